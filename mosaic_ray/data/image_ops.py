"""Convert the channels and size of uint8 image arrays, chunk by chunk, and measure their mean and deviation."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import numpy as np


def chunks(images: np.ndarray, size: int = 1024) -> Iterator[np.ndarray]:
    """Yield ``images`` in chunks, each small enough to be copied in a wider type."""
    return (images[start : start + size] for start in range(0, len(images), size))


def in_channels(images: np.ndarray, channels: int) -> np.ndarray:
    """Convert uint8 [N, 1 or 3, H, W] to ``channels``: repeat grey, or take luma (ITU-R 601, rounded like Pillow)."""
    if images.shape[1] == channels:
        return images
    if channels == 3:
        return np.repeat(images, 3, axis=1)
    weights = np.array([19595, 38470, 7471], np.uint32)
    grey = np.empty((len(images), 1, *images.shape[2:]), np.uint8)
    for chunk, target in zip(chunks(images), chunks(grey), strict=True):
        target[:, 0] = np.einsum("nchw,c->nhw", chunk, weights, dtype=np.uint32) + 0x8000 >> 16
    return grey


def resized(images: np.ndarray, size: int) -> np.ndarray:
    """Resize uint8 [N, C, H, W] to [N, C, size, size], bilinear with antialiasing."""
    if images.shape[2:] == (size, size):
        return np.ascontiguousarray(images)
    import torch
    from torch.nn.functional import interpolate

    out = np.empty((*images.shape[:2], size, size), np.uint8)
    for chunk, target in zip(chunks(images), chunks(out), strict=True):
        wide = torch.tensor(chunk, dtype=torch.float32)
        wide = interpolate(wide, size=(size, size), mode="bilinear", antialias=True)
        target[:] = wide.round_().clamp_(0, 255).to(torch.uint8).numpy()
    return out


def tally(images: np.ndarray) -> list[list[int]]:
    """Return count, sum and sum of squares for each channel of uint8 [N, C, H, W], exactly."""
    found = []
    for channel in range(images.shape[1]):
        wide = images[:, channel].ravel().astype(np.float64)  # whole numbers are exact up to 2**53
        found.append([wide.size, int(wide.sum()), int(wide @ wide)])
    return found


def mean_std(tallies: Iterable[list[list[int]]]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation per channel from tallies, in units of [0, 1] intensity, to four digits."""
    mean, std = [], []
    for channel in zip(*tallies, strict=True):
        count, total, squares = map(sum, zip(*channel, strict=True))
        mean.append(round(total / count / 255, 4))
        spread = math.sqrt(count * squares - total * total) / count / 255
        std.append(round(spread, 4) or 1.0)  # a channel of one single value has deviation 0
    return tuple(mean), tuple(std)


def image_grid(images: np.ndarray, columns: int) -> np.ndarray:
    """Arrange uint8 [N, C, H, W] in rows as one image uint8 [C, H', W'], with white lines of one pixel between."""
    count, channels, height, width = images.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    grid = np.full((channels, rows * (height + 1) - 1, columns * (width + 1) - 1), 255, np.uint8)
    for index, image in enumerate(images):
        top, left = index // columns * (height + 1), index % columns * (width + 1)
        grid[:, top : top + height, left : left + width] = image
    return grid
