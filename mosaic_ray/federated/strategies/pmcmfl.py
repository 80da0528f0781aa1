"""PmcmFL: class prototypes of each modality stand in for the modalities that a sample lacks.

Bao et al., "Multimodal Federated Learning with Missing Modality via Prototype Mask and Contrast", arXiv 2312.13508
(docs/algorithm.md 3.25). The server keeps P[m, c], the mean feature of class c from the encoder of modality m. In
training, a sample of class y gets P[m, y] in the place of the features of each modality m that it lacks, and the loss
is the cross-entropy plus mu times the mean of

    - log ( exp(cos(z, Q_y) / T) / sum_c exp(cos(z, Q_c) / T) )

where z are a sample's features side by side, and Q_c those of class c's prototypes. At inference labels are unknown:
the class is that with the nearest prototypes in the modalities that the sample has (``models.multimodal.Fusion``).
After its local steps a client sends, for each modality and class, the sum of the features of the samples that it has
just seen, and their number.

From the authors' code (Noirebao/Multimodal_Federated, src/algorithm): mu = 0.01 is the weight of its contrast of fused
features, whose temperature begins at 0.07; those of single modalities have 1e-8 there and are left out here. The
contrast begins in the second round. Ours differs: the authors contrast a sample with the prototypes of its mini-batch,
where a class may stand twice; they average prototypes by clients' numbers of samples, so that a client without a class
counts; they compute them on all of a client's complete samples, in a pass of its own; and their first round has noise
in the place of prototypes, here zeros.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ...config.fields import knob
from ...config.plugins import section_of
from ...config.schema import ExperimentConfig
from ...core.about import About, Paper
from ...core.errors import RequestError
from ...core.types import Update, Weights
from ...models.classifiers import Classifier
from ...models.multimodal import PROTOTYPES, Fusion
from ..client_models import Models, RoundAggregator, RoundStart
from ..communication import Entries
from ..local_training import LocalStart, Objective
from .base import Strategy


@dataclass(frozen=True)
class PmcmflKnobs:
    mu: float = knob(0.01, "weight of the contrast with the classes' prototypes; 0: none", low=0.0)
    temperature: float = knob(0.07, "temperature of that contrast", above=0.0)


def contrast(z: Tensor, prototypes: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Return the mean contrast of features ``z`` [B, d] with ``prototypes`` [C, d], of which ``labels`` [B] are theirs.

    Classes without a prototype (zeros) are left out, with the samples of these classes.
    """
    known = prototypes.abs().sum(1) > 0
    kept = known[labels]
    if not bool(kept.any()):
        return z.sum() * 0.0
    similarity = nn.functional.normalize(z[kept], dim=1) @ nn.functional.normalize(prototypes, dim=1).T
    logits = (similarity / temperature).masked_fill(~known, -torch.inf)
    return nn.functional.cross_entropy(logits, labels[kept])


class PrototypeObjective(Objective):
    """Cross-entropy on features that the own class's prototypes complete, plus the contrast."""

    def __init__(self, own: PmcmflKnobs, num_classes: int) -> None:
        self._own, self._num_classes = own, num_classes
        self._encoded: tuple[list[Tensor], list[Tensor]] = [], []
        self._seen: list[tuple[Tensor, Tensor]] = []

    def forward(self, model: Classifier, images: Tensor) -> Tensor:
        trunk = fusion_of(model)
        self._encoded = trunk.encode(images)
        logits: Tensor = model.head(trunk.complete(*self._encoded))
        return logits

    def loss(self, model: nn.Module, logits: Tensor, labels: Tensor) -> Tensor:
        assert isinstance(model, Classifier)
        trunk = fusion_of(model)
        features, present = ([part[: len(labels)] for part in parts] for parts in self._encoded)
        z = trunk.complete(features, present, labels)
        found = super().loss(model, model.head(z).float(), labels)
        if not self._own.mu or not bool(trunk.prototypes.any()):
            return found
        classes = trunk.prototypes.transpose(0, 1).flatten(1)
        return found + self._own.mu * contrast(z.float(), classes, labels, self._own.temperature)

    def after_step(self, model: nn.Module, images: Tensor, labels: Tensor) -> None:
        self._seen.append((images, labels))

    @torch.no_grad()
    def finish(self, model: nn.Module, num_steps: int) -> tuple[Weights, Weights]:
        """Return sums [M, C, d] of features by modality and class, and numbers of samples [M, C]."""
        assert isinstance(model, Classifier)
        trunk = fusion_of(model)
        sums = torch.zeros_like(trunk.prototypes)
        counts = torch.zeros(sums.shape[:2], device=sums.device)
        for images, labels in self._seen:
            classes = nn.functional.one_hot(labels, self._num_classes).float()
            for number, (features, present) in enumerate(zip(*trunk.encode(images), strict=True)):
                held = classes * present
                sums[number] += held.T @ features.float()
                counts[number] += held.sum(0)
        return {"sums": sums.cpu().numpy(), "counts": counts.cpu().numpy()}, {}


