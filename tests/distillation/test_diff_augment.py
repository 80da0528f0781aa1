"""DiffAugment: against loops over pixels, its gradient, and what it does to a client's generator."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import FACTS, TINY, generate, shard_of, stripes

from mosaic_ray.config.resolve import override, resolve
from mosaic_ray.core.errors import RequestError
from mosaic_ray.distillation.diff_augment import diff_augment
from mosaic_ray.federated.client import ClientContext, initial_weights

CPU = torch.device("cpu")


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def by_loops(images: np.ndarray, draws: torch.Generator) -> np.ndarray:
    """Change one image after the other, one pixel after the other."""
    count, _, height, width = images.shape
    colours = torch.rand(3, count, generator=draws).double().numpy()
    places = torch.rand(4, count, generator=draws).double().numpy()
    result = np.zeros(images.shape)
    for b in range(count):
        image = images[b].astype(np.float64) + colours[0, b] - 0.5
        grey = image.mean(0)
        image = grey + (image - grey) * 2 * colours[1, b]
        image = image.mean() + (image - image.mean()) * (colours[2, b] + 0.5)
        down = int(places[0, b] * (2 * round(height / 8) + 1)) - round(height / 8)
        right = int(places[1, b] * (2 * round(width / 8) + 1)) - round(width / 8)
        middle = int(places[2, b] * (height + 1)), int(places[3, b] * (width + 1))
        for row in range(height):
            for column in range(width):
                source = row + down, column + right
                known = 0 <= source[0] < height and 0 <= source[1] < width
                cut = all(
                    -(round(side / 2) // 2) <= at - centre < round(side / 2) - round(side / 2) // 2
                    for side, at, centre in zip((height, width), (row, column), middle, strict=True)
                )
                if known and not cut:
                    result[b, :, row, column] = image[:, source[0], source[1]]
    return result


@pytest.mark.parametrize("shape", [(40, 3, 8, 8), (20, 1, 16, 16), (6, 3, 28, 28), (10, 3, 8, 16)])
def test_images_are_changed_as_loops_over_their_pixels_do(shape):
    images = torch.rand(shape, generator=seeded(1)) * 2 - 1
    found = diff_augment(images, seeded(2))
    np.testing.assert_allclose(found.numpy(), by_loops(images.numpy(), seeded(2)), atol=2e-6)


def test_every_move_and_every_corner_comes_up():
    """Of white images: all 9 moves by -1, 0 and 1 pixels of 8, and squares at each place, partly outside too."""
    images = torch.ones(4000, 1, 8, 8)
    found = (diff_augment(images, seeded(3)) == 0)[:, 0]
    sizes = found.sum((1, 2))
    assert sizes.min() == 4 and sizes.max() == 4 * 4 + 8 + 8 - 1  # a corner of the square alone; all of it and a move
    assert (found.float().mean(0) > 0.1).all()  # no pixel is safe


def test_the_gradient_passes_to_the_pixels_that_are_left():
    images = torch.rand(30, 3, 8, 8, generator=seeded(4), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: diff_augment(x, seeded(5)), images[:3].detach().requires_grad_())
    weights = torch.rand(images.shape, generator=seeded(6), dtype=torch.float64)
    (diff_augment(images, seeded(5)) * weights).sum().backward()
    # brightness moves all pixels by the same: the sum of the gradient is that of the weights of pixels that are left
    left = diff_augment(torch.full_like(images, 7.0), seeded(5)).detach() != 0
    torch.testing.assert_close(images.grad.sum((1, 2, 3)), (weights * left).sum((1, 2, 3)))


def client(knobs: dict, steps: int = 6):
    config = override(TINY, {"generator.steps": steps} | knobs)
    context = ClientContext(config, FACTS, CPU)
    start = initial_weights(context)
    return generate(context, shard_of(stripes(60)), 1, start, start)


@pytest.mark.parametrize("knobs", [
    {}, {"generator.conditional": True}, {"generator.discriminator": "shared_trunk"},
    {"generator.gan_range": "model_norm"},
])  # fmt: skip
def test_it_changes_what_a_generator_learns_and_nothing_before(knobs):
    plain, changed, again = client(knobs), *(client(knobs | {"generator.diff_augment": True}) for _ in range(2))
    assert all(np.isfinite(value).all() for value in changed.weights.values())
    assert any(not np.array_equal(plain.weights[name], changed.weights[name]) for name in plain.weights)
    assert all(np.array_equal(changed.weights[name], again.weights[name]) for name in again.weights)
    untrained = [client(knobs | {"generator.diff_augment": on}, steps=0).samples for on in (False, True)]
    assert np.array_equal(*untrained)


def test_a_variational_autoencoder_has_no_discriminator_to_change_images_for():
    with pytest.raises(RequestError, match=r"generator.diff_augment: only a GAN has it"):
        resolve(preset="demo", sets={"generator.diff_augment": "true"})
