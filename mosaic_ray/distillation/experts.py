"""Class experts: for each class, the average of the clients' models weighted by class (docs/algorithm.md stage A)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from ..core.health import SINGLE_OWNER_BELOW
from ..core.types import Weights
from ..federated.aggregation import ModalityAverage, PartialAverage, RunningAverage, entry_weight
from ..models.submodel import ChannelIndices, ChannelLayout

#: A client and its weights; with partial-width clients also its channels, None for all.
ClientWeights = tuple[int, Weights] | tuple[int, Weights, ChannelIndices | None]

#: Relative distance below which two experts count as the same model (docs/algorithm.md 4.2).
SAME = 1e-3


def expert_weights(counts: np.ndarray) -> np.ndarray:
    """Return float64 [K, C]: n_{k,c} / sum_k n_{k,c}; the column of a class that no client holds is zero."""
    totals = counts.sum(0)
    return counts / np.where(totals == 0, 1, totals)


def distinct_experts(counts: np.ndarray) -> tuple[list[int], np.ndarray]:
    """Return (representatives, index int64 [C]): classes with different experts, and each class's place among them.

    Classes with equal columns of weights, such as two that one client holds alone, share an expert, which the teacher
    evaluates once.
    """
    names = [column.tobytes() for column in expert_weights(counts).T]
    representatives = [label for label, name in enumerate(names) if names.index(name) == label]
    return representatives, np.array([representatives.index(names.index(name)) for name in names], np.int64)


def effective_owners(counts: np.ndarray) -> np.ndarray:
    """Return float64 [C]: exp of the entropy of a class's weights; 1 if one client holds it alone, 0 if none does."""
    weights = expert_weights(counts)
    entropy = -(weights * np.log(np.where(weights > 0, weights, 1))).sum(0)
    return np.where(counts.sum(0) > 0, np.exp(entropy), 0.0)


def redundancy(experts: Sequence[Weights], index: np.ndarray, counts: np.ndarray) -> float:
    """Return the share of pairs of classes with nearly equal experts: their parameters are closer than ``SAME``.

    The distance is relative to the experts' mean norm. Classes that no client holds are not counted. Nor are pairs that
    one client holds nearly alone, because their experts must be equal. 0 if no pair is left.
    """
    squares, norms, chunk = np.zeros((len(experts),) * 2), np.zeros(len(experts)), 2**18  # numbers in memory at a time
    for name, value in experts[0].items():
        if value.dtype.kind != "f" or "running_" in name:
            continue
        for start in range(0, value.size, chunk):
            rows = np.stack([e[name].reshape(-1)[start : start + chunk] for e in experts]).astype(np.float64)
            norms += np.square(rows).sum(1)
            rows -= rows.mean(0)  # against cancellation: experts share most of their value
            products = rows @ rows.T
            squares += np.diag(products)[:, None] + np.diag(products) - 2 * products
    near = np.sqrt(np.maximum(squares, 0)) < SAME * np.sqrt(norms).mean()
    np.fill_diagonal(near, True)
    owner, alone = counts.argmax(0), effective_owners(counts) < SINGLE_OWNER_BELOW
    held = np.flatnonzero(counts.sum(0) > 0)
    pairs = [
        near[index[a], index[b]]
        for i, a in enumerate(held)
        for b in held[i + 1 :]
        if not (alone[a] and alone[b] and owner[a] == owner[b])
    ]
    return float(np.mean(pairs)) if pairs else 0.0


@dataclass(frozen=True)
class Holdings:
    """Which modalities each client holds, and which weights belong to a modality.

    ``held``: the modalities of each client. ``owner``: the modality of an entry, or "". ``columns``: those of the head.
    """

    held: Sequence[Sequence[str]]
    owner: Callable[[str], str]
    columns: Mapping[str, slice]


def form_experts(
    client_weights: Iterable[ClientWeights],
    counts: np.ndarray,
    fallback: Weights | None,
    *,
    whole: Weights | None = None,
    channels: ChannelLayout | None = None,
    holdings: Holdings | None = None,
) -> tuple[list[Weights], np.ndarray]:
    """Return distinct experts theta_{E_c} = sum_k n_{k,c} theta_k / sum_k n_{k,c}, and the class -> expert index [C].

    ``client_weights`` yields (client, weights) once, in client order, so one client's model is in memory at a time.
    A class that no client holds gets ``fallback`` (F2); raises ``ValueError`` if that is None.

    With partial-width clients it yields (client, part, channels), with None for the channels of a full client, and
    ``channels`` and ``whole``, the global model theta_g, are required. Each coordinate is averaged over the clients
    that hold both it and the class; if there is none it is taken from theta_g (docs/algorithm.md 1.6). ``holdings``,
    for samples of several modalities, requires ``whole``, too: the weights of a modality are averaged in the same way
    over the clients that hold both it and the class.
    """
    representatives, index = distinct_experts(counts)

    def empty() -> RunningAverage | PartialAverage | ModalityAverage:
        if whole is not None and channels is not None:
            return PartialAverage(whole, channels)
        if whole is not None and holdings is not None:
            return ModalityAverage(whole, holdings.owner, holdings.columns)
        return RunningAverage()

    averages = [empty() for _ in representatives]
    for client_id, weights, *sets in client_weights:
        for average, label in zip(averages, representatives, strict=True):
            count = int(counts[client_id, label])
            if not count:
                continue
            samples = dict.fromkeys(holdings.held[client_id], count) if holdings else {}
            if isinstance(average, PartialAverage):
                by_entry = partial(entry_weight, holdings.owner, samples, count) if holdings else None
                average.add(weights, count, sets[0] if sets else None, held=by_entry)
            elif isinstance(average, ModalityAverage):
                average.add(weights, count, samples)
            else:
                average.add(weights, count)
    experts = []
    for average, label in zip(averages, representatives, strict=True):
        if counts[:, label].sum():
            experts.append(average.result())
        elif fallback is None:
            raise ValueError(f"no client holds class {label}, and meta.expert_fallback = error")
        else:
            experts.append({name: value.copy() for name, value in fallback.items()})
    return experts, index
