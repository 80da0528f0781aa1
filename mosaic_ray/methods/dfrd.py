"""The method ``dfrd``: DFRD, data-free robustness distillation (Luo et al., NeurIPS 2023, arXiv 2309.13546).

As FedFTG, with the ensemble t = sum_k w_ky f_k formed before the losses, h = z * e_y, and an average of the generator
over rounds, whose images the student sees too (docs/algorithm.md 3.10). w_ky, of the label that was asked for, is over
the clients of the round. It works above FedAvg and above strategies with narrow clients.

Defaults: ``DFAD/manager.py`` and ``param_config.py`` (tran_strategy 1, which is DFRD) of the same group's later code
(lkyddd/DFDG): Adam 2e-4 with betas 0.5 and 0.999, SGD 0.01 with momentum 0.9 and decay 1e-4, T = 10, batches of 64, two
student steps a turn, weights 1, optimizers begin anew in each turn. Smaller here: ten turns of five generator steps a
round; theirs are 200 of 20, in one round. ``dfrd.ema`` and ``dfrd.average_weight`` of 0.5 are ours: no public code has
them.

Where it differs: a batch without a sample that the ensemble has right and the student wrong gives a term of 0, where
theirs is not a number. The student's batch-norm statistics stay (``dfrd.bn``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..config.fields import knob
from ..config.plugins import section_of
from ..core.about import About, Paper
from .base import Method
from .server_side import RoundKnobs, fine_tune

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..core.types import Weights
    from ..distillation.ensemble import Batch
    from ..federated.client_models import Models
    from ..pipeline.context import RunContext
    from ..pipeline.rounds import FinishedRound


@dataclass(frozen=True)
class DfrdKnobs(RoundKnobs):
    generator_steps: int = knob(5, "the generator's steps a turn", low=1)
    student_steps: int = knob(2, "the student's steps a turn", low=1)
    generator_lr: float = knob(2e-4, "Adam learning rate of the generator", above=0.0)
    momentum: float = knob(0.9, "SGD momentum, fresh each turn", low=0.0, high=0.999)
    weight_decay: float = knob(1e-4, "SGD weight decay of the student", low=0.0)
    temperature: float = knob(10.0, "T", above=0.0)
    transfer_weight: float = knob(1.0, "weight of the loss where the ensemble is right and the student wrong", low=0.0)
    spread_weight: float = knob(1.0, "weight of the diversity loss", low=0.0)
    ema: float = knob(0.5, "decay of the generator's average over rounds; 0: no average", low=0.0, high=0.9999)
    average_weight: float = knob(0.5, "weight of the student's loss on the averaged generator's images", low=0.0)


@dataclass(frozen=True)
class DfrdGame:
    """Generator and student of DFRD (``ensemble.Game``)."""

    ema: float
    name, product, fresh = "dfrd", True, True

    def generator_steps(self, knobs: DfrdKnobs, clients: int) -> int:
        return knobs.generator_steps

    def adam(self, knobs: DfrdKnobs, parameters: Any, round_num: int) -> torch.optim.Optimizer:
        from ..models.optimizers import Adam

        return Adam(parameters, lr=knobs.generator_lr, betas=(0.5, 0.999))

    def optimizer(self, knobs: DfrdKnobs, parameters: Any, round_num: int) -> torch.optim.Optimizer:
        from ..models.optimizers import SGD

        return SGD(parameters, lr=knobs.lr, momentum=knobs.momentum, weight_decay=knobs.weight_decay)

    def generator_loss(self, knobs: DfrdKnobs, step: int, batch: Batch) -> Tensor:
        from ..distillation.ensemble import mixed, spread_loss

        ensemble = mixed(batch.ensemble(batch.inputs), batch.weights)
        loss = image_loss(
            batch.student(batch.inputs), ensemble, batch.labels, knobs.temperature, knobs.transfer_weight
        )
        return loss + knobs.spread_weight * spread_loss(batch.latents, batch.images)

    def student_loss(self, knobs: DfrdKnobs, batch: Batch) -> Tensor:
        from ..distillation.ensemble import mixed
        from ..distillation.losses import kl

        t, ensemble = knobs.temperature, mixed(batch.logits, batch.weights)
        return (kl(ensemble, batch.student(batch.inputs), t) / t**2).mean()


def image_loss(student: Tensor, ensemble: Tensor, labels: Tensor, temperature: float, weight: float) -> Tensor:
    """Return CE(t, y) - weight mean KL_T(s || t) over the samples that t has right and s wrong; 0 without any.

    Logits [B, C]; KL has no factor T^2, and s no gradient in it.
    """
    from torch.nn import functional as F

    from ..distillation.losses import kl

    chosen = ((ensemble.argmax(1) == labels) & (student.argmax(1) != labels)).float()
    apart = kl(student.detach(), ensemble, temperature) / temperature**2
    return F.cross_entropy(ensemble, labels) - weight * (apart * chosen).sum() / chosen.sum().clamp(min=1)


class Dfrd(Method):
    """A generator and the global model take turns after every round, with a memory of the generator."""

    name = "dfrd"
    images_only = True
    about = About(
        label_counts="on the server",
        papers=(Paper(
            "luo2023dfrd", "DFRD: Data-Free Robustness Distillation for Heterogeneous Federated Learning", "NeurIPS",
            2023, "Kangyang Luo, Shuai Wang, Yexuan Fu, Xiang Li, Yunshi Lan, Ming Gao", arxiv="2309.13546",
        ),),
    )  # fmt: skip
    knobs = DfrdKnobs

    def after_round(self, ctx: RunContext, finished: FinishedRound) -> tuple[Models, Weights]:
        own = section_of(ctx.config, self.name, DfrdKnobs)
        return fine_tune(ctx, finished, DfrdGame(own.ema), own)


DFRD = Dfrd()
