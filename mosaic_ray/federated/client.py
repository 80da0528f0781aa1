"""A client's side of federated rounds: the context that it works in, and the tasks that it is given.

A task is a frozen record with the method ``run``. Any host can run it for any client, as often as it likes: it depends
on its arguments alone, and changes none of them (they may be read-only views of shared memory).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
import torch

from ..config.plugins import strategy_named
from ..config.registry import CLASSIFIERS
from ..config.schema import ExperimentConfig
from ..core.errors import RunError
from ..core.seeding import numpy_stream, seeded
from ..core.types import DataFacts, ImageSet, Update, Weights
from ..models.classifiers import Classifier, build_classifier
from ..models.state_dict import load_weights, to_weights, uninitialised
from ..models.submodel import ChannelIndices, fit, scale_activations
from .batched_training import train_together
from .client_models import Federation, Models
from .evaluation import confusion, logits_on, own_accuracy, per_class_accuracy
from .local_training import LocalStart, LocalTrainingConfig, Objective, Rehearsed, Shard, no_progress, train_locally
from .recorded_steps import Recorder, record_cuda_graph
from .static_batch_norm import Moments, moments, pooled

B = TypeVar("B")
P = TypeVar("P")
R = TypeVar("R")


@dataclass(frozen=True)
class ClientContext:
    """What a client works with: the experiment, the data set's facts and a device.

    ``progress(done, total)``: a task calls it after each of its steps, often and at no cost.
    """

    config: ExperimentConfig
    facts: DataFacts
    device: torch.device
    progress: Callable[[int, int], None] = no_progress

    @cached_property
    def federation(self) -> Federation:
        """Each client's network, width and channels."""
        return Federation(self.config, self.facts)

    def classifier(self, weights: Weights | None = None, name: str | None = None) -> Classifier:
        """Build a full-width classifier on this device: ``name``, by default the student's; it copies ``weights``."""
        facts, knobs = self.facts, self.config.model
        loads = weights is not None and (name or knobs.classifier) in CLASSIFIERS
        with uninitialised() if loads else contextlib.nullcontext():
            model = build_classifier(knobs, facts.num_classes, facts.channels, facts.image_size, name, facts.modalities)
        return (model if weights is None else load_weights(model, weights)).to(self.device)

    def client_classifier(self, client_id: int, weights: Weights) -> Classifier:
        """Build a client's own classifier, as wide as ``weights`` are."""
        name = self.federation.classifiers[client_id]
        if self.federation.widths[client_id] == 1:
            return self.classifier(weights, name)
        return fit(self.classifier(name=name), weights).to(self.device)

    def scale(self, client_id: int) -> float:
        """Return what a client's activations are divided by: its width, or 1 without ``federation.scaler``."""
        return self.federation.widths[client_id] if self.config.federation.scaler else 1.0

    def shard(self, images: np.ndarray, labels: np.ndarray) -> Shard:
        """Copy a client's arrays to this device (the originals may be shared memory)."""
        return Shard(torch.tensor(images, device=self.device), torch.tensor(labels, device=self.device))


def initial_weights(context: ClientContext, name: str | None = None) -> Weights:
    """Draw theta_0 of an architecture (default: the student's) from the experiment's seed."""
    with seeded(context.config.seed, "init", "classifier"):
        return to_weights(context.classifier(name=name))


def initial_models(context: ClientContext) -> Models:
    """Draw theta_0 of every architecture."""
    return {name: initial_weights(context, name) for name in context.federation.groups}


class Task(Generic[B, P, R]):
    """Work for clients. ``broadcast`` is the same for all clients of a call; ``own`` is one client's.

    ``unit`` names what ``run`` counts by ``context.progress``. A client whose count stands still is taken for hung
    (``runtime.client_timeout``); without a ``unit`` it is enough that its process answers.
    """

    unit: ClassVar[str] = ""

    def run(self, context: ClientContext, shard: Shard, client_id: int, broadcast: B, own: P) -> R:
        """Do the work on one client's data."""
        raise NotImplementedError

    def alike(self, context: ClientContext, client_id: int) -> Hashable:
        """Return what clients must have in common for ``run_batch``; None: this client's work is done alone."""
        return None

    def run_batch(
        self, context: ClientContext, shards: Sequence[Shard], clients: Sequence[int], broadcast: B, owns: Sequence[P]
    ) -> list[R | RunError]:
        """Do the work of several clients at once, up to rounding as one by one; an error is that client's alone."""
        raise NotImplementedError


