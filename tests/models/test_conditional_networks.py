"""Class-conditional generators and discriminators: sizes (O6), capacity knobs, effect of labels."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from torch import nn

from mosaic_ray.config.schema import GeneratorConfig, ModelConfig
from mosaic_ray.core.seeding import seeded, stream
from mosaic_ray.models import discriminator as discriminators
from mosaic_ray.models import generator as generators
from mosaic_ray.models.classifiers import build_classifier
from mosaic_ray.models.discriminator import SharedTrunkDiscriminator, build_discriminator
from mosaic_ray.models.generator import build_generator

PAPER = GeneratorConfig(conditional=True)
SMALL = GeneratorConfig(latent_dim=10, ngf=4, ndf=4, conditional=True)


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("size, channels, plain", [(32, 3, 3_573_824), (28, 3, 3_573_824), (64, 3, 3_639_488)])
def test_o6_a_conditional_generator_has_a_latent_of_each_class_more(size, channels, plain):
    for num_classes in (10, 200):
        assert count(build_generator(PAPER, channels, size, num_classes)) == plain + 100 * num_classes
        assert count(build_generator(dataclasses.replace(PAPER, conditional=False), channels, size)) == plain
    assert count(build_discriminator(PAPER, 3, 32, 200)) == 2_759_424 + 512 * 200


@pytest.mark.parametrize("width", [4, 16, 64])
@pytest.mark.parametrize("size", generators.STAGES)
def test_capacity_knobs_act_at_every_size_as_documented(size, width):
    config, channels = GeneratorConfig(latent_dim=32, ngf=width, ndf=width), 3
    stages = [multiple for multiple, _ in generators.STAGES[size]]
    pairs = sum(a * b for a, b in itertools.pairwise(stages))
    expected = width * (16 * (32 * stages[0] + width * pairs) + 2 * sum(stages) + channels * stages[-1])
    assert count(build_generator(config, channels, size)) == expected
    num_stages, last = discriminators.STAGES[size]
    maps = [width << depth for depth in range(num_stages)]
    expected = 16 * channels * width + 16 * sum(a * b for a, b in itertools.pairwise(maps))
    assert count(build_discriminator(config, channels, size)) == expected + 2 * sum(maps[1:]) + last**2 * maps[-1]


@pytest.mark.parametrize("size", generators.STAGES)
def test_a_label_moves_the_latent_and_nothing_else(size):
    with seeded(0, "game"):
        generator = build_generator(SMALL, 1, size, 5).eval()
        plain = build_generator(dataclasses.replace(SMALL, conditional=False), 1, size).eval()
    names = set(generator.state_dict()) - set(plain.state_dict())
    assert names == {"embedding.weight", "label_cdf"}
    plain.load_state_dict({n: v for n, v in generator.state_dict().items() if n not in names})
    z, labels = torch.randn(4, 10, generator=stream(0, "z")), torch.tensor([0, 4, 4, 2])
    torch.testing.assert_close(generator(z, labels), plain(z + generator.embedding.weight[labels]))
    assert generator(z, labels).shape == (4, 1, size, size)
    torch.testing.assert_close(generator(z[:, :, None, None], labels), generator(z, labels))


@pytest.mark.parametrize("size", generators.STAGES)
def test_the_discriminator_adds_the_projection_of_the_class(size):
    with seeded(0, "game"):
        discriminator = build_discriminator(SMALL, 1, size, 5).eval()
    x, labels = torch.randn(4, 1, size, size, generator=stream(0, "x")), torch.tensor([0, 4, 4, 2])
    maps = discriminator.layers[:-1](x)
    expected = discriminator(x) + (discriminator.embedding.weight[labels][:, :, None, None] * maps).sum((1, 2, 3))
    torch.testing.assert_close(discriminator(x, labels), expected)
    assert not torch.allclose(discriminator(x, labels), discriminator(x))


def test_the_shared_trunk_adds_the_projection_of_the_class():
    classifier = build_classifier(ModelConfig(width=4), 3, 1, 8).eval()
    discriminator = SharedTrunkDiscriminator(classifier, 3)
    x, labels = torch.randn(4, 1, 8, 8, generator=stream(0, "x")), torch.tensor([0, 2, 2, 1])
    features = classifier.features(x)
    expected = discriminator(x) + (discriminator.embedding.weight[labels] * features).sum(1)
    torch.testing.assert_close(discriminator(x, labels), expected)
    assert {n for n, p in discriminator.named_parameters() if p.requires_grad} == {
        "head.weight", "head.bias", "embedding.weight",
    }  # fmt: skip
