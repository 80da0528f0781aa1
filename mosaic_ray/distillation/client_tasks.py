"""Client tasks of data-free distillation: train a generator, compute prototypes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from ..core.errors import RunError
from ..core.seeding import seeded
from ..core.types import Prototypes, Weights
from ..data.records import pictures
from ..federated.client import ClientContext, Round, Task, TrainTask
from ..federated.client_models import Models
from ..federated.local_training import LocalTrainingConfig, Rehearsed, Shard, train_locally
from ..models.state_dict import to_weights
from ..models.submodel import ChannelIndices
from .condensation import train_condensed
from .cvae_training import train_cvae
from .generator_training import TrainedGenerator, num_steps, train_generator
from .prototypes import client_prototypes
from .rehearsal import rehearsal_images


@dataclass(frozen=True)
class GeneratorInput:
    """One client's model, and the channels that it holds (None: all)."""

    weights: Weights
    indices: ChannelIndices | None = None


@dataclass(frozen=True)
class GeneratorTask(Task[Models, GeneratorInput, TrainedGenerator]):
    """Train the client's generator beside its own classifier, or beside a fresh one (G9).

    ``broadcast``: the global models that the discriminator's trunk begins with.
    """

    unit: ClassVar[str] = "step"

    def run(
        self, context: ClientContext, shard: Shard, client_id: int, broadcast: Models, own: GeneratorInput
    ) -> TrainedGenerator:
        config, knobs = context.config, context.config.generator
        federation, before, own_steps = context.federation, 0, num_steps(knobs, len(shard))
        if knobs.classifier_source == "client":
            classifier = context.client_classifier(client_id, own.weights)
        else:
            name = federation.classifiers[client_id]
            with seeded(config.seed, "generator/fresh-classifier", client_id):
                whole = to_weights(context.classifier(name=name))
            fresh = federation.submodel(client_id, {name: whole}, own.indices)
            classifier = context.client_classifier(client_id, fresh)
            before = knobs.classifier_epochs * -(-len(shard) // config.warmup.batch_size)
            plan = LocalTrainingConfig(before, config.warmup.batch_size, 0.01, 1e-4, 0.0, config.warmup.shuffle)
            fresh_address = (config.seed, "generator/fresh", 0, client_id)
            train_locally(
                classifier, shard, plan, context.facts, fresh_address, config.runtime.precision,
                progress=lambda done, total: context.progress(done, total + own_steps),
            )  # fmt: skip
        targets, address = federation.submodel(client_id, broadcast, own.indices), (config.seed, client_id)
        facts, precision = context.facts, config.runtime.precision

        def progress(done: int, total: int) -> None:
            context.progress(before + done, before + total)

        if knobs.family == "cvae":
            features = context.client_classifier(client_id, targets) if knobs.feature_weight else None
            made = train_cvae(classifier, shard, knobs, facts, address, precision, progress, features)
        elif knobs.family == "condensed":
            known = context.client_classifier(client_id, targets) if knobs.matching_global else None
            made = train_condensed(classifier, shard, knobs, facts, address, precision, progress, known)
        else:
            start = context.client_classifier(client_id, targets) if knobs.inversion_network == "global" else None
            made = train_generator(classifier, targets, shard, knobs, facts, address, precision, progress, start)
        if not all(map(math.isfinite, made.figures.values())):
            raise RunError(f"its generator diverged (generator.lr {knobs.learning_rate:g})", client=client_id)
        if facts.modalities:
            seen = np.stack([pictures(facts.modalities, records) for records in made.progress["images"]])
            progressed = {"images": seen, "steps": made.progress["steps"]}
            made = made._replace(samples=pictures(facts.modalities, made.samples), progress=progressed)
        return made


@dataclass(frozen=True)
class RehearsalTask(TrainTask):
    """Local training on the client's own images and on synthetic ones, whose loss has the ``weight``.

    ``Round.extra`` is a ``SharedGenerators``.
    """

    weight: float

    def rehearsed(self, context: ClientContext, shard: Shard, client_id: int, broadcast: Round) -> Rehearsed | None:
        section = context.config.rehearsal
        per_step = max(1, round(section.ratio * min(self.plan.batch_size, len(shard))))
        own = torch.bincount(shard.labels, minlength=context.facts.num_classes).cpu().numpy()
        drawn = rehearsal_images(
            context.config, context.facts, broadcast.extra, own, (self.phase, self.round_num, client_id),
            per_step * self.plan.steps, context.device,
        )  # fmt: skip
        return None if drawn is None else Rehearsed(drawn, per_step, self.weight)


@dataclass(frozen=True)
class PrototypesTask(Task[Models, Weights | None, Prototypes]):
    """Compute class centroids under the client's own model ``own`` if given, else under its global model.

    A partial-width client runs the whole global model here, forward only: features of the same channels can be
    compared. ``stream_round`` addresses the random draws.
    """

    stream_round: int
    unit: ClassVar[str] = "batch"

    def run(
        self, context: ClientContext, shard: Shard, client_id: int, broadcast: Models, own: Weights | None
    ) -> Prototypes:
        name = context.federation.classifiers[client_id]
        model = context.classifier(own or broadcast[name], name)
        address = (context.config.seed, self.stream_round, client_id)
        return client_prototypes(
            model, shard, context.config.prototypes, context.facts, address, context.config.runtime.precision,
            context.progress,
        )  # fmt: skip
