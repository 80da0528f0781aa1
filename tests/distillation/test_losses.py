"""Properties of the losses (O12 to O19; O15 is a property of training and is tested there)."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from logits import LOG_C, B, C, batches, extremes, few, gradient, normal, one_hot
from torch import Tensor, nn

from mosaic_ray.config.schema import DistillConfig, ModelConfig
from mosaic_ray.core.seeding import seeded
from mosaic_ray.core.types import Weights
from mosaic_ray.distillation.losses import (
    adversarial_loss,
    bhattacharyya,
    discriminator_loss,
    distillation_loss,
    diversity_loss,
    entropy_loss,
    inversion_probe,
    jensen_shannon,
    kl,
)
from mosaic_ray.models.classifiers import build_classifier
from mosaic_ray.models.state_dict import bn_statistics, to_weights

NAMES = ("running_mean", "running_var")


def inversion_loss(model: nn.Module, x: Tensor, targets: Weights | None = None) -> Tensor:
    with inversion_probe(model, targets) as inversion:
        model(x)
    return inversion()


# --- O12, O13: diversity and entropy ---------------------------------------------------------------------------------


@given(batches)
@few
def test_o12_diversity_range(logits):
    assert -LOG_C - 1e-5 <= diversity_loss(logits) <= 1e-5


def test_o12_diversity_ends():
    assert diversity_loss(torch.zeros(B, C)).item() == pytest.approx(-LOG_C, abs=1e-6)
    assert diversity_loss(one_hot(2, 2, 2)).item() == 0


def test_o12_diversity_ignores_confidence():
    """Each class once with certainty, or every sample undecided: the mean is uniform either way."""
    certain, undecided = one_hot(*range(C)), torch.zeros(C, C)
    assert diversity_loss(certain).item() == pytest.approx(diversity_loss(undecided).item(), abs=1e-6)


@pytest.mark.parametrize("support", [None, torch.tensor([True, False, True, True, False])])
def test_o12_a_descent_step_raises_the_entropy_of_the_mean(support):
    logits = normal(B, C, seed=1).requires_grad_()
    step = logits - 0.5 * gradient(diversity_loss(logits, support), logits)

    def entropy(x: Tensor) -> Tensor:
        mean = x.softmax(1).mean(0)
        mean = mean if support is None else mean[support] / mean[support].sum()
        return -(mean * mean.log()).sum()

    assert entropy(step) > entropy(logits)


@given(batches)
@few
def test_g8_all_owned_is_the_plain_loss(logits):
    torch.testing.assert_close(diversity_loss(logits, torch.ones(C, dtype=torch.bool)), diversity_loss(logits))


@given(batches, st.sets(st.integers(0, C - 1), min_size=1))
@few
def test_g8_owned_range_and_minimum(logits, owned):
    support = torch.zeros(C, dtype=torch.bool)
    support[list(owned)] = True
    floor = -math.log(len(owned))
    assert diversity_loss(logits, support) >= floor - 1e-5
    mean = logits.double().softmax(1).mean(0)
    inside = mean[support].sum()
    share = mean[support] / inside
    by_hand = torch.special.xlogy(share, share).sum() - inside.log()
    torch.testing.assert_close(diversity_loss(logits.double(), support), by_hand)
    best = torch.where(support, 0.0, -1e4).expand(B, C)
    assert diversity_loss(best, support).item() == pytest.approx(floor, abs=1e-6)


@given(batches, st.lists(st.integers(0, 50), min_size=C, max_size=C).filter(any))
@few
def test_s3_the_clients_shares_are_the_one_minimum(logits, counts):
    shares = torch.tensor(counts, dtype=torch.float64) / sum(counts)
    support, mean = shares > 0, logits.double().softmax(1).mean(0)
    inside = mean[support].sum()
    r = mean[support] / inside
    by_hand = (r * (r.log() - shares[support].log())).sum() - inside.log()
    torch.testing.assert_close(diversity_loss(logits.double(), support, shares), by_hand)
    assert by_hand >= -1e-9
    best = torch.where(support, shares.clamp(min=1e-9).log(), -1e4).expand(B, C)
    assert diversity_loss(best, support, shares).item() == pytest.approx(0, abs=1e-6)


def test_s3_with_equal_shares_only_a_constant_is_added():
    logits, support = normal(B, C, seed=3), torch.tensor([True, True, False, True, False])
    shares = support / support.sum()
    torch.testing.assert_close(
        diversity_loss(logits, support, shares), diversity_loss(logits, support) + math.log(3), atol=1e-5, rtol=0
    )


def test_s3_the_gradient_pulls_to_the_shares_and_not_to_equal_ones():
    support, shares = torch.tensor([True, True, False, False, False]), torch.tensor([0.99, 0.01, 0, 0, 0])
    logits = torch.where(support, 0.0, -20.0).repeat(B, 1).requires_grad_()
    assert gradient(diversity_loss(logits, support), logits).abs().max() < 1e-6
    step = logits - gradient(diversity_loss(logits, support, shares), logits)
    assert step.softmax(1).mean(0)[0] > 0.51


def test_g8_mass_outside_the_owned_classes_costs():
    support = torch.tensor([True, True, False, False, False])
    outside = [-20.0, -1.0, 0.0, 5.0, 1e4]
    values = [diversity_loss(torch.tensor([[0.0, 0.0, x, x, x]]), support).item() for x in outside]
    assert values == sorted(set(values))
    assert values[0] == pytest.approx(-math.log(2)) and values[-1] == pytest.approx(1e4 + math.log(3) - 2 * math.log(2))


@given(batches)
@few
def test_o13_entropy_range_and_concavity(logits):
    entropy = entropy_loss(logits)
    assert -2e-5 <= entropy <= LOG_C + 1e-5
    assert entropy <= -diversity_loss(logits) + 1e-5


def test_o13_entropy_ends():
    assert entropy_loss(one_hot(0, 3)).item() == pytest.approx(0, abs=1.1e-5)
    assert entropy_loss(torch.zeros(B, C)).item() == pytest.approx(LOG_C, abs=1e-4)


@pytest.mark.parametrize("support", [None, torch.tensor([True, False, True]), torch.tensor([False, False, True])])
def test_g7_extreme_logits_stay_finite(support):
    for batch in (extremes(), extremes()[:1], extremes()[9:10]):
        logits = batch.clone().requires_grad_()
        loss = diversity_loss(logits, support) + entropy_loss(logits)
        assert loss.isfinite() and gradient(loss, logits).isfinite().all()


# --- O14: inversion --------------------------------------------------------------------------------------------------


def small_net() -> nn.Module:
    with seeded(0, "test"):
        net = build_classifier(ModelConfig(width=4), C, 1, 8)
        net(torch.randn(64, 1, 8, 8))  # running statistics off their start
    return net


def match_running_statistics(net: nn.Module, x: Tensor) -> None:
    """Set each batch norm's running statistics to its input's statistics on ``x``, first layer first."""

    def write(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        channels_first = inputs[0].transpose(0, 1).flatten(1)
        module.running_mean.copy_(channels_first.mean(1))
        module.running_var.copy_(channels_first.var(1, unbiased=False))

    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    hooks = [m.register_forward_pre_hook(write) for m in norms]
    with torch.no_grad():
        net.eval()(x)
    for hook in hooks:
        hook.remove()


def test_o14_zero_where_statistics_match_and_finite_gradient_there():
    net, x = small_net(), normal(16, 1, 8, 8).requires_grad_()
    match_running_statistics(net, x)
    loss = inversion_loss(net, x)
    assert 0 <= loss < 1e-4 and gradient(loss, x).isfinite().all()
    exact = nn.BatchNorm1d(2)
    x = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], requires_grad=True)  # mean 0 and variance 1, exactly the start
    loss = inversion_loss(exact, x)
    assert loss == 0 and not gradient(loss, x).any()


@pytest.mark.parametrize("change", NAMES)
def test_o14_positive_where_any_one_layer_differs(change):
    net, x = small_net(), normal(16, 1, 8, 8)
    match_running_statistics(net, x)
    last = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)][-1]
    getattr(last, change)[1] += 0.5
    assert inversion_loss(net, x).item() == pytest.approx(0.5, abs=1e-3)


def test_o14_by_hand_on_both_kinds_of_batch_norm():
    """One layer of each kind: the population variance of the input over every dimension but the channels."""
    flat, maps = nn.BatchNorm1d(3), nn.BatchNorm2d(3)
    x = normal(7, 3, 4, 5) * 2 + 1
    for layer, batch, columns in ((maps, x, x.transpose(0, 1).flatten(1)), (flat, x[:, :, 0, 0], x[:, :, 0, 0].T)):
        layer.running_mean.fill_(0.25)
        layer.running_var.fill_(1.5)
        centred = columns - columns.mean(1, keepdim=True)
        variance = (centred**2).sum(1) / columns.shape[1]
        by_hand = (columns.mean(1) - 0.25).square().sum().sqrt() + (variance - 1.5).square().sum().sqrt()
        torch.testing.assert_close(inversion_loss(layer, batch), by_hand)


def test_o14_gradient_flows_and_the_model_is_left_alone():
    for training in (True, False):
        net = small_net().train(training)
        next(m for m in net.modules() if isinstance(m, nn.BatchNorm2d)).eval()
        modes, before = [m.training for m in net.modules()], to_weights(net)
        x = normal(16, 1, 8, 8).requires_grad_()
        loss = inversion_loss(net, x)
        assert loss > 0 and gradient(loss, x).any()
        assert [m.training for m in net.modules()] == modes
        assert all(np.array_equal(before[n], value) for n, value in to_weights(net).items())
        assert not any(m._forward_pre_hooks for m in net.modules())


def test_o14_invariant_to_the_last_affine_but_not_to_the_first():
    net, x = small_net(), normal(16, 1, 8, 8)
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    before = inversion_loss(net, x)
    with torch.no_grad():
        norms[-1].weight.mul_(3)
        norms[-1].bias.add_(1)
    assert torch.equal(inversion_loss(net, x), before)
    with torch.no_grad():
        norms[0].weight.mul_(3)
    assert not torch.allclose(inversion_loss(net, x), before)


def test_o14_targets_of_another_model():
    net, other, x = small_net(), small_net(), normal(16, 1, 8, 8)
    found = bn_statistics(net)
    assert len(found) == 6 and all(torch.equal(m, net.get_submodule(n).running_mean) for n, (m, _) in found.items())
    match_running_statistics(other, x)  # same parameters, other running statistics
    targets = to_weights(other)
    for array in targets.values():
        array.setflags(write=False)
    assert inversion_loss(other, x, targets) < 1e-4 < inversion_loss(other, x, to_weights(net))
    torch.testing.assert_close(inversion_loss(net, x, to_weights(net)), inversion_loss(net, x))
    # Only the targets are the other model's: the forward pass still normalises with this one's statistics.
    first = inversion_loss(nn.Sequential(*net.trunk[:2]), x, {f"1.{k}": targets[f"trunk.1.{k}"] for k in NAMES})
    assert first < 1e-4 < inversion_loss(net, x, targets)


def test_o14_probe_shares_the_forward():
    net, x = small_net(), normal(16, 1, 8, 8)
    with inversion_probe(net) as inversion:
        logits, inside = net(x), inversion()
    torch.testing.assert_close(logits, net.eval()(x))
    assert inside == inversion() == inversion_loss(net, x)


@pytest.mark.parametrize("passes", [0, 2])
def test_o14_probe_wants_one_forward_pass_and_cleans_up_after_an_error(passes):
    net, x = small_net(), normal(4, 1, 8, 8)
    with pytest.raises(ValueError, match="one forward pass"), inversion_probe(net) as inversion:
        for _ in range(passes):
            net(x)
        inversion()
    assert not any(m._forward_pre_hooks for m in net.modules()) and net.training


# --- O19: the adversarial game ---------------------------------------------------------------------------------------


def test_o19_undecided_discriminator():
    zeros = torch.zeros(B)
    assert discriminator_loss(zeros, zeros).item() == pytest.approx(2 * math.log(2))
    assert adversarial_loss(zeros).item() == pytest.approx(math.log(2))


def test_game_losses_are_binary_cross_entropy():
    bce, real, fake = nn.functional.binary_cross_entropy, normal(B), normal(B + 2, seed=1)
    one, zero = torch.ones(B), torch.zeros(B + 2)
    torch.testing.assert_close(discriminator_loss(real, fake), bce(real.sigmoid(), one) + bce(fake.sigmoid(), zero))
    torch.testing.assert_close(adversarial_loss(fake), bce(fake.sigmoid(), zero + 1))


def test_game_losses_do_not_saturate_or_overflow():
    fake = torch.tensor([-1e4, 1e4], requires_grad=True)
    assert discriminator_loss(-fake, fake).isfinite()
    assert gradient(adversarial_loss(fake), fake).tolist() == [-0.5, 0.0]


def test_half_precision_is_taken_up_to_float32():
    p, q = normal(B, C).bfloat16(), normal(B, C, seed=1).bfloat16()
    for loss in (
        lambda p, q: entropy_loss(p) + diversity_loss(q),
        lambda p, q: kl(p, q, 3.0),
        jensen_shannon,
        bhattacharyya,
        lambda p, q: discriminator_loss(p, q) + adversarial_loss(q),
        lambda p, q: distillation_loss(p, q, DistillConfig(temperature=3.0))[0],
    ):
        assert loss(p, q).dtype == torch.float32
        assert torch.equal(loss(p, q), loss(p.float(), q.float()))
