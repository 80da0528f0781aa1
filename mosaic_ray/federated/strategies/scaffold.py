"""SCAFFOLD: control variates take the clients' drift out of local training.

Karimireddy, Kale, Mohri, Reddi, Stich and Suresh, "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning",
ICML 2020 (docs/algorithm.md 3.13; option II, server step 1).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from ...config.schema import ExperimentConfig
from ...core.about import About, Paper
from ...core.errors import RequestError
from ...core.types import Update, Weights
from ..client_models import Models, RoundAggregator, RoundStart
from ..communication import Entries, is_parameter
from ..local_training import LocalStart, Objective
from .base import Strategy


class ControlledObjective(Objective):
    """Cross-entropy; its gradients are corrected by c - c_k, the server's and the client's control variates.

    Control variates have the names and shapes of the parameters; a client's first one is 0.
    """

    def __init__(self, start: LocalStart) -> None:
        self._lr, self._server, self._client = start.plan.lr, start.server, start.state
        self._received = {name: value.detach().clone() for name, value in start.model.named_parameters()}
        self._correction = {
            name: torch.as_tensor(start.server[name] - start.state.get(name, np.float32(0)), device=value.device)
            for name, value in start.model.named_parameters()
        }

    def correct_gradients(self, model: nn.Module) -> None:
        for name, value in model.named_parameters():
            if value.grad is not None:
                value.grad += self._correction[name]

    def finish(self, model: nn.Module, num_steps: int) -> tuple[Weights, Weights]:
        """Return c_k+ - c_k, and c_k+ = c_k - c + (w_t - y) / (I lr) after I = ``num_steps`` steps."""
        change, state = {}, {}
        for name, value in model.named_parameters():
            drift = (self._received[name] - value.detach()).cpu().numpy() / np.float32(max(num_steps, 1) * self._lr)
            change[name] = np.asarray(drift - self._server[name], np.float32)
            state[name] = np.asarray(change[name] + self._client.get(name, np.float32(0)), np.float32)
        return change, state


class ControlledAggregator(RoundAggregator):
    """FedAvg's average of the models; c moves by 1/K of the sum of the clients' changes, K counting all clients."""

    def __init__(self, start: RoundStart) -> None:
        super().__init__(start)
        self._sums: dict[str, np.ndarray] = {}

    def add(self, update: Update) -> None:
        super().add(update)
        for name, value in update.message.items():
            self._sums[name] = self._sums.get(name, np.float64(0)) + value.astype(np.float64)

    def server_state(self) -> Weights:
        clients, before = self.start.federation.config.partition.num_clients, self.start.server
        changes = {name: (total / clients).astype(np.float32) for name, total in self._sums.items()}
        return before | {name: before[name] + change for name, change in changes.items()}


class Scaffold(Strategy):
    """FedAvg with control variates on the server and on every client."""

    name = "scaffold"
    about = About(
        state="a control variate",
        papers=(Paper(
            "karimireddy2020scaffold", "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning", "ICML", 2020,
            "Sai Praneeth Karimireddy, Satyen Kale, Mehryar Mohri, Sashank J. Reddi, Sebastian U. Stich, "
                "Ananda Theertha Suresh",
            arxiv="1910.06378",
        ),),
    )  # fmt: skip
    whole_models = True
    partial_modalities = False
    step_cost = 1.0

    def check(self, config: ExperimentConfig) -> None:
        if config.warmup.momentum:
            raise RequestError(
                f"warmup.momentum = {config.warmup.momentum:g}: scaffold needs plain SGD, momentum 0; in a comparison "
                "give --for scaffold warmup.momentum=0"
            )
        if len(set(config.model.classifiers)) > 1:
            raise RequestError("model.classifiers: scaffold needs one network, since control variates have its shape")

    def initial_state(self, models: Models) -> Weights:
        [network] = models.values()
        return {name: np.zeros_like(value) for name, value in network.items() if is_parameter(name)}

    def objective(self, start: LocalStart) -> Objective:
        return ControlledObjective(start)

    def aggregator(self, start: RoundStart) -> RoundAggregator:
        return ControlledAggregator(start)

    def messages(self, network: Entries) -> tuple[Entries, Entries]:
        own = {name: entry for name, entry in network.items() if is_parameter(name)}
        return own, own


SCAFFOLD = Scaffold()
