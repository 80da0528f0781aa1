"""The head made anew after the closing rounds (``finetune.head``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import TINY, assert_same, stripes_dataset
from safetensors.numpy import load_file

from mosaic_ray.config.plugins import load
from mosaic_ray.config.registry import METHODS
from mosaic_ray.config.resolve import override
from mosaic_ray.methods.closing_head import CLOSING_HEADS, closing_head
from mosaic_ray.runs import runner
from mosaic_ray.storage.store import Store

ON = {"finetune.bn": "exact", "finetune.lr": 0.02, "finetune.num_rounds": 2, "runtime.eval_rounds": 0}


@pytest.fixture(autouse=True)
def stripes_as_data(monkeypatch):
    monkeypatch.setattr("mosaic_ray.data.load.load_dataset", lambda config: stripes_dataset())


def go(folder: Path, **knobs: Any) -> dict[str, Any]:
    config = override(TINY, ON | {name.replace("__", "."): value for name, value in knobs.items()})
    return runner.run(config, storage=str(folder), progress=False)


def student(summary: dict[str, Any]) -> dict[str, np.ndarray]:
    return load_file(Path(summary["paths"]["run"]) / "student.safetensors")


def test_refit_makes_the_head_as_the_method_does_else_by_lda():
    found = {method: closing_head(override(TINY, {"method": method, "finetune.head": "refit"})) for method in METHODS}
    assert {method: head.name for method, head in found.items()} == {
        method: method if method in CLOSING_HEADS else "lda_head" for method in METHODS
    }
    assert closing_head(TINY) is None


@pytest.mark.parametrize("head", sorted(CLOSING_HEADS))
def test_without_closing_rounds_the_head_is_the_one_that_the_method_makes(tmp_path, head):
    """Both are made in the features of the warm-up, from the same images."""
    both = go(tmp_path, method=head, finetune__head="refit", finetune__num_rounds=0, warmup__bn="exact")
    assert both["accuracy"]["final"] == both["accuracy"]["distilled"]
    alone = go(tmp_path, method=head, finetune__num_rounds=0, warmup__bn="exact")
    assert_same(student(both), student(alone))


@pytest.mark.parametrize("method", [name for name in METHODS if load("methods", name).head_only])
def test_methods_that_change_the_head_alone_share_the_closing_rounds_of_the_control(tmp_path, method):
    anew = {"finetune__head": "refit", "warmup__bn": "exact"}
    plain, other = go(tmp_path, method="fedavg", **anew), go(tmp_path, method=method, **anew)
    assert other["stages"]["finetune"]["cached"]
    assert other["stages"]["finetune"]["key"] == other["stages"]["control"]["key"] == plain["stages"]["control"]["key"]
    assert other["communication"]["measured_over_predicted"] == 1
    store = Store(str(tmp_path))
    before, after = (store.get(other["stages"][name]["key"]).load("global") for name in ("warmup", "distill"))
    assert {name for name in before if not np.array_equal(before[name], after[name])} == {"head.weight", "head.bias"}
    kept = go(tmp_path, method=method)  # without a new head the rounds begin at the student
    assert kept["stages"]["finetune"]["key"] != kept["stages"]["control"]["key"]


@pytest.mark.parametrize("head", sorted(CLOSING_HEADS))
def test_closing_rounds_are_shared_and_only_the_head_differs(tmp_path, head):
    kept, anew = go(tmp_path, method="fedavg"), go(tmp_path, method="fedavg", finetune__head=head)
    assert anew["stages"]["finetune"]["cached"]
    before, after = student(kept), student(anew)
    assert {name for name in before if not np.array_equal(before[name], after[name])} == {"head.weight", "head.bias"}
    assert anew["communication"]["measured_over_predicted"] == 1


def test_mixed_networks_send_prototypes_of_the_students_alone(tmp_path):
    mixed = {"model.classifiers": ("cnn", "mobilenet"), "prototypes.model": "global"}
    knobs = {name.replace(".", "__"): value for name, value in mixed.items()}
    summary = go(tmp_path, method="fedavg", finetune__head="prototype_head", **knobs)
    by_client = summary["communication_bytes"]["uplink"]["prototypes"]
    whole = go(tmp_path, method="fedavg", finetune__head="prototype_head")["communication_bytes"]["uplink"]
    assert 0 < by_client < whole["prototypes"]
    assert summary["communication"]["measured_over_predicted"] == 1


def test_trials_are_judged_with_the_head_that_follows_the_rounds(tmp_path):
    choice = {
        "generator__family": "cvae", "generator__steps": 4, "distill__steps": 0, "rehearsal__candidates": (1.0,),
        "rehearsal__trial_rounds": 1, "finetune__num_rounds": 1,
    }  # fmt: skip
    scores = [
        go(tmp_path, finetune__head=head, **choice)["stages"]["rehearsal"]["key"] for head in sorted(CLOSING_HEADS)
    ]
    assert len(set(scores)) == len(CLOSING_HEADS)
    summary = go(tmp_path, finetune__head="prototype_head", **choice)
    assert summary["communication"]["measured_over_predicted"] == 1


@pytest.mark.ray
def test_serial_and_ray_make_the_same_prototype_head(tmp_path, ray_up):
    serial = go(tmp_path / "serial", runtime__host="serial", finetune__head="prototype_head", method="fedavg")
    ray = go(tmp_path / "ray", runtime__host="ray", finetune__head="prototype_head", method="fedavg")
    assert_same(student(ray), student(serial))
