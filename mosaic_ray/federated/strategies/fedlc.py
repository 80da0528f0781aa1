"""FedLC: logits are calibrated by the client's label counts, so that rare classes get a larger margin.

Zhang, Li, Li, Xu, Wu, Ding and Wu, "Federated Learning with Label Distribution Skew via Logits Calibration", ICML 2022
(docs/algorithm.md 3.14). The loss is the cross-entropy of f_c(x) - tau n_kc^(-1/4), a margin of tau (n_ky^(-1/4) -
n_kc^(-1/4)) between the classes y and c. The paper's sum in the denominator leaves the right class out, which has no lower bound and
is not FedAvg at tau = 0; here it has all classes, as in public implementations (makgyver/fluke). A class that the
client lacks has an infinite margin: it is left out of the softmax, and its row of the head gets no gradient. The
authors tune tau and released no code that was found; 1 is fluke's.

``fedlc.margin`` = shares adds tau log q_kc of the client's class shares instead: with tau = 1 it is the loss
``warmup.loss`` = adjusted. Only the loss differs from FedAvg, so nothing more is sent or kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...config.fields import knob
from ...config.plugins import section_of
from ...config.schema import ExperimentConfig
from ...core.errors import RequestError
from ..local_training import LocalStart, LogitAdjustment, log_shares
from .base import Strategy


@dataclass(frozen=True)
class FedLCKnobs:
    tau: float = knob(1.0, "strength of the calibration; 0: FedAvg", low=0.0)
    margin: str = knob(
        "counts", "what logits are calibrated by: - n^(-1/4) of a client's label counts, or the log of its class shares",
        choices=("counts", "shares"),
    )  # fmt: skip


class FedLC(Strategy):
    """FedAvg with calibrated logits; tau = 0 is FedAvg."""

    name = "fedlc"
    knobs = FedLCKnobs

    def check(self, config: ExperimentConfig) -> None:
        if config.warmup.loss != "ce":
            raise RequestError(f"warmup.loss = {config.warmup.loss}: fedlc calibrates the same logits; take ce")

    def adjust_logits(self, start: LocalStart) -> LogitAdjustment | None:
        own = section_of(start.config, self.name, FedLCKnobs)
        if not own.tau:
            return None
        counts = torch.bincount(start.labels, minlength=start.facts.num_classes)
        margins = -(counts.double() ** -0.25).float() if own.margin == "counts" else log_shares(start.labels, len(counts))
        shift = own.tau * margins
        return lambda logits: logits + shift


FEDLC = FedLC()
