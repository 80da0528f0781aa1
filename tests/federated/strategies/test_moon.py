"""MOON (docs/algorithm.md 3.16)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import FACTS, TINY, assert_same
from strategy_runs import (
    differs,
    go,
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
from mosaic_ray.federated.client import ClientContext, initial_weights
from mosaic_ray.federated.local_training import LocalTrainingConfig
from mosaic_ray.federated.strategies.moon import contrast


def reference(z: np.ndarray, same: np.ndarray, other: np.ndarray, temperature: float) -> float:
    """Equation 3 of the paper, image by image."""

    def sim(a: np.ndarray, b: np.ndarray) -> float:
        return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))

    terms = []
    for a, b, c in zip(z, same, other, strict=True):
        near, far = np.exp(sim(a, b) / temperature), np.exp(sim(a, c) / temperature)
        terms.append(-np.log(near / (near + far)))
    return float(np.mean(terms))


@pytest.mark.parametrize("temperature", [0.1, 0.5, 2.0])
def test_the_term_by_brute_force(temperature):
    draws = np.random.default_rng(0)
    z, same, other = draws.normal(size=(3, 6, 5))
    found = contrast(*(torch.tensor(part) for part in (z, same, other)), temperature)
    assert float(found) == pytest.approx(reference(z, same, other, temperature), rel=1e-9)
    assert float(contrast(*(torch.tensor(z) for _ in range(3)), temperature)) == pytest.approx(np.log(2))


def test_the_loss_of_a_step_by_brute_force():
    """Features of the model in training mode, of the received and the last one in eval mode; their weights stay."""
    strategy, config = named("moon", {"moon.mu": 2.0, "moon.temperature": 0.5})
    context, data = ClientContext(config, FACTS, torch.device("cpu")), some(6, 3, 2)
    received = initial_weights(context)
    draws = np.random.default_rng(1)
    last = {
        n: v + draws.normal(0, 0.1, v.shape).astype(v.dtype) if v.dtype.kind == "f" else v for n, v in received.items()
    }
    last = {n: np.abs(v) if n.endswith("running_var") else v for n, v in last.items()}
    model = context.classifier(received)
    start, shard = start_of(context, data, model, LocalTrainingConfig(1, 11, 0.1), last)
    objective = strategy.objective(start)
    images = shard.images.float() / 255
    with torch.no_grad():
        model.head.weight += 0.1  # as after a step: the received model is a copy
    model.train()
    logits = objective.forward(model, images)
    loss = objective.loss(model, logits, shard.labels)
    loss.backward()
    features = [
        context.classifier(w).train(mode).features(images)
        for w, mode in ((received, True), (received, False), (last, False))
    ]
    plain = torch.nn.functional.cross_entropy(logits, shard.labels)
    term = reference(*(part.detach().double().numpy() for part in features), 0.5)
    assert loss.item() == pytest.approx(plain.item() + 2.0 * term, rel=1e-5)
    assert model.trunk[0].weight.grad is not None
    assert_same(objective.finish(model, 1)[1], {n: v.numpy() for n, v in model.state_dict().items()})


def test_the_term_pulls_features_to_the_received_model(tmp_path):
    """The gradient of the term raises the similarity to the global features and lowers the other."""
    z = torch.tensor([[1.0, 1.0]], requires_grad=True)
    contrast(z, torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]), 0.5).backward()
    assert z.grad is not None and z.grad[0, 0] < 0 < z.grad[0, 1]


def test_mu_0_is_fedavg_bit_for_bit(tmp_path):
    is_fedavg(tmp_path, "moon", {"moon.mu": 0.0})


def test_the_first_round_is_fedavgs_and_the_second_is_not(tmp_path):
    is_fedavg(tmp_path, "moon", {"warmup.num_rounds": 1, "finetune.num_rounds": 0, "moon.mu": 5.0})
    differs(tmp_path, "moon", {"warmup.num_rounds": 2})


def test_a_client_keeps_its_last_local_model(tmp_path):
    result = warmed_up(go(tmp_path, "moon"))
    for k in range(3):
        assert_same(result.load(f"state_{k:05d}"), result.load(f"client_{k:05d}"))


def test_a_killed_run_resumes_bit_for_bit(tmp_path):
    resumes(tmp_path, "moon", {"federation.cohort_size": 2})


@pytest.mark.ray
@pytest.mark.slow
def test_ray_and_serial_agree_bit_for_bit(tmp_path, ray_up):
    same_on_ray(tmp_path, "moon")


@pytest.mark.parametrize(
    "strategy, knobs",
    [
        ("moon", {"federation.cohort_size": 2, "federation.drop_rate": 0.3}),
        ("moon", {"model.classifiers": ("cnn", "mobilenet", "cnn")}),
        ("moon+fedlc", {}),
        ("moon+heterofl", {}),
    ],
)
def test_it_works_with(tmp_path, strategy, knobs):
    found = go(tmp_path, strategy, knobs)
    assert found["communication"]["measured_over_predicted"] == 1
    assert all(np.isfinite(value).all() for value in student(found).values())
    off = go(tmp_path, strategy, knobs | {"moon.mu": 0.0})
    rest = "+".join(word for word in strategy.split("+") if word != "moon") or "fedavg"
    assert_same(student(off), student(go(tmp_path, rest, knobs)))
    left, right = parts(found), parts(off)
    assert any(not np.array_equal(left[name], right[name]) for name in left)


def test_rehearsal_leaves_synthetic_images_out_of_the_term(tmp_path):
    knobs = {
        "method": "mosaic", "distill.steps": 0, "generator.family": "cvae", "rehearsal.weight": 1.0,
        "rehearsal.classes": "all",
    }  # fmt: skip
    off = go(tmp_path, "moon", knobs | {"moon.mu": 0.0})
    assert_same(student(off), student(go(tmp_path, "fedavg", knobs)))
    on = go(tmp_path, "moon", knobs)
    assert all(np.isfinite(value).all() for value in student(on).values())


@pytest.mark.parametrize(
    "knobs, message",
    [
        ({"federation.widths": (0.5,)}, "federation.widths = [0.5]: moon trains whole models"),
        (
            {"federation.strategy": "heterofl+moon", "federation.widths": (1.0, 0.5)},
            "heterofl+moon trains whole models, so every width must be 1.0",
        ),
        ({"moon.temperature": 0.0}, "moon.temperature = 0.0: it takes a number above 0"),
        ({"federation.strategy": "moon+fedprox"}, "moon and fedprox cannot be combined, both set objective"),
    ],
)
def test_bad_requests_are_refused_in_one_line(knobs, message):
    with pytest.raises(RequestError) as caught:
        check(override(TINY, {"federation.strategy": "moon"} | knobs))
    assert message in str(caught.value) and "\n" not in str(caught.value)
