"""The copy of a sweep's trials in Optuna's journal: what it shows, and that nothing follows from it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from cli_runner import ask

from mosaic_ray.config.schema import ExperimentConfig
from mosaic_ray.storage.store import Store
from mosaic_ray.sweeps import journal as journal_module
from mosaic_ray.sweeps.journal import FILE, Journal
from mosaic_ray.sweeps.space import Choice, Range, SweepPlan
from mosaic_ray.sweeps.state import SweepState, make_trials

optuna = pytest.importorskip("optuna")

SPACE = """
from mosaic_ray.spaces import Choice, Range, SweepPlan


def plan():
    knobs = {
        "partition.omega": Choice((0.01, 0.1)), "generator.lambda_e": Range(0.5, 2.0, log=True),
        "generator.steps": Range(10, 20), "federation.widths": Choice(((1.0,), (1.0, 0.5))),
        "meta.pool": Choice(("mean", "sum")), "distill.workers": Choice(("auto", 0)),
    }
    base = {"algorithm": "distilled", "federation.strategy": "fedrolex"}
    return SweepPlan("a test", knobs, base=base, search="optuna", samples=8)
"""

pytestmark = pytest.mark.usefixtures("two_cpus")


def studies(folder: Path) -> dict[str, Any]:
    """The studies of a sweep's journal by name, as another process reads them."""
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(folder / FILE)))
    names = [study.study_name for study in storage.get_all_studies()]
    return {name: optuna.load_study(study_name=name, storage=storage) for name in names}


def sweep(*words: str, status: int = 0) -> Path:
    result = ask("sweep", "--name", "n", *words)
    assert result.exit_code == status, (result.stderr, result.exception)
    return Path("mosaic_runs/sweeps/n")


def searched() -> list[dict[str, Any]]:
    """The points of an optuna search, in order."""
    Path("space.py").write_text(SPACE)
    folder = sweep("--space", "space.py", "--seeds", "0,1")
    trials = sorted((folder / "trials").iterdir())
    names = ("generator.lambda_e", "generator.steps", "meta.pool", "federation.widths", "partition.omega")
    configs = [json.loads((trial / "summary.json").read_text())["config"] for trial in trials]
    return [{name: config[name.split(".")[0]][name.split(".")[1]] for name in names} for config in configs]


def test_each_setting_is_a_study_with_all_its_trials(trials):
    trials.failing = ("p001s0",)
    folder = sweep("--grid", "partition.omega=0.01,0.1", "--grid", "meta.pool=mean,sum", status=1)
    found = studies(folder)
    assert list(found) == ["n omega=0.01", "n omega=0.1"]
    first = found["n omega=0.01"].trials
    assert [trial.user_attrs["trial"] for trial in first] == ["p000s0", "p001s0"]
    assert [trial.state.name for trial in first] == ["COMPLETE", "FAIL"]
    assert (first[0].value, first[0].params) == (0.5, {"partition.omega": 0.01, "meta.pool": "mean"})
    assert first[1].user_attrs["stage"] == "warmup"
    assert found["n omega=0.1"].best_value == 0.5
    assert not (folder / f"{FILE}.lock").exists()


def test_every_kind_of_knob_and_search(trials):
    searched()
    found = studies(Path("mosaic_runs/sweeps/n"))
    assert [len(study.trials) for study in found.values()] == [8, 8]
    for study in found.values():
        for trial in study.trials:
            assert trial.state.name == "COMPLETE" and trial.params["federation.widths"] in ("[1.0]", "[1.0, 0.5]")
            assert trial.distributions["generator.lambda_e"].log and trial.params["distill.workers"] in ("auto", 0)
            assert trial.distributions["generator.steps"] == optuna.distributions.IntDistribution(10, 20)


def test_a_comparison_with_other_knobs_in_each_point(trials):
    folder = Path("mosaic_runs/sweeps/c")
    result = ask("compare", "--methods", "fedavg,mosaic+fedprox", "--seeds", "0", "--name", "c")
    assert result.exit_code == 0, (result.stderr, result.exception)
    [study] = studies(folder).values()
    assert [trial.params for trial in study.trials] == [
        {"method": "fedavg"}, {"method": "mosaic", "federation.strategy": "fedprox"}
    ]  # fmt: skip