@dataclass(frozen=True)
class OnPart(Task[B, P, R]):
    """Do ``task`` on a part of the client's images: on the ``share`` of each class that it holds back, or on the rest.

    Of n images of a class floor(share n) are held back, the same ones for every task of an experiment.
    """

    task: Task[B, P, R]
    share: float
    held_back: bool = False
    unit: ClassVar[str] = "step"

    @property
    def round_num(self) -> int | None:
        """Return the round of ``task``, which failures name, if it has one."""
        return getattr(self.task, "round_num", None)

    def run(self, context: ClientContext, shard: Shard, client_id: int, broadcast: B, own: P) -> R:
        return self.task.run(context, self._part(context, shard, client_id), client_id, broadcast, own)

    def alike(self, context: ClientContext, client_id: int) -> Hashable:
        return self.task.alike(context, client_id)

    def run_batch(
        self, context: ClientContext, shards: Sequence[Shard], clients: Sequence[int], broadcast: B, owns: Sequence[P]
    ) -> list[R | RunError]:
        parts = [self._part(context, *pair) for pair in zip(shards, clients, strict=True)]
        return self.task.run_batch(context, parts, clients, broadcast, owns)

    def _part(self, context: ClientContext, shard: Shard, client_id: int) -> Shard:
        held = held_back(shard.labels.cpu().numpy(), self.share, context.config.seed, client_id)
        rows = torch.from_numpy(np.flatnonzero(held == self.held_back)).to(shard.labels.device)
        return Shard(shard.images[rows], shard.labels[rows])


@dataclass(frozen=True)
class Batch(Task[B, Sequence[P], list[R | RunError]]):
    """Do ``task`` for several clients at once. Hosts run it for the first client of a batch, with a shard for each.

    ``members``: all clients of each batch by its first one; ``own`` holds the input of each of them.
    """

    task: Task[B, P, R]
    members: Mapping[int, tuple[int, ...]]
    unit: ClassVar[str] = "step"

    @property
    def round_num(self) -> int | None:
        """Return the round of ``task``, which failures name, if it has one."""
        return getattr(self.task, "round_num", None)

    def run(
        self, context: ClientContext, shard: Any, client_id: int, broadcast: B, own: Sequence[P]
    ) -> list[R | RunError]:
        """Implement ``Task.run``; ``shard`` is a list of the members' shards."""
        return self.task.run_batch(context, shard, self.members[client_id], broadcast, own)


def batches_of(task: Task[Any, Any, Any], context: ClientContext, clients: Sequence[int]) -> dict[int, tuple[int, ...]]:
    """Return the clients that work together, by the first of them: at most ``runtime.clients_per_batch``, all alike."""
    most = context.config.runtime.clients_per_batch
    if most == 1:
        return {client_id: (client_id,) for client_id in clients}
    found: dict[int, tuple[int, ...]] = {}
    open_ones: dict[Hashable, int] = {}
    for client_id in sorted(clients):
        kind = task.alike(context, client_id)
        first = open_ones.get(kind, client_id)
        found[first] = (*found.get(first, ()), client_id)
        if kind is not None and len(found[first]) < int(most):
            open_ones[kind] = first
        else:
            open_ones.pop(kind, None)
    return found


def held_back(labels: np.ndarray, share: float, seed: int, client_id: int) -> np.ndarray:
    """Draw the images that a client holds back, bool [n], from the labels [n] of its training images."""
    mask = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        rows = numpy_stream(seed, "held back", client_id, int(label)).permutation(np.flatnonzero(labels == label))
        mask[rows[: int(share * len(rows))]] = True
    return mask


@dataclass(frozen=True)
class Round:
    """What the server sends to every client of a round: the global models, and the strategy's arrays."""

    models: Models
    server: Weights = field(default_factory=dict)
    #: What a method's own kind of ``TrainTask`` reads.
    extra: Any = None


@dataclass(frozen=True)
class ClientRound:
    """What the server sends to one client: the channels that it holds (None: all), and its own state."""

    indices: ChannelIndices | None = None
    state: Weights = field(default_factory=dict)


