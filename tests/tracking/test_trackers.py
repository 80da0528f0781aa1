"""Trackers: what one in memory holds after a run, a resumed run and a study, runs whose tracker fails, and requests."""

from __future__ import annotations

import json
import math
import sys
import time
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import pytest
from cli_runner import ask, refusal, refused_by
from helpers import TINY, interrupted, stripes_dataset
from tracked import QUICK, go, logged

import mosaic_ray as mr
from mosaic_ray.config.registry import TRACKERS
from mosaic_ray.config.resolve import flatten, override
from mosaic_ray.storage.store import Store
from mosaic_ray.studies.harness import run_study
from mosaic_ray.tracking import backends, reports
from mosaic_ray.tracking.backends import Point, RunInfo, check_trackers
from mosaic_ray.tracking.reports import Tracking

pytestmark = pytest.mark.filterwarnings("ignore")  # those of the trackers


@pytest.fixture(autouse=True)
def stripes_as_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mosaic_ray.data.load.load_dataset", lambda config: stripes_dataset())
    monkeypatch.setattr(reports, "INTERRUPTED_SECONDS", 120.0)
    monkeypatch.setattr(reports, "CLOSE_SECONDS", 120.0)


# --- a tracker in memory ---------------------------------------------------------------------------------------------


class Memory:
    """Keeps what it gets, by run. The method that ``fails`` raises; ``slow``: seconds that ``write`` takes."""

    runs: ClassVar[dict[str, dict[str, Any]]] = {}
    fails: str = ""
    slow: float = 0.0
    place = "memory"

    def __init__(self) -> None:
        self._check("init")

    def _check(self, method: str) -> None:
        if method == self.fails:
            raise RuntimeError(f"{method}\nfails \x1b[31m")

    def environment(self) -> dict[str, str]:
        self._check("environment")
        return {"MEMORY": "1"}

    def open(self, info: RunInfo, known: str) -> str:
        self._check("open")
        self._of = known or f"run{len(self.runs)}"
        new = {"info": info, "points": [], "tables": {}, "ends": [], "opened": 0}
        self._run = self.runs.setdefault(self._of, new)
        self._run["opened"] += 1
        return self._of

    def configure(self, config: Any) -> None:
        self._check("configure")
        self._run["config"] = dict(config)

    def write(self, points: Any) -> None:
        time.sleep(self.slow)
        self._check("write")
        self._run["points"] += points

    def table(self, name: str, columns: Any, rows: Any, number: int) -> None:
        self._check("table")
        self._run["tables"][name] = [columns, rows, number]

    def close(self, status: str) -> None:
        self._check("close")
        self._run["ends"].append(status)


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> type[Memory]:
    monkeypatch.setattr(Memory, "runs", {})
    monkeypatch.setitem(backends.BACKENDS, "memory", Memory)
    monkeypatch.setitem(sys.modules, "memory", ModuleType("memory"))
    return Memory


def numbers(points: list[Point]) -> Counter[tuple[str, int, float]]:
    return Counter((p.tag, p.step, None if math.isnan(p.value) else p.value) for p in points if type(p.value) is float)


def test_a_tracker_gets_what_metrics_jsonl_has_and_a_repeated_run_sends_nothing(memory, tmp_path):
    summary = go(tmp_path, "memory")
    [run] = memory.runs.values()
    assert numbers(run["points"]) == logged(summary)
    assert [point.number for point in run["points"]] == list(range(len(run["points"])))
    assert {p.tag for p in run["points"] if type(p.value) is not float} >= {"partition/label_counts"}
    chosen = {name: value for name, value in flatten(QUICK).items() if value != "auto"}
    assert run["config"].keys() == flatten(QUICK).keys() and run["config"].items() >= chosen.items()
    columns, rows, _ = run["tables"]["final"]
    assert [row[:2] for row in rows] == [[n, v] for n, v in summary["accuracy"].items() if v is not None]
    assert columns[:2] == ["model", "accuracy"] and run["ends"] == ["done"]
    assert (run["info"].kind, run["info"].name) == ("run", Path(summary["paths"]["run"]).name)

    again = go(tmp_path, "memory")
    assert all(stage["cached"] for stage in again["stages"].values())
    assert memory.runs == {"run0": run} and run["opened"] == 1


def test_tracking_changes_no_number_no_key_and_no_name(memory, tmp_path):
    tracked, plain = go(tmp_path / "a", "memory"), go(tmp_path / "b")
    assert Path(tracked["paths"]["run"]).name == Path(plain["paths"]["run"]).name
    for found in (tracked, plain):
        found["stages"] = {name: stage["key"] for name, stage in found["stages"].items()}
        del found["paths"], found["communication"]
    assert tracked == plain


