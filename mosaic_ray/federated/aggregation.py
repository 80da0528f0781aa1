"""Weighted averages of weights, for FedAvg over clients and for class experts.

Where clients hold parts of a network (``models.submodel``), each coordinate is averaged over the clients that held it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np

from ..core.types import Weights
from ..models.submodel import ChannelIndices, ChannelLayout


class RunningAverage:
    """sum_k w_k theta_k / sum_k w_k over all entries, added one client at a time in float64, so memory stays flat.

    The sum depends on the order of adding (floating point), so add in client-id order. Averages of equal float32
    weights are bit-equal to them. Entries of weight zero are checked and otherwise ignored.
    """

    def __init__(self) -> None:
        self.total = 0.0
        self._added = 0
        self._like: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
        self._sums: Weights = {}

    def add(self, weights: Weights, weight: float) -> None:
        """Add ``weights`` with ``weight`` >= 0, such as a number of samples."""
        weight = _checked(weight)
        if not self._like:
            self._like = {name: (np.shape(array), array.dtype) for name, array in weights.items()}
        _check_names(weights, self._like)
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
        """Return the average so far, as new arrays of each entry's dtype; counters (integers) are rounded down."""
        if self.total == 0:
            raise ValueError("cannot average: the weights sum to zero")
        return {
            name: _as_type(self._sums[name] / self.total, dtype, self._added) for name, (_, dtype) in self._like.items()
        }


class ModalityAverage:
    """Average the weights of each modality over the clients that have it, and all others over all clients.

    Where no client has a modality, its weights keep their ``previous`` values.
    """

    def __init__(
        self, previous: Weights, owner: Callable[[str], str], columns: Mapping[str, slice] | None = None
    ) -> None:
        """``owner``: the modality that an entry belongs to, or "". ``columns``: those of the head, by modality."""
        self._previous, self._owner, self._columns = previous, owner, dict(columns or {})
        self._averages: dict[str, RunningAverage] = {}

    def _parts(self, weights: Weights) -> dict[str, Weights]:
        found: dict[str, Weights] = {"": {}}
        for name, array in weights.items():
            if name == "head.weight" and self._columns:
                for modality, columns in self._columns.items():
                    found.setdefault(modality, {})[name] = array[:, columns]
            else:
                found.setdefault(self._owner(name), {})[name] = array
        return found

    def add(self, weights: Weights, weight: float, samples: Mapping[str, float]) -> None:
        """Add one client's ``weights``: with ``weight`` what all share, with ``samples`` what belongs to a modality.

        ``samples``: by modality, the number of its samples that have it.
        """
        _check_names(weights, self._previous)
        for modality, part in self._parts(weights).items():
            held = samples.get(modality, 0.0) if modality else weight
            if held:
                self._averages.setdefault(modality, RunningAverage()).add(part, held)

    def result(self) -> Weights:
        """Return the averages so far, as ``RunningAverage.result`` does."""
        averages = dict(self._previous)
        head: list[np.ndarray] = []
        for modality, previous in self._parts(self._previous).items():
            found = self._averages[modality].result() if modality in self._averages else previous
            if modality in self._columns:
                head.append(found["head.weight"])
                found = {name: array for name, array in found.items() if name != "head.weight"}
            averages |= found
        if head:
            averages["head.weight"] = np.concatenate(head, 1)
        return averages


class PartialAverage:
    """Average each coordinate over the clients that held it, weighted; where none did, keep ``previous``.

    Otherwise like ``RunningAverage``: the results are equal to the last bit if every client held all coordinates.
    """

    def __init__(self, previous: Weights, channels: ChannelLayout) -> None:
        self._previous, self._channels = previous, channels
        self._sums: Weights = {name: np.full(np.shape(array), -0.0) for name, array in previous.items()}
        # sum_k w_k: a number while all held an entry whole, then an array with 1 for the dimensions that no client cuts
        self._held: dict[str, float | np.ndarray] = dict.fromkeys(previous, 0.0)
        self._added = 0

    def add(
        self, weights: Weights, weight: float, sets: ChannelIndices | None = None, classes: np.ndarray | None = None,
        held: Callable[[str], float] | None = None,
    ) -> None:  # fmt: skip
        """Add ``weights`` with ``weight`` >= 0: the part at ``sets``, or a whole network where those are None.

        ``classes`` bool [C]: of the head only these rows, the classes that the client holds (HeteroFL). ``held``: the
        weight of an entry in the place of ``weight``, where entries differ; 0: the client does not hold it.
        """
        weight = _checked(weight)
        _check_names(weights, self._previous)
        places = {
            name: self._channels.part_index(name, np.shape(previous), sets) for name, previous in self._previous.items()
        }
        for name, place in places.items():
            whole, parted = np.shape(self._previous[name]), [index.size for index in place or ()]
            shape = (*parted, *whole[len(parted) :])
            if np.shape(weights[name]) != shape:
                raise ValueError(f"cannot average: {name} is {np.shape(weights[name])}, its part is {shape}")
        if weight == 0:
            return
        for name, place in places.items():
            array = weights[name]
            amount = weight if held is None else _checked(held(name))
            if amount == 0:
                continue
            if classes is not None and name in self._channels.heads:
                place, array = self._channels.part_index(name, self._sums[name].shape, sets, classes), array[classes]
            term = np.multiply(array, amount, dtype=np.float64)
            if place is None:
                self._sums[name] += term
                self._held[name] += amount
                continue
            sums = self._held[name]
            if not isinstance(sums, np.ndarray):
                shape, reach = self._sums[name].shape, self._channels.num_cut_axes(name)
                sums = self._held[name] = np.full([*shape[:reach], *[1] * (len(shape) - reach)], sums)
            self._sums[name][place] += term
            sums[place] += amount
        self._added += 1

    def result(self) -> Weights:
        """Return the average so far, as new arrays of each entry's dtype; counters (integers) are rounded down."""
        averages = {}
        for name, previous in self._previous.items():
            covered = np.asarray(self._held[name]) > 0
            mean = self._sums[name] / np.where(covered, self._held[name], 1)
            averages[name] = np.where(covered, _as_type(mean, previous.dtype, self._added), previous)
        return averages


def entry_weight(owner: Callable[[str], str], samples: Mapping[str, float], weight: float, entry: str) -> float:
    """Return an entry's weight in an average: that of its modality in ``samples``, or 0; ``weight`` if it has none.

    ``owner``: the modality that an entry belongs to, or "".
    """
    modality = owner(entry)
    return samples.get(modality, 0.0) if modality else weight


def _checked(weight: float) -> float:
    weight = float(weight)
    if not (math.isfinite(weight) and weight >= 0):
        raise ValueError(f"cannot average with weight {weight}: it must be finite and not negative")
    return weight


def _check_names(weights: Weights, expected: Mapping[str, object]) -> None:
    if expected.keys() != weights.keys():
        raise ValueError(f"cannot average: names differ in {sorted(expected.keys() ^ weights.keys())[:3]}")


def _as_type(mean: np.ndarray, dtype: np.dtype, added: int) -> np.ndarray:
    if dtype.kind != "f":
        # Fractional weights can leave the mean of equal counters a rounding error short of the counter.
        slack = (added + 1) * np.finfo(np.float64).eps
        mean = np.floor(mean + slack * np.abs(mean))
    return np.asarray(mean, dtype=dtype)