@dataclass(frozen=True)
class TrainTask(Task[Round, ClientRound, Update]):
    """Local training in round ``round_num``; ``phase`` names its random streams."""

    phase: str
    round_num: int
    plan: LocalTrainingConfig
    unit: ClassVar[str] = "step"

    def rehearsed(self, context: ClientContext, shard: Shard, client_id: int, broadcast: Round) -> Rehearsed | None:
        """Return synthetic images to train on beside the client's own: none here."""
        return None

    def run(self, context: ClientContext, shard: Shard, client_id: int, broadcast: Round, own: ClientRound) -> Update:
        config = context.config
        strategy, model = strategy_named(config.federation.strategy), self._model(context, client_id, broadcast, own)
        start = LocalStart(
            config, context.facts, client_id, self.round_num, self.plan, model, shard.labels, broadcast.server,
            own.state,
        )  # fmt: skip
        objective, others = strategy.objective(start), self.rehearsed(context, shard, client_id, broadcast)
        with scale_activations(model, context.scale(client_id)):
            metrics = train_locally(
                model, shard, self.plan, context.facts, self._address(context, client_id), config.runtime.precision,
                masked=config.federation.masked, objective=objective, adjust=strategy.adjust_logits(start),
                rehearsed=others, record=self._recorder(context, client_id), progress=context.progress,
            )  # fmt: skip
        return self._update(context, shard, client_id, model, metrics, objective, others)

    def _recorder(self, context: ClientContext, client_id: int) -> Recorder | None:
        """Return how local steps are recorded; None where ``runtime.cuda_graphs`` does not apply."""
        asked = context.config.runtime.cuda_graphs and context.device.type == "cuda"
        return record_cuda_graph if asked and self.alike(context, client_id) is not None else None

    def alike(self, context: ClientContext, client_id: int) -> Hashable:
        """Return network and width, where local steps are those of plain training on images with a network of ours."""
        federation, strategy = context.federation, strategy_named(context.config.federation.strategy)
        name = federation.classifiers[client_id]
        if context.facts.modalities or name not in CLASSIFIERS or not strategy.plain_steps:
            return None
        return name, federation.widths[client_id]

    def run_batch(
        self, context: ClientContext, shards: Sequence[Shard], clients: Sequence[int], broadcast: Round,
        owns: Sequence[ClientRound],
    ) -> list[Update | RunError]:  # fmt: skip
        models = [self._model(context, client, broadcast, own) for client, own in zip(clients, owns, strict=True)]
        others = [self.rehearsed(context, *pair, broadcast) for pair in zip(shards, clients, strict=True)]
        with scale_activations(models[0], context.scale(clients[0])):
            metrics = train_together(
                models, shards, self.plan, context.facts, [self._address(context, client) for client in clients],
                context.config.runtime.precision, masked=context.config.federation.masked, rehearsed=others,
                progress=context.progress,
            )  # fmt: skip
        found: list[Update | RunError] = []
        for trained in zip(shards, clients, models, metrics, others, strict=True):
            shard, client_id, model, figures, synthetic = trained
            try:
                found.append(self._update(context, shard, client_id, model, figures, Objective(), synthetic))
            except RunError as error:
                found.append(error)
        return found

    def _model(self, context: ClientContext, client_id: int, broadcast: Round, own: ClientRound) -> Classifier:
        """Build the network that a client begins with."""
        weights = context.federation.submodel(client_id, broadcast.models, own.indices)
        strategy = strategy_named(context.config.federation.strategy)
        return context.client_classifier(client_id, strategy.receive(weights, own.state))

    def _address(self, context: ClientContext, client_id: int) -> tuple[int, str, int, int]:
        return context.config.seed, self.phase, self.round_num, client_id

    def _update(
        self, context: ClientContext, shard: Shard, client_id: int, model: Classifier, metrics: dict[str, float],
        objective: Objective, others: Rehearsed | None,
    ) -> Update:  # fmt: skip
        """Return what a client sends; ``RunError`` where its training diverged."""
        if not math.isfinite(metrics["loss"]):
            what = f"training diverged (lr {self.plan.lr:g} gives a loss of {metrics['loss']})"
            raise RunError(what, round=self.round_num, client=client_id)
        message, state = objective.finish(model, int(metrics.pop("steps")))
        samples = modality_samples(context, shard, others)
        return Update(client_id, to_weights(model), len(shard), metrics, message, state, samples)


def modality_samples(context: ClientContext, shard: Shard, others: Rehearsed | None) -> dict[str, float] | None:
    """Return by modality how many of a client's samples have it; None where all clients train everything.

    Synthetic samples count by the weight of their loss, and no more of them than the client has own ones.
    """
    names = [modality.name for modality in context.facts.modalities]
    if not names or context.config.model.fusion == "zero_fill":
        return None
    found = (shard.images[:, 0, 0, -len(names) :] > 0).sum(0).double()
    if others is not None:
        drawn = (others.shard.images[:, 0, 0, -len(names) :] > 0).sum(0)
        found = found + others.weight * drawn.clamp(max=len(shard))
    return dict(zip(names, found.tolist(), strict=True))