def test_a_run_that_failed_is_open_again_when_it_goes_on_and_ends_as_done_without_a_new_point(memory, tmp_path):
    def reported() -> Any:
        return Tracking(("memory",)).open(Store(str(tmp_path)).files, "x/", "n", "run", {}, print)

    with pytest.raises(RuntimeError, match="stopped"), reported() as to:
        to.scalar("a", 1, 2.0)
        raise RuntimeError("stopped")
    [run] = memory.runs.values()
    for opened in (2, 2):  # a run that is done is left alone
        with reported() as to:
            to.scalar("a", 1, 2.0)
        assert (run["ends"], run["opened"], len(run["points"])) == (["failed", "done"], opened, 1)


def test_an_interrupted_run_goes_on_in_the_same_run_and_a_fresh_one_does_not(memory, tmp_path):
    with interrupted(in_round=2):
        go(tmp_path, "memory")
    [run] = memory.runs.values()
    assert run["ends"] == ["killed"] and run["points"] and not run["tables"]
    summary = go(tmp_path, "memory")
    assert numbers(run["points"]) == logged(summary)
    assert memory.runs == {"run0": run} and run["ends"] == ["killed", "done"] and run["tables"]
    go(tmp_path, "memory", fresh=True)
    assert list(memory.runs) == ["run0", "run1"] and numbers(memory.runs["run1"]["points"]) == logged(summary)


def test_a_failed_run_is_one_in_the_tracker(memory, tmp_path):
    with pytest.raises(mr.RunError, match="diverged"):
        go(tmp_path, "memory", config=override(QUICK, {"warmup.lr": 1e9, "warmup.weight_decay": 1e9}))
    assert memory.runs["run0"]["ends"] == ["failed"]


