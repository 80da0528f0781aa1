"""Sweeps over which modalities clients hold: trials of one dealing share its stages, and the results name it."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from helpers import TINY, assert_same
from safetensors.numpy import load_file
from signs import FACTS, REHEARSAL, SOME, signs_dataset

from mosaic_ray.config.resolve import override
from mosaic_ray.config.schema import ExperimentConfig
from mosaic_ray.core.errors import RequestError
from mosaic_ray.runs import runner
from mosaic_ray.sweeps import runner as sweep_runner
from mosaic_ray.sweeps.results import read_results
from mosaic_ray.sweeps.space import Choice, SweepPlan

PLAN = SweepPlan(
    "two dealings, two weights",
    knobs={"partition.modalities": Choice(("each:2", SOME)), "rehearsal.weight": Choice((0.5, 1.0))},
)
BASE = {
    **REHEARSAL, "data.name": "mfeat", "generator.tau": ExperimentConfig().generator.tau, "runtime.host": "serial",
    "partition.validation_fraction": 0.2,
}  # fmt: skip

#: Stages that depend on the dealing and not on the weight of rehearsal.
SHARED = ("partition", "warmup", "control")


def request(plan: SweepPlan = PLAN) -> sweep_runner.SweepRequest:
    return sweep_runner.SweepRequest(override(TINY, BASE), "tiny", plan, max_concurrent=1)


@pytest.fixture(autouse=True)
def signs_as_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mosaic_ray.data.load.load_dataset", lambda config: signs_dataset())
    monkeypatch.setattr("mosaic_ray.data.load.known_facts", lambda config: FACTS)


def test_the_dry_run_counts_distinct_stages(tmp_path: Path) -> None:
    found = sweep_runner.dry_run(request(), str(tmp_path), None, "local")
    work = {row.stage: (row.asked, row.unique) for row in found.work or []}
    assert {stage: work[stage] for stage in SHARED} == dict.fromkeys(SHARED, (4, 2))
    assert work["generators"] == (12, 6) and work["finetune"] == (4, 4)


@pytest.mark.parametrize("dealing, says", [(("image", "text"), "no client holds v"), ("each:4", "has 3 modalities")])
def test_a_dealing_that_cannot_be_is_refused_before_anything_starts(tmp_path: Path, dealing: object, says: str) -> None:
    wrong = request(SweepPlan("one is wrong", points=({}, {"partition.modalities": dealing})))
    for ask in (lambda: sweep_runner.dry_run(wrong, str(tmp_path), None, "local"),
                lambda: sweep_runner.run(wrong, storage=str(tmp_path), progress=False)):  # fmt: skip
        with pytest.raises(RequestError, match=says):
            ask()


@pytest.mark.ray
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning")
def test_trials_share_stages_also_after_a_kill_and_are_plain_runs(
    tmp_path: Path, ray_up: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mosaic_ray.sweeps import tune as tuning

    killed, follow = [], tuning._Progress.on_trial_result

    def kill_once(self, iteration, trials, trial, result, **info):
        follow(self, iteration, trials, trial, result, **info)
        if result.get("stage") == "generators" and not killed:
            killed.append(trial.config["trial"])
            os.kill(result["pid"], signal.SIGKILL)

    monkeypatch.setattr(tuning._Progress, "on_trial_result", kill_once)
    outcome = sweep_runner.run(request(), storage=str(tmp_path / "sweep"), progress=False)
    assert killed and [r.summary["status"] for r in outcome.results] == ["done"] * 4
    cached = {r.trial: {name: stage["cached"] for name, stage in r.summary["stages"].items()} for r in outcome.results}
    assert cached[killed[0]]["warmup"]
    for stage in SHARED:  # the second trial of each dealing finds what the first one made
        assert cached["p001s0"][stage] and cached["p003s0"][stage] and not cached["p002s0"][stage]

    for result in outcome.results:
        config = override(TINY, BASE | dict(result.knobs))
        alone = runner.run(config, storage=str(tmp_path / "runs"), progress=False)
        assert result.summary["accuracy"] == alone["accuracy"]
        assert result.summary["subset_accuracy"] == alone["subset_accuracy"]
        place = Path(outcome.place) / "trials" / result.trial
        left, right = (load_file(Path(folder) / "student.safetensors") for folder in (place, alone["paths"]["run"]))
        assert_same(left, right)

    dealings = read_results(Path(outcome.place) / "results.parquet").column("partition.modalities").to_pylist()
    assert dealings == ["each:2"] * 2 + [json.dumps(SOME)] * 2