def fusion_of(model: Classifier) -> Fusion:
    """Return the part of a network that joins modalities."""
    assert isinstance(model.trunk, Fusion)
    return model.trunk


class PrototypeAggregator(RoundAggregator):
    """FedAvg's average of the models, with the means of the clients' features as prototypes."""

    def __init__(self, start: RoundStart) -> None:
        super().__init__(start)
        self._sums: dict[str, Weights] = {}

    def add(self, update: Update) -> None:
        super().add(update)
        sums = self._sums.setdefault(self.start.federation.classifiers[update.client_id], {})
        for name, value in update.message.items():
            sums[name] = sums.get(name, np.float64(0)) + value.astype(np.float64)

    def result(self) -> Models:
        found = super().result()
        for name, sums in self._sums.items():
            counts = sums["counts"][:, :, None]
            means = sums["sums"] / np.maximum(counts, 1)
            before = self.start.models[name][PROTOTYPES]
            found[name] = found[name] | {PROTOTYPES: np.where(counts > 0, means, before).astype(before.dtype)}
        return found


class Pmcmfl(Strategy):
    """FedAvg over networks in which class prototypes, made of the clients' features, replace absent modalities."""

    name = "pmcmfl"
    about = About(
        statistics="sums of features by modality and class, in every round",
        papers=(Paper(
            "bao2023multimodal", "Multimodal Federated Learning with Missing Modality via Prototype Mask and Contrast",
            "", 2023, "Guangyin Bao and others",
            arxiv="2312.13508",
        ),),
    )  # fmt: skip
    knobs = PmcmflKnobs
    step_cost = 4 / 3  # the features of each step's samples once more, without gradients
    whole_models = True
    several_modalities = True

    def check(self, config: ExperimentConfig) -> None:
        if config.model.fusion != "prototypes":
            raise RequestError(
                f"model.fusion = {config.model.fusion}: pmcmfl fills absent modalities with prototypes; "
                "--set model.fusion=prototypes"
            )
        masked = config.federation.masked
        if config.warmup.loss != "ce" or masked:
            raise RequestError(
                f"warmup.loss = {config.warmup.loss}, federation.masked = {str(masked).lower()}: pmcmfl computes the "
                "logits of its loss itself; take ce, and false"
            )

    def adjust_logits(self, start: LocalStart) -> None:
        """Return None; set here so that a strategy that adjusts logits, which the loss would not see, is refused."""

    def objective(self, start: LocalStart) -> Objective:
        return PrototypeObjective(section_of(start.config, self.name, PmcmflKnobs), start.facts.num_classes)

    def aggregator(self, start: RoundStart) -> RoundAggregator:
        return PrototypeAggregator(start)

    def messages(self, network: Entries) -> tuple[Entries, Entries]:
        shape, kind = network[PROTOTYPES]
        return {}, {"sums": (shape, kind), "counts": (shape[:2], kind)}


PMCMFL = Pmcmfl()
