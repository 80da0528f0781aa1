"""Batched transforms against loops over images and pixels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import pad as zero_pad

from mosaic_ray.config.schema import DataConfig
from mosaic_ray.data.load import load_dataset
from mosaic_ray.data.transforms import AUGMENTATIONS, augment, normalise, pm1_to_normalised, to_pm1

CIFAR = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
MNIST = ((0.1307,), (0.3081,))


def images_of(count: int, channels: int, size: int) -> torch.Tensor:
    draws = torch.Generator().manual_seed(count + channels + size)
    return torch.randint(1, 256, (count, channels, size, size), dtype=torch.uint8, generator=draws)


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("mean, std", [CIFAR, MNIST])
def test_normalise_equals_the_formula_pixel_by_pixel(mean, std):
    images = images_of(3, len(mean), 5)
    got = normalise(images, mean, std)
    assert got.dtype == torch.float32
    for index in np.ndindex(*images.shape):
        wanted = (int(images[index]) / 255 - mean[index[1]]) / std[index[1]]
        assert float(got[index]) == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("mean, std", [CIFAR, MNIST])
def test_o32_every_level_reaches_the_classifier_alike_through_both_ranges(mean, std):
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(2, len(mean), 16, 16)
    real = to_pm1(levels)
    assert real.dtype == torch.float32
    assert (real.min(), real.max()) == (-1.0, 1.0)
    torch.testing.assert_close(pm1_to_normalised(real, mean, std), normalise(levels, mean, std), atol=1e-6, rtol=0)


def test_o32_gradients_pass_to_a_generator_and_half_precision_is_widened():
    x = torch.zeros(2, 3, 4, 4, dtype=torch.bfloat16, requires_grad=True)
    seen = pm1_to_normalised(x, *CIFAR)
    assert seen.dtype == torch.float32
    seen.sum().backward()
    torch.testing.assert_close(x.grad[0, :, 0, 0], (0.5 / torch.tensor(CIFAR[1])).bfloat16())


@pytest.mark.parametrize("size", [8, 28, 32, 64])
def test_crop_equals_a_loop_over_windows_of_the_padded_image(size):
    images, pad = images_of(120, 3, size), max(1, size // 8)
    got = AUGMENTATIONS["crop"](images, draws())
    tops, lefts = torch.randint(0, 2 * pad + 1, (2, 120), generator=draws()).tolist()
    for i, (top, left) in enumerate(zip(tops, lefts, strict=True)):
        padded = zero_pad(images[i], (pad, pad, pad, pad))
        assert torch.equal(got[i], padded[:, top : top + size, left : left + size])
    assert {*tops} == {*range(2 * pad + 1)} == {*lefts}, "every shift is reached"


def test_flip_mirrors_whole_images_about_half_of_them():
    images = images_of(400, 1, 8)
    got = AUGMENTATIONS["flip"](images, draws())
    mirrored = 0
    for before, after in zip(images, got, strict=True):
        row = before.numpy()[..., ::-1]
        mirrored += np.array_equal(after.numpy(), row)
        assert np.array_equal(after.numpy(), row) or torch.equal(after, before)
    assert 150 < mirrored < 250


@pytest.mark.parametrize("name", sorted(AUGMENTATIONS))
def test_every_augmentation_keeps_shape_and_type_and_leaves_its_input(name):
    images = images_of(7, 3, 32)
    kept = images.clone()
    got = augment(images, (name,), draws())
    assert (got.shape, got.dtype) == (images.shape, torch.uint8)
    assert torch.equal(images, kept)
    assert not torch.equal(got, images)


def test_o31_augment_is_a_function_of_its_stream_and_composes_in_order():
    images = images_of(50, 3, 32)
    assert torch.equal(augment(images, ("crop", "flip"), draws(1)), augment(images, ("crop", "flip"), draws(1)))
    assert not torch.equal(augment(images, ("crop", "flip"), draws(1)), augment(images, ("crop", "flip"), draws(2)))
    stream = draws(3)
    by_hand = AUGMENTATIONS["flip"](AUGMENTATIONS["crop"](images, stream), stream)
    assert torch.equal(augment(images, ("crop", "flip"), draws(3)), by_hand)


def test_no_augmentation_draws_nothing():
    stream, images = draws(), images_of(2, 1, 8)
    before = stream.get_state()
    assert augment(images, (), stream) is images
    assert torch.equal(stream.get_state(), before)


def test_facts_name_augmentations_that_exist():
    facts = load_dataset(DataConfig(name="digits")).facts
    assert set(facts.augmentations) <= set(AUGMENTATIONS)


@pytest.mark.gpu
def test_gpu_and_cpu_augment_alike():
    images = images_of(50, 3, 32)
    there = augment(images.cuda(), ("crop", "flip"), draws())
    assert torch.equal(there.cpu(), augment(images, ("crop", "flip"), draws()))
