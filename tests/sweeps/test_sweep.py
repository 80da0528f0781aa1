"""Whole sweeps on Ray: shared stages are computed once, also after failures and kills; every trial is a plain run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import TINY, assert_same, stripes_dataset
from safetensors.numpy import load_file

from mosaic_ray.config.resolve import override, resolve
from mosaic_ray.core.errors import RunError
from mosaic_ray.runs import runner
from mosaic_ray.sweeps import runner as sweep_runner
from mosaic_ray.sweeps.results import NOT_REPRODUCIBLE, read_results
from mosaic_ray.sweeps.space import Choice, SweepPlan

PLAN = SweepPlan(
    "two omegas, two weights",
    knobs={"partition.omega": Choice((0.3, 3.0)), "generator.lambda_d": Choice((2.0, 5.0))},
)
ASKED = ("search", "samples", "seeds", "scheduler", "max_concurrent")
SHARED = ("partition", "warmup", "prototypes", "teacher", "control")

pytestmark = [
    pytest.mark.ray,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning"),
]


@pytest.fixture(autouse=True)
def stripes_as_data(monkeypatch):
    """Sweeps in this process train on the tiny data set; trials get it from here, through Ray's object store."""
    monkeypatch.setattr("mosaic_ray.data.load.load_dataset", lambda config: stripes_dataset())


def sweep(folder: Path, plan: SweepPlan = PLAN, knobs: dict | None = None, **options) -> sweep_runner.Outcome:
    """Run a sweep, by default on two client hosts with two trials at once."""
    base = {"runtime.host": "ray", "runtime.max_hosts": 2, "partition.validation_fraction": 0.2} | (knobs or {})
    asked = {"max_concurrent": 2} | {name: options.pop(name) for name in ASKED if name in options}
    request = sweep_runner.SweepRequest(override(TINY, base), "tiny", plan, **asked)
    return sweep_runner.run(request, storage=str(folder), progress=False, **options)


def computed(outcome: sweep_runner.Outcome, stage: str) -> int:
    return sum(not r.summary["stages"][stage]["cached"] for r in outcome.results)


def comparable(outcome: sweep_runner.Outcome) -> list[dict]:
    return read_results(Path(outcome.place) / "results.parquet").drop_columns(NOT_REPRODUCIBLE).to_pylist()


def test_trials_share_what_they_can_and_each_is_a_plain_run(tmp_path, ray_up):
    outcome = sweep(tmp_path / "sweep")
    assert [r.summary["status"] for r in outcome.results] == ["done"] * 4
    assert {stage: computed(outcome, stage) for stage in SHARED} == dict.fromkeys(SHARED, 2)
    assert computed(outcome, "distill") == 4
    for result in outcome.results:
        config = override(TINY, {"partition.validation_fraction": 0.2, **result.knobs})
        alone = runner.run(config, storage=str(tmp_path / "runs"), progress=False)
        assert result.summary["accuracy"] == alone["accuracy"]
        place = Path(outcome.place) / "trials" / result.trial
        left, right = (load_file(Path(folder) / "student.safetensors") for folder in (place, alone["paths"]["run"]))
        assert_same(left, right)
        assert (place / "log.txt").exists() and list((place / "tensorboard").glob("events*"))

    table = read_results(Path(outcome.place) / "results.parquet")
    assert table.column("trial").to_pylist() == ["p000s0", "p001s0", "p002s0", "p003s0"]
    assert table.column("generator.lambda_d").to_pylist() == [2.0, 5.0, 2.0, 5.0]

    before = (Path(outcome.place) / "results.parquet").read_bytes()
    again = sweep(tmp_path / "sweep")
    assert (Path(again.place) / "results.parquet").read_bytes() == before


