"""The files of a sweep: resumed, damaged, or blocked by another file."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from cli_runner import ask, refusal
from click.testing import Result

from mosaic_ray.cli.request import parse_config
from mosaic_ray.config.resolve import flatten
from mosaic_ray.execution import devices
from mosaic_ray.storage.store import Store
from mosaic_ray.sweeps import runner as sweep_runner
from mosaic_ray.sweeps.results import read_results
from mosaic_ray.sweeps.runner import SweepRequest, prepare
from mosaic_ray.sweeps.space import load_space

pytestmark = pytest.mark.usefixtures("two_cpus")

SMOKE = ["--space", "smoke", "--name", "n"]


def sweep(*words: str) -> Result:
    return ask("sweep", *words)


def files(folder: Path = Path()) -> dict[str, bytes]:
    """Return all files below the working directory."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


NAMES = [f"p00{point}s0" for point in range(6)]
PLACE = Path("mosaic_runs/sweeps/n")


def test_a_sweep_ends_with_its_results_and_is_found_again(trials):
    result = sweep(*SMOKE)
    assert result.exit_code == 0, result.stderr
    assert trials == NAMES
    assert "configurations 6, trials 6: 6 done" in result.stdout
    assert str(PLACE) in result.stdout
    assert read_results(PLACE / "results.parquet").column("trial").to_pylist() == NAMES
    before = files()
    again = sweep(*SMOKE)
    assert (again.exit_code, again.stdout) == (0, result.stdout)
    assert trials == NAMES
    assert {name: data for name, data in files().items() if "results" not in name} == {
        name: data for name, data in before.items() if "results" not in name
    }
    assert read_results(PLACE / "results.parquet").column("trial").to_pylist() == NAMES


def test_json_alone_on_standard_output(trials):
    facts = json.loads(sweep(*SMOKE, "--json").stdout)
    assert (facts["status"], facts["name"]) == ("done", "n")
    assert Path(facts["paths"]["sweep"]) == PLACE.absolute()
    assert [trial["trial"] for trial in facts["trials"]] == NAMES
    assert facts["trials"][0]["knobs"] == {"partition.omega": 0.1, "generator.lambda_d": 2.0}


def test_a_dry_run_prints_the_name_of_the_sweep(trials):
    name = re.match(r"sweep (\S+): ", sweep("--space", "smoke", "--dry-run").stdout)[1]
    assert sweep("--space", "smoke").exit_code == 0
    assert [path.name for path in Path("mosaic_runs/sweeps").iterdir()] == [name]


def test_failed_trials_are_listed_and_tried_again(trials):
    trials.failing = ("p001s0", "p004s0")
    result = sweep(*SMOKE)
    assert result.exit_code == 1
    last = result.stderr.splitlines()[-1]
    assert last.startswith("mosaic: error: 2 of 6 trials failed: p001s0 (loss is nan); p004s0 (loss is nan)")
    assert "trials 6: 4 done, 2 failed" in result.stdout
    rows = read_results(PLACE / "results.parquet").to_pylist()
    assert [row["status"] for row in rows] == ["done", "failed", "done", "done", "failed", "done"]
    assert (rows[1]["error_stage"], rows[1]["error_round"], rows[1]["error_client"]) == ("warmup", 3, 1)
    trials.failing = ()
    trials.clear()
    assert sweep(*SMOKE).exit_code == 0
    assert trials == ["p001s0", "p004s0"]
    assert {row["status"] for row in read_results(PLACE / "results.parquet").to_pylist()} == {"done"}


