"""Class experts: for each class, the clients' models averaged by who holds that class (ALGORITHM stage A)."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from ..models.widths import Channels, IndexSets
from ..records import Weights
from .averaging import PartialAverage, RunningAverage


def expert_weights(counts: np.ndarray) -> np.ndarray:
    """float64 [K, C]: n_{k,c} / sum_k n_{k,c}; the column of a class that nobody holds is zero."""
    totals = counts.sum(0)
    return counts / np.where(totals == 0, 1, totals)


def distinct_experts(counts: np.ndarray) -> tuple[list[int], np.ndarray]:
    """(representatives, index): classes whose experts differ, and for each class which of those is its own.

    Two classes have the same expert when their columns of weights are equal (one client owns both, say): the
    teacher evaluates it once.
    """
    representatives: list[int] = []
    index = np.zeros(counts.shape[1], np.int64)
    seen: dict[bytes, int] = {}
    for label, column in enumerate(expert_weights(counts).T):
        name = np.ascontiguousarray(column).tobytes()
        if name not in seen:
            seen[name] = len(representatives)
            representatives.append(label)
        index[label] = seen[name]
    return representatives, index


def form_experts(
    client_weights: Iterable[tuple[int, Weights] | tuple[int, Weights, IndexSets | None]],
    counts: np.ndarray,
    fallback: Weights | None,
    *,
    whole: Weights | None = None,
    channels: Channels | None = None,
) -> tuple[list[Weights], np.ndarray]:
    """Distinct experts theta_{E_c} = sum_k n_{k,c} theta_k / sum_k n_{k,c}, and the class -> expert index [C].

    ``client_weights`` yields (client, weights) once, in client order, so one client's model is in memory at a time.
    A class that nobody holds gets ``fallback`` (F2), or ``ValueError`` where that is None.

    With narrow clients it yields (client, part, its channels), with None for a whole client's channels; ``channels``
    and ``whole``, the global model theta_g, are then given. Each coordinate is averaged over the clients that hold both
    it and the class, and where there is none it is theta_g's (ALGORITHM 1.6).
    """
    representatives, index = distinct_experts(counts)
    averages: list[RunningAverage | PartialAverage] = [
        RunningAverage() if channels is None or whole is None else PartialAverage(whole, channels)
        for _ in representatives
    ]
    for client_id, weights, *sets in client_weights:
        for average, label in zip(averages, representatives, strict=True):
            if counts[client_id, label]:
                average.add(weights, int(counts[client_id, label]), *sets)
    experts = []
    for average, label in zip(averages, representatives, strict=True):
        if counts[:, label].sum():
            experts.append(average.result())
        elif fallback is None:
            raise ValueError(f"no client holds class {label}, and meta.expert_fallback = error")
        else:
            experts.append({name: value.copy() for name, value in fallback.items()})
    return experts, index
