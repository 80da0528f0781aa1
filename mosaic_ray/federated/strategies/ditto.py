"""Ditto: beside FedAvg's model every client trains a personal one, which is kept near the global model.

Li, Hu, Beirami and Smith, "Ditto: Fair and Robust Federated Learning Through Personalization", ICML 2021, algorithm 1
(docs/algorithm.md 3.17). A client that was sent w_t takes steps with its personal model v_k

    v = v - lr (g_k(v) + lambda (v - w_t))

on the mini-batches of its local training, as in the authors' code (litian96/ditto, flearn/trainers_MTL/ditto.py). v_k
begins at the first model that the client is sent, theta_0 where all clients take part. Learning rate, momentum and
weight decay are those of local training; the loss is the plain cross-entropy, also where the other model has another.
The term runs over parameters, and batch norm's statistics are the personal model's own. lambda = 1 is the value of the
authors' scripts (run_fashion_clean_ditto_lam1.sh); their code can choose from 0.1, 1 and 2 for each client.

**The global model** is FedAvg's bit for bit. The personal models after the warm-up are evaluated as
``personal_accuracy`` in summary.json. Nothing more is sent; a client keeps one more model and does twice the work.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...config.fields import knob
from ...config.plugins import section_of
from ...core.about import About, Paper
from ...core.types import Weights
from ...models.state_dict import load_weights, to_weights, use_precision
from ..local_training import LocalStart, Objective, prepare
from .base import Strategy


@dataclass(frozen=True)
class DittoKnobs:
    lam: float = knob(1.0, "lambda: pull of a personal model to the global one; 0: it is trained alone", low=0.0)


class PersonalObjective(Objective):
    """Cross-entropy; after each of its steps the client's personal model takes one on the same mini-batch."""

    def __init__(self, start: LocalStart, lam: float) -> None:
        self._lam, self._precision = lam, start.config.runtime.precision
        self._personal = copy.deepcopy(start.model)
        if start.state:
            load_weights(self._personal, start.state)
        self._optimizer = prepare(self._personal, start.plan)
        self._received = {name: value.detach().clone() for name, value in start.model.named_parameters()}

    def after_step(self, model: nn.Module, images: Tensor, labels: Tensor) -> None:
        devices = [images.device] if images.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), use_precision(self._precision, images.device):
            logits = self._personal(images)
        loss = super().loss(self._personal, logits.float(), labels)
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for name, value in self._personal.named_parameters():
            if value.grad is not None:
                value.grad.add_(value.detach() - self._received[name], alpha=self._lam)
        self._optimizer.step()

    def finish(self, model: nn.Module, num_steps: int) -> tuple[Weights, Weights]:
        return {}, to_weights(self._personal)


class Ditto(Strategy):
    """FedAvg, and a personal model at every client."""

    name = "ditto"
    about = About(
        state="a personal model",
        papers=(Paper(
            "li2021ditto", "Ditto: Fair and Robust Federated Learning Through Personalization", "ICML", 2021,
            "Tian Li, Shengyuan Hu, Ahmad Beirami, Virginia Smith", arxiv="2012.04221",
        ),),
    )  # fmt: skip
    knobs = DittoKnobs
    step_cost = 2.0
    whole_models = personal_models = True

    def objective(self, start: LocalStart) -> Objective:
        return PersonalObjective(start, section_of(start.config, self.name, DittoKnobs).lam)

    def personal(self, weights: Weights, state: Weights) -> Weights:
        return state or weights


DITTO = Ditto()
