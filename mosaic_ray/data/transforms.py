"""Batched image operations on the device of their inputs: uint8 [B, C, H, W] in, float32 or uint8 out.

Classifiers take ``(intensity - mean) / std`` with intensity in [0, 1]. Generators and discriminators use [-1, 1], the
range of tanh; ``pm1_to_normalised`` converts it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from ..core.types import DataFacts


def _per_channel(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """Return ``values`` as float32 [C, 1, 1], filled on ``device``: a copy from the host would wait for the GPU."""
    return torch.cat([torch.full((1, 1, 1), value, dtype=torch.float32, device=device) for value in values])


def normalise(images: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
    """Convert uint8 [B, C, H, W] to a classifier's input: float32, ``(images / 255 - mean) / std`` per channel."""
    return (images.float() / 255 - _per_channel(mean, images.device)) / _per_channel(std, images.device)


def to_input(images: torch.Tensor, facts: DataFacts) -> torch.Tensor:
    """Convert stored samples, images uint8 [B, C, H, W] or records, to a classifier's input float32.

    Images are normalised: [B, C, H, W]. Of records all values are laid side by side, and then the mask of the
    modalities: [B, D + M] (``DataFacts.input_shape``). An image in them is normalised, vectors are standardised already
    (``data.records``), tokens are numbers. The values of absent modalities are 0.
    """
    if not facts.modalities:
        return normalise(images, facts.mean, facts.std)
    records, at = images.flatten(1), 0
    present = records[:, -len(facts.modalities) :].float()
    parts = []
    for number, modality in enumerate(facts.modalities):
        raw = records[:, at : at + modality.num_bytes].clone(memory_format=torch.contiguous_format)  # aligned
        at += modality.num_bytes
        if modality.kind == "image":
            values = normalise(raw.view(-1, *modality.shape), facts.mean, facts.std).flatten(1)
        else:
            values = raw.view(torch.float32 if modality.kind == "vector" else torch.int32).float()
        parts.append(values * present[:, number : number + 1])
    return torch.cat([*parts, present], 1)


def to_pm1(images: torch.Tensor) -> torch.Tensor:
    """Convert uint8 images of any shape to float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def pm1_to_normalised(x: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
    """Convert images [B, C, H, W] in [-1, 1] to a classifier's input, float32; differentiable."""
    return ((x.float() + 1) / 2 - _per_channel(mean, x.device)) / _per_channel(std, x.device)


def augment(images: torch.Tensor, names: tuple[str, ...], generator: torch.Generator) -> torch.Tensor:
    """Apply the named ``AUGMENTATIONS`` to ``images`` uint8 [B, C, H, W], in order.

    ``generator`` is on the CPU for ``images`` on any device, so that CPU and GPU make equal draws.
    """
    for name in names:
        images = AUGMENTATIONS[name](images, generator)
    return images


def crop(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Pad each image with zeros by an eighth of its side (4 pixels at 32), and crop it at a random place."""
    num_images, _, height, width = images.shape
    pad = max(1, height // 8)
    top, left = torch.randint(0, 2 * pad + 1, (2, num_images), generator=generator).to(images.device)
    windows = F.pad(images, (pad, pad, pad, pad)).unfold(2, height, 1).unfold(3, width, 1)  # views, no copies
    return windows[torch.arange(num_images, device=images.device), :, top, left]


def flip(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Mirror each image left to right with probability one half."""
    mirrored = torch.randint(0, 2, (len(images),), generator=generator).bool().to(images.device)
    return torch.where(mirrored[:, None, None, None], images.flip(-1), images)


AUGMENTATIONS: dict[str, Callable[[torch.Tensor, torch.Generator], torch.Tensor]] = {"crop": crop, "flip": flip}
