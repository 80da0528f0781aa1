"""FedRS (docs/algorithm.md 3.4, O23)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import FACTS, TINY, Linear, assert_same
from strategy_runs import differs, go, inputs, is_fedavg, named, resumes, some, start_of, student, warmed_up

from mosaic_ray.config.resolve import override
from mosaic_ray.config.validate import check
from mosaic_ray.core.errors import RequestError
from mosaic_ray.federated.client import ClientContext
from mosaic_ray.federated.local_training import LocalTrainingConfig, train_locally


def step(alpha: float, counts: tuple[int, ...], lr: float = 0.1):
    """One step of a linear model on all images; returns its weights before and after, and the loss."""
    strategy, config = named("fedrs", {"fedrs.alpha": alpha})
    context, data = ClientContext(config, FACTS, torch.device("cpu")), some(*counts)
    torch.manual_seed(0)
    model, plan = Linear(), LocalTrainingConfig(1, len(data), lr)
    before = [p.detach().double().numpy().copy() for p in model.head.parameters()]
    start, shard = start_of(context, data, model, plan)
    metrics = train_locally(
        model, shard, plan, FACTS, (0, "local", 0, 0), "fp32", adjust=strategy.adjust_logits(start)
    )  # fmt: skip
    return data, before, [p.detach().double().numpy() for p in model.head.parameters()], metrics["loss"]


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("counts", [(12, 3, 1), (10, 6, 0), (8, 0, 0)])
def test_one_step_by_brute_force(alpha, counts):
    """The gradient of CE(psi f(x), y) is psi (p - y) x, with p the softmax of psi f(x)."""
    data, (weights, bias), (new_weights, new_bias), found = step(alpha, counts)
    x, psi = inputs(data), np.where(np.array(counts) > 0, 1.0, alpha)
    logits = psi * (x @ weights.T + bias)
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    loss = -np.log(p[np.arange(len(data)), data.labels]).mean()
    slope = psi * (p - np.eye(3)[data.labels]) / len(data)
    assert found == pytest.approx(loss, rel=1e-5)
    np.testing.assert_allclose(new_weights, weights - 0.1 * slope.T @ x, atol=1e-6)
    np.testing.assert_allclose(new_bias, bias - 0.1 * slope.sum(0), atol=1e-6)


def test_o23_with_alpha_0_rows_of_missing_classes_stay():
    _, (before, _), (after, _), _ = step(0.0, (10, 6, 0))
    assert [bool((a != b).any()) for a, b in zip(after, before, strict=True)] == [True, True, False]


def test_o23_alpha_1_is_fedavg_bit_for_bit(tmp_path):
    skewed = {"partition.sampler": "pathological", "partition.classes_per_client": 1}
    is_fedavg(tmp_path, "fedrs", skewed | {"fedrs.alpha": 1.0})
    differs(tmp_path, "fedrs", skewed)


def test_clients_with_all_classes_are_fedavgs(tmp_path):
    is_fedavg(tmp_path, "fedrs", {"partition.sampler": "iid", "fedrs.alpha": 0.0})


@pytest.mark.parametrize(
    "strategy, knobs",
    [
        ("fedrs", {"federation.cohort_size": 2, "federation.drop_rate": 0.3}),
        ("heterofl+fedrs", {"federation.widths": (1.0, 0.5), "model.width": 8}),
        ("fedrs+fedprox", {"fedprox.mu": 0.1}),
        ("fedrs+scaffold", {}),
        ("fedrs", {"model.classifiers": ("cnn", "mobilenet", "cnn")}),
    ],
)
def test_it_works_with(tmp_path, strategy, knobs):
    skewed = {"partition.sampler": "pathological", "partition.classes_per_client": 2}
    found = go(tmp_path, strategy, skewed | knobs)
    assert found["communication"]["measured_over_predicted"] == 1
    assert all(np.isfinite(value).all() for value in student(found).values())
    rest = "+".join(word for word in strategy.split("+") if word != "fedrs") or "fedavg"
    other = go(tmp_path, rest, skewed | knobs)
    assert any(
        not np.array_equal(v, warmed_up(other).load("global")[n]) for n, v in warmed_up(found).load("global").items()
    )
    off = go(tmp_path, strategy, skewed | knobs | {"fedrs.alpha": 1.0})
    assert_same(student(off), student(other))


def test_a_killed_run_resumes_bit_for_bit(tmp_path):
    resumes(tmp_path, "fedrs")


@pytest.mark.parametrize(
    "knobs, message",
    [
        ({"warmup.loss": "adjusted"}, "warmup.loss = adjusted: it leaves out the classes that fedrs scales; take ce"),
        ({"federation.masked": True}, "federation.masked = true: it sets the logits to zero that fedrs scales"),
        ({"fedrs.alpha": 1.5}, "fedrs.alpha = 1.5: it takes a number at least 0"),
        ({"federation.strategy": "fedrs+fedlc"}, "fedrs and fedlc cannot be combined, both set adjust_logits"),
        ({"federation.widths": (0.5,)}, "federation.widths = [0.5]: fedrs trains whole models"),
    ],
)
def test_bad_requests_are_refused_in_one_line(knobs, message):
    with pytest.raises(RequestError) as caught:
        check(override(TINY, {"federation.strategy": "fedrs"} | knobs))
    assert message in str(caught.value) and "\n" not in str(caught.value)
