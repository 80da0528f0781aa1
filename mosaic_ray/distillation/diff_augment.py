"""Change images before a discriminator sees them, with a gradient: DiffAugment (Zhao et al. 2020, NeurIPS).

A discriminator that trains on few images memorises them, and no longer guides the generator. So it sees no image
unchanged, real or synthetic: both are changed at random, and the generator's gradient passes through the change.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def diff_augment(images: Tensor, draws: torch.Generator, *, alike: bool = False) -> Tensor:
    """Return ``images`` in other colours, moved, and with a square cut out: all three policies of the paper, in order.

    Brightness gets a number in [-0.5, 0.5), saturation and contrast are multiplied by one in [0, 2) and [0.5, 1.5). An
    image is moved by up to an eighth of its sides. The square has half of its sides, and its centre is anywhere, so a
    part of it may lie outside. What is moved in or cut out is 0, grey in the range of tanh.

    Args:
        images: float32 [B, C, H, W], in [-1, 1] or normalised; the result has the same shape, and is not clipped.
        draws: on the CPU, so that all devices get the same numbers. Each image has numbers of its own.
        alike: give all images the same numbers (Zhao and Bilen 2021, "differentiable siamese augmentation").
    """
    count = 1 if alike else len(images)
    colours, places = torch.rand(3, count, 1, 1, 1, generator=draws), torch.rand(4, count, generator=draws)
    places = places.expand(4, len(images))
    return _cut(_moved(_recoloured(images, colours.to(images.device)), places[:2]), places[2:])


def _recoloured(images: Tensor, numbers: Tensor) -> Tensor:
    """Change brightness, saturation and contrast by ``numbers`` [3, B, 1, 1, 1] in [0, 1)."""
    brightness, saturation, contrast = numbers.unbind()
    images = images + (brightness - 0.5)
    grey = images.mean(1, keepdim=True)
    images = grey + (images - grey) * (2 * saturation)
    mean = images.mean((1, 2, 3), keepdim=True)
    return mean + (images - mean) * (contrast + 0.5)


def _moved(images: Tensor, numbers: Tensor) -> Tensor:
    """Move each image by up to an eighth of its height and width, by ``numbers`` [2, B] in [0, 1)."""
    for dim, places in zip((2, 3), numbers, strict=True):
        side = images.shape[dim]
        most = round(side / 8)
        shift = (places * (2 * most + 1)).long()
        index = (torch.arange(side) + shift[:, None]).to(images.device)  # [B, side], in the padded image
        padded = F.pad(images, (0, 0, most, most) if dim == 2 else (most, most))
        shape = (-1, 1, side, 1) if dim == 2 else (-1, 1, 1, side)
        target = (*images.shape[:dim], side, *images.shape[dim + 1 :])
        images = padded.gather(dim, index.view(shape).expand(target))
    return images


def _cut(images: Tensor, numbers: Tensor) -> Tensor:
    """Set a square of half of each image's sides to 0; its centre is at ``numbers`` [2, B] in [0, 1) of the sides."""
    inside = []
    for side, places in zip(images.shape[2:], numbers, strict=True):
        size = round(side / 2)
        first = (places * (side + 1)).long() - size // 2
        at = torch.arange(side) - first[:, None]
        inside.append((at >= 0) & (at < size))
    rows, columns = inside
    hole = (rows[:, None, :, None] & columns[:, None, None, :]).to(images.device)
    return images.masked_fill(hole, 0.0)
