"""How good predictions are, for reporting alone: no choice is made by what this module returns on test data."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ..core.seeding import numpy_stream
from ..core.types import DataFacts, ImageSet
from ..data.transforms import normalise
from ..models.state_dict import use_precision

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
) -> np.ndarray:
    """Logits float32 [N, C] of ``data``, which is not augmented."""
    logits = np.empty((len(data), facts.num_classes), np.float32)
    for start in range(0, len(data), chunk):
        images = torch.tensor(data.images[start : start + chunk], device=device)
        with use_precision(precision, device):
            logits[start : start + chunk] = logits_of(normalise(images, facts.mean, facts.std)).float().cpu().numpy()
    return logits


def confusion(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Counts int64 [C, C] of logits [N, C] and labels [N]: rows are true classes, columns predicted ones."""
    table = np.zeros((logits.shape[1], logits.shape[1]), np.int64)
    np.add.at(table, (labels, logits.argmax(1)), 1)
    return table


def accuracy(table: np.ndarray) -> float:
    """Share of the diagonal of a confusion table; 0 where it is empty."""
    return float(np.trace(table) / max(table.sum(), 1))


def per_class_accuracy(table: np.ndarray) -> list[float | None]:
    """Recall of each class; None for a class without samples."""
    totals = table.sum(1)
    return [float(table[c, c] / totals[c]) if totals[c] else None for c in range(len(table))]


def calibration(logits: np.ndarray, labels: np.ndarray) -> dict[str, float | None]:
    """How far the probabilities behind logits [N, C] can be trusted; None where a logit is not finite.

    ``nll``: mean of -log p(label), in nats. ``ece``: sum_b n_b / N |accuracy_b - confidence_b| over 15 bins of equal
    width, open below, of the largest probability (Guo et al. 2017, eq. 3), within [0, 1].
    """
    if not np.isfinite(logits).all():
        return {"nll": None, "ece": None}
    log_p = torch.tensor(logits).double().log_softmax(1).numpy()
    confidence, right = np.exp(log_p.max(1)), log_p.argmax(1) == labels
    bins = np.minimum(np.ceil(NUM_BINS * confidence), NUM_BINS).astype(np.int64)  # a rounded sum may be above 1
    gaps = np.bincount(bins, right - confidence)
    return {
        "nll": float(-log_p[np.arange(len(labels)), labels].mean()),
        "ece": float(np.abs(gaps).sum() / len(labels)),
    }


def domain_auc(real: np.ndarray, synthetic: np.ndarray, seed: int) -> float:
    """How well a linear classifier tells ``synthetic`` [n, d] from ``real`` [n, d]: 0.5 not at all, 1 always.

    Logistic regression on standardised features, fitted to one half of each, its AUC taken on the other (ALGORITHM
    4.2). 0.5 where there are fewer than two of each.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from threadpoolctl import threadpool_limits

    half = len(real) // 2
    if not half:
        return 0.5
    draws = numpy_stream(seed, "meta", "domain")
    sides = [side[draws.permutation(len(side))] for side in (real, synthetic)]
    judge = make_pipeline(StandardScaler(), LogisticRegression(max_iter=500))
    with threadpool_limits(1), warnings.catch_warnings():  # one thread, as for the prototypes: the last bit
        warnings.simplefilter("ignore", ConvergenceWarning)
        judge.fit(np.concatenate([side[:half] for side in sides]), np.repeat([0, 1], half))
    unseen = [side[half:] for side in sides]
    truth = np.repeat([0, 1], [len(side) for side in unseen])
    return float(roc_auc_score(truth, judge.decision_function(np.concatenate(unseen))))
