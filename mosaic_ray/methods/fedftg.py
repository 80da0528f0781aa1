"""The method ``fedftg``: FedFTG, fine-tuning the global model (Zhang et al., CVPR 2022, arXiv 2203.09249).

After the average of every round a generator with labels and the global model take turns (docs/algorithm.md 3.9). Client
k's loss on a sample has the weight w_ky of the label y that was asked for, over the clients of the round.

Defaults: ``methods/local_fn_gan.py`` and ``methods/train_gan_fn.py`` of the authors' code (ZhangLin-PKU/FedFTG): ten
turns of one Adam step (0.01) for each client and five SGD steps of the student, weight decay 1e-3, both rates times
0.998 a round, batches of 50 (64 here). The student's loss is the mean over samples and classes, as there. The generator
goes on over rounds, and its optimizer begins anew. The student's rate is 0.01 here and 0.1 there, in 1,000 rounds of a
ResNet-18 without batch norm: in the ten rounds of the demo on digits 0.1 takes 21 points off the global model.

Where it differs: w_ky weighs the cross-entropy of each sample, as in the paper; their code takes the mean of the
cross-entropies times the mean of the weights. z and the label's embedding are added in this package's generator. The
student's batch-norm statistics stay (``fedftg.bn``); their network has none.
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
class FedFtgKnobs(RoundKnobs):
    lr_decay: float = knob(0.998, "factor of both learning rates after each round", above=0.0, high=1.0)
    weight_decay: float = knob(1e-3, "SGD weight decay of the student", low=0.0)
    label_weight: float = knob(1.0, "weight of the asked label's cross-entropy", low=0.0)
    spread_weight: float = knob(1.0, "weight of the diversity loss", low=0.0)


class FedFtgGame:
    """Generator and student of FedFTG (``ensemble.Game``)."""

    name, product, fresh, ema = "fedftg", False, False, 0.0

    def generator_steps(self, knobs: FedFtgKnobs, clients: int) -> int:
        return clients

    def adam(self, knobs: FedFtgKnobs, parameters: Any, round_num: int) -> torch.optim.Optimizer:
        from ..models.optimizers import Adam

        return Adam(parameters, lr=knobs.generator_lr * knobs.lr_decay**round_num)

    def optimizer(self, knobs: FedFtgKnobs, parameters: Any, round_num: int) -> torch.optim.Optimizer:
        from ..models.optimizers import SGD

        return SGD(parameters, lr=knobs.lr * knobs.lr_decay**round_num, weight_decay=knobs.weight_decay)

    def generator_loss(self, knobs: FedFtgKnobs, step: int, batch: Batch) -> Tensor:
        from ..distillation.ensemble import spread_loss

        place = step % len(batch.weights)
        loss = client_loss(
            batch.student(batch.inputs), batch.ensemble.of(place, batch.inputs), batch.labels, batch.weights[place],
            knobs.label_weight,
        )  # fmt: skip
        spread = spread_loss(batch.latents, batch.images, absolute=True)
        return loss + knobs.spread_weight / len(batch.weights) * spread

    def student_loss(self, knobs: FedFtgKnobs, batch: Batch) -> Tensor:
        return student_loss(batch.student(batch.inputs), batch.logits, batch.weights)


def client_loss(student: Tensor, client: Tensor, labels: Tensor, weights: Tensor, label_weight: float) -> Tensor:
    """Return mean_i w_i (label_weight CE(t_i, y_i) - mean_c |s_ic - t_ic|) of logits [B, C] and w [B].

    The client's logits have no gradient in the second term.
    """
    from torch.nn import functional as F

    apart = (student - client.detach()).abs().mean(1)
    return (weights * (label_weight * F.cross_entropy(client, labels, reduction="none") - apart)).mean()


def student_loss(student: Tensor, logits: Tensor, weights: Tensor) -> Tensor:
    """Return the mean over samples and classes of -log softmax(s) sum_k w_k softmax(t_k); ``logits`` [K, B, C]."""
    from ..distillation.ensemble import mixed

    return -(student.log_softmax(1) * mixed(logits.softmax(2), weights)).mean()


class FedFtg(Method):
    """A generator and the global model take turns after every round."""

    name = "fedftg"
    images_only = True
    about = About(
        label_counts="on the server",
        papers=(Paper(
            "zhang2022fine",
            "Fine-tuning Global Model via Data-Free Knowledge Distillation for Non-IID Federated Learning",
            "CVPR", 2022, "Lin Zhang, Li Shen, Liang Ding, Dacheng Tao, Ling-Yu Duan", arxiv="2203.09249",
        ),),
    )  # fmt: skip
    knobs = FedFtgKnobs

    def after_round(self, ctx: RunContext, finished: FinishedRound) -> tuple[Models, Weights]:
        return fine_tune(ctx, finished, FedFtgGame(), section_of(ctx.config, self.name, FedFtgKnobs))


FEDFTG = FedFtg()