def test_the_points_of_a_search_are_the_same_without_it(trials, monkeypatch, tmp_path):
    points = searched()
    assert len({json.dumps(point) for point in points}) == 8
    monkeypatch.chdir(tmp_path / "mosaic_runs")

    def broken(*_: Any) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Journal, "_open", broken)
    assert searched() == points and not (Path("mosaic_runs/sweeps/n") / FILE).exists()


def test_a_resumed_sweep_writes_it_anew(trials):
    trials.interrupts = ("p002s0",)
    grid = ["--grid", "meta.pool=mean,sum", "--grid", "warmup.lr=0.01,0.02"]
    folder = sweep(*grid, status=130)
    [study] = studies(folder).values()
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "COMPLETE"]
    (folder / FILE).write_text("not a journal\n")
    (folder / f"{FILE}.lock").symlink_to("x")  # of a process that was killed
    trials.interrupts = ()
    sweep(*grid)
    written = (folder / FILE).read_bytes()
    sweep(*grid)
    assert (folder / FILE).read_bytes() == written, "a finished sweep runs no trial"
    [study] = studies(folder).values()
    assert [trial.user_attrs["trial"] for trial in study.trials] == [f"p00{point}s0" for point in range(4)]


def test_a_link_in_its_place_is_not_followed(trials):
    Path("mine.txt").write_text("mine")
    folder = Path("mosaic_runs/sweeps/n")
    folder.mkdir(parents=True)
    (folder / FILE).symlink_to(Path("mine.txt").absolute())
    sweep("--grid", "meta.pool=mean,sum")
    assert Path("mine.txt").read_text() == "mine" and not (folder / FILE).is_symlink()


@pytest.mark.parametrize("call", ["create_new_trial", "set_trial_state_values"])
def test_a_journal_that_cannot_be_written_ends_no_sweep(call, trials, monkeypatch):
    def broken(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(f"optuna.storages.JournalStorage.{call}", broken)
    result = ask("sweep", "--name", "n", "--grid", "meta.pool=mean,sum")
    assert result.exit_code == 0
    said = [line for line in result.stderr.splitlines() if FILE in line]
    assert said == [
        f"{FILE}: it is left out ([Errno 28] No space left on device), so optuna-dashboard does not show this sweep"
    ]


def test_a_bucket_has_none_and_says_so_once(bucket_only):
    said: list[str] = []
    [first] = make_trials(ExperimentConfig(), [{}], [0])
    made = Journal(SweepState(Store(bucket_only), "n"), SweepPlan("x"), (), said.append)
    made.start(first)
    [line] = said
    assert line.startswith(f"{FILE}: it is left out (it takes a storage on a disk)")
    made.score(first.name, 1, 0.5)
    made.end(first, {"status": "done"}, 0.5)
    assert len(said) == 1


def test_running_stopped_and_scored_trials(tmp_path):
    plan = SweepPlan("x", {"generator.lambda_e": Range(0.5, 2.0), "seed": Choice((0,))})
    first, second = make_trials(ExperimentConfig(), [{"generator.lambda_e": 1.0}, {"generator.lambda_e": 2.0}], [0])
    store = Store(tmp_path)
    os.makedirs(tmp_path / "sweeps/n")
    said: list[str] = []
    made = Journal(SweepState(store, "n"), plan, (), said.append)
    for _ in range(2):  # its process died
        made.start(first)
    made.start(second)
    made.score(first.name, 1, 0.25)
    made.end(second, {"status": "stopped", "stage": "teacher"}, None)
    assert said == [] and made._storage is not None
    [study] = studies(tmp_path / "sweeps/n").values()
    assert [trial.state.name for trial in study.trials] == ["RUNNING", "PRUNED"]
    assert study.trials[0].intermediate_values == {1: 0.25} and study.trials[1].user_attrs["stage"] == "teacher"
    assert journal_module.FILE in os.listdir(tmp_path / "sweeps/n")
