"""FedRS: restricted softmax. The logits of classes that a client lacks are scaled down in its loss.

Li and Zhan, "FedRS: Federated Learning with Restricted Softmax for Label Distribution Non-IID Data", KDD 2021
(docs/algorithm.md 3.4). This is the form of the paper: the factor is 1 for classes that the client holds, and alpha for
those that it lacks. The authors' release (lxcnju/FedRepo, algorithms/fedrs.py) multiplies every class by alpha + (1 -
alpha) n_kc / max_c n_kc, has a head without bias and clips gradients. The default of alpha is the middle of the
authors' grid 0.9, 0.5, 0.1 (train_lab.py). Only the loss differs from FedAvg: nothing more is sent or kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...config.fields import knob
from ...config.plugins import section_of
from ...config.schema import ExperimentConfig
from ...core.about import About, Paper
from ...core.errors import RequestError
from ..local_training import LocalStart, LogitAdjustment
from .base import Strategy


@dataclass(frozen=True)
class FedRSKnobs:
    alpha: float = knob(0.5, "factor of the logits of classes that a client lacks; 1: FedAvg", low=0.0, high=1.0)


class FedRS(Strategy):
    """FedAvg with the restricted softmax; alpha = 1 is FedAvg."""

    name = "fedrs"
    about = About(
        label_counts="at the client",
        papers=(Paper(
            "li2021fedrs", "FedRS: Federated Learning with Restricted Softmax for Label Distribution Non-IID Data",
            "KDD", 2021, "Xin-Chun Li, De-Chuan Zhan", doi="10.1145/3447548.3467254",
        ),),
    )  # fmt: skip
    knobs = FedRSKnobs

    def check(self, config: ExperimentConfig) -> None:
        if config.warmup.loss != "ce":
            raise RequestError(
                f"warmup.loss = {config.warmup.loss}: it leaves out the classes that fedrs scales; take ce"
            )
        if config.federation.masked:
            raise RequestError("federation.masked = true: it sets the logits to zero that fedrs scales; take false")

    def adjust_logits(self, start: LocalStart) -> LogitAdjustment:
        counts = torch.bincount(start.labels, minlength=start.facts.num_classes)
        scale = torch.ones(len(counts), device=counts.device)
        scale[counts == 0] = section_of(start.config, self.name, FedRSKnobs).alpha
        return lambda logits: logits * scale


FEDRS = FedRS()
