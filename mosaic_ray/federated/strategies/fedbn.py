"""FedBN: batch norms stay with the clients.

Li, Jiang, Zhang, Kamp and Dou, "FedBN: Federated Learning on Non-IID Features via Local Batch Normalization", ICLR 2021
(docs/algorithm.md 3.3). A client begins a round with its own batch norms (scale, shift, running statistics, counter) as
they were at the end of its last round, and its first round with those that it is sent. All other entries are averaged
as in FedAvg. Layers are found by type; the authors (med-air/FedBN, federated/fed_digits.py) look for "bn" in names.

**The global model.** FedBN has none. Here clients send their batch norms, too, and the global model has the averages of
all entries, as in FedAvg. ``warmup.bn`` and ``finetune.bn`` decide about its statistics, as for every strategy, so that
rows of a table differ in the strategy alone. Exact ones (3.6) suit FedBN best, whose clients' statistics lie apart.

The paper evaluates each client's own model, the global one with the client's batch norms: ``personal_accuracy`` in
summary.json. A network without batch norm is trained as in FedAvg.
"""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ...core.about import About, Paper
from ...core.types import Weights
from ...models.state_dict import to_weights
from ..local_training import LocalStart, Objective
from .base import Strategy


class KeptBatchNorms(Objective):
    """Cross-entropy; the client keeps its batch norms."""

    def finish(self, model: nn.Module, num_steps: int) -> tuple[Weights, Weights]:
        norms = {path: part for path, part in model.named_modules() if isinstance(part, _BatchNorm)}
        return {}, {f"{path}.{name}": value for path, part in norms.items() for name, value in to_weights(part).items()}


class FedBN(Strategy):
    """FedAvg of all entries but batch norms, which stay with the clients."""

    name = "fedbn"
    about = About(
        state="their batch norms",
        papers=(Paper(
            "li2021fedbn", "FedBN: Federated Learning on Non-IID Features via Local Batch Normalization", "ICLR", 2021,
            "Xiaoxiao Li, Meirui Jiang, Xiaofei Zhang, Michael Kamp, Qi Dou", arxiv="2102.07623",
        ),),
    )  # fmt: skip
    whole_models = personal_models = True
    step_cost = 1.0

    def receive(self, weights: Weights, state: Weights) -> Weights:
        return weights | state

    def objective(self, start: LocalStart) -> Objective:
        return KeptBatchNorms()

    def personal(self, weights: Weights, state: Weights) -> Weights:
        return weights | state


FEDBN = FedBN()