@dataclass(frozen=True)
class ScoreTask(Task[tuple[Weights, ...], None, np.ndarray]):
    """Score several models of the student's network on the client's images: float64 [models, 3].

    Columns: images, right answers, and the sum of the cross-entropy in nats.
    """

    unit: ClassVar[str] = "batch"

    def run(
        self, context: ClientContext, shard: Shard, client_id: int, broadcast: tuple[Weights, ...], own: None
    ) -> np.ndarray:
        found = np.zeros((len(broadcast), 3))
        data = ImageSet(shard.images.cpu().numpy(), shard.labels.cpu().numpy())
        for number, weights in enumerate(broadcast):
            model = context.classifier(weights).eval()
            logits = logits_on(model, data, context.facts, context.device, context.config.runtime.precision)
            losses = -torch.tensor(logits).double().log_softmax(1).numpy()[np.arange(len(data)), data.labels]
            found[number] = len(data), (logits.argmax(1) == data.labels).sum(), losses.sum()
            context.progress(number + 1, len(broadcast))
        return found


@dataclass(frozen=True)
class OwnScoreTask(Task[ImageSet, Weights, float]):
    """Score the client's own model on test images of the classes that it holds, weighted by its class shares."""

    unit: ClassVar[str] = "image"

    def run(self, context: ClientContext, shard: Shard, client_id: int, broadcast: ImageSet, own: Weights) -> float:
        model = context.client_classifier(client_id, own)
        with scale_activations(model, context.scale(client_id), always=True):
            return _own_score(context, model, shard, broadcast, context.progress)


@dataclass(frozen=True)
class AdaptTask(Task[tuple[Models, ImageSet], ChannelIndices | None, float]):
    """Take the local steps of ``plan`` from the global model of the client's network; score as ``OwnScoreTask``.

    A narrow client takes them from its part of that model, and its batch norms then get the statistics of its images.
    The loss is the cross-entropy, without what the strategy adds to it.
    """

    plan: LocalTrainingConfig
    unit: ClassVar[str] = "step"

    def run(
        self, context: ClientContext, shard: Shard, client_id: int, broadcast: tuple[Models, ImageSet],
        own: ChannelIndices | None,
    ) -> float:  # fmt: skip
        (models, test), config, facts, federation = broadcast, context.config, context.facts, context.federation
        precision, steps = config.runtime.precision, self.plan.steps
        model = context.client_classifier(client_id, federation.submodel(client_id, models, own))
        with scale_activations(model, context.scale(client_id), always=True):
            address = (config.seed, "adapt", 0, client_id)
            train_locally(model, shard, self.plan, facts, address, precision, progress=context.progress)
            for layers in federation.statistics_passes(federation.classifiers[client_id]) if own else ():
                load_weights(model, to_weights(model) | pooled([moments(model, shard, facts, precision, layers)]))
            return _own_score(
                context, model, shard, test, lambda done, total: context.progress(steps + done, steps + total)
            )


def _own_score(
    context: ClientContext, model: Classifier, shard: Shard, test: ImageSet, progress: Callable[[int, int], None]
) -> float:
    held = np.bincount(shard.labels.cpu().numpy(), minlength=context.facts.num_classes)
    data = test.take(np.flatnonzero(held[test.labels]))
    precision = context.config.runtime.precision
    logits = logits_on(model.eval(), data, context.facts, context.device, precision, progress=progress)
    return own_accuracy(per_class_accuracy(confusion(logits, data.labels)), held)


@dataclass(frozen=True)
class StatisticsTask(Task[Models, None, Mapping[str, Moments]]):
    """A client's share of batch-norm statistics (docs/algorithm.md 3.6): ``layers`` by architecture."""

    layers: Mapping[str, Sequence[str]]
    unit: ClassVar[str] = "batch"

    def run(
        self, context: ClientContext, shard: Shard, client_id: int, broadcast: Models, own: None
    ) -> Mapping[str, Moments]:
        name = context.federation.classifiers[client_id]
        model = context.classifier(broadcast[name], name)
        precision = context.config.runtime.precision
        return moments(model, shard, context.facts, precision, self.layers[name], progress=context.progress)
