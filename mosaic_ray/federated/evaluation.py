"""Measure predictions, for reporting alone: no choice depends on what this module returns on test data."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from ..core.types import DataFacts, ImageSet
from ..data.transforms import to_input
from ..models.state_dict import use_precision
from .local_training import no_progress

#: Bins of the calibration error (Guo et al. 2017).
NUM_BINS = 15


@torch.no_grad()
def logits_on(
    logits_of: Callable[[Tensor], Tensor],
    data: ImageSet,
    facts: DataFacts,
    device: torch.device,
    precision: str = "fp32",
    chunk: int = 500,
    progress: Callable[[int, int], None] = no_progress,
) -> np.ndarray:
    """Return logits float32 [N, C] of ``data``, without augmentation; ``progress(done, total)`` counts images."""
    logits = np.empty((len(data), facts.num_classes), np.float32)
    for start in range(0, len(data), chunk):
        images = torch.tensor(data.images[start : start + chunk], device=device)
        with use_precision(precision, device):
            logits[start : start + chunk] = logits_of(to_input(images, facts)).float().cpu().numpy()
        progress(min(start + chunk, len(data)), len(data))
    return logits


def confusion(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the confusion table int64 [C, C] of logits [N, C]: rows are true classes, columns predicted ones."""
    table = np.zeros((logits.shape[1], logits.shape[1]), np.int64)
    np.add.at(table, (labels, logits.argmax(1)), 1)
    return table


def accuracy(table: np.ndarray) -> float:
    """Return the accuracy of a confusion table; 0 where it is empty."""
    return float(np.trace(table) / max(table.sum(), 1))


def per_class_accuracy(table: np.ndarray) -> list[float | None]:
    """Return the recall of each class; None for a class without samples."""
    totals = table.sum(1)
    return [float(table[c, c] / totals[c]) if totals[c] else None for c in range(len(table))]


def own_accuracy(recalls: Sequence[float | None], held: np.ndarray) -> float:
    """Return sum_c q_c recall_c from the recall of each class and a client's label counts [C], q_c being their shares.

    Classes without test images (None) are left out; 0 where none is left.
    """
    known = np.array([recall is not None for recall in recalls])
    shares = held * known
    return float(shares @ np.array([recall or 0.0 for recall in recalls]) / max(shares.sum(), 1))


def calibration(logits: np.ndarray, labels: np.ndarray) -> dict[str, float | None]:
    """Return the calibration of the probabilities behind logits [N, C]; None where a logit is not finite.

    ``nll``: mean of -log p(label), in nats. ``ece``: sum_b n_b / N |accuracy_b - confidence_b| over 15 bins of equal
    width, open below, of the largest probability (Guo et al. 2017, eq. 3), within [0, 1].
    """
    if not np.isfinite(logits).all():
        return {"nll": None, "ece": None}
    log_p = torch.tensor(logits).double().log_softmax(1).numpy()
    confidence, right = np.exp(log_p.max(1)), log_p.argmax(1) == labels
    bins = np.minimum(np.ceil(NUM_BINS * confidence), NUM_BINS).astype(np.int64)  # a rounded sum may be above 1
    gaps = np.bincount(bins, right - confidence)
    return {"nll": float(-log_p[np.arange(len(labels)), labels].mean()), "ece": float(np.abs(gaps).sum() / len(labels))}
