"""Refit a linear head on prototypes: the ablation ``prototype_head``, and a starting point of the teacher."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import count, islice

import numpy as np
import torch
from torch import Tensor, nn

from ..core.types import Prototypes, Weights
from ..models.state_dict import head_of
from .prototypes import prototype_weights

FIT_STEPS, FIT_LR, PATIENCE = 1000, 1e-2, 200
BETA1, BETA2, EPS = 0.9, 0.999, 1e-8  # of Adam

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
    """Yield the head (V [C, d], b [C]) before each step of full-batch Adam on the weighted cross-entropy.

    Gradient and step are written out, with the bits of autograd and ``torch.optim.Adam``: those take four times as long
    for so few numbers. The tensors that are yielded change in the next step.
    """
    vectors, labels = torch.tensor(prototypes.vectors), torch.tensor(prototypes.labels)
    weights = torch.tensor(prototype_weights(prototypes, weighting))
    head = [torch.tensor(part) for part in start]
    means, squares = ([torch.zeros_like(part) for part in head] for _ in range(2))
    shares = weights * (torch.ones(()) / len(labels))
    # the gradient by the log-probabilities [P, C]
    by_log = torch.zeros(len(labels), len(head[1])).scatter_(1, labels[:, None], -shares[:, None])
    for step in count(1):
        yield head
        logs = (vectors @ head[0].T + head[1]).log_softmax(1)
        by_logits = torch.ops.aten._log_softmax_backward_data(by_log, logs, 1, logs.dtype)
        corrections = 1 - BETA1**step, math.sqrt(1 - BETA2**step)
        for part, mean, square, slope in zip(
            head, means, squares, (by_logits.T @ vectors, by_logits.sum(0)), strict=True
        ):
            mean.lerp_(slope, 1 - BETA1)
            square.mul_(BETA2).addcmul_(slope, slope, value=1 - BETA2)
            part.addcdiv_(mean, (square.sqrt() / corrections[1]).add_(EPS), value=-FIT_LR / corrections[0])


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