def test_ctrl_c_names_the_command_that_resumes_the_same_session(trials, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/mosaic"])
    trials.interrupts = ("p002s0",)
    result = sweep("--fresh", *SMOKE, "--set", "data.root=it's")
    assert (result.exit_code, result.stdout) == (130, "")
    command = result.stderr.splitlines()[-1].removeprefix("mosaic: interrupted; to resume: ")
    assert shlex.split(command) == ["/somewhere/bin/mosaic", "sweep", *SMOKE, "--set", "data.root=it's"]
    trials.interrupts = ()
    trials.clear()
    assert ask(*shlex.split(command)[1:]).exit_code == 0
    assert trials == NAMES[2:]
    summaries = [json.loads(path.read_bytes()) for path in PLACE.glob("trials/*/summary.json")]
    assert len({summary["session"] for summary in summaries}) == 1
    assert summaries[0]["session"] is not None


def test_a_fresh_sweep_runs_everything_and_keeps_the_old_one(trials):
    sweep(*SMOKE)
    before = {name.replace("sweeps/n/", "sweeps/n.1/"): data for name, data in files().items() if "sweeps/n/" in name}
    assert sweep(*SMOKE, "--fresh").exit_code == 0
    assert trials == NAMES * 2
    assert before.items() <= files().items()


@pytest.mark.parametrize(
    "words, part",
    [
        (["--set", "warmup.lr=0.5"], "(warmup.lr 0.05 there, 0.5 here)"),
        (["--seeds", "0,1"], "(seeds [0] there, [0, 1] here)"),
        (["--scheduler", "asha"], "(scheduler fifo there, asha here)"),
        (["--space", "lambdas_grid"], "(space smoke there, lambdas_grid here; "),
        (["--search", "random", "--samples", "6"], "(search grid there, random here; samples none there, 6 here; "),
    ],
)
def test_another_plan_under_the_same_name_is_refused(trials, words, part):
    sweep(*SMOKE)
    before = files()
    line = refusal(sweep(*SMOKE, *words))
    assert line.startswith("mosaic: error: --name n: that sweep has another plan (") and part in line
    assert "another --name" in line and "--fresh" in line
    assert files() == before
    assert len(trials) == 6


def test_a_resumed_sweep_keeps_its_precision(trials, monkeypatch):
    monkeypatch.setattr(devices, "has_native_bf16", lambda cuda: True)
    trials.interrupts = ("p003s0",)
    sweep(*SMOKE)
    monkeypatch.setattr(devices, "has_native_bf16", lambda cuda: False)
    trials.interrupts = ()
    assert sweep(*SMOKE).exit_code == 0
    assert trials == NAMES
    table = read_results(PLACE / "results.parquet")
    assert table.column("runtime.precision").to_pylist() == ["bf16"] * 6
    assert json.loads((PLACE / "plan.json").read_bytes())["base"]["runtime"]["precision"] == "auto"


def test_max_concurrent_is_not_part_of_the_plan(trials):
    sweep(*SMOKE)
    assert sweep(*SMOKE, "--max-concurrent", "1").exit_code == 0
    assert len(trials) == 6


@pytest.mark.parametrize(
    "name, way",
    [
        ("plan.json", "half"),
        ("plan.json", "other"),
        ("results.parquet", "half"),
        ("results.parquet", "empty"),
        ("trials/p005s0/summary.json", "half"),
        ("trials/p005s0/summary.json", "empty"),
    ],
)
def test_a_damaged_file_is_refused_and_can_be_removed(trials, name, way):
    trials.interrupts = ("p003s0",)  # so that a damaged trial lies behind one that is still to run
    sweep(*SMOKE)
    (PLACE / "trials/p005s0").mkdir()
    (PLACE / "trials/p005s0/summary.json").write_bytes((PLACE / "trials/p002s0/summary.json").read_bytes())
    trials.interrupts = ()
    trials.clear()
    path = PLACE / name
    whole = path.read_bytes()
    path.write_bytes({"half": whole[: len(whole) // 2], "empty": b"", "other": b"[1, 2]"}[way])
    before = files()
    line = refusal(sweep(*SMOKE))
    assert str(path) in line and "remove" in line and "--fresh" in line
    assert files() == before
    assert trials == []
    path.unlink()
    assert sweep(*SMOKE).exit_code == 0
    assert trials == NAMES[3:]


@pytest.mark.parametrize("name", ["plan.json", "results.parquet", "trials/p005s0/summary.json", "trials"])
@pytest.mark.parametrize("kind", ["a pipe", "a device", "a folder", "deep", "a huge number"])
def test_what_no_sweep_writes_is_refused_at_once(trials, name, kind):
    sweep(*SMOKE)
    trials.clear()
    path = PLACE / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    if kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a device":
        path.symlink_to("/dev/zero")
    elif kind == "a folder":
        path.mkdir()
    else:
        path.write_text("[" * 5000 if kind == "deep" else '{"status": ' + "1" * 4001 + "}")
    if (name, kind) != ("trials", "a folder"):  # as after all trials were deleted
        assert name in refusal(sweep(*SMOKE))
        assert trials == []
    if name == "results.parquet":
        assert name in refusal(ask("report", str(PLACE)))


@pytest.mark.parametrize("name", ["plan.json", "results.parquet", "trials/p005s0/summary.json"])
def test_fresh_replaces_damaged_files(trials, name):
    sweep(*SMOKE)
    (PLACE / name).write_bytes(b"{")
    assert sweep(*SMOKE, "--fresh").exit_code == 0
    assert trials == NAMES * 2
    assert (PLACE.with_name("n.1") / name).read_bytes() == b"{"


@pytest.mark.parametrize("way", ["s", "s/below", "s/objects", "s/sweeps", "s/sweeps/n", "s/sweeps/n/trials"])
@pytest.mark.parametrize("fresh", [False, True])
def test_a_file_in_the_way_of_the_storage_is_named_and_kept(trials, way, fresh):
    at = Path(way.removesuffix("/below"))
    at.parent.mkdir(parents=True, exist_ok=True)
    at.write_text("mine")
    storage = way if way.endswith("below") else "s"
    words = [*SMOKE, "--storage", storage, *["--fresh"] * fresh]
    if fresh and way == "s/sweeps/n/trials":  # moved aside
        assert sweep(*words).exit_code == 0
        assert Path("s/sweeps/n.1/trials").read_text() == "mine"
        return
    line = refusal(sweep(*words))
    assert "s/sweeps/n" in line if fresh and way.startswith("s/sweeps/") else f"--storage {storage}: " in line
    assert at.read_text() == "mine"
    assert trials == []


@pytest.mark.parametrize("storage", ["/proc/nowhere", "nosuch://bucket/x"])
def test_an_impossible_storage_is_refused(trials, storage):
    assert f"--storage {storage}: " in refusal(sweep(*SMOKE, "--storage", storage))
    assert trials == []
    assert not files()


def test_missing_data_are_refused_before_any_trial(trials):
    line = refusal(sweep(*SMOKE, "--dataset", "cifar100", "--set", "data.root=empty"))
    assert "empty" in line and "download" in line
    assert trials == []
    assert not PLACE.exists()


def test_a_running_sweep_cannot_start_twice(trials):
    with Store("mosaic_runs").try_lease("sweep-n"):
        assert "running already" in refusal(sweep(*SMOKE))
    assert trials == []
    assert sweep(*SMOKE).exit_code == 0


def test_an_optuna_sweep_resumes(trials):
    words = ["--space", "lambdas_omega", "--search", "optuna", "--samples", "8", "--name", "n"]
    trials.interrupts = ("p005s0",)
    assert sweep(*words).exit_code == 130
    trials.interrupts = ()
    assert sweep(*words).exit_code == 0
    assert trials == [f"p00{point}s0" for point in range(8)]
    rows = read_results(PLACE / "results.parquet").to_pylist()
    assert [row["partition.omega"] for row in rows] == [0.01, 0.1, 1.0, 0.01, 0.1, 1.0, 0.01, 0.1]
    plan = load_space("lambdas_omega")[1]
    base = parse_config(base=sweep_runner.SWEEP_BASE | dict(plan.base))
    straight = prepare(SweepRequest(base, "x", plan, search="optuna", samples=8))
    for row in rows:
        trial = straight.search.next()
        assert {name: row[name] for name in trial.knobs} == trial.knobs
        assert flatten(trial.config)["generator.lambda_e"] == row["generator.lambda_e"]
        straight.search.finished(trial, 0.5)
