"""Refit a linear head on prototypes: the ablation ``prototype_head``, and a starting point of the teacher."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import numpy as np
import torch
from torch import Tensor, nn

from ..core.types import Prototypes, Weights
from ..models.optimizers import Adam
from ..models.state_dict import head_of
from .prototypes import prototype_weights

FIT_STEPS, FIT_LR, PATIENCE = 1000, 1e-2, 200


#: A trained state replaces its start only if its loss is lower by so many standard errors of the difference. Held-out
#: centroids are few, and easier than images, so that a more confident state often has a slightly lower loss by chance.
SURE = 2.0


def sample_losses(logits: Tensor, labels: np.ndarray) -> Tensor:
    """Return the cross-entropy of each sample, float64 [P] on the CPU, of logits [P, C]."""
    return nn.functional.cross_entropy(logits.detach().double().cpu(), torch.as_tensor(labels), reduction="none")


def surely_lower(now: Tensor, start: Tensor, sizes: np.ndarray) -> bool:
    """Check that the mean of losses ``now`` [P] is below that of ``start`` by more than ``SURE`` standard errors.

    The errors are those of the mean of the paired differences, weighted by ``sizes`` [P].
    """
    shares = torch.as_tensor(sizes).double() / float(np.sum(sizes))
    falls = start - now
    mean = shares @ falls
    return bool(mean > SURE * (shares**2 @ (falls - mean) ** 2).sqrt())


def scores(logits: Tensor, prototypes: Prototypes) -> tuple[float, float]:
    """Return (accuracy in [0, 1], mean cross-entropy) of logits [P, C] on prototypes, weighted by cluster size."""
    sizes = torch.as_tensor(prototypes.sizes).double()
    sizes = sizes / sizes.sum()
    right = (logits.detach().cpu().argmax(1) == torch.as_tensor(prototypes.labels)).double()
    return float(sizes @ right), float(sizes @ sample_losses(logits, prototypes.labels))


def descent(prototypes: Prototypes, start: tuple[np.ndarray, np.ndarray], weighting: str) -> Iterator[list[Tensor]]:
    """Yield the head (V [C, d], b [C]) before each step of full-batch Adam on the weighted cross-entropy."""
    vectors, labels = torch.tensor(prototypes.vectors), torch.tensor(prototypes.labels)
    weights = torch.tensor(prototype_weights(prototypes, weighting))
    head = [torch.tensor(part, requires_grad=True) for part in start]
    optimiser = Adam(head, lr=FIT_LR)
    while True:
        yield [part.detach() for part in head]
        optimiser.zero_grad()
        losses = nn.functional.cross_entropy(vectors @ head[0].T + head[1], labels, reduction="none")
        (weights * losses).mean().backward()
        optimiser.step()


def fit_head(
    kept: Prototypes, held_out: Prototypes, start: tuple[np.ndarray, np.ndarray], weighting: str
) -> tuple[np.ndarray, np.ndarray, dict[str, float]]:
    """Fit weighted logistic regression to ``kept`` from the head ``start``; returns V [C, d], b [C] and metrics.

    Uses full-batch Adam and returns the state of lowest cross-entropy on ``held_out`` (on ``kept`` if that is empty),
    ``start`` included. Draws no random numbers.
    """
    evaluated = held_out if len(held_out) else kept
    unseen = torch.tensor(evaluated.vectors)
    best, best_step, best_loss = [torch.tensor(part) for part in start], 0, float("inf")
    for step, head in zip(range(FIT_STEPS + 1), descent(kept, start, weighting), strict=False):
        if step % 5 == 0:
            loss = scores(unseen @ head[0].T + head[1], evaluated)[1]
            if loss < best_loss:
                best, best_step, best_loss = [part.clone() for part in head], step, loss
            elif step - best_step >= PATIENCE:
                break
    accuracy = scores(unseen @ best[0].T + best[1], evaluated)[0]
    figures = {"steps": best_step, "held_out_loss": best_loss, "held_out_accuracy": accuracy}
    return best[0].numpy(), best[1].numpy(), figures


def fit_heads(
    kept: Prototypes, held_out: Prototypes, start: Weights, weighting: str
) -> tuple[Weights, Weights, dict[str, float]]:
    """Fit the head of the network ``start`` as ``fit_head`` does, then to all prototypes for as many steps.

    Returns the head that has not seen ``held_out``, the head that has, and the figures of the former.
    """
    matrix, bias, figures = fit_head(kept, held_out, head_of(start), weighting)
    trial = {"head.weight": matrix, "head.bias": bias}
    if not len(held_out):
        return trial, trial, figures
    everything = descent(Prototypes.concatenate([kept, held_out]), head_of(start), weighting)
    matrix, bias = (part.clone().numpy() for part in next(islice(everything, int(figures["steps"]), None)))
    return trial, {"head.weight": matrix, "head.bias": bias}, figures
