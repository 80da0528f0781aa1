"""FedLC: logits are calibrated by the client's label counts, so that rare classes get a larger margin.

Zhang, Li, Li, Xu, Wu, Ding and Wu, "Federated Learning with Label Distribution Skew via Logits Calibration", ICML 2022
(docs/algorithm.md 3.15). The loss is the cross-entropy of f_c(x) - tau n_kc^(-1/4): between the right class y and a
class c lies a margin of tau (n_ky^(-1/4) - n_kc^(-1/4)). The paper's denominator leaves the right class out. Such a
loss has no lower bound and is not FedAvg at tau = 0; here the sum has all classes, as in a public implementation
(makgyver/fluke, fluke/algorithms/fedlc.py). A class that the client lacks has an infinite margin: it is left out of the
softmax, and its row of the head gets no gradient. We found no release of the authors, who tune tau; 1 is our default.

``fedlc.margin`` = shares adds tau log q_kc instead, with the client's class shares q_kc. With tau = 1 this is the loss
of ``warmup.loss`` = adjusted. Only the loss differs from FedAvg: nothing more is sent or kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...config.fields import knob
from ...config.plugins import section_of
from ...config.schema import ExperimentConfig
from ...core.about import About, Paper
from ...core.errors import RequestError
from ..local_training import LocalStart, LogitAdjustment, log_shares
from .base import Strategy


@dataclass(frozen=True)
class FedLCKnobs:
    tau: float = knob(1.0, "strength of the calibration; 0: FedAvg", low=0.0)
    margin: str = knob(
        "counts", "what calibrates logits: label counts, by - n^(-1/4), or the log of class shares",
        choices=("counts", "shares"),
    )  # fmt: skip


class FedLC(Strategy):
    """FedAvg with calibrated logits; tau = 0 is FedAvg."""

    name = "fedlc"
    about = About(
        label_counts="at the client",
        papers=(Paper(
            "zhang2022federated", "Federated Learning with Label Distribution Skew via Logits Calibration", "ICML",
            2022, "Jie Zhang, Zhiqi Li, Bo Li, Jianghe Xu, Shuang Wu, Shouhong Ding, Chao Wu", arxiv="2209.00189",
        ),),
    )  # fmt: skip
    knobs = FedLCKnobs

    def check(self, config: ExperimentConfig) -> None:
        if config.warmup.loss != "ce":
            raise RequestError(f"warmup.loss = {config.warmup.loss}: fedlc calibrates the same logits; take ce")

    def adjust_logits(self, start: LocalStart) -> LogitAdjustment | None:
        own = section_of(start.config, self.name, FedLCKnobs)
        if not own.tau:
            return None
        counts = torch.bincount(start.labels, minlength=start.facts.num_classes)
        margins = (
            -(counts.double() ** -0.25).float() if own.margin == "counts" else log_shares(start.labels, len(counts))
        )
        shift = own.tau * margins
        return lambda logits: logits + shift


FEDLC = FedLC()
