"""Samples of several modalities as records: bytes of fixed length, the values of each modality and a mask.

A record holds, in the order of ``DataFacts.modalities``, the bytes of every modality (an image's uint8, a vector's
float32, a text's int32, little-endian), and then one byte for each modality: 1 where the sample has it, else 0, with
zeros for its values. Records are images uint8 [N, 1, 1, bytes], so everything that carries images carries them too.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..core.types import Modality

#: Every set of modalities up to so many modalities; of more, single ones, pairs, and all.
MOST_IN_ALL_SUBSETS = 6

_TYPES: dict[str, np.dtype[Any]] = {"image": np.dtype("u1"), "vector": np.dtype("<f4"), "text": np.dtype("<i4")}


def record_size(modalities: Sequence[Modality]) -> int:
    """Return the bytes of one record."""
    return sum(modality.num_bytes for modality in modalities) + len(modalities)


def pack(modalities: Sequence[Modality], values: Mapping[str, np.ndarray], present: np.ndarray) -> np.ndarray:
    """Return records uint8 [N, 1, 1, bytes].

    Args:
        modalities: the parts, in order.
        values: an array [N, *shape] for each of them, by name.
        present: bool [N, M], whether a sample has the modality; the values of absent ones are set to zero.
    """
    records = np.zeros((len(present), record_size(modalities)), np.uint8)
    at = 0
    for number, modality in enumerate(modalities):
        array = np.ascontiguousarray(values[modality.name], _TYPES[modality.kind]).reshape(len(present), -1)
        part = records[:, at : at + modality.num_bytes]
        part[:] = array.view(np.uint8).reshape(len(present), -1) * present[:, number : number + 1]
        at += modality.num_bytes
    records[:, at:] = present
    return records[:, None, None]


def unpack(modalities: Sequence[Modality], records: np.ndarray) -> dict[str, np.ndarray]:
    """Return the values [N, *shape] of each modality by name, of ``records`` uint8 [N, 1, 1, bytes]."""
    flat, at, found = records.reshape(len(records), -1), 0, {}
    for modality in modalities:
        part = np.ascontiguousarray(flat[:, at : at + modality.num_bytes])
        found[modality.name] = part.view(_TYPES[modality.kind]).reshape(len(records), *modality.shape)
        at += modality.num_bytes
    return found


def present_in(modalities: Sequence[Modality], records: np.ndarray) -> np.ndarray:
    """Return which modalities each record has, bool [N, M]."""
    return records.reshape(len(records), -1)[:, -len(modalities) :] > 0


def restrict(modalities: Sequence[Modality], records: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Return a copy of ``records`` in which only the modalities ``kept``, bool [M] or [N, M], are there."""
    return pack(modalities, unpack(modalities, records), present_in(modalities, records) & kept)


def subsets(count: int) -> list[tuple[int, ...]]:
    """Return the sets of ``count`` modalities that accuracy is measured for: small ones first, all of them last."""
    sizes = range(1, count + 1) if count <= MOST_IN_ALL_SUBSETS else (1, 2, count)
    return [chosen for size in sizes for chosen in itertools.combinations(range(count), size)]


def in_subsets(modalities: Sequence[Modality], records: np.ndarray) -> np.ndarray:
    """Return ``records`` once for each of ``subsets``, restricted to it: [S * N, 1, 1, bytes], subset by subset."""
    masks = np.zeros((len(subsets(len(modalities))), len(modalities)), bool)
    for row, chosen in zip(masks, subsets(len(modalities)), strict=True):
        row[list(chosen)] = True
    return np.concatenate([restrict(modalities, records, mask) for mask in masks])


def pictures(modalities: Sequence[Modality], records: np.ndarray) -> np.ndarray:
    """Return images uint8 [N, C, H, W] to look at: those in the records, or squares of grey for other values.

    Without an image the values of vectors, from -3 (black) to 3 (white), fill a square row by row; tokens stand between
    black and white by their number.
    """
    values = unpack(modalities, records)
    for modality in modalities:
        if modality.kind == "image":
            return values[modality.name]
    grey = [
        values[m.name] * (255 / max(1, m.vocabulary - 1)) if m.vocabulary else (values[m.name] + 3) * 42.5
        for m in modalities
    ]
    flat = np.concatenate(grey, 1)
    side = int(np.ceil(np.sqrt(flat.shape[1])))
    square = np.zeros((len(flat), side * side))
    square[:, : flat.shape[1]] = flat
    return np.clip(square, 0, 255).astype(np.uint8).reshape(len(flat), 1, side, side)


def sums_of(modality: Modality, values: np.ndarray) -> np.ndarray:
    """Return what a client sends for standardisation: count, sums and sums of squares, float64 [3, d].

    Args:
        modality: a vector.
        values: the client's samples that have it, float32 [n, d].
    """
    wide = values.astype(np.float64)
    return np.stack([np.full(modality.size, float(len(values))), wide.sum(0), np.square(wide).sum(0)])


def mean_and_scale(sums: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return means and standard deviations, float64 [d] each, of ``sums`` [3, d] as ``sums_of`` gives them.

    The deviation of a value that never varies is infinite, so that dividing by it gives 0.
    """
    count, total, squares = sums
    mean = total / np.maximum(count, 1)
    spread = np.sqrt(np.maximum(squares / np.maximum(count, 1) - mean**2, 0))
    return mean, np.where(spread > 1e-6 * (np.abs(mean) + 1e-12), spread, np.inf)


def standardise(
    modalities: Sequence[Modality], records: np.ndarray, sums: Mapping[str, np.ndarray]
) -> np.ndarray:
    """Return ``records`` whose vectors have mean 0 and variance 1 by the ``sums`` of all clients.

    A value that never varies becomes 0. ``sums``: by modality, the sum over clients of ``sums_of``, float64 [3, d].
    """
    values = unpack(modalities, records)
    for modality in modalities:
        if modality.kind == "vector":
            mean, scale = mean_and_scale(sums[modality.name])
            values[modality.name] = ((values[modality.name] - mean) / scale).astype(np.float32)
    return pack(modalities, values, present_in(modalities, records))