def test_seeds_repeat_every_point_and_a_finished_sweep_starts_nothing(tmp_path, ray_up, monkeypatch):
    plan = SweepPlan("one", knobs={"generator.lambda_d": Choice((2.0, 5.0))})
    outcome = sweep(tmp_path, plan, {"runtime.host": "serial"}, seeds=(0, 3), max_concurrent=1)
    assert [(r.point, r.seed) for r in outcome.results] == [(0, 0), (0, 3), (1, 0), (1, 3)]
    assert computed(outcome, "warmup") == 2

    monkeypatch.setattr("mosaic_ray.sweeps.tune.run_trials", lambda *_, **__: pytest.fail("a trial was started"))
    again = sweep(tmp_path, plan, {"runtime.host": "serial"}, seeds=(0, 3), max_concurrent=1)
    assert comparable(again) == comparable(outcome) and len(again.results) == 4


def test_failed_trials_are_recorded_and_the_rest_go_on(tmp_path, ray_up, monkeypatch):
    """One has no possible partition, one diverges on a client, one's process is killed three times."""
    from mosaic_ray.sweeps import tune as tuning

    follow = tuning._Progress.on_trial_result

    def kill(self, iteration, trials, trial, result, **info):
        follow(self, iteration, trials, trial, result, **info)
        if trial.config["trial"] == "p003s0" and "stage" in result:
            os.kill(result["pid"], signal.SIGKILL)

    impossible = {"partition.policy": "reject", "partition.max_tries": 1, "partition.min_size": 80}
    points = ({}, impossible, {"warmup.lr": 1e9, "warmup.weight_decay": 1e9}, {"generator.lambda_d": 2.0})
    plan, one = SweepPlan("two that cannot be", points=points), {"runtime.max_hosts": 1}
    with monkeypatch.context() as patch:
        patch.setattr(tuning._Progress, "on_trial_result", kill)
        outcome = sweep(tmp_path, plan, one, max_concurrent=1)
    assert [r.summary["status"] for r in outcome.results] == ["done", "failed", "failed", "failed"]
    assert "process died 3 times" in outcome.results[3].summary["error"]

    outcome = sweep(tmp_path, plan, one, max_concurrent=1)  # again: the failed ones are tried again, and two fail again
    assert [r.summary["status"] for r in outcome.results] == ["done", "failed", "failed", "done"]
    with pytest.raises(RunError, match=r"2 of 4 trials failed: p001s0 \(.*partition.*; p002s0 \(.*diverged"):
        outcome.raise_failures()
    row = read_results(Path(outcome.place) / "results.parquet").to_pylist()[1]
    assert row["status"] == "failed" and "partition" in row["error"] and row["accuracy_final"] is None
    failed = outcome.results[2].summary
    assert (failed["stage"], failed["round"]) == ("warmup", 0) and failed["client"] in range(3)
    assert f"client {failed['client']}: " in failed["error"] and "training diverged" in failed["error"]
    assert failed["stages"].keys() == {"partition"}


@pytest.mark.slow
def test_a_killed_trial_resumes_at_its_last_stored_stage(tmp_path, ray_up, monkeypatch):
    from mosaic_ray.sweeps import tune as tuning

    undisturbed = comparable(sweep(tmp_path / "a"))
    killed, follow = [], tuning._Progress.on_trial_result

    def kill_once(self, iteration, trials, trial, result, **info):
        follow(self, iteration, trials, trial, result, **info)
        if result.get("stage") == "teacher" and not killed:
            killed.append(trial.config["trial"])
            os.kill(result["pid"], signal.SIGKILL)

    monkeypatch.setattr(tuning._Progress, "on_trial_result", kill_once)
    outcome = sweep(tmp_path / "b")
    assert killed and comparable(outcome) == undisturbed
    stages = next(r for r in outcome.results if r.trial == killed[0]).summary["stages"]
    assert stages["warmup"]["cached"] and stages["generators"]["cached"]


def test_asha_stops_trials_and_keeps_what_they_reached(tmp_path, ray_up):
    """A trial that hardly warms up is behind at the first rung."""
    plan = SweepPlan("good first", points=({"warmup.num_rounds": 12}, {"warmup.lr": 1e-9}))
    options = {"knobs": {"runtime.host": "serial"}, "scheduler": "asha", "max_concurrent": 1}
    outcome = sweep(tmp_path, plan, **options)
    assert [r.summary["status"] for r in outcome.results] == ["done", "stopped"]
    stopped, reached = outcome.results[1].summary, outcome.results[0].summary["validation_accuracy"]["initial"]
    assert (stopped["stage"], stopped["rung"]) == ("warmup", 1) and stopped["selection"]["value"] < reached
    again = sweep(tmp_path, plan, **options)
    assert [r.summary["status"] for r in again.results] == ["done", "stopped"]


