"""Federated optimisers: how a round's updates become the next global model.

An optimiser is a small frozen record of functions; the fold over clients calls ``add`` in client order and
``result`` at the end, so memory stays flat whatever the number of clients.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from ...algorithm.averaging import RunningAverage
from ...records import Update, Weights


class Fold(Protocol):
    """Updates in, global weights out."""

    def add(self, update: Update) -> None: ...

    def result(self) -> Weights: ...


class FedAvgFold:
    """theta_g = sum_k n_k theta_k / sum_k n_k over every entry, running statistics too (McMahan et al. 2017)."""

    def __init__(self) -> None:
        self._average = RunningAverage()

    def add(self, update: Update) -> None:
        self._average.add(update.weights, update.num_samples)

    def result(self) -> Weights:
        return self._average.result()


@dataclass(frozen=True)
class Optimiser:
    """A federated optimiser: ``begin(global weights)`` opens the fold of one round."""

    name: str
    begin: Callable[[Weights], Fold]


OPTIMISERS: dict[str, Optimiser] = {
    "fedavg": Optimiser("fedavg", lambda weights: FedAvgFold()),
}
