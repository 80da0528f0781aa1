"""FedLC (docs/algorithm.md 3.15)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import FACTS, TINY, Linear, assert_same
from strategy_runs import differs, go, inputs, is_fedavg, named, resumes, some, start_of, student

from mosaic_ray.config.resolve import override
from mosaic_ray.config.validate import check
from mosaic_ray.core.errors import RequestError
from mosaic_ray.federated.client import ClientContext
from mosaic_ray.federated.local_training import LocalTrainingConfig, train_locally


@pytest.mark.parametrize("margin", ["counts", "shares"])
@pytest.mark.parametrize("tau", [0.5, 3.0])
@pytest.mark.parametrize("counts", [(12, 3, 1), (10, 6, 0), (8, 0, 0)])
def test_one_step_by_brute_force(tau, counts, margin):
    """The loss is log(sum_c exp(f_c - f_y + margin_y - margin_c)) over the classes c that the client holds."""
    strategy, config = named("fedlc", {"fedlc.tau": tau, "fedlc.margin": margin})
    context, data, lr = ClientContext(config, FACTS, torch.device("cpu")), some(*counts), 0.1
    torch.manual_seed(0)
    model, plan = Linear(), LocalTrainingConfig(1, len(data), lr)
    weights, bias = (p.detach().double().numpy().copy() for p in model.head.parameters())
    start, shard = start_of(context, data, model, plan)
    metrics = train_locally(
        model, shard, plan, FACTS, (0, "local", 0, 0), "fp32", adjust=strategy.adjust_logits(start)
    )  # fmt: skip
    x, held = inputs(data), [c for c in range(3) if counts[c]]
    f = x @ weights.T + bias
    of = {c: tau * (counts[c] ** -0.25 if margin == "counts" else -np.log(counts[c] / len(data))) for c in held}
    losses, slope = [], np.zeros((len(data), 3))
    for row, y in enumerate(data.labels):
        terms = {c: np.exp(f[row, c] - f[row, y] + of[y] - of[c]) for c in held}
        losses.append(np.log(sum(terms.values())))
        for c in held:
            slope[row, c] = (terms[c] / sum(terms.values()) - (c == y)) / len(data)
    assert metrics["loss"] == pytest.approx(np.mean(losses), rel=1e-4, abs=1e-6)
    np.testing.assert_allclose(model.head.weight.detach(), weights - lr * slope.T @ x, atol=1e-6)
    np.testing.assert_allclose(model.head.bias.detach(), bias - lr * slope.sum(0), atol=1e-6)


@pytest.mark.parametrize("margin", ["counts", "shares"])
def test_tau_0_is_fedavg_bit_for_bit(tmp_path, margin):
    is_fedavg(tmp_path, "fedlc", {"fedlc.tau": 0.0, "fedlc.margin": margin})
    differs(tmp_path, "fedlc", {"fedlc.margin": margin} if margin == "shares" else {})


def test_shares_with_tau_1_are_the_adjusted_loss_bit_for_bit(tmp_path):
    found = go(tmp_path, "fedlc", {"fedlc.margin": "shares"})
    assert_same(student(found), student(go(tmp_path, "fedavg", {"warmup.loss": "adjusted"})))


@pytest.mark.parametrize(
    "strategy, knobs",
    [
        ("fedlc", {"federation.cohort_size": 2, "federation.drop_rate": 0.3}),
        ("fedrolex+fedlc", {"federation.widths": (1.0, 0.5), "model.width": 8}),
        ("fedlc", {"federation.masked": True}),
        ("fedlc+scaffold", {}),
        ("fedlc", {"model.classifiers": ("cnn", "mobilenet", "cnn")}),
    ],
)
def test_it_works_with(tmp_path, strategy, knobs):
    found = go(tmp_path, strategy, knobs)
    assert found["communication"]["measured_over_predicted"] == 1
    assert all(np.isfinite(value).all() for value in student(found).values())
    rest = "+".join(word for word in strategy.split("+") if word != "fedlc") or "fedavg"
    off = go(tmp_path, strategy, knobs | {"fedlc.tau": 0.0})
    assert_same(student(off), student(go(tmp_path, rest, knobs)))


def test_a_killed_run_resumes_bit_for_bit(tmp_path):
    resumes(tmp_path, "fedlc")


@pytest.mark.parametrize(
    "knobs, message",
    [
        ({"warmup.loss": "adjusted"}, "warmup.loss = adjusted: fedlc calibrates the same logits; take ce"),
        ({"fedlc.tau": -1.0}, "fedlc.tau = -1.0: it takes a number at least 0"),
        ({"federation.widths": (0.5,)}, "federation.widths = [0.5]: fedlc trains whole models"),
    ],
)
def test_bad_requests_are_refused_in_one_line(knobs, message):
    with pytest.raises(RequestError) as caught:
        check(override(TINY, {"federation.strategy": "fedlc"} | knobs))
    assert message in str(caught.value) and "\n" not in str(caught.value)
