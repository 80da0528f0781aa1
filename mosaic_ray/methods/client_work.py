"""The work that a client can be asked for, each a function of (bench, shard, client, common, own).

``common`` is the same for every client asked, ``own`` is this client's; both are plain values and may be read-only
views of shared memory, so nothing here writes to them. Results are plain values too. Any host can redo any of it.
``common["models"]`` holds the global model of each architecture; ``own["sets"]`` the channels of a narrow client.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import nn

from ..algorithm.batch_norm import moments
from ..algorithm.generation import NUM_WATCHED, train_generator
from ..algorithm.local_training import LocalPlan, Shard, train_locally
from ..algorithm.prototypes import client_prototypes
from ..config import ExperimentConfig
from ..errors import RunError
from ..models.classifiers import build_classifier
from ..models.tensors import load_weights, to_weights
from ..models.widths import fit, scale_activations
from ..records import DataFacts, Prototypes, Update, Weights
from ..seeding import seeded
from .federation import Federation, Models


@dataclass(frozen=True)
class Bench:
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


def initial_weights(bench: Bench, name: str | None = None) -> Weights:
    """theta_0 of an architecture (the student's), as drawn from the experiment's seed."""
    with seeded(bench.config.seed, "init", "classifier"):
        return to_weights(bench.classifier(name=name))


def initial_models(bench: Bench) -> Models:
    """theta_0 of every architecture."""
    return {name: initial_weights(bench, name) for name in bench.federation.groups}


@dataclass(frozen=True)
class TrainResult:
    """An update, and where asked the prototypes of the model that came in (P3)."""

    update: Update
    prototypes: Prototypes | None = None


def train(bench: Bench, shard: Shard, client_id: int, common: Mapping[str, Any], own: Mapping[str, Any]) -> TrainResult:
    """Local training from ``common["models"]`` in round ``common["round"]`` of ``common["phase"]``."""
    config, plan, round_num = bench.config, common["plan"], common["round"]
    federation = bench.federation
    model = bench.client_classifier(client_id, federation.share(client_id, common["models"], own.get("sets")))
    prototypes = None
    if common.get("collect_prototypes"):
        address = (config.seed, round_num, client_id)
        prototypes = client_prototypes(model, shard, config.prototypes, bench.facts, address, config.runtime.precision)
    address = (config.seed, common["phase"], round_num, client_id)
    width = federation.widths[client_id] if config.federation.scaler else 1.0
    with scale_activations(model, width):
        metrics = train_locally(
            model, shard, plan, bench.facts, address, config.runtime.precision, masked=config.federation.masked
        )
    if not math.isfinite(metrics["loss"]):
        what = f"training diverged (lr {plan.lr:g} gives a loss of {metrics['loss']})"
        raise RunError(what, round=round_num, client=client_id)
    return TrainResult(Update(client_id, to_weights(model), len(shard), metrics), prototypes)


@dataclass(frozen=True)
class GeneratorResult:
    """A client's generator, images to look at uint8 [n, C, H, W], health figures and curve rows.

    ``progress``: ``images`` uint8 [T, n, C, H, W] of the same latents after so many ``steps`` int64 [T].
    """

    weights: Weights
    samples: np.ndarray
    figures: dict[str, float]
    curve: list[list[float]]
    progress: Weights = field(default_factory=dict)


def generate(
    bench: Bench, shard: Shard, client_id: int, common: Mapping[str, Any], own: Mapping[str, Any]
) -> GeneratorResult:
    """Train the client's generator beside its classifier: ``own["weights"]``, or a fresh one (G9)."""
    config, knobs = bench.config, bench.config.generator
    federation = bench.federation
    if knobs.classifier_source == "client":
        classifier = bench.client_classifier(client_id, own["weights"])
    else:
        name = federation.classifiers[client_id]
        with seeded(config.seed, "generator/fresh-classifier", client_id):
            whole = to_weights(bench.classifier(name=name))
        fresh = federation.share(client_id, {name: whole}, own.get("sets"))
        classifier = bench.client_classifier(client_id, fresh)
        steps = knobs.classifier_epochs * -(-len(shard) // config.warmup.batch_size)
        plan = LocalPlan(steps, config.warmup.batch_size, 0.01, 1e-4, 0.0, config.warmup.shuffle)
        address = (config.seed, "generator/fresh", 0, client_id)
        train_locally(classifier, shard, plan, bench.facts, address, config.runtime.precision)
    seen: list[tuple[int, np.ndarray]] = []
    weights, samples, figures, curve = train_generator(
        classifier,
        federation.share(client_id, common["models"], own.get("sets")),
        shard,
        knobs,
        bench.facts,
        (config.seed, client_id),
        config.runtime.precision,
        lambda step, images: seen.append((step, images)),
    )
    if not all(map(math.isfinite, figures.values())):
        raise RunError(f"its generator diverged (generator.lr {knobs.lr:g})", client=client_id)
    if not seen:  # nobody played (drop_class0_bug): there is the start alone
        seen.append((0, samples[:NUM_WATCHED]))
    progress = {"images": np.stack([i for _, i in seen]), "steps": np.array([s for s, _ in seen], np.int64)}
    return GeneratorResult(weights, samples, figures, curve, progress)


def prototypes(
    bench: Bench, shard: Shard, client_id: int, common: Mapping[str, Any], own: Mapping[str, Any]
) -> Prototypes:
    """Centroids under ``own["weights"]`` where given (the client's model), else under its architecture's global model.

    A narrow client runs the whole global model here, forward only: features of the same channels can be compared.
    """
    name = bench.federation.classifiers[client_id]
    model = bench.classifier(own.get("weights") or common["models"][name], name)
    address = (bench.config.seed, common["round"], client_id)
    return client_prototypes(
        model, shard, bench.config.prototypes, bench.facts, address, bench.config.runtime.precision
    )


def statistics(
    bench: Bench, shard: Shard, client_id: int, common: Mapping[str, Any], own: Mapping[str, Any]
) -> Mapping[str, Any]:
    """What the client adds to the statistics of ``layers``, its architecture's global model's (static BN, 3.6)."""
    name = bench.federation.classifiers[client_id]
    model = bench.classifier(common["models"][name], name)
    return moments(model, shard, bench.facts, bench.config.runtime.precision, common["layers"][name])


Work = Callable[[Bench, Shard, int, Mapping[str, Any], Mapping[str, Any]], Any]

WORK: dict[str, Work] = {
    "train": train, "generate": generate, "prototypes": prototypes, "statistics": statistics,
}  # fmt: skip
