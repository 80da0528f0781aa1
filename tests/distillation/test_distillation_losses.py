"""Properties of the divergences and of the distillation loss (O16 to O18)."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from logits import B, C, batches, extremes, few, gradient, normal, one_hot
from torch import nn

from mosaic_ray.config.resolve import KNOBS
from mosaic_ray.config.schema import DistillConfig
from mosaic_ray.core.seeding import stream
from mosaic_ray.distillation.losses import (
    DIVERGENCES,
    bhattacharyya,
    distillation_loss,
    jensen_shannon,
    kl,
    with_asked_labels,
)

# --- O16: divergences ------------------------------------------------------------------------------------------------


@given(batches, batches)
@few
def test_o16_jensen_shannon_range_symmetry_and_order(p, q):
    js = jensen_shannon(p, q)
    assert js.shape == (B,) and (js >= -1e-6).all() and (js <= math.log(2) + 1e-6).all()
    torch.testing.assert_close(js, jensen_shannon(q, p), rtol=0, atol=1e-6)
    assert (bhattacharyya(p, q) >= js - 1e-5).all()
    torch.testing.assert_close(bhattacharyya(p, q), bhattacharyya(q, p))


@given(batches, batches)
@few
def test_o16_true_value_by_hand(p, q):
    p, q = p.double(), q.double()
    a, b = p.softmax(1), q.softmax(1)
    m = (a + b) / 2
    xlogy = torch.special.xlogy
    by_hand = (xlogy(a, a) - xlogy(a, m) + xlogy(b, b) - xlogy(b, m)).sum(1) / 2
    torch.testing.assert_close(jensen_shannon(p, q), by_hand, rtol=1e-6, atol=1e-9)


@given(batches, batches)
@few
def test_o16_k1_averaged_logits_and_reversed_kls_are_bhattacharyya(p, q):
    p, q = p.double(), q.double()
    m = (p + q) / 2
    reference = (kl(m, p) + kl(m, q)) / 2
    torch.testing.assert_close(bhattacharyya(p, q), reference, rtol=1e-6, atol=1e-6)
    direct = -(p.softmax(1) * q.softmax(1)).sqrt().sum(1).log()
    torch.testing.assert_close(bhattacharyya(p, q), direct, rtol=1e-6, atol=1e-6)


def test_o16_zero_iff_equal_and_log_2_for_disjoint():
    p = normal(B, C)
    for divergence in DIVERGENCES.values():
        assert divergence(p, p + 3).abs().max() < 1e-6  # logits up to a constant are the same distribution
        assert (divergence(p, normal(B, C, seed=1)) > 1e-3).all()
    assert jensen_shannon(one_hot(0), one_hot(1)).item() == pytest.approx(math.log(2))
    assert bhattacharyya(one_hot(0), one_hot(1)).item() > 100


def test_o16_both_tend_to_a_quarter_of_kl():
    p = normal(200, 10, dtype=torch.float64)
    relative = 1e-2 * normal(200, 10, seed=1, dtype=torch.float64)
    q = (p.softmax(1) * (1 + relative)).log()
    for divergence in DIVERGENCES.values():
        assert (divergence(p, q).sum() / kl(p, q, 1.0).sum()).item() == pytest.approx(0.25, abs=1.5e-3)


@pytest.mark.parametrize("divergence", [*DIVERGENCES.values(), lambda p, q: kl(p, q, 0.5)])
def test_extreme_logits_and_equality_have_finite_gradients(divergence):
    p = extremes()
    for q in (p.clone(), p.flip(0), p.roll(5, 0)):
        q.requires_grad_()
        value = divergence(p, q)
        assert value.isfinite().all() and gradient(value.sum(), q).isfinite().all()
    q = p.clone().requires_grad_()
    assert gradient(divergence(p, q).sum(), q).abs().max() < 1e-6


# --- O17, O18: distillation ------------------------------------------------------------------------------------------


def test_registry_matches_the_knob():
    assert tuple(DIVERGENCES) == KNOBS["distill.jsd"].metadata["choices"]


@pytest.mark.parametrize("jsd", DIVERGENCES)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_o17_student_equal_to_teacher_leaves_the_hard_term(temperature, jsd):
    logits = normal(B, C).requires_grad_()
    config = DistillConfig(temperature=temperature, soft_weight=0.7, js_weight=2.0, jsd=jsd)
    loss, parts = distillation_loss(logits.detach(), logits, config)
    hard = -logits.log_softmax(1).max(1).values.mean()
    assert abs(parts["soft"]) < 1e-6 and abs(parts["js"]) < 1e-6
    torch.testing.assert_close(parts["hard"], hard.detach())
    torch.testing.assert_close(loss, 0.3 * hard, rtol=1e-4, atol=1e-5)
    soft = distillation_loss(logits.detach(), logits, DistillConfig(soft_weight=1.0, js_weight=0.0))[0]
    assert gradient(soft, logits).abs().max() < 1e-6


def test_o17_soft_gradient_does_not_shrink_with_temperature():
    teacher, student = normal(B, C, dtype=torch.float64), normal(B, C, seed=1, dtype=torch.float64).requires_grad_()
    norms = [gradient(kl(teacher, student, t).mean(), student).norm().item() for t in (20.0, 40.0, 80.0)]
    assert norms == pytest.approx([norms[-1]] * 3, rel=0.05)


def test_o18_the_teacher_is_the_target():
    p, q = torch.tensor([[0.7, 0.2, 0.1]]), torch.tensor([[0.2, 0.2, 0.6]])
    forward = 0.7 * math.log(0.7 / 0.2) + 0.1 * math.log(0.1 / 0.6)
    backward = 0.2 * math.log(0.2 / 0.7) + 0.6 * math.log(0.6 / 0.1)
    assert kl(p.log(), q.log(), 1.0).item() == pytest.approx(forward, rel=1e-5)
    assert kl(q.log(), p.log(), 1.0).item() == pytest.approx(backward, rel=1e-5)
    _, parts = distillation_loss(p.log(), q.log(), DistillConfig())
    assert parts["soft"].item() == pytest.approx(forward, rel=1e-5)
    assert parts["hard"].item() == pytest.approx(-math.log(0.2), rel=1e-5)  # the teacher's class under the student


@pytest.mark.parametrize("jsd", DIVERGENCES)
def test_distillation_is_the_stated_sum(jsd):
    teacher, student = normal(B, C), normal(B, C, seed=1)
    config = DistillConfig(temperature=2.0, soft_weight=0.6, js_weight=0.5, jsd=jsd)
    loss, parts = distillation_loss(teacher, student, config)
    soft = kl(teacher, student, 2.0).mean()
    hard = nn.functional.cross_entropy(student, teacher.argmax(1))
    js = DIVERGENCES[jsd](teacher / 2, student / 2).mean()
    torch.testing.assert_close(loss, 0.6 * soft + 0.4 * hard + 0.5 * js)
    torch.testing.assert_close(torch.stack([parts["soft"], parts["hard"], parts["js"]]), torch.stack([soft, hard, js]))
    assert not any(part.requires_grad for part in parts.values())


def test_distillation_weights_select_and_average():
    teacher, student, config = normal(B, C), normal(B, C, seed=1), DistillConfig()
    whole = distillation_loss(teacher, student, config)[0]
    torch.testing.assert_close(distillation_loss(teacher, student, config, torch.full((B,), 3.0))[0], whole)
    chosen = torch.tensor([1, 0, 2, 0, 0, 1])
    repeated = [0, 2, 2, 5]
    by_hand = distillation_loss(teacher[repeated], student[repeated], config)[0]
    torch.testing.assert_close(distillation_loss(teacher, student, config, chosen)[0], by_hand)


def test_distillation_of_workers_adds_up_to_that_of_the_joined_batch():
    teacher, student, config = normal(B, C), normal(B, C, seed=1).requires_grad_(), DistillConfig()
    weights = torch.rand(B, generator=stream(0, "weights"))
    whole = distillation_loss(teacher, student, config, weights)[0]
    parts = [
        distillation_loss(teacher[rows], student[rows], config, weights[rows], normaliser=weights.sum())[0]
        for rows in (slice(0, 2), slice(2, B))
    ]
    torch.testing.assert_close(sum(parts), whole)
    torch.testing.assert_close(gradient(sum(parts), student), gradient(whole, student))


def test_distillation_without_a_single_chosen_sample_is_zero():
    student = normal(B, C, seed=1).requires_grad_()
    loss, _ = distillation_loss(normal(B, C), student, DistillConfig(), torch.zeros(B))
    assert loss == 0 and not gradient(loss, student).any()


def test_distillation_of_extreme_logits_is_finite():
    student = extremes().flip(0).requires_grad_()
    for jsd in DIVERGENCES:
        loss, parts = distillation_loss(extremes(), student, DistillConfig(jsd=jsd, temperature=0.5))
        assert loss.isfinite() and all(part.isfinite() for part in parts.values())
        assert gradient(loss, student).isfinite().all()


@pytest.mark.parametrize("weight", [0.01, 0.5, 0.99])
def test_s2_the_target_is_part_teacher_and_part_label(weight):
    logits = torch.tensor([[2.0, -1.0, 0.5], [40.0, 0.0, -40.0]])
    labels = torch.tensor([1, 2])
    expected = (1 - weight) * logits.softmax(1) + weight * torch.eye(3)[labels]
    torch.testing.assert_close(with_asked_labels(logits, labels, weight).softmax(1), expected)
    torch.testing.assert_close(with_asked_labels(logits, labels, weight).exp().sum(1), torch.ones(2))
