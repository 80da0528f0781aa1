"""`mosaic runs` and `mosaic diff`: what they list and compare, the index, refusals, and files that others wrote."""

from __future__ import annotations

import csv
import io
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
from cli_runner import ask, refusal
from helpers import TINY, interrupted, stripes_dataset
from hostile import CHANGES
from storing import held

from mosaic_ray.config.registry import STATUSES
from mosaic_ray.config.resolve import as_dict, override, to_toml
from mosaic_ray.config.schema import ExperimentConfig
from mosaic_ray.runs import listing, runner
from mosaic_ray.runs.listing import INDEX, lease_of, list_runs
from mosaic_ray.storage.store import Store

ACCURACY = {"initial": 0.5, "final": 0.8125, "control": 0.5625, "ceiling": None}


def make(
    root: Path, place: str, knobs: dict[str, Any] | None = None, when: float = 1e9, write: bool = True, **facts: Any
) -> Path:
    """Write the folder of a run that ended at ``when``; without ``write`` one that did not end."""
    folder = root / place
    folder.mkdir(parents=True)
    config = override(ExperimentConfig(), knobs or {})
    stages = {
        "partition": {"seconds": 0.0, "computed_seconds": 900.0, "cached": True, "key": "partition-0"},
        "warmup": {"seconds": 900.0, "cached": False, "key": "warmup-0"},
    }
    summary = {"status": "done", "accuracy": ACCURACY, "stages": stages, "config": as_dict(config)} | facts
    (folder / "config.toml").write_text(to_toml(config))
    if write:
        (folder / "summary.json").write_text(json.dumps({k: v for k, v in summary.items() if v is not None}))
    for path in folder.iterdir():
        os.utime(path, (when, when))
    return folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A storage with runs of every status but running, and two sweeps."""
    make(tmp_path, "runs/old", {"seed": 3, "data.name": "mnist"}, 1e9)
    rolex = {"method": "fedavg", "federation.strategy": "fedrolex", "federation.widths": [1.0, 0.5]}
    make(tmp_path, "runs/new", rolex, 3e9)
    make(tmp_path, "runs/bad", {"data.name": "imported:mine"}, 2e9, status="failed", accuracy=None, error="x")
    make(tmp_path, "runs/cut", {"federation.strategy": "fedprox"}, 4e9, write=False)
    (make(tmp_path, "runs/torn", when=5e8) / "summary.json").write_text("{")
    os.utime(tmp_path / "runs/torn/summary.json", (5e8, 5e8))
    (tmp_path / "runs/empty").mkdir()
    (tmp_path / "runs/note.txt").write_text("mine")
    for sweep in ("a", "b"):
        make(tmp_path, f"sweeps/{sweep}/trials/p000s0", when=1e9)
    make(tmp_path, "sweeps/b/trials/p001s0", {"seed": 1}, 2e9, status="stopped")
    return tmp_path


def listed(root: Path, *words: str) -> dict[str, dict[str, Any]]:
    """The runs of ``--json`` by name, in order."""
    result = ask("runs", "--storage", str(root), "--json", *words)
    assert result.exit_code == 0, (result.stderr, result.exception)
    return {row["name"]: row for row in json.loads(result.stdout)["runs"]}


# --- what is listed --------------------------------------------------------------------------------------------------


def test_runs_are_listed_newest_first_with_what_their_files_say(root):
    rows = listed(root)
    assert {name: row["status"] for name, row in rows.items()} == {
        "cut": "interrupted", "new": "done", "bad": "failed", "old": "done", "torn": "damaged"
    }  # fmt: skip
    assert list(rows) == ["cut", "new", "bad", "old", "torn"]
    old = rows["old"]
    assert (old["data"], old["method"], old["seed"], old["clients"], old["omega"]) == ("mnist", "mosaic", 3, 10, 0.1)
    assert old["hours"] == 0.5, "what its stages took, also where an earlier run computed them"
    assert old["accuracy"] == {role: value for role, value in ACCURACY.items() if value is not None}
    assert rows["new"]["strategy"] == "fedrolex" and rows["cut"]["strategy"] == "fedprox"
    assert rows["cut"]["hours"] is None and rows["cut"]["accuracy"] == {}


def test_filters_and_limits(root):
    assert list(listed(root, "--status", "done")) == ["new", "old"]
    assert list(listed(root, "--status", "failed", "--status", "damaged")) == ["bad", "torn"]
    assert list(listed(root, "--dataset", "mine")) == ["bad"]
    assert list(listed(root, "--method", "fedrolex")) == ["new"] == list(listed(root, "--method", "fedavg"))
    assert list(listed(root, "--method", "mosaic+fedprox")) == ["cut"]
    assert list(listed(root, "--limit", "2")) == ["cut", "new"]
    assert list(listed(root, "--sweep", "b")) == ["p001s0", "p000s0"]
    assert listed(root, "--sweep", "b", "--status", "stopped")["p001s0"]["seed"] == 1


def test_the_table_breaks_no_name_and_counts_what_it_leaves_out(root, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    name = "digits-prototype_head-distilled-s0-0123abcd"
    make(root, f"runs/{name}", {"method": "prototype_head"}, 5e9)
    lines = ask("runs", "--storage", str(root)).stdout.splitlines()
    [row] = [line for line in lines if name in line]
    assert row.split()[:4] == [name, "done", "digits", "prototype_head"] and "81.2 %" in row and "56.2 %" in row
    assert "6 runs" in lines and lines[-1].startswith("2 sweeps beside them: a, b; --sweep NAME")
    less = ask("runs", "--storage", str(root), "--limit", "1").stdout
    assert "6 runs; the first 1 are shown" in less and "old" not in less


def test_csv_has_every_role(root):
    name = "=1+1"
    make(root, f"runs/{name}")
    rows = list(csv.DictReader(io.StringIO(ask("runs", "--storage", str(root), "--csv").stdout)))
    assert [row["name"] for row in rows] == ["cut", "new", "bad", f"'{name}", "old", "torn"]
    assert rows[1]["accuracy_final"] == "0.8125" and rows[1]["accuracy_teacher"] == ""


def test_a_run_at_work_shows_as_running(root, monkeypatch):
    monkeypatch.setattr("mosaic_ray.data.load.load_dataset", lambda config: stripes_dataset())
    seen: list[str] = []
    settle = runner.execute

    def execute(*args, **options):
        seen.append(listed(root)["mine"]["status"])
        return settle(*args, **options)

    with interrupted(1):
        runner.run(TINY, storage=str(root), name="mine", progress=False)
    assert listed(root)["mine"]["status"] == "interrupted"
    monkeypatch.setattr(runner, "execute", execute)
    runner.run(TINY, storage=str(root), name="mine", progress=False)
    assert seen == ["running"] and listed(root)["mine"]["status"] == "done"
    assert not list((root / "leases").iterdir())


def test_trials_of_a_sweep_at_work(root):
    make(root, "sweeps/b/trials/p002s0", when=3e9, write=False)
    assert listed(root, "--sweep", "b")["p002s0"]["status"] == "interrupted"
    with held(Store(root).try_lease(lease_of("sweeps/b"))):
        rows = listed(root, "--sweep", "b")
    assert {name: row["status"] for name, row in rows.items()} == {
        "p002s0": "running", "p001s0": "stopped", "p000s0": "done"
    }  # fmt: skip


def test_names_cannot_act_on_the_terminal(root):
    make(root, "runs/red\x1b[31m", {"data.name": "folder:/x\x1b[2J"})
    text = ask("runs", "--storage", str(root)).stdout
    assert "\x1b" not in text and "red\\x1b[31m" in text


def test_a_bucket_is_listed_too(storage):
    root = storage if storage.name == "local" else storage / "prefix"
    make(root, "runs/one", when=2e9)
    make(root, "runs/two", {"seed": 1}, 1e9)
    make(root, "sweeps/s/trials/p000s0")
    for _ in range(2):
        assert {n: row["status"] for n, row in listed(storage).items()} == {"one": "done", "two": "done"}
        assert (root / INDEX).exists()
    assert list(listed(storage)) == ["one", "two"] and list(listed(storage, "--sweep", "s")) == ["p000s0"]
    assert compared(storage, "one", "two")["knobs"] == {"seed": [0, 1]}


@pytest.mark.parametrize(
    "words, says",
    [
        ("--status finished", "--status finished: it takes running, done, failed"),
        ("--limit 0", "--limit 0: it takes a whole number"),
        ("--sweep c", '--sweep c: no such sweep in'),
        ("--sweep ../sweeps/b", "--sweep ../sweeps/b: no such sweep"),
        ("--csv --json", "--csv: --json is given as well"),
        ("--storage no/such", "--storage no/such: nothing is stored there"),
    ],
)  # fmt: skip
def test_refusals(root, words, says):
    assert says in refusal(ask("runs", "--storage", str(root), *words.split()))


def test_a_storage_without_runs(tmp_path):
    assert ask("runs", "--storage", str(tmp_path)).stdout == "no runs\n"


# --- the index -------------------------------------------------------------------------------------------------------


@pytest.fixture
def opened(monkeypatch) -> list[str]:
    """The names of runs whose files are opened."""
    names: list[str] = []
    read = listing._read

    def noted(store, below, name, modified):
        names.append(name)
        return read(store, below, name, modified)

    monkeypatch.setattr(listing, "_read", noted)
    return names


def test_a_thousand_runs_are_opened_once_and_then_only_the_changed_ones(tmp_path, opened):
    for number in range(1000):
        folder = tmp_path / "runs" / f"run-{number:04}"
        folder.mkdir(parents=True)
        (folder / "summary.json").write_text('{"status": "done"}')
        os.utime(folder / "summary.json", (1e9 + number,) * 2)
    rows = list_runs(Store(tmp_path))
    assert len(opened) == 1000 and [row.name for row in rows][:2] == ["run-0999", "run-0998"]
    opened.clear()
    assert list_runs(Store(tmp_path)) == rows and opened == []
    (tmp_path / "runs/run-0500/summary.json").write_text('{"status": "failed"}')
    (tmp_path / "runs/run-0700/summary.json").unlink()
    make(tmp_path, "runs/another")
    again = {row.name: row.status for row in list_runs(Store(tmp_path))}
    assert sorted(opened) == ["another", "run-0500"] and len(again) == 1000
    assert again["run-0500"] == "failed" and "run-0700" not in again


@pytest.mark.parametrize("change", [name for name in CHANGES if name not in ("flipped", "swapped")])
def test_an_index_that_anybody_changed_is_made_again(root, change):
    rows = listed(root)
    whole = (root / INDEX).read_bytes()
    (root / "outside").mkdir()
    (root / "outside" / "mine.txt").write_text("mine")
    CHANGES[change](root / INDEX, random.Random(0))
    assert listed(root) == rows
    assert (root / INDEX).read_bytes() == whole
    assert (root / "outside" / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize(
    "changes",
    [
        {"status": "well"}, {"accuracy": {"final": 7.0}}, {"accuracy": [1]}, {"modified": 1e300}, {"modified": "x"},
        {"name": "new"}, {"name": "../../x"}, {"stamp": [0, 0]}, {"stamp": None}, {"hours": -1}, {"seed": "\x1b"},
    ],
)  # fmt: skip
def test_rows_of_the_index_that_do_not_fit_are_read_again(root, changes):
    rows = listed(root)
    index = json.loads((root / INDEX).read_text())
    index["runs"]["old"] |= changes
    index["runs"]["../../etc"] = index["runs"]["new"]
    (root / INDEX).write_text(json.dumps(index))
    assert listed(root) == rows
    assert set(json.loads((root / INDEX).read_text())["runs"]) == {"cut", "new", "bad", "old"}


def test_a_storage_that_cannot_be_written_is_listed_all_the_same(root, monkeypatch):
    def full(*_: Any) -> None:
        raise OSError(28, "no space")

    monkeypatch.setattr("mosaic_ray.storage.filesystem.Files.put", full)
    assert len(listed(root)) == 5 and not (root / INDEX).exists()


@pytest.mark.parametrize("text", ["[]", '{"status": 3}', '{"status": "good"}', '{"config": []}', "[" * 9999, ""])
def test_a_summary_that_is_not_a_runs_shows_as_damaged(root, text):
    (root / "runs/new/summary.json").write_text(text)
    rows = listed(root)
    assert rows["new"]["status"] == "damaged" and len(rows) == 5


def test_every_status_is_listed_somewhere(root):
    assert {row["status"] for row in listed(root).values()} | {"running", "stopped"} == set(STATUSES)


# --- diff ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    """Real runs: one; others that differ in a knob, in the seed, in the method, in a knob without effect."""
    root = tmp_path_factory.mktemp("pairs")
    changes = {
        "one": {}, "steps": {"generator.steps": 8, "distill.lr": 0.002}, "lambda": {"generator.lambda_i": 3.0},
        "seed": {"seed": 1}, "fedavg": {"method": "fedavg"}, "hosts": {"runtime.max_hosts": 2},
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mosaic_ray.data.load.load_dataset", lambda config: stripes_dataset())
        for name, knobs in changes.items():
            runner.run(override(TINY, knobs), storage=str(root), name=name, progress=False)
    return root


def compared(root: Path, a: str, b: str) -> dict[str, Any]:
    """What `mosaic diff --json` prints."""
    result = ask("diff", a, b, "--storage", str(root), "--json")
    assert result.exit_code == 0, (result.stderr, result.exception)
    return json.loads(result.stdout)


def test_the_first_stage_with_another_result_and_the_knobs_behind_it(pairs):
    found = compared(pairs, "one", "steps")
    assert found["knobs"] == {"generator.steps": [6, 8], "distill.lr": [0.001, 0.002]}
    assert (found["shared_stages"], found["stage"]) == (["partition", "warmup"], "generators")
    assert found["because"] == {"generator.steps": [6, 8]}
    summaries = [json.loads((pairs / "runs" / name / "summary.json").read_text()) for name in ("one", "steps")]
    for role, pair in found["accuracy"].items():
        a, b = (summary["accuracy"][role] for summary in summaries)
        assert pair == {"a": a, "b": b, "difference": b - a}
    assert {"initial", "final", "control"} <= found["accuracy"].keys()
    text = ask("diff", "one", "steps", "--storage", str(pairs)).stdout
    assert "first stage with another result: generators (shared before it: partition, warmup)" in text
    assert "because of generator.steps (6 and 8)\n" in text and "B − A" in text


@pytest.mark.parametrize(
    "other, stage, because",
    [
        ("lambda", "generators", {"generator.lambda_i": [10.0, 3.0]}),
        ("seed", "partition", {"seed": [0, 1]}),
        ("hosts", None, {}),
    ],
)
def test_reasons(pairs, other, stage, because):
    found = compared(pairs, "one", other)
    assert (found["stage"], found["because"]) == (stage, because)


def test_knobs_without_effect_are_said_to_have_none(pairs):
    found = compared(pairs, "one", "hosts")
    assert found["knobs"] == {"runtime.max_hosts": [0, 2]} and "change none" in found["why"]


def test_a_stage_that_one_run_lacks(pairs):
    found = compared(pairs, "fedavg", "one")
    assert found["stage"] == "generators" and found["why"] == "only B has it"
    assert found["accuracy"]["teacher"] == {"a": None, "b": found["accuracy"]["teacher"]["b"], "difference": None}


def test_other_images_are_named_where_no_knob_differs(pairs, tmp_path):
    for name in ("one", "two"):
        make(tmp_path, f"runs/{name}")
    summary = json.loads((tmp_path / "runs/two/summary.json").read_text())
    summary["stages"]["partition"]["key"] = "partition-1"
    (tmp_path / "runs/two/summary.json").write_text(json.dumps(summary))
    found = compared(tmp_path, "one", "two")
    assert (found["knobs"], found["stage"]) == ({}, "partition") and "the images are others" in found["why"]


def test_user_code_that_a_run_names_is_not_loaded(tmp_path):
    (tmp_path / "evil.py").write_text("raise SystemExit('loaded')")
    for name in ("one", "two"):
        folder = make(tmp_path, f"runs/{name}")
        summary = json.loads((folder / "summary.json").read_text())
        summary["config"]["method"] = f"{tmp_path}/evil.py:METHOD"
        summary["stages"]["warmup"]["key"] = f"warmup-{name}"
        (folder / "summary.json").write_text(json.dumps(summary))
    found = compared(tmp_path, "one", "two")
    assert found["stage"] == "warmup" and "user code, which is not loaded" in found["why"]


def test_unfinished_runs(root):
    found = compared(root, "cut", "new")
    assert found["a"]["status"] == "unfinished" and found["knobs"]["method"] == ["mosaic", "fedavg"]
    assert found["stage"] == "partition" and found["why"] == "only B has it; the other did not get so far"


def test_paths_and_trials(root, monkeypatch):
    monkeypatch.chdir(root)
    for a, b in (("b/p000s0", "p001s0"), ("sweeps/b/trials/p000s0", f"{root}/sweeps/b/trials/p001s0")):
        found = compared(root, a, b)
        assert found["knobs"] == {"seed": [0, 1]} and found["b"]["place"].endswith("/sweeps/b/trials/p001s0")


@pytest.mark.parametrize(
    "a, b, says",
    [
        ("p000s0", "new", "p000s0: 2 runs have this name; give the path of one: "),
        ("new", "runs/new", "diff new runs/new: both are "),
        ("nwe", "old", 'nwe: there is no such run in'),
        ("../x", "old", "../x: there is no such run"),
        ("torn", "old", "torn: its files are not what a run writes"),
        ("s3://b/x", "old", "s3://b/x: it takes a run's name"),
        ("empty", "old", "empty: there is no such run"),
    ],
)
def test_diffs_refusals(root, a, b, says):
    assert says in refusal(ask("diff", a, b, "--storage", str(root)))


def test_a_folder_here_and_a_run_of_the_same_name_are_two(root, tmp_path_factory, monkeypatch):
    here = tmp_path_factory.mktemp("here")
    make(here, "new", {"seed": 9})
    monkeypatch.chdir(here)
    assert f"new: 2 runs have this name; give the path of one: {here}/new, {root}/runs/new" in refusal(
        ask("diff", "new", "old", "--storage", str(root))
    )
    assert compared(root, "./new", "old")["knobs"]["seed"] == [9, 3]


def test_a_sweep_is_no_run(root, monkeypatch):
    (root / "sweeps/b/plan.json").write_text("{}")
    assert "that is a sweep; name one of its trials" in refusal(
        ask("diff", f"{root}/sweeps/b", "old", "--storage", str(root))
    )
