"""Health in whole runs: stored and printed findings, and runs that --strict-health stops."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import TINY, small_ray, stripes_dataset

from mosaic_ray.config.resolve import override, resolve
from mosaic_ray.core.errors import RunError
from mosaic_ray.core.types import Finding
from mosaic_ray.pipeline.context import RunContext, known
from mosaic_ray.runs import runner
from mosaic_ray.storage.store import Store
from mosaic_ray.sweeps import runner as sweep_runner
from mosaic_ray.sweeps.queue import TrialQueue
from mosaic_ray.sweeps.space import SweepPlan

QUICK = {
    "generator.steps": 4, "distill.steps": 2, "warmup.num_rounds": 2, "meta.updates": 4, "finetune.num_rounds": 1,
    "runtime.eval_rounds": 0,
}  # fmt: skip
#: Enough to learn something.
SOUND = QUICK | {
    "partition.omega": 3.0, "warmup.num_rounds": 4, "warmup.local_steps": 10, "warmup.momentum": 0.9,
    "generator.steps": 80, "generator.lr": 2e-3, "generator.ngf": 8,
}  # fmt: skip
#: The returned meta model is not finite.
BROKEN = QUICK | {"meta.lr": 1e9, "meta.select": False, "meta.init": "random"}
ERROR = Finding("meta.diverged", "error", "teacher", "it broke", 3, 9.0, 4.6, "lower meta.lr")


@pytest.fixture
def stripes_as_data(monkeypatch):
    monkeypatch.setattr("mosaic_ray.data.load.load_dataset", lambda config: stripes_dataset())


def go(tmp_path: Path, knobs: dict, **options) -> dict:
    return runner.run(override(TINY, knobs), storage=str(tmp_path), progress=False, name="x", **options)


def test_a_strict_run_stops_after_the_stage_and_goes_on_without_the_flag(tmp_path, capsys, stripes_as_data):
    with pytest.raises(RunError, match=r"^stage teacher: meta\.diverged: .*not finite, threshold 2\.197\); .*meta\.lr"):
        go(tmp_path, BROKEN, strict_health=True)
    assert "error: meta.diverged: " in capsys.readouterr().err
    failed = json.loads((tmp_path / "runs" / "x" / "summary.json").read_text())
    assert (failed["status"], failed["stage"]) == ("failed", "teacher")
    assert "meta.diverged" in [row["code"] for row in failed["health"]] and "distill" not in failed["stages"]

    summary = go(tmp_path, BROKEN)
    there = set(failed["stages"])
    assert {name for name, stage in summary["stages"].items() if stage["cached"]} == there
    assert all(summary["stages"][name]["key"] == failed["stages"][name]["key"] for name in there)
    (row,) = [row for row in summary["health"] if row["severity"] == "error"]
    assert (row["code"], row["stage"], row["value"]) == ("meta.diverged", "teacher", None)
    assert row["threshold"] == pytest.approx(2 * np.log(3)) and "meta.lr" in row["advice"]
    assert not [row for row in summary["health"] if row["stage"] == "distill" and row["severity"] != "info"]

    with pytest.raises(RunError, match=r"stage teacher: meta\.diverged"):  # from the store as well
        go(tmp_path, BROKEN, strict_health=True)


def test_a_strict_run_without_an_error_ends_as_any_other_and_leaves_what_is_looked_at(tmp_path, stripes_as_data):
    summary = go(tmp_path, SOUND, strict_health=True)
    assert summary["status"] == "done"
    assert all({"threshold", "advice"} <= row.keys() for row in summary["health"])
    store = Store(str(tmp_path))
    teacher, student = (store.get(summary["stages"][name]["key"]) for name in ("teacher", "distill"))
    arrays = teacher.load("diagnostics")
    assert {name: (a.dtype, a.shape) for name, a in arrays.items()} == {
        "expert_weights": (np.float32, (3, 3)), "expert_of_class": (np.int64, (3,)), "meta_gates": (np.float32, (3, 3)),
    }  # fmt: skip
    assert np.isfinite(arrays["meta_gates"]).all()
    counts = np.array(summary["label_counts"])
    np.testing.assert_allclose(arrays["expert_weights"], counts / counts.sum(0), rtol=1e-6)
    assert student.load("diagnostics")["synthetic_counts"].sum() == 3 * TINY.distill.samples_per_generator
    assert {"teacher_entropy", "class_entropy", "agreement", "shift"} <= student.facts["figures"].keys()
    tags = {json.loads(line)["tag"] for line in (tmp_path / "runs" / "x" / "metrics.jsonl").read_text().splitlines()}
    assert {"generator/variety", "teacher/expert_redundancy", "teacher/synthetic_entropy"} <= tags


def test_figures_that_are_not_finite_are_stored_as_unknown():
    assert known({"a": float("nan"), "b": np.float64(1)}) == {"a": None, "b": 1.0}


class FakeTracker:
    """A tracker that keeps warnings and texts."""

    def __init__(self):
        self.warnings, self.texts = [], {}

    def warn(self, text, severity):
        self.warnings.append(f"{severity}: {text}")

    def on_finding(self, finding):
        pass

    def text(self, tag, markdown):
        self.texts[tag] = markdown


def noted(strict: bool = False) -> RunContext:
    return RunContext(TINY, stripes_dataset(), None, None, FakeTracker(), strict=strict)


def facts_of(*findings: Finding) -> dict:
    return {"findings": [vars(finding) for finding in findings]}


def test_a_finding_is_printed_once():
    run, other = noted(), Finding("generator.low_coverage", "warning", "generators", "few", 1, 0.3, 0.5, "more steps")
    run.warn_of([other])
    run.note("generators", "k", False, 1.0, facts_of(other, Finding("a.b", "info", "generators", "m")))
    assert run.tracker.warnings == ["warning: generator.low_coverage client 1: few; more steps"]
    assert set(run.tracker.texts) == {"health/generator.low_coverage", "health/a.b"}
    assert "client 1: few. *more steps*" in run.tracker.texts["health/generator.low_coverage"]
    run.note("generators", "k", True, 0.0, facts_of(ERROR))
    assert len(run.tracker.warnings) == 1 and run.alarmed, "findings of a cached stage are in the closing table alone"


@pytest.mark.parametrize("cached", [True, False])
def test_only_an_error_stops_a_strict_run(cached):
    run = noted(strict=True)
    run.note("teacher", "k", cached, 1.0, facts_of(Finding("a.b", "warning", "teacher", "m")))
    wanted = (
        r"stage teacher, client 3: meta.diverged: it broke \(value 9, threshold 4.6\); lower meta.lr; --strict-health"
    )
    with pytest.raises(RunError, match=wanted):
        run.note("teacher", "k", cached, 1.0, facts_of(ERROR))
    assert "teacher" in run.log and run.findings[-1] == ERROR


# --- sweeps -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strict", [False, True])
def test_a_trial_that_ended_with_an_error_is_not_done_for_a_strict_sweep(strict, monkeypatch):
    trials = [SimpleNamespace(name=name, label=name) for name in ("warning", "error")]
    search = SimpleNamespace(next=lambda: trials.pop(0) if trials else None)
    state = SimpleNamespace(finished=lambda trial: {"status": "done", "health": [{"severity": trial.name}]})
    queue = TrialQueue(search, state, SimpleNamespace(found=lambda *_: None), strict_health=strict)
    monkeypatch.setattr(queue, "_keep", lambda trial, summary: None)
    monkeypatch.setattr(queue, "_setting", lambda trial: "")
    found = queue.next()
    assert (found and found.name) == ("error" if strict else None)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning")
def test_a_strict_sweep_records_the_trial_as_failed_with_the_line(tmp_path, stripes_as_data):
    points = ({"method": "prototype_head"}, {"method": "mosaic", "meta.lr": 1e9})
    plan = SweepPlan("one has no teacher, one's diverges", points=points)
    request = sweep_runner.SweepRequest(override(TINY, BROKEN | {"runtime.host": "ray"}), "mine", plan, search="grid")
    with small_ray(num_cpus=2):
        outcome = sweep_runner.run(request, storage=str(tmp_path), progress=False, strict_health=True)
        (failed,) = outcome.failed
        assert "meta.diverged" in failed.summary["error"] and failed.knobs["meta.lr"] == 1e9
        assert not sweep_runner.run(request, storage=str(tmp_path), progress=False).failed


# --- a sound run ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_sound_demo_raises_no_warning_and_no_error(tmp_path):
    config = resolve("demo", sets={"runtime.host": "serial", "runtime.precision": "fp32"})
    summary = runner.run(config, storage=str(tmp_path), progress=False)
    assert {row["severity"] for row in summary["health"]} <= {"info"}
    assert {row["code"] for row in summary["health"]} <= {"experts.single_owner"}


def test_closing_rounds_with_a_wild_step_size_are_warned_of_and_the_controls_are_not(tmp_path, stripes_as_data):
    wild = {"partition.omega": 0.01, "finetune.lr": 0.05, "finetune.num_rounds": 4}
    wild |= {"warmup.num_rounds": 6, "warmup.local_steps": 6}
    found = [row for row in go(tmp_path, wild)["health"] if row["code"] == "finetune.forgetting"]
    assert [(row["stage"], row["severity"]) for row in found] == [("finetune", "warning")]
    calm = go(tmp_path / "calm", wild | {"finetune.lr": 1e-4})["health"]
    assert not [row for row in calm if row["code"] == "finetune.forgetting"]
