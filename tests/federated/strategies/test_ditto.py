"""Ditto (docs/algorithm.md 3.17)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import FACTS, TINY, Linear, assert_same
from strategy_runs import (
    go,
    inputs,
    is_fedavg,
    named,
    parts,
    resumes,
    same_on_ray,
    some,
    start_of,
    student,
    warmed_up,
)

from mosaic_ray.config.resolve import override
from mosaic_ray.config.validate import check
from mosaic_ray.core.errors import RequestError
from mosaic_ray.federated.client import ClientContext
from mosaic_ray.federated.local_training import LocalTrainingConfig, train_locally


@pytest.mark.parametrize("lam", [0.0, 0.7])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_three_steps_by_brute_force(lam, momentum):
    """v = v - lr d with d = momentum d + g(v) + lambda (v - w_t) + wd v, on all images; w_t is the received model."""
    strategy, config = named("ditto", {"ditto.lam": lam})
    context, data, lr, decay = ClientContext(config, FACTS, torch.device("cpu")), some(9, 4, 2), 0.2, 0.01
    torch.manual_seed(0)
    model, plan = Linear(), LocalTrainingConfig(3, len(data), lr, decay, momentum, shuffle=False)
    received = {n: v.numpy().copy() for n, v in model.state_dict().items()}
    draws = np.random.default_rng(0)
    state = {n: (v + draws.normal(0, 0.3, v.shape)).astype(np.float32) for n, v in received.items()}
    start, shard = start_of(context, data, model, plan, state)
    objective = strategy.objective(start)
    train_locally(model, shard, plan, FACTS, (0, "local", 0, 0), "fp32", objective=objective)
    message, found = objective.finish(model, 3)

    x, one_hot = inputs(data), np.eye(3)[data.labels]
    v = {n: a.astype(np.float64) for n, a in state.items()}
    w = {n: a.astype(np.float64) for n, a in received.items()}
    direction = {n: np.zeros_like(a) for n, a in v.items()}
    for _ in range(3):
        e = np.exp(x @ v["head.weight"].T + v["head.bias"])
        slope = (e / e.sum(1, keepdims=True) - one_hot) / len(data)
        g = {"head.weight": slope.T @ x, "head.bias": slope.sum(0)}
        for n in v:
            direction[n] = momentum * direction[n] + g[n] + lam * (v[n] - w[n]) + decay * v[n]
            v[n] = v[n] - lr * direction[n]
    assert message == {}
    for n in v:
        np.testing.assert_allclose(found[n], v[n], atol=1e-5)


@pytest.mark.parametrize("lam", [0.0, 1.0])
def test_the_global_part_is_fedavg_bit_for_bit(tmp_path, lam):
    found = is_fedavg(tmp_path, "ditto", {"ditto.lam": lam})
    assert found["communication_bytes"] == go(tmp_path, "fedavg")["communication_bytes"]


def test_the_global_part_is_fedavg_with_dropout(tmp_path, networks):
    knobs = {"model.classifier": "strategy_networks:dropping"}
    is_fedavg(tmp_path, "ditto", knobs)


def test_with_lambda_0_the_personal_models_are_those_of_local_training(tmp_path):
    ditto, local = go(tmp_path, "ditto", {"ditto.lam": 0.0}), go(tmp_path, "local")
    for k in range(3):
        assert_same(*(warmed_up(found).load(f"state_{k:05d}") for found in (ditto, local)))
    assert ditto["personal_accuracy"] == local["personal_accuracy"]
    assert any(not np.array_equal(v, student(local)[n]) for n, v in student(ditto).items())


def test_a_larger_lambda_keeps_personal_models_nearer(tmp_path):
    """The start of the last round is the global model of the round before."""
    rounds = {"warmup.num_rounds": 3, "finetune.num_rounds": 0}
    before = warmed_up(go(tmp_path, "fedavg", rounds | {"warmup.num_rounds": 2})).load("global")["head.weight"]

    def distance(lam: float) -> float:
        result = warmed_up(go(tmp_path, "ditto", rounds | {"ditto.lam": lam}))
        return sum(float(np.abs(result.load(f"state_{k:05d}")["head.weight"] - before).sum()) for k in range(3))

    assert distance(15.0) < distance(1.0) < distance(0.0)


def test_a_killed_run_resumes_bit_for_bit(tmp_path):
    resumes(tmp_path, "ditto", {"federation.cohort_size": 2})


@pytest.mark.ray
def test_ray_and_serial_agree_bit_for_bit(tmp_path, ray_up):
    same_on_ray(tmp_path, "ditto")


@pytest.mark.parametrize(
    "strategy, knobs",
    [
        ("ditto", {"federation.cohort_size": 2, "federation.drop_rate": 0.3}),
        ("ditto", {"model.classifiers": ("cnn", "mobilenet", "cnn")}),
        ("ditto", {"warmup.loss": "adjusted", "finetune.freeze_head": True, "finetune.bn": "running"}),
        ("ditto+fedrs", {}),
        ("ditto", {"method": "mosaic"}),
    ],
)
def test_it_works_with(tmp_path, strategy, knobs):
    """Everything that is not personal is as without Ditto."""
    found = go(tmp_path, strategy, knobs)
    rest = "+".join(word for word in strategy.split("+") if word != "ditto") or "fedavg"
    plain = go(tmp_path, rest, knobs)
    assert_same(student(found), student(plain))
    left, right = parts(found), parts(plain)
    assert_same({name: value for name, value in left.items() if not name.startswith("state_")}, right)
    assert found["accuracy"] == plain["accuracy"] and "personal_accuracy" not in plain
    assert len(found["personal_accuracy"]["clients"]) == 3


@pytest.mark.parametrize(
    "knobs, message",
    [
        ({"federation.widths": (0.5,)}, "federation.widths = [0.5]: ditto trains whole models"),
        ({"ditto.lam": -1.0}, "ditto.lam = -1.0: it takes a number at least 0"),
        ({"federation.strategy": "ditto+fedbn"}, "ditto and fedbn cannot be combined, both set"),
    ],
)
def test_bad_requests_are_refused_in_one_line(knobs, message):
    with pytest.raises(RequestError) as caught:
        check(override(TINY, {"federation.strategy": "ditto"} | knobs))
    assert message in str(caught.value) and "\n" not in str(caught.value)
