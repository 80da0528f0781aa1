"""Refit a linear head on prototypes: the ablation ``prototype_head``, and a starting point of the teacher."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from ..core.types import Prototypes
from .prototypes import prototype_weights

FIT_STEPS, FIT_LR, PATIENCE = 1000, 1e-2, 200


def scores(logits: Tensor, prototypes: Prototypes) -> tuple[float, float]:
    """Return (accuracy in [0, 1], mean cross-entropy) of logits [P, C] on prototypes, weighted by cluster size."""
    labels = torch.as_tensor(prototypes.labels)
    sizes = torch.as_tensor(prototypes.sizes).double()
    sizes = sizes / sizes.sum()
    logits = logits.detach().double().cpu()
    right = (logits.argmax(1) == labels).double()
    return float(sizes @ right), float(sizes @ nn.functional.cross_entropy(logits, labels, reduction="none"))


def fit_head(
    kept: Prototypes, held_out: Prototypes, start: tuple[np.ndarray, np.ndarray], weighting: str
) -> tuple[np.ndarray, np.ndarray, dict[str, float]]:
    """Fit weighted logistic regression to ``kept`` from the head ``start``; returns V [C, d], b [C] and metrics.

    Uses full-batch Adam and returns the state of lowest cross-entropy on ``held_out`` (on ``kept`` if that is empty),
    ``start`` included. Draws no random numbers.
    """
    vectors, labels = torch.tensor(kept.vectors), torch.tensor(kept.labels)
    weights = torch.tensor(prototype_weights(kept, weighting))
    evaluated = held_out if len(held_out) else kept
    unseen = torch.tensor(evaluated.vectors)
    head = [torch.tensor(part, requires_grad=True) for part in start]
    optimiser = torch.optim.Adam(head, lr=FIT_LR)
    best, best_step, best_loss = [p.detach().clone() for p in head], 0, float("inf")
    for step in range(FIT_STEPS + 1):
        if step % 5 == 0:
            loss = scores(unseen @ head[0].T + head[1], evaluated)[1]
            if loss < best_loss:
                best, best_step, best_loss = [p.detach().clone() for p in head], step, loss
            elif step - best_step >= PATIENCE:
                break
        optimiser.zero_grad()
        losses = nn.functional.cross_entropy(vectors @ head[0].T + head[1], labels, reduction="none")
        (weights * losses).mean().backward()
        optimiser.step()
    accuracy = scores(unseen @ best[0].T + best[1], evaluated)[0]
    figures = {"steps": best_step, "held_out_loss": best_loss, "held_out_accuracy": accuracy}
    return best[0].numpy(), best[1].numpy(), figures
