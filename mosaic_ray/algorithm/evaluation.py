"""Accuracy on real images, for reporting alone: no choice is made by what this module returns on test data."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ..data.transforms import normalise
from ..models.tensors import use_precision
from ..records import DataFacts, ImageSet


@torch.no_grad()
def confusion(
    logits_of: Callable[[Tensor], Tensor],
    data: ImageSet,
    facts: DataFacts,
    device: torch.device,
    precision: str = "fp32",
    chunk: int = 500,
) -> np.ndarray:
    """Counts int64 [C, C]: rows are true classes, columns predicted ones. Images are not augmented."""
    table = np.zeros((facts.num_classes, facts.num_classes), np.int64)
    for start in range(0, len(data), chunk):
        images = torch.tensor(data.images[start : start + chunk], device=device)
        with use_precision(precision, device):
            predicted = logits_of(normalise(images, facts.mean, facts.std)).argmax(1)
        np.add.at(table, (data.labels[start : start + chunk], predicted.cpu().numpy()), 1)
    return table


def accuracy(table: np.ndarray) -> float:
    """Share of the diagonal of a confusion table; 0 where it is empty."""
    return float(np.trace(table) / max(table.sum(), 1))


def per_class_accuracy(table: np.ndarray) -> list[float | None]:
    """Recall of each class; None for a class without samples."""
    totals = table.sum(1)
    return [float(table[c, c] / totals[c]) if totals[c] else None for c in range(len(table))]
