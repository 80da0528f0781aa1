"""The method ``co_boosting``: Co-Boosting (Dai et al., "Enhancing One-Shot Federated Learning Through Data and Ensemble
Co-Boosting", ICLR 2024, arXiv 2402.15070). Data and ensemble improve each other.

As DENSE, with three changes (docs/algorithm.md 3.20). Images: CE weighs by how hard an image is, (1 - p_y)^hardness,
and the KL to the student at T = 3 has no mask. The student's steps: images move by one step of the sign of a random
direction's gradient in the ensemble's output space. The ensemble: weights w_k of the clients, learnt by
the sign of the gradient of CE on the pool, in [0, 1]; logits are sum_k w_k f_k / sum_k w_k.

Defaults: ``co_boosting.sh``, ``datafree_kd.py`` and ``datafree/synthesis/coboost.py`` of the authors' code
(rong-dai/Co-Boosting): 30 steps of Adam 1e-3, T = 4, SGD 0.01 on a cosine, momentum 0.9, decay 1e-4, no inversion loss,
steps 8/255 and 0.01 x 0.99^epoch, gradients clipped to a norm of 10. Smaller here: 20 epochs of 200, batches of 64 of
128, z of 100 numbers of 256, 20 student steps an epoch and at most as many of the weights, where theirs are passes over
the pool. Where it differs: where a step would set all weights to 0 they stay as they were; with ``co_boosting.start`` =
global the student begins at the warm-up's model; the last student counts, not the best on test images.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..config.fields import knob
from ..core.about import About, Paper
from .server_side import PoolKnobs, PoolMethod

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..config.schema import ExperimentConfig
    from ..distillation.ensemble import PoolRule


@dataclass(frozen=True)
class CoBoostingKnobs(PoolKnobs):
    bn_weight: float = knob(0.0, "weight of the batch norms' inversion loss", low=0.0)
    lr: float = knob(0.01, "SGD learning rate of the student in the first epoch; it falls on a cosine", above=0.0)
    weight_decay: float = knob(1e-4, "SGD weight decay", low=0.0)
    temperature: float = knob(4.0, "T of the student's loss", above=0.0)
    hardness: float = knob(1.0, "exponent of 1 - p_y, the weight of an image's cross-entropy", low=0.0)
    perturbation: float = knob(8 / 255, "step of the images before the student learns, in [-1, 1]; 0: none", low=0.0)
    weight_step: float = knob(0.01, "step of the ensemble's weights in the first epoch; 0: equal weights", low=0.0)
    weight_decline: float = knob(0.99, "factor of that step an epoch", above=0.0, high=1.0)


class CoBoosting(PoolMethod):
    """Hard images, and an ensemble with learnt weights."""

    name = "co_boosting"
    about = About(
        rounds="no rounds of its own",
        papers=(Paper(
            "dai2024enhancing", "Enhancing One-Shot Federated Learning Through Data and Ensemble Co-Boosting", "ICLR",
            2024, "Rong Dai, Yonggang Zhang, Ang Li, Tongliang Liu, Xun Yang, Bo Han", arxiv="2402.15070",
        ),),
    )  # fmt: skip
    knobs = CoBoostingKnobs

    def rule(self, config: ExperimentConfig) -> PoolRule:
        from functools import partial

        from ..distillation.ensemble import PoolRule

        own = self.own(config)
        assert isinstance(own, CoBoostingKnobs)
        return PoolRule(
            self.name, own, partial(image_loss, weight=own.adversarial_weight, hardness=own.hardness),
            partial(perturb, size=own.perturbation) if own.perturbation else None,
            partial(reweigh, step=own.weight_step, decline=own.weight_decline) if own.weight_step else None,
            clip=10.0, cosine=True,
        )  # fmt: skip


def image_loss(student: Tensor, ensemble: Tensor, labels: Tensor, weight: float, hardness: float) -> Tensor:
    """Return mean[(1 - p_y)^hardness CE(t, y)] - weight mean[9 KL_{T=3}(t || s)] of logits; p_y has no gradient."""
    from torch.nn import functional as F

    from ..distillation.losses import kl

    losses = F.cross_entropy(ensemble, labels, reduction="none")
    hard = (1 - (-losses.detach()).exp()).clamp(min=0) ** hardness
    return (hard * losses).mean() - weight * kl(ensemble, student, 3.0).mean()


def perturb(ensemble: Callable[[Tensor], Tensor], images: Tensor, draws: torch.Generator, size: float) -> Tensor:
    """Return ``images`` + size sign(d/dx sum u softmax(t(x) / 4)), u uniform in [-1, 1] (Tashiro et al. 2020)."""
    import torch

    x = images.detach().requires_grad_()
    answers = (ensemble(x) / 4).softmax(1)
    direction = 2 * torch.rand(answers.shape, generator=draws).to(answers.device) - 1
    [slope] = torch.autograd.grad((direction * answers).sum(), x)
    return (x + size * slope.sign()).detach()


def reweigh(logits: Tensor, labels: Tensor, weights: Tensor, epoch: int, step: float, decline: float) -> Tensor:
    """Return the weights [K] after one signed step on CE(sum_k w_k f_k / sum_k w_k, y); ``logits`` [K, B, C]."""
    import torch
    from torch.nn import functional as F

    from ..distillation.ensemble import mixed

    w = weights.detach().requires_grad_()
    [slope] = torch.autograd.grad(F.cross_entropy(mixed(logits, w / w.sum()), labels), w)
    moved = (w.detach() - step * decline**epoch * slope.sign()).clamp(0, 1)
    return moved if moved.sum() > 0 else weights


CO_BOOSTING = CoBoosting()
