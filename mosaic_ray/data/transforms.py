"""Batched image operations on the device of their inputs: uint8 [B, C, H, W] in, float32 or uint8 out.

Classifiers take ``(intensity - mean) / std`` with intensity in [0, 1]. Generators and discriminators use [-1, 1], the
range of tanh; ``pm1_to_normalised`` converts it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from ..core.types import DataFacts, Modality


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
    return _rows(images, facts, lambda found: normalise(found, facts.mean, facts.std))


def to_generator_range(images: torch.Tensor, facts: DataFacts) -> torch.Tensor:
    """Convert stored samples to what generators draw: as ``to_input``, but with images in [-1, 1]."""
    return _rows(images, facts, to_pm1) if facts.modalities else to_pm1(images)


def _rows(
    images: torch.Tensor, facts: DataFacts, of_image: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Lay the values of records uint8 [B, 1, 1, bytes] side by side, with their mask; ``of_image`` converts images."""
    records, at = images.flatten(1), 0
    present = records[:, -len(facts.modalities) :].float()
    parts = []
    for number, modality in enumerate(facts.modalities):
        raw = records[:, at : at + modality.num_bytes].clone(memory_format=torch.contiguous_format)  # aligned
        at += modality.num_bytes
        if modality.kind == "image":
            values = of_image(raw.view(-1, *modality.shape)).flatten(1)
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


def drawn_to_input(x: torch.Tensor, facts: DataFacts) -> torch.Tensor:
    """Convert what a generator draws to a classifier's input; differentiable.

    ``x``: images [B, C, H, W] in [-1, 1], or rows [B, D + M] whose images are in [-1, 1].
    """
    if not facts.modalities:
        return pm1_to_normalised(x, facts.mean, facts.std)
    parts, first, count = [], 0, len(facts.modalities)
    for number, modality in enumerate(facts.modalities):
        values = x[:, first : first + modality.size]
        if modality.kind == "image":
            image = pm1_to_normalised(values.reshape(-1, *modality.shape), facts.mean, facts.std)
            values = image.flatten(1) * x[:, number - count, None]
        parts.append(values)
        first += modality.size
    return torch.cat([*parts, x[:, -count:]], 1)


def drawn_to_stored(x: torch.Tensor, facts: DataFacts) -> torch.Tensor:
    """Convert rows that a generator draws, float32 [B, D + M], to records uint8 [B, 1, 1, bytes]."""
    parts, first, count = [], 0, len(facts.modalities)
    present = x[:, -count:] > 0
    for number, modality in enumerate(facts.modalities):
        values = x[:, first : first + modality.size] * present[:, number, None]
        if modality.kind == "image":
            raw = (((values + 1) / 2).clamp(0, 1) * 255).round().to(torch.uint8) * present[:, number, None]
        else:
            kind = torch.float32 if modality.kind == "vector" else torch.int32
            raw = values.to(kind).contiguous().view(torch.uint8)
        parts.append(raw)
        first += modality.size
    return torch.cat([*parts, present.to(torch.uint8)], 1)[:, None, None]


#: A source of draws for all images of a batch, or sources of several clients and how many of the images each has.
Draws = torch.Generator | Sequence[tuple[torch.Generator, int]]


def augment(images: torch.Tensor, names: tuple[str, ...], generator: Draws) -> torch.Tensor:
    """Apply the named ``AUGMENTATIONS`` to ``images`` uint8 [B, C, H, W], in order.

    ``generator`` is on the CPU for ``images`` on any device, so that CPU and GPU make equal draws. Several clients'
    images in one batch, one client's after the other's, are changed as each client's alone would be.
    """
    for name in names:
        images = AUGMENTATIONS[name](images, generator)
    return images


def _integers(below: int, rows: int, num_images: int, generator: Draws) -> torch.Tensor:
    """Draw int64 [rows, num_images] in [0, below)."""
    parts = [(generator, num_images)] if isinstance(generator, torch.Generator) else generator
    return torch.cat([torch.randint(0, below, (rows, count), generator=draws) for draws, count in parts], 1)


def crop(images: torch.Tensor, generator: Draws) -> torch.Tensor:
    """Pad each image with zeros by an eighth of its side (4 pixels at 32), and crop it at a random place."""
    num_images, _, height, width = images.shape
    pad = max(1, height // 8)
    top, left = _integers(2 * pad + 1, 2, num_images, generator).to(images.device)
    windows = F.pad(images, (pad, pad, pad, pad)).unfold(2, height, 1).unfold(3, width, 1)  # views, no copies
    return windows[torch.arange(num_images, device=images.device), :, top, left]


def flip(images: torch.Tensor, generator: Draws) -> torch.Tensor:
    """Mirror each image left to right with probability one half."""
    mirrored = _integers(2, 1, len(images), generator)[0].bool().to(images.device)
    return torch.where(mirrored[:, None, None, None], images.flip(-1), images)


def drop_modalities(records: torch.Tensor, count: int, rate: float, generator: torch.Generator) -> torch.Tensor:
    """Return records [B, 1, 1, bytes] in which each modality is marked absent with probability ``rate``.

    Where that would leave a record without any of those that it had, it keeps the one with the largest draw.

    Args:
        records: uint8; their last ``count`` bytes are the mask.
        generator: on the CPU, so that CPU and GPU make equal draws.
    """
    kept = _kept_modalities(records[:, 0, 0, -count:] > 0, rate, generator)
    changed = records.clone()
    changed[:, 0, 0, -count:] = kept.to(torch.uint8)
    return changed


def drop_from_rows(
    x: torch.Tensor, modalities: Sequence[Modality], rate: float, generator: torch.Generator
) -> torch.Tensor:
    """Return a classifier's input [B, D + M] with zeros for modalities that are drawn as in ``drop_modalities``."""
    kept = _kept_modalities(x[:, -len(modalities) :] > 0, rate, generator)
    sizes = torch.tensor([modality.size for modality in modalities], device=x.device)
    return x * torch.cat([kept.repeat_interleave(sizes, 1), kept], 1)


def _kept_modalities(there: torch.Tensor, rate: float, generator: torch.Generator) -> torch.Tensor:
    draws = torch.rand(*there.shape, generator=generator).to(there.device)
    draws = draws.masked_fill(~there, -1.0)
    return there & ((draws >= rate) | (draws == draws.max(1, keepdim=True).values))


AUGMENTATIONS: dict[str, Callable[[torch.Tensor, Draws], torch.Tensor]] = {"crop": crop, "flip": flip}
