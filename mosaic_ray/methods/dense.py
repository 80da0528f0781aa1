"""The method ``dense``: DENSE, data-free one-shot federated learning (Zhang et al., NeurIPS 2022, arXiv 2112.12371).

Its equations are in docs/algorithm.md 3.8. The server makes images on which the clients' models, averaged in their
logits, are sure of an asked label and disagree with the student (``image_loss``), and teaches the student by them.

Defaults: the command of the authors' README and ``loop_df_fl.py`` of their code (zj-jayzhang/DENSE): 30 steps of Adam
1e-3, weights 1, T = 20, SGD 0.005 with momentum 0.9. Smaller here: 20 epochs of 200, batches of 64 of 256, z of 100
numbers of 256, 20 student steps an epoch where theirs is a pass over the pool.

Where it differs from their code: the inversion loss is averaged over the clients' models, as in the paper, not summed;
images are not cropped and flipped before the ensemble; the student does not update batch-norm statistics while images
are made; with ``dense.start`` = global it begins at the warm-up's model, and at a network as drawn with ``random``, as
theirs does; the last student counts, not the best on test images. Their 400 local epochs are the warm-up's knobs, and
``federation.strategy=local`` makes it one-shot.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..core.about import About, Paper
from .server_side import PoolKnobs, PoolMethod

if TYPE_CHECKING:
    from torch import Tensor

    from ..config.schema import ExperimentConfig
    from ..distillation.ensemble import PoolRule


@dataclass(frozen=True)
class DenseKnobs(PoolKnobs):
    pass


class Dense(PoolMethod):
    """A generator and a student taught by the mean of the clients' logits."""

    name = "dense"
    about = About(
        rounds="no rounds of its own",
        papers=(Paper(
            "zhang2022dense", "DENSE: Data-Free One-Shot Federated Learning", "NeurIPS", 2022,
            "Jie Zhang, Chen Chen, Bo Li, Lingjuan Lyu, Shuang Wu, Shouhong Ding, Chunhua Shen, Chao Wu",
            arxiv="2112.12371",
        ),),
    )  # fmt: skip
    knobs = DenseKnobs

    def rule(self, config: ExperimentConfig) -> PoolRule:
        from functools import partial

        from ..distillation.ensemble import PoolRule

        own = self.own(config)
        return PoolRule(self.name, own, partial(image_loss, weight=own.adversarial_weight))


def image_loss(student: Tensor, ensemble: Tensor, labels: Tensor, weight: float) -> Tensor:
    """Return CE(t, y) - weight mean[KL(t || s) 1(argmax t != argmax s)] of logits [B, C].

    The mean is over all B images, so a batch without disagreement has a second term of 0.
    """
    from torch.nn import functional as F

    from ..distillation.losses import kl

    apart = (student.argmax(1) != ensemble.argmax(1)).float()
    return F.cross_entropy(ensemble, labels) - weight * (kl(ensemble, student) * apart).mean()


DENSE = Dense()
