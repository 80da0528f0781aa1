"""Generators and discriminators: sizes, shapes, gradients (O6); weights are copied, never shared."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from mosaic_ray.config.schema import GeneratorConfig, ModelConfig
from mosaic_ray.core.errors import RequestError
from mosaic_ray.core.seeding import seeded
from mosaic_ray.models import discriminator as discriminators
from mosaic_ray.models import generator as generators
from mosaic_ray.models import state_dict
from mosaic_ray.models.classifiers import build_classifier
from mosaic_ray.models.discriminator import SharedTrunkDiscriminator, build_discriminator
from mosaic_ray.models.generator import build_generator
from mosaic_ray.models.state_dict import freeze, head_of, load_weights, to_weights, use_precision

SIZES = (8, 16, 28, 32, 64)
SMALL = GeneratorConfig(latent_dim=10, ngf=4, ndf=4)
PAPER = GeneratorConfig(latent_dim=100, ngf=64, ndf=64)


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def gradients_reach_everything(module: nn.Module) -> bool:
    return all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in module.parameters())


@pytest.mark.parametrize(
    "size, channels, params", [(32, 3, 3_573_824), (32, 1, 3_573_696), (28, 3, 3_573_824), (64, 3, 3_639_488)]
)
def test_o6_generator_sizes(size, channels, params):
    assert count(build_generator(PAPER, channels, size)) == params


def test_o6_discriminator_size():
    assert count(build_discriminator(PAPER, 3, 32)) == 2_759_424


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", SIZES)
def test_o6_generator_and_discriminator_at_every_size(size, channels):
    with seeded(0, "init", "game"):
        generator = build_generator(SMALL, channels, size)
        discriminator = build_discriminator(SMALL, channels, size)
    z = torch.randn(5, generator.latent_dim, generator=torch.Generator().manual_seed(1))
    images = generator(z)
    assert images.shape == (5, channels, size, size) and images.abs().max() < 1 and images.std() > 0
    generator.eval()
    torch.testing.assert_close(generator(z[:, :, None, None]), generator(z))
    scores = discriminator(images)
    assert scores.shape == (5,)
    scores.square().sum().backward()
    assert gradients_reach_everything(generator) and gradients_reach_everything(discriminator)


def test_dcgan_initialisation():
    with seeded(0, "init", "game"):
        nets = build_generator(PAPER, 3, 32), build_discriminator(PAPER, 3, 32)
    for part in (m for net in nets for m in net.modules()):
        if isinstance(part, nn.Conv2d | nn.ConvTranspose2d) and part.weight.numel() > 10_000:
            assert abs(part.weight.mean()) < 1e-3 and part.weight.std().item() == pytest.approx(0.02, rel=0.05)
        if isinstance(part, nn.BatchNorm2d):
            assert part.weight.mean().item() == pytest.approx(1, abs=0.01) and 0.01 < part.weight.std() < 0.03
            assert not part.bias.any()


def test_size_tables_agree():
    assert set(generators.STAGES) == set(discriminators.STAGES) == set(SIZES)


@pytest.mark.parametrize("build", [build_generator, build_discriminator])
def test_sizes_that_cannot_be_drawn_are_refused(build):
    with pytest.raises(RequestError, match=r"data\.image_size = 40: .*8, 16, 28, 32, 64"):
        build(SMALL, 3, 40)


def test_shared_trunk_trains_its_head_only():
    classifier = build_classifier(ModelConfig(width=4), 10, 1, 8)
    before = to_weights(classifier)
    discriminator = SharedTrunkDiscriminator(classifier).train()
    assert [n for n, p in discriminator.named_parameters() if p.requires_grad] == ["head.weight", "head.bias"]
    optimiser = torch.optim.SGD(discriminator.parameters(), lr=1.0)
    x = torch.randn(6, 1, 8, 8, requires_grad=True)
    scores = discriminator(x)
    assert scores.shape == (6,)
    torch.testing.assert_close(scores, discriminator.head(classifier.eval().features(x)).squeeze(1))
    scores.sum().backward()
    assert x.grad.any()
    head = discriminator.head.weight.clone()
    optimiser.step()
    assert not torch.equal(head, discriminator.head.weight)
    for owner in (classifier, discriminator):  # running statistics included
        assert all(np.array_equal(before[n], v) for n, v in to_weights(owner).items() if n.startswith("trunk."))
    assert all(p.requires_grad for p in classifier.parameters())


# --- weights ---------------------------------------------------------------------------------------------------------


def small_net() -> nn.Module:
    return build_classifier(ModelConfig(width=2), 3, 1, 8)


def test_to_weights_copies():
    net = small_net()
    weights = to_weights(net)
    kept = {name: array.copy() for name, array in weights.items()}
    with torch.no_grad():
        for value in net.state_dict().values():
            value.add_(1)
    assert all(np.array_equal(weights[n], kept[n]) for n in kept)
    assert all(array.flags.writeable and array.flags.c_contiguous for array in weights.values())
    counters = [array for name, array in weights.items() if name.endswith("num_batches_tracked")]
    assert len(counters) == 6 and all(c.shape == () and c.dtype == np.int64 for c in counters)


def test_load_weights_never_aliases_even_read_only_arrays():
    weights = to_weights(small_net())
    for array in weights.values():
        array.setflags(write=False)
    kept = {name: array.copy() for name, array in weights.items()}
    net = small_net()
    storage = {name: value.data_ptr() for name, value in net.state_dict().items()}
    assert load_weights(net, weights) is net
    assert storage == {name: value.data_ptr() for name, value in net.state_dict().items()}
    loaded = to_weights(net)
    assert all(np.array_equal(loaded[n], kept[n]) and loaded[n].dtype == kept[n].dtype for n in kept)
    net(torch.randn(4, 1, 8, 8)).sum().backward()
    torch.optim.SGD(net.parameters(), lr=1.0).step()
    assert all(np.array_equal(weights[n], kept[n]) for n in kept)


def test_load_weights_keeps_nothing_of_arrays_that_change_later():
    net, weights = small_net(), to_weights(small_net())
    kept = to_weights(load_weights(net, weights))
    for array in weights.values():
        array += 1
    assert all(np.array_equal(value, kept[n]) for n, value in to_weights(net).items())


def test_load_weights_is_strict_and_changes_nothing_on_refusal():
    net = small_net()
    before, weights = to_weights(net), {n: a + 1 for n, a in to_weights(net).items()}
    bad_shape = weights | {"head.bias": np.zeros((3, 1), np.float32)}
    missing = {n: a for n, a in weights.items() if n != "head.bias"}
    for bad in (bad_shape, missing, weights | {"extra": np.zeros(1, np.float32)}):
        with pytest.raises(ValueError, match=r"do not fit: .*(head.bias|extra)"):
            load_weights(net, bad)
    assert all(np.array_equal(before[n], value) for n, value in to_weights(net).items())


def test_load_weights_takes_numpy_scalars_for_counters():
    net = small_net()
    weights = {n: np.int64(7) if n.endswith("tracked") else a for n, a in to_weights(net).items()}
    load_weights(net, weights)
    assert all(v == 7 for n, v in net.state_dict().items() if n.endswith("tracked"))


def test_freeze_stops_parameters_not_inputs():
    net = small_net()
    assert freeze(net) is net and not net.training
    x = torch.randn(2, 1, 8, 8, requires_grad=True)
    net(x).square().sum().backward()
    assert x.grad.any() and all(p.grad is None for p in net.parameters())


def test_head_and_bytes():
    net = small_net()
    weights = to_weights(net)
    v, b = head_of(weights)
    assert v.shape == (3, 8) and b.shape == (3,)
    x = torch.randn(2, 1, 8, 8)
    features, logits = net.eval().features(x), net(x)
    np.testing.assert_allclose(features.detach().numpy() @ v.T + b, logits.detach().numpy(), rtol=1e-4, atol=1e-6)
    floats = sum(value.numel() for value in net.state_dict().values() if value.is_floating_point())
    assert sum(array.nbytes for array in weights.values()) == 4 * floats + 8 * 6


def test_use_precision():
    layer, x = nn.Linear(4, 4), torch.randn(2, 4)
    with use_precision("bf16", "cpu"):
        assert layer(x).dtype == torch.bfloat16
    with use_precision("fp32", torch.device("cpu")):
        assert layer(x).dtype == torch.float32
    with pytest.raises(ValueError, match="auto"):
        state_dict.use_precision("auto", "cpu")