@pytest.mark.slow
def test_optuna_chooses_the_same_points_again(tmp_path, ray_up):
    plan = SweepPlan("learns", knobs={"warmup.lr": Choice((0.01, 0.05, 0.1)), "generator.lambda_d": Choice((2.0, 5.0))})
    options = {"search": "optuna", "samples": 5, "knobs": {"runtime.host": "serial"}}
    first, other = sweep(tmp_path / "a", plan, **options), sweep(tmp_path / "b", plan, **options)
    assert [dict(r.knobs) for r in first.results] == [dict(r.knobs) for r in other.results]
    assert len(first.results) == 5


# --- the command -----------------------------------------------------------------------------------------------------

BASE = {
    "partition.num_clients": 3, "warmup.num_rounds": 4, "generator.steps": 15, "generator.ngf": 4, "generator.ndf": 4,
    "distill.steps": 20, "meta.updates": 10, "meta.feedforward": 64, "meta.token_dim": 10, "meta.batch_size": 16,
    "model.width": 4, "finetune.num_rounds": 2, "algorithm": "distilled",
}  # fmt: skip
SPACE = f"""
from mosaic_ray.spaces import Choice, SweepPlan

def plan():
    return SweepPlan("tiny", knobs={{"generator.lambda_d": Choice((2.0, 5.0))}}, base={BASE})
"""


def command(folder: Path, storage: str, host: str, *more: str) -> list[str]:
    space = folder / "tiny.py"
    space.write_text(SPACE)
    words = ["--space", str(space), "--storage", str(folder / storage), "--host", host, "--max-concurrent", "1"]
    return [sys.executable, "-m", "mosaic_ray", "sweep", *words, *more]


@pytest.mark.parametrize("host", ["serial", pytest.param("ray", marks=pytest.mark.slow)])
def test_a_killed_and_resumed_sweep_equals_undisturbed_runs(tmp_path, host, monkeypatch):
    with subprocess.Popen(
        command(tmp_path, "sweep", host), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    ) as process:  # fmt: skip
        lines = []
        for line in process.stderr:
            lines.append(line)
            if "begins" in line and any("[1/2]" in earlier for earlier in lines):
                process.send_signal(signal.SIGKILL)
                break
        else:
            pytest.fail("".join(lines))
    ended = list((tmp_path / "sweep").glob("sweeps/*/trials/*/summary.json"))
    stamps = {path: path.stat().st_mtime_ns for path in ended}
    assert ended
    resumed = subprocess.run(command(tmp_path, "sweep", host, "--json"), capture_output=True, text=True, check=False)
    assert resumed.returncode == 0, resumed.stderr
    assert {path: path.stat().st_mtime_ns for path in ended} == stamps, "a finished trial was run again"
    summary = json.loads(resumed.stdout)
    assert summary["status"] == "done" and len(summary["trials"]) == 2
    table = read_results(next((tmp_path / "sweep").glob("sweeps/*/results.parquet")))
    assert table.column("cached_warmup").to_pylist() == [False, True]
    monkeypatch.undo()  # the commands' data
    for row, knob in zip(table.to_pylist(), (2.0, 5.0), strict=True):
        mine = {**sweep_runner.SWEEP_BASE, **BASE, "runtime.host": "serial", "generator.lambda_d": knob}
        alone = runner.run(resolve(file=mine), storage=str(tmp_path / "runs"), progress=False)
        assert {name: row[f"accuracy_{name}"] for name in alone["accuracy"]} == alone["accuracy"]
        students = next((tmp_path / "sweep").glob(f"sweeps/*/trials/{row['trial']}/student.safetensors"))
        assert_same(load_file(students), load_file(Path(alone["paths"]["run"]) / "student.safetensors"))
