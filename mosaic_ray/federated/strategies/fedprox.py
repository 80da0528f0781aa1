"""FedProx: a proximal term keeps each client's model near the one that it was sent.

Li, Sahu, Zaheer, Sanjabi, Talwalkar and Smith, "Federated Optimization in Heterogeneous Networks", MLSys 2020
(docs/algorithm.md, Strategies).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from ...config.fields import knob
from ...config.plugins import section_of
from ...core.about import About, Paper
from ..local_training import LocalStart, Objective
from .base import Strategy


@dataclass(frozen=True)
class FedProxKnobs:
    mu: float = knob(0.01, "weight of the proximal term mu/2 |w - w_t|^2", low=0.0)


class ProximalObjective(Objective):
    """Cross-entropy plus mu/2 times the squared distance of the trained parameters to those received.

    Buffers, such as batch norm's running statistics, are not parameters and take no part.
    """

    def __init__(self, model: nn.Module, mu: float) -> None:
        self._mu = mu
        self._received = {name: value.detach().clone() for name, value in model.named_parameters()}

    def loss(self, model: nn.Module, logits: Tensor, labels: Tensor) -> Tensor:
        distance = sum(
            (value - self._received[name]).square().sum()
            for name, value in model.named_parameters()
            if value.requires_grad
        )
        return super().loss(model, logits, labels) + self._mu / 2 * distance


class FedProx(Strategy):
    """FedAvg with a proximal term in the local objective; mu = 0 is FedAvg."""

    name = "fedprox"
    about = About(
        papers=(Paper(
            "li2020federated", "Federated Optimization in Heterogeneous Networks", "MLSys", 2020,
            "Tian Li, Anit Kumar Sahu, Manzil Zaheer, Maziar Sanjabi, Ameet Talwalkar, Virginia Smith",
            arxiv="1812.06127",
        ),),
    )  # fmt: skip
    knobs = FedProxKnobs
    step_cost = 1.0

    def objective(self, start: LocalStart) -> Objective:
        return ProximalObjective(start.model, section_of(start.config, self.name, FedProxKnobs).mu)


FEDPROX = FedProx()
