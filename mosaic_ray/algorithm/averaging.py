"""Weighted averages of weights: FedAvg over clients, and class experts, are both this."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from ..records import Weights


class RunningAverage:
    """sum_k w_k theta_k / sum_k w_k over all entries, folded in one at a time in float64, so memory stays flat.

    The sum depends on the order of adding (floating point), so add in client-id order. Averages of equal float32
    weights are bit-equal to them. Entries of weight zero are checked and otherwise ignored.
    """

    def __init__(self) -> None:
        self.total = 0.0
        self._added = 0
        self._like: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
        self._sums: Weights = {}

    def add(self, weights: Weights, weight: float) -> None:
        """Fold in ``weights`` with ``weight`` >= 0 (a sample count, say)."""
        weight = float(weight)
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"cannot average with weight {weight}: it must be finite and not negative")
        if not self._like:
            self._like = {name: (np.shape(array), array.dtype) for name, array in weights.items()}
        if self._like.keys() != weights.keys():
            raise ValueError(f"cannot average: names differ in {sorted(self._like.keys() ^ weights.keys())[:3]}")
        for name, (shape, _) in self._like.items():
            if np.shape(weights[name]) != shape:
                raise ValueError(f"cannot average: {name} is {np.shape(weights[name])}, before it was {shape}")
        if weight == 0:
            return
        for name, array in weights.items():
            term = np.asarray(np.multiply(array, weight, dtype=np.float64))
            if name in self._sums:
                self._sums[name] += term
            else:
                self._sums[name] = term  # not 0 + term, which would turn -0.0 into 0.0
        self.total += weight
        self._added += 1

    def result(self) -> Weights:
        """The average so far, as fresh arrays of each entry's own dtype; counters (integers) are rounded down."""
        if self.total == 0:
            raise ValueError("cannot average: the weights sum to zero")
        return {name: self._mean(name, dtype) for name, (_, dtype) in self._like.items()}

    def _mean(self, name: str, dtype: np.dtype) -> np.ndarray:
        mean = self._sums[name] / self.total
        if dtype.kind != "f":
            # Fractional weights can leave the mean of equal counters a rounding error short of the counter.
            slack = (self._added + 1) * np.finfo(np.float64).eps
            mean = np.floor(mean + slack * np.abs(mean))
        return np.asarray(mean, dtype=dtype)


def average(pairs: Iterable[tuple[Weights, float]]) -> Weights:
    """The average of ``(weights, weight)`` pairs, added in their order."""
    running = RunningAverage()
    for weights, weight in pairs:
        running.add(weights, weight)
    return running.result()
