"""Methods that work on the server after every round: their keys, their control, their state over a kill."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import FACTS, TINY, assert_same, interrupted, stripes_dataset
from safetensors.numpy import load_file

from mosaic_ray.config.resolve import override
from mosaic_ray.runs import runner
from mosaic_ray.runs.plan import stage_keys, unique_work
from mosaic_ray.storage.store import Store

METHOD = "lab.server_average:SERVER_AVERAGE"


@pytest.fixture(autouse=True)
def stripes_as_data(monkeypatch):
    monkeypatch.setattr("mosaic_ray.data.load.load_dataset", lambda config: stripes_dataset())


def go(folder: Path, **knobs: Any) -> dict[str, Any]:
    named = {"warmup.checkpoint_rounds": 1, "method": METHOD} | {n.replace("__", "."): v for n, v in knobs.items()}
    return runner.run(override(TINY, named), storage=str(folder), progress=False)


def test_the_first_round_is_plain_and_later_ones_are_averages(tmp_path):
    once = go(tmp_path, warmup__num_rounds=1)
    plain = go(tmp_path, warmup__num_rounds=1, method="fedavg")
    weights = [Store(str(tmp_path)).get(s["stages"]["warmup"]["key"]).load("global") for s in (once, plain)]
    assert_same(*weights)
    twice, other = (go(tmp_path, warmup__num_rounds=2, method=m) for m in (METHOD, "fedavg"))
    weights = [Store(str(tmp_path)).get(s["stages"]["warmup"]["key"]).load("global") for s in (twice, other)]
    assert not np.array_equal(weights[0]["head.weight"], weights[1]["head.weight"])


def test_its_control_is_the_plain_warm_up_that_other_methods_share(tmp_path):
    config = override(TINY, {"method": METHOD})
    keys, plain = (stage_keys(override(config, {"method": m}), "x", FACTS) for m in (METHOD, "fedavg"))
    assert list(keys) == ["partition", "warmup", "control_warmup", "finetune", "control", "own_models", "evaluate"]
    assert keys["control_warmup"] == plain["warmup"] != keys["warmup"]
    assert keys["control"] == plain["control"] and keys["finetune"] != plain["finetune"]
    rows = {row.stage: row.unique for row in unique_work([keys, plain], [config, override(TINY, {"method": "fedavg"})])}
    assert (rows["warmup"], rows["control_warmup"], rows["control"]) == (2, 0, 0)  # FedAvg's closing rounds
    summary = go(tmp_path)
    assert summary["stages"]["control"]["key"] == go(tmp_path, method="fedavg")["stages"]["finetune"]["key"]
    assert summary["communication"]["measured_over_predicted"] == 1


def test_its_state_survives_a_kill(tmp_path):
    undisturbed = go(tmp_path / "whole", warmup__num_rounds=4)
    with interrupted(in_round=3):
        go(tmp_path / "killed", warmup__num_rounds=4)
    resumed = go(tmp_path / "killed", warmup__num_rounds=4)
    left, right = (
        load_file(Path(summary["paths"]["run"]) / "student.safetensors") for summary in (resumed, undisturbed)
    )
    assert_same(left, right)
