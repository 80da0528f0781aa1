"""The work that a client can be asked for, each a function of (bench, shard, client, common, own).

``common`` is the same for every client asked, ``own`` is this client's; both are plain values and may be read-only
views of shared memory, so nothing here writes to them. Results are plain values too. Any host can redo any of it.
``common["models"]`` holds the global model of each architecture; ``own["sets"]`` the channels of a narrow client.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import nn

from ..config.schema import ExperimentConfig
from ..core.errors import RunError
from ..core.seeding import seeded
from ..core.types import DataFacts, Prototypes, Update, Weights
from ..distillation.prototypes import client_prototypes
from ..models.classifiers import build_classifier
from ..models.state_dict import load_weights, to_weights
from ..models.submodel import fit, scale_activations
from .client_models import Federation, Models
from .local_training import Shard, train_locally
from .static_batch_norm import moments


@dataclass(frozen=True)
class ClientContext:
    """A client host's tools: the experiment, the data set's facts and a device."""

    config: ExperimentConfig
    facts: DataFacts
    device: torch.device

    @cached_property
    def federation(self) -> Federation:
        """Who trains what."""
        return Federation(self.config, self.facts)

    def classifier(self, weights: Weights | None = None, name: str | None = None) -> nn.Module:
        """A whole classifier on this device, the student's or that of ``name``, with a copy of ``weights``."""
        facts = self.facts
        model = build_classifier(self.config.model, facts.num_classes, facts.channels, facts.image_size, name)
        return (model if weights is None else load_weights(model, weights)).to(self.device)

    def client_classifier(self, client_id: int, weights: Weights) -> nn.Module:
        """A client's own classifier, as wide as ``weights`` are."""
        name = self.federation.classifiers[client_id]
        if self.federation.widths[client_id] == 1:
            return self.classifier(weights, name)
        facts = self.facts
        whole = build_classifier(self.config.model, facts.num_classes, facts.channels, facts.image_size, name)
        return fit(whole, weights).to(self.device)

    def shard(self, images: np.ndarray, labels: np.ndarray) -> Shard:
        """A client's arrays, copied to this device (the originals may be shared memory)."""
        return Shard(torch.tensor(images, device=self.device), torch.tensor(labels, device=self.device))


def initial_weights(context: ClientContext, name: str | None = None) -> Weights:
    """theta_0 of an architecture (the student's), as drawn from the experiment's seed."""
    with seeded(context.config.seed, "init", "classifier"):
        return to_weights(context.classifier(name=name))


def initial_models(context: ClientContext) -> Models:
    """theta_0 of every architecture."""
    return {name: initial_weights(context, name) for name in context.federation.groups}


@dataclass(frozen=True)
class TrainResult:
    """An update, and where asked the prototypes of the model that came in (P3)."""

    update: Update
    prototypes: Prototypes | None = None


def train(
    context: ClientContext, shard: Shard, client_id: int, common: Mapping[str, Any], own: Mapping[str, Any]
) -> TrainResult:
    """Local training from ``common["models"]`` in round ``common["round"]`` of ``common["phase"]``."""
    config, plan, round_num = context.config, common["plan"], common["round"]
    federation = context.federation
    model = context.client_classifier(client_id, federation.share(client_id, common["models"], own.get("sets")))
    prototypes = None
    if common.get("collect_prototypes"):
        address = (config.seed, round_num, client_id)
        prototypes = client_prototypes(
            model, shard, config.prototypes, context.facts, address, config.runtime.precision
        )
    address = (config.seed, common["phase"], round_num, client_id)
    width = federation.widths[client_id] if config.federation.scaler else 1.0
    with scale_activations(model, width):
        metrics = train_locally(
            model, shard, plan, context.facts, address, config.runtime.precision, masked=config.federation.masked
        )
    if not math.isfinite(metrics["loss"]):
        what = f"training diverged (lr {plan.lr:g} gives a loss of {metrics['loss']})"
        raise RunError(what, round=round_num, client=client_id)
    return TrainResult(Update(client_id, to_weights(model), len(shard), metrics), prototypes)


def statistics(
    context: ClientContext, shard: Shard, client_id: int, common: Mapping[str, Any], own: Mapping[str, Any]
) -> Mapping[str, Any]:
    """What the client adds to the statistics of ``layers``, its architecture's global model's (static BN, 3.6)."""
    name = context.federation.classifiers[client_id]
    model = context.classifier(common["models"][name], name)
    return moments(model, shard, context.facts, context.config.runtime.precision, common["layers"][name])
