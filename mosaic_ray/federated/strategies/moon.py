"""MOON: model-contrastive learning pulls a client's features to the global model's and away from its last local one's.

Li, He and Song, "Model-Contrastive Federated Learning", CVPR 2021, equation 3 (docs/algorithm.md 3.16). The loss is the
cross-entropy plus mu times the mean of

    - log ( exp(sim(z, z_glob) / T) / (exp(sim(z, z_glob) / T) + exp(sim(z, z_prev) / T)) )

with the cosine similarity of features of the model that is trained, of the one that the client was sent, and of its own
at the end of its last round. In a client's first round there is no such model, and the term is 0, as in the authors'
code (QinbinLi/MOON, main.py). The other two models are in eval mode and get no gradient. mu = 1 and T = 0.5 are the
defaults of that code; the authors' example for CIFAR-10 has mu = 5. The authors add a projection head of two layers and
contrast its outputs. Here features are the inputs of the linear head, so that the network is that of all other
strategies. A client keeps one more model, and a step has two more forward passes.
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
from ...models.classifiers import Classifier
from ...models.state_dict import freeze, load_weights, to_weights
from ..local_training import LocalStart, Objective
from .base import Strategy


@dataclass(frozen=True)
class MoonKnobs:
    mu: float = knob(1.0, "weight of the contrastive term; 0: FedAvg", low=0.0)
    temperature: float = knob(0.5, "temperature of the contrastive term", above=0.0)


def contrast(z: Tensor, same: Tensor, other: Tensor, temperature: float) -> Tensor:
    """Return the contrastive term, which pulls features ``z`` [B, d] to those of ``same``, away from ``other``'s."""
    similarity = [nn.functional.cosine_similarity(z, z2, dim=1) for z2 in (same, other)]
    return -(torch.stack(similarity, 1) / temperature).log_softmax(1)[:, 0].mean()


class ContrastiveObjective(Objective):
    """Cross-entropy plus ``mu`` times the contrastive term; the client keeps its model."""

    def __init__(self, start: LocalStart, own: MoonKnobs) -> None:
        self._own = own
        self._received = freeze(copy.deepcopy(start.model))
        self._last = freeze(load_weights(copy.deepcopy(start.model), start.state)) if start.state else None
        self._features: list[Tensor] = []

    def forward(self, model: Classifier, images: Tensor) -> Tensor:
        z = model.features(images)
        if self._last is not None:
            with torch.no_grad():
                self._features = [z, self._received.features(images), self._last.features(images)]
        logits: Tensor = model.head(z)
        return logits

    def loss(self, model: nn.Module, logits: Tensor, labels: Tensor) -> Tensor:
        found = super().loss(model, logits, labels)
        if self._last is None:
            return found
        z, received, last = (features[: len(labels)].float() for features in self._features)
        return found + self._own.mu * contrast(z, received, last, self._own.temperature)

    def finish(self, model: nn.Module, num_steps: int) -> tuple[Weights, Weights]:
        return {}, to_weights(model)


class Moon(Strategy):
    """FedAvg with a model-contrastive term in the local objective; mu = 0 is FedAvg."""

    name = "moon"
    about = About(
        state="their last model",
        papers=(Paper(
            "li2021model", "Model-Contrastive Federated Learning", "CVPR", 2021, "Qinbin Li, Bingsheng He, Dawn Song",
            arxiv="2103.16257",
        ),),
    )  # fmt: skip
    knobs = MoonKnobs
    step_cost = 5 / 3  # two more forward passes, each a third of a step
    whole_models = True

    def objective(self, start: LocalStart) -> Objective:
        return ContrastiveObjective(start, section_of(start.config, self.name, MoonKnobs))


MOON = Moon()