@pytest.mark.parametrize("method", ["init", "open", "configure", "write", "table", "close"])
def test_a_tracker_that_fails_anywhere_is_warned_of_once_and_the_run_goes_on(
    memory, method, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(memory, "fails", method)
    monkeypatch.setattr(reports, "GATHER_SECONDS", 0.0)
    summary = go(tmp_path, "memory")
    assert summary["status"] == "done"
    lines = [line for line in capsys.readouterr().err.splitlines() if "tracker" in line]
    assert lines == [
        rf"warning: tracker memory: RuntimeError: {method} fails \x1b[31m; the run goes on without it"
    ]


def test_a_tracker_that_does_not_answer_is_left_behind(memory, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(memory, "slow", 30.0)
    monkeypatch.setattr(reports, "CLOSE_SECONDS", 0.2)
    assert go(tmp_path, "memory")["status"] == "done"
    assert "tracker memory: it did not take everything in time; the run goes on" in capsys.readouterr().err


@pytest.mark.parametrize(
    "damage", [b"", b"\x00", b"[]", b'{"request": 1}', b'{"run": "../x"}', b'{"number": -1}', b'{"sending": [1]}', None]
)
def test_a_record_that_anybody_wrote_begins_a_new_run(memory, damage, tmp_path):
    summary = go(tmp_path, "memory")
    path = Path(summary["paths"]["run"]) / "memory.json"
    good = json.loads(path.read_text())
    path.write_bytes(json.dumps(good | json.loads(damage)).encode() if damage and damage[:1] == b"{" else damage or b"")
    if damage is None:
        path.unlink()
        path.symlink_to(tmp_path / "elsewhere")
        (tmp_path / "elsewhere").write_text(json.dumps(good))
    again = go(tmp_path, "memory")
    assert list(memory.runs) == ["run0", "run1"]
    assert numbers(memory.runs["run1"]["points"]) == logged(again)
    if damage is None:
        assert json.loads((tmp_path / "elsewhere").read_text()) == good


def test_what_a_kill_left_unknown_is_sent_again_as_the_same_points(memory, tmp_path):
    files = Store(str(tmp_path)).files

    def log(again: bool) -> None:
        with Tracking(("memory",)).open(files, "x/", "x", "run", {"seed": 0}, print) as to:
            to.scalar("a/b", 1, 0.5)
            if again:
                to.scalar("a/b", 2, math.inf)

    log(again=False)
    [first] = memory.runs["run0"]["points"]
    place = tmp_path / "x" / "memory.json"
    kept = json.loads(place.read_text())
    killed = kept | {"steps": {}, "number": 0, "sending": [["a/b", 1, 0.5, first.time]]}
    place.write_text(json.dumps(killed))
    log(again=True)
    points = memory.runs["run0"]["points"]
    assert points[:2] == [first, first] and math.isnan(points[2].value) and points[2].number == 1
    assert len(points) == 3 and memory.runs["run0"]["opened"] == 2


def test_names_and_tags_of_users_are_escaped(memory, tmp_path):
    with Tracking(("memory",), group="g\x1b").open(
        Store(str(tmp_path)).files, "x/", "n\n\u202e", "run", {"k\x07": "v\x9b"}, print
    ) as to:
        to.scalar("t\x1b", 0, 1)
        to.image("i\u2028", 0, np.zeros((1, 2, 3), np.uint8))
        to.table("final", ["c\r"], [["x\x00", 1.0]])
    [run] = memory.runs.values()
    assert (run["info"].name, run["info"].group, run["config"]) == ("n\\n\\u202e", "g\\x1b", {"k\\x07": "v\\x9b"})
    assert [p.tag for p in run["points"]] == ["t\\x1b", "i\\u2028"] and run["points"][1].value.shape == (2, 3)
    assert run["tables"]["final"][:2] == [["c\\r"], [["x\\x00", 1.0]]]


def test_a_study_is_a_run_and_its_seeds_are_runs_below_it(memory, tmp_path):
    from mosaic_ray.studies import moe_weights

    config = override(TINY, moe_weights.BASE | {"warmup.num_rounds": 1, "warmup.local_steps": 2})
    found = run_study(
        moe_weights.STUDY, config, (0, 1), {}, storage=str(tmp_path), name="n", progress=False, track=("memory",)
    )
    whole, *seeds = memory.runs.values()
    assert (whole["info"].kind, whole["info"].name, whole["info"].group) == ("study", "n", "")
    assert len(whole["tables"]["results"][1]) == len(found["rows"]) and not whole["points"]
    assert [run["info"].name for run in seeds] == ["seed 0", "seed 1"]
    assert all(run["info"].group == "n" and run["info"].parents == {"memory": "run0"} for run in seeds)
    assert all(max(numbers(run["points"]).values()) == 1 for run in seeds)
    assert [run["ends"] for run in memory.runs.values()] == [["done"]] * 3


# --- requests --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", ["run", "sweep --space smoke", "compare", "experiment moe-weights", "run --dry-run"])
def test_an_unknown_tracker_is_refused_in_one_line(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = refusal(ask(*words.split(), "--track", "wandb2"))
    assert line == 'mosaic: error: --track wandb2: unknown tracker; did you mean "wandb"?\n'
    assert not list(tmp_path.iterdir())


def test_the_names_that_shells_complete_are_the_trackers():
    assert tuple(backends.BACKENDS) == TRACKERS


def test_a_tracker_that_is_not_installed_is_refused_with_its_extra(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name in backends.BACKENDS:
        monkeypatch.delitem(sys.modules, name, raising=False)
        line = f"--track {name}: it is not installed; pip install 'mosaic-ray[{name}]'"
        assert refused_by(check_trackers, [name]) == line
        monkeypatch.chdir(tmp_path)
        assert refusal(ask("run", "--track", name)) == f"mosaic: error: {line}\n"
        for call in (mr.run, mr.sweep, mr.compare):
            assert refused_by(lambda call=call, name=name: call(track=(name,))) == line
    assert not list(tmp_path.iterdir())


def test_the_folder_that_wandb_writes_is_not_taken_for_wandb(tmp_path, monkeypatch):
    (tmp_path / "wandb").mkdir()
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert "is not installed" in refused_by(check_trackers, ["wandb"])


def test_each_tracker_is_taken_once(memory):
    assert check_trackers(["memory", "memory"]) == check_trackers("memory") == ("memory",)


@pytest.mark.parametrize(
    "content", ["raise ImportError('no\\nway')", "raise SystemExit(3)", "def __getattr__(name): 1 / 0"]
)
@pytest.mark.parametrize("name", list(backends.BACKENDS))
def test_a_module_that_fails_everywhere_is_warned_of_once(name, content, tmp_path, monkeypatch, capsys):
    for module in [m for m in sys.modules if m.partition(".")[0] == name]:
        monkeypatch.delitem(sys.modules, module)
    (tmp_path / "lib" / name).mkdir(parents=True)
    (tmp_path / "lib" / name / "__init__.py").write_text(content)
    monkeypatch.syspath_prepend(tmp_path / "lib")
    assert check_trackers([name]) == (name,)
    summary = go(tmp_path / "s", name)
    sys.modules.pop(name, None)  # the undoing of what was deleted above brings the real one back
    assert summary["accuracy"] == go(tmp_path / "t")["accuracy"]
    [line] = [line for line in capsys.readouterr().err.splitlines() if "tracker" in line]
    assert line.startswith(f"warning: tracker {name}: ") and line.endswith("; the run goes on without it")
