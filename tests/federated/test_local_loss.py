"""The logit-adjusted loss (docs/algorithm.md 1.3) and the decay of the learning rate."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import FACTS, TINY, Linear, assert_same, interrupted, shard_of, stripes, stripes_dataset
from safetensors.numpy import load_file

import mosaic_ray.data.load as datasets
from mosaic_ray.config.resolve import override
from mosaic_ray.core.types import ImageSet
from mosaic_ray.data.transforms import normalise
from mosaic_ray.federated.client import ClientContext, TrainTask, initial_weights
from mosaic_ray.federated.local_training import LocalTrainingConfig, log_shares, train_locally
from mosaic_ray.models.state_dict import to_weights
from mosaic_ray.runs import runner

CONTEXT = ClientContext(TINY, FACTS, torch.device("cpu"))
QUICK = {"method": "fedavg", "warmup.num_rounds": 3, "warmup.checkpoint_rounds": 1, "runtime.eval_rounds": 0}
ADJUSTED = QUICK | {"warmup.loss": "adjusted", "warmup.lr_decay": 0.5, "finetune.lr_decay": 0.25}


def some(*counts: int) -> ImageSet:
    """Stripes with ``counts`` images of each class."""
    every = stripes(3 * max(counts))
    return every.take(np.concatenate([np.flatnonzero(every.labels == c)[:n] for c, n in enumerate(counts)]))


def trained(data: ImageSet, loss: str, masked: bool = False, decay: float = 0.0) -> tuple[dict, dict]:
    model = CONTEXT.classifier(initial_weights(CONTEXT))
    plan = LocalTrainingConfig(4, 16, 0.05, decay, momentum=0.9, loss=loss)
    metrics = train_locally(model, shard_of(data), plan, FACTS, (0, "local", 0, 0), "fp32", masked=masked)
    return to_weights(model), metrics


def test_equal_shares_of_all_classes_are_plain_cross_entropy():
    (plain, before), (same, after) = (trained(some(20, 20, 20), loss) for loss in ("ce", "adjusted"))
    assert after == pytest.approx(before, rel=1e-5)
    for name in plain:
        np.testing.assert_allclose(same[name], plain[name], atol=1e-6, err_msg=name)
    (plain, _), (other, _) = (trained(some(40, 10, 5), loss) for loss in ("ce", "adjusted"))
    assert any(not np.allclose(other[name], plain[name], atol=1e-4) for name in plain)


@pytest.mark.parametrize("counts", [(12, 3, 1), (10, 6, 0)])
def test_one_step_by_brute_force(counts):
    """p(c | x) is proportional to n_c exp f_c(x) over the classes that the client holds."""
    data = some(*counts)
    torch.manual_seed(0)
    model, lr = Linear(), 0.1
    x = normalise(torch.tensor(data.images), FACTS.mean, FACTS.std).flatten(1).double().numpy()
    weights, bias = (p.detach().double().numpy() for p in model.head.parameters())
    odds = np.array(counts) * np.exp(x @ weights.T + bias)
    p = odds / odds.sum(1, keepdims=True)
    loss = -np.log(p[np.arange(len(data)), data.labels]).mean()
    slope = (p - np.eye(3)[data.labels]) / len(data)
    plan = LocalTrainingConfig(1, len(data), lr, loss="adjusted")
    metrics = train_locally(model, shard_of(data), plan, FACTS, (0, "local", 0, 0), "fp32")
    assert metrics["loss"] == pytest.approx(loss, rel=1e-5)
    np.testing.assert_allclose(model.head.weight.detach(), weights - lr * slope.T @ x, atol=1e-6)
    np.testing.assert_allclose(model.head.bias.detach(), bias - lr * slope.sum(0), atol=1e-6)


def test_a_class_that_the_client_lacks_is_left_out_masked_or_not():
    assert log_shares(torch.tensor([0, 0, 2, 0]), 3).exp().tolist() == pytest.approx([0.75, 0, 0.25])
    start, data = initial_weights(CONTEXT), some(30, 0, 10)
    (found, metrics), (masked, _), (plain, _) = (
        trained(data, loss, mask) for loss, mask in (("adjusted", False), ("adjusted", True), ("ce", False))
    )
    assert_same(found, masked)
    assert np.isfinite(metrics["loss"]) and all(np.isfinite(value).all() for value in found.values())
    moved, moves = ((w["head.weight"] != start["head.weight"]).any(1).tolist() for w in (found, plain))
    assert (moved, moves) == ([True, False, True], [True, True, True])
    alone, _ = trained(some(30, 0, 0), "adjusted")  # one class: nothing to tell it from
    assert_same({n: v for n, v in alone.items() if "head" in n}, {n: v for n, v in start.items() if "head" in n})


# --- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda config: stripes_dataset())


def go(storage: Path, knobs: dict) -> dict[str, np.ndarray]:
    summary = runner.run(override(TINY, knobs), storage=str(storage), progress=False)
    return load_file(Path(summary["paths"]["run"]) / "student.safetensors")


@pytest.mark.parametrize("warmup, closing", [(1.0, 1.0), (0.5, 0.25)])
def test_round_r_trains_with_lr_times_decay_to_the_r(tmp_path, monkeypatch, warmup, closing):
    rates, train = {}, TrainTask.run

    def watched(task, *inputs):
        rates[task.phase, task.round_num] = task.plan.lr
        return train(task, *inputs)

    monkeypatch.setattr(TrainTask, "run", watched)
    go(tmp_path, QUICK | {"warmup.lr": 0.03, "finetune.lr": 0.7e-3, "warmup.lr_decay": warmup} | {
        "finetune.lr_decay": closing,
    })  # fmt: skip
    assert rates == {("local", r): 0.03 * warmup**r for r in range(3)} | {
        ("closing", r): 0.7e-3 * closing**r for r in range(2)
    }


def test_a_killed_run_ends_with_the_same_numbers(tmp_path):
    whole = go(tmp_path / "whole", ADJUSTED)
    with interrupted(in_round=2):
        go(tmp_path / "killed", ADJUSTED)
    assert_same(go(tmp_path / "killed", ADJUSTED), whole)
    plain = go(tmp_path / "whole", QUICK)
    assert not np.allclose(plain["head.weight"], whole["head.weight"], atol=1e-4)


@pytest.mark.ray
def test_serial_and_ray_agree_bit_for_bit(tmp_path, ray_up):
    serial = go(tmp_path / "serial", ADJUSTED)
    assert_same(go(tmp_path / "ray", ADJUSTED | {"runtime.host": "ray"}), serial)


@pytest.mark.parametrize("masked", [False, True])
def test_narrow_clients_train_with_it(tmp_path, masked):
    narrow = ADJUSTED | {"federation.strategy": "heterofl+fedprox", "federation.widths": (1.0, 0.5)}
    found = go(tmp_path, narrow | {"federation.masked": masked})
    assert all(np.isfinite(value).all() for value in found.values())
    plain = go(tmp_path, narrow | {"federation.masked": masked, "warmup.loss": "ce"})
    assert not np.allclose(plain["head.weight"], found["head.weight"], atol=1e-4)


def test_the_default_is_the_plan_of_before():
    assert LocalTrainingConfig(1, 1, 0.1) == dataclasses.replace(LocalTrainingConfig(1, 1, 0.1), loss="ce")
    assert (TINY.warmup.loss, TINY.warmup.lr_decay, TINY.finetune.lr_decay) == ("ce", 1.0, 1.0)
