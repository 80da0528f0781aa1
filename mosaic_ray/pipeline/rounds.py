"""Stages W and FT: federated rounds, with checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from ..config.client_layout import any_partial_width
from ..config.plugins import strategy_named
from ..config.schema import ExperimentConfig
from ..core.health import closing_findings
from ..core.seeding import numpy_stream
from ..core.types import DataFacts, ImageSet, Prototypes, Update, Weights
from ..distillation.client_tasks import PrototypesTask, RehearsalTask
from ..distillation.rehearsal import SharedGenerators, sent_weights
from ..federated.client import ClientRound, Round, StatisticsTask, TrainTask, initial_models
from ..federated.client_models import Federation, Models, RoundStart
from ..federated.communication import (
    Tally,
    size_of,
)
from ..federated.evaluation import accuracy
from ..federated.local_training import LocalTrainingConfig
from ..federated.static_batch_norm import pooled, with_statistics
from ..models.submodel import ChannelIndices
from ..storage.store import StageResult, StageWriter
from ..tracking.progress import StageProgress
from .context import Facts, FailedClients, RunContext, own_tag
from .evaluate import log_validation, table_of, validation_images
from .graph import Stage
from .stages import WARMUP, rehearses, rehearses_early, weights_tried
from .stored import check_entries, check_facts

#: The authors' prototypes come from the last 41 rounds (0..40 of their second program, P3).
PROTOTYPE_HISTORY = 41


def cohort_of(config: ExperimentConfig, phase: str, round_num: int) -> list[int]:
    """Return the clients asked in a round: all, or ``cohort_size`` drawn without replacement."""
    everyone, size = config.partition.num_clients, config.federation.cohort_size
    if not size or size >= everyone:
        return list(range(everyone))
    draws = numpy_stream(config.seed, "cohort", phase, round_num)
    return sorted(int(k) for k in draws.choice(everyone, size, replace=False))


def answering(config: ExperimentConfig, phase: str, round_num: int, asked: list[int]) -> list[int]:
    """Drop each client of ``asked`` with probability ``drop_rate``; return those that stay.

    At least ``min_cohort`` clients (and one) stay: those with the largest draws.
    """
    rate, least = config.federation.drop_rate, max(1, config.federation.min_cohort)
    if not rate:
        return asked
    draws = numpy_stream(config.seed, "drop_out", phase, round_num).random(config.partition.num_clients)
    surest = sorted(asked, key=lambda k: -draws[k])
    staying = sum(draws[k] >= rate for k in asked)
    return sorted(surest[: max(least, staying)])


@dataclass(frozen=True)
class FinishedRound:
    """The input of a method's work after a round.

    ``models``: the global models after the aggregation. ``updates``: the clients' results, in client order.
    ``state``: the method's own arrays, as it returned them after the round before.
    """

    round_num: int
    num_rounds: int
    models: Models
    updates: list[Update]
    state: Weights


#: The server's work of a method after a round: returns the new global models and the method's own arrays.
AfterRound = Callable[[RunContext, FinishedRound], tuple[Models, Weights]]


@dataclass(frozen=True)
class RoundsConfig:
    """A series of federated rounds.

    ``address`` names the random streams. The student's and the control's closing rounds share one address, so that
    they differ only in the weights that they begin with.
    """

    name: str
    address: str
    num_rounds: int
    plan: LocalTrainingConfig
    lr_decay: float = 1.0  # the learning rate of round r is plan.lr * lr_decay^r
    keep_clients: bool = False
    prototype_rounds: int = 0
    send_counts: bool = False  # clients send their label counts once
    exact_bn: bool = False  # at the end, batch-norm statistics of all clients' images
    validation: ImageSet | None = None  # evaluated after every round
    after_round: AfterRound | None = None  # the method's own work on the server
    shared: SharedGenerators | None = None  # generators for rehearsal
    weight: float = 0.0  # of its loss
    send_generators: bool = True  # the clients do not have them yet
    whole: bool = False  # clients get and send the weights of modalities that they lack, too: they may rehearse them


@dataclass
class _Progress:
    """All that federated rounds carry from one to the next; a checkpoint holds it."""

    models: Models
    traffic: Tally
    losses: np.ndarray  # float32 [rounds, clients], NaN where there was no answer
    failed: FailedClients
    begun: int = 0
    prototypes: list[Prototypes] = field(default_factory=list)
    server: Weights = field(default_factory=dict)  # the strategy's arrays
    clients: dict[int, Weights] = field(default_factory=dict)  # clients' own arrays
    method: Weights = field(default_factory=dict)  # the method's arrays

    def parts(self, federation: Federation) -> dict[str, Weights]:
        found = {part: self.models[name] for name, part in federation.parts("global").items()}
        found["communication"] = self.traffic.arrays()
        if self.prototypes:
            found["prototypes"] = Prototypes.concatenate(self.prototypes).arrays()
        states = {f"{_STATE}{k:05d}": state for k, state in sorted(self.clients.items()) if state}
        return found | states | {n: part for n, part in ((_SERVER, self.server), (_METHOD, self.method)) if part}

    def resume(self, checkpoint: StageResult, federation: Federation) -> None:
        self.begun = checkpoint.facts["round"]
        self.models = load_models(federation, checkpoint)
        losses = checkpoint.load("losses")["losses"]
        if len(losses) != self.begun or not 0 < self.begun < len(self.losses):
            raise ValueError(f"round {self.begun} is none to begin at")
        self.losses[: self.begun] = losses
        if "prototypes" in checkpoint.parts:
            self.prototypes = [Prototypes(**checkpoint.load("prototypes"))]
        states = [part for part in checkpoint.parts if part.startswith(_STATE)]
        self.clients = {int(part.removeprefix(_STATE)): checkpoint.load(part) for part in states}
        self.server = checkpoint.load(_SERVER) if _SERVER in checkpoint.parts else {}
        self.method = checkpoint.load(_METHOD) if _METHOD in checkpoint.parts else {}


#: Parts of a result: one client's own arrays (and its number), the strategy's on the server, the method's.
_STATE, _SERVER, _METHOD = "state_", "server", "method"


def federated_rounds(
    ctx: RunContext, rounds: RoundsConfig, models: Models, key: str, writer: StageWriter, progress: StageProgress
) -> dict[str, Any]:
    """Run ``rounds.num_rounds`` federated rounds: send, train, aggregate; returns the facts of the stage's result.

    The result's parts are the global models (see ``load_models``); each client's model where asked; ``losses`` float32
    [rounds, clients], NaN where there was no answer; ``communication`` as ``Tally.arrays`` gives it; and the arrays
    that strategy and method keep between rounds. Every few rounds a checkpoint is stored; a run that was killed begins
    at the last one and ends with the same numbers.
    """
    config, federation = ctx.config, ctx.client_context.federation
    shape, last = (rounds.num_rounds, config.partition.num_clients), rounds.num_rounds - 1
    losses = np.full(shape, np.nan, np.float32)
    now = _Progress(models, Tally(*shape), losses, FailedClients(rounds.name))
    now.server = strategy_named(config.federation.strategy).initial_state(models)
    checkpoint = ctx.store.load_checkpoint(key)
    if checkpoint is not None:
        with checkpoint.read_as("checkpoint"):
            check_facts(checkpoint.facts)
            now.resume(ctx.checked(checkpoint), federation)
            now.traffic = Tally(*shape, checkpoint.load("communication"))
            now.failed = FailedClients.of(rounds.name, checkpoint.facts.get("left_out", []))
        show_losses(ctx, rounds.name, losses[: now.begun])
        progress.resume(checkpoint.facts["curve"], now.begun)
    elif rounds.send_counts:
        for client_id, counts in enumerate(ctx.shards.counts):
            now.traffic.add("uplink", "counts", client_id, size_of({"counts": counts}))
    if rounds.shared is not None and rounds.send_generators and checkpoint is None:
        send_generators(now.traffic, rounds.shared, config.partition.num_clients, federation.facts)
    for round_num in range(now.begun, rounds.num_rounds):
        asked = cohort_of(config, rounds.address, round_num)
        answered = answering(config, rounds.address, round_num, asked)
        if round_num > last - rounds.prototype_rounds:
            _collect_prototypes(ctx, now, answered, round_num)
        updates, answers = _one_round(ctx, rounds, now, asked, answered, round_num, writer)
        done = round_num + 1
        if rounds.after_round is not None:
            finished = FinishedRound(round_num, rounds.num_rounds, now.models, updates, now.method)
            now.models, now.method = rounds.after_round(ctx, finished)
        if rounds.exact_bn and done == rounds.num_rounds:
            now.models = static_statistics(ctx, now.models, now.traffic, now.failed, round_num)
        _log_round(ctx, rounds, now, answers, len(asked), done, progress)
        if done % config.warmup.checkpoint_rounds == 0 and done < rounds.num_rounds:
            curve = [list(row) for row in progress.recorded]
            facts = {"round": done, "curve": curve, "left_out": now.failed.facts()}
            ctx.store.save_checkpoint(key, facts, now.parts(federation) | {"losses": {"losses": losses[:done]}})
    for part, arrays in (now.parts(federation) | {"losses": {"losses": losses}}).items():
        writer.add(part, arrays)
    findings = now.failed.findings()
    if rounds.name == "finetune":
        findings += closing_findings([float(np.nanmean(row)) for row in losses if np.isfinite(row).any()])
    return {"communication": now.traffic.totals(), "findings": [f.to_json() for f in findings]}


def _one_round(
    ctx: RunContext,
    rounds: RoundsConfig,
    now: _Progress,
    asked: list[int],
    answered: list[int],
    round_num: int,
    writer: StageWriter,
) -> tuple[list[Update], list[float]]:
    """Send the models, train on the clients, aggregate into ``now``.

    Returns the updates (empty unless the method reads them) and the losses of the clients that answered.
    """
    federation, traffic = ctx.client_context.federation, now.traffic
    strategy, last = strategy_named(ctx.config.federation.strategy), rounds.num_rounds - 1
    start = RoundStart(federation, now.models, now.server, rounds.address, round_num, ctx.shards.counts)
    aggregator = strategy.aggregator(start)
    kept: list[Update] = []
    losses: list[float] = []

    own: dict[int, ClientRound] = {}
    for client_id in asked:  # a client that does not answer is sent the model, too
        indices = federation.indices(client_id, rounds.address, round_num)
        own[client_id] = ClientRound(indices, now.clients.get(client_id, {}))
        share = federation.submodel(client_id, now.models, indices)
        if strategy.every_round or round_num == 0:
            sent = federation.trained_entries(client_id, share, rounds.whole)
            traffic.add("downlink", "weights", client_id, size_of(sent), round_num=round_num)
        if now.server:
            traffic.add("downlink", "strategy", client_id, size_of(now.server), round_num=round_num)
    plan = replace(rounds.plan, lr=rounds.plan.lr * rounds.lr_decay**round_num)
    task = TrainTask(rounds.address, round_num, plan)
    if rounds.shared is not None:
        task = RehearsalTask(rounds.address, round_num, plan, rounds.weight)
    start_models = Round(now.models, now.server, rounds.shared)
    for client_id, update in ctx.map(task, answered, start_models, own.__getitem__, failed_clients=now.failed):
        aggregator.add(update)
        losses.append(update.metrics["loss"])
        now.losses[round_num, client_id] = losses[-1]
        if update.state:
            now.clients[client_id] = update.state
        if strategy.every_round or round_num == last:
            sent = federation.trained_entries(client_id, update.weights, rounds.whole)
            traffic.add("uplink", "weights", client_id, size_of(sent), round_num=round_num)
        if update.message:
            traffic.add("uplink", "strategy", client_id, size_of(update.message), round_num=round_num)
        if rounds.keep_clients and round_num == last:
            writer.add(f"client_{client_id:05d}", update.weights)
        if rounds.after_round is not None:
            kept.append(update)
    now.models, now.server = aggregator.result(), aggregator.server_state()
    return kept, losses


def send_generators(traffic: Tally, shared: SharedGenerators, num_clients: int, facts: DataFacts) -> None:
    """Count the bytes of every client's download of the others' generators."""
    sent = (size_of(sent_weights(weights, facts)) for weights in shared.weights)
    sizes = dict(zip(shared.clients, sent, strict=True))
    for client_id in range(num_clients):
        for owner, size in sizes.items():
            if owner != client_id:
                traffic.add("downlink", "generators", client_id, size)


def _collect_prototypes(ctx: RunContext, now: _Progress, clients: list[int], round_num: int) -> None:
    """Gather prototypes under the models that this round begins with (P3)."""
    task, nothing = PrototypesTask(round_num), lambda client_id: None
    for client_id, found in ctx.map(task, clients, now.models, nothing, failed_clients=now.failed, units=0):
        now.prototypes.append(found)
        now.traffic.add("uplink", "prototypes", client_id, size_of(found.arrays()), round_num=round_num)


def _log_round(
    ctx: RunContext,
    rounds: RoundsConfig,
    now: _Progress,
    answers: list[float],
    asked: int,
    done: int,
    progress: StageProgress,
) -> None:
    """Log the losses of the clients that answered, and accuracies, after round number ``done``, counted from 1."""
    config, student = ctx.config, ctx.client_context.federation.student
    progress.scalar(f"{rounds.name}/client_loss", done, float(np.mean(answers)))
    for what, of in (("median", np.median), ("min", np.min), ("max", np.max)):
        progress.scalar(f"{rounds.name}/client_loss_{what}", done, float(of(answers)))
    show_losses(ctx, rounds.name, now.losses[done - 1 : done], done - 1)
    if len(answers) < asked or config.federation.cohort_size:
        progress.scalar(f"{rounds.name}/cohort", done, float(len(answers)))
    every = config.runtime.eval_rounds
    if every and (done % every == 0 or done == rounds.num_rounds):
        progress.scalar(f"{rounds.name}/accuracy", done, quick_eval(ctx, now.models[student]))
    if rounds.validation is not None:
        found = accuracy(table_of(ctx, now.models[student], rounds.validation))
        progress.scalar(f"{rounds.name}/validation_accuracy", done, found)
    progress.advance(note=f"loss {np.mean(answers):.3f}")


def show_losses(ctx: RunContext, stage: str, losses: np.ndarray, begun: int = 0) -> None:
    """Log the clients' losses [rounds, clients] as one histogram a round, after ``begun`` rounds of ``stage``.

    Closing rounds continue the warm-up's steps; the control is not shown.
    """
    before = {"warmup": begun, "finetune": begun + ctx.config.warmup.num_rounds}
    if stage in before:
        for number, row in enumerate(losses, before[stage] + 1):
            ctx.tracker.histogram("client/loss", number, row)


def load_models(federation: Federation, result: StageResult) -> Models:
    """Load the global models of a result, the parts ``Federation.parts("global")``."""
    return {name: result.load(part) for name, part in federation.parts("global").items()}


def static_statistics(ctx: RunContext, models: Models, traffic: Tally, failed: FailedClients, round_num: int) -> Models:
    """Return ``models`` with batch-norm statistics of all clients' images under the full networks (static BN, 3.6).

    Averages of partial-width clients' running statistics fit no network, and those of other clients were measured under
    drifted weights and leave out how far the clients' means lie apart. Every pass makes one more layer exact.
    """
    federation = ctx.client_context.federation
    layers = {name: federation.statistics_passes(name) for name in models}
    num_passes = max(map(len, layers.values()))
    for number in range(num_passes):
        now = {name: passes[number] for name, passes in layers.items() if number < len(passes)}
        asked = sorted(client_id for name in now for client_id in federation.groups[name])
        parts: dict[str, list[Any]] = {name: [] for name in now}
        for client_id in asked:
            size = size_of(models[federation.classifiers[client_id]])
            traffic.add("downlink", "weights", client_id, size, round_num=round_num)
        found_by_client = ctx.map(
            StatisticsTask(now), asked, models, lambda k: None, failed_clients=failed,
            units=0, label=f"batch norm {number + 1}/{num_passes}",
        )  # fmt: skip
        for client_id, found in found_by_client:
            parts[federation.classifiers[client_id]].append(found)
            rows = ((layer, *entry) for layer, moments in found.items() for entry in moments._asdict().items())
            message = {f"{layer}/{what}": np.asarray(value) for layer, what, value in rows}
            traffic.add("uplink", "statistics", client_id, size_of(message), round_num=round_num)
        models = models | {name: with_statistics(models[name], pooled(parts[name])) for name in now}
    return models


def quick_eval(ctx: RunContext, weights: Weights) -> float:
    """Return the accuracy on a fixed sample of the test images, for curves only."""
    test, wanted = ctx.dataset.test, ctx.config.runtime.eval_samples
    if wanted < len(test):
        test = test.take(numpy_stream(0, "glance").permutation(len(test))[:wanted])
    return accuracy(table_of(ctx, weights, test))


def last_channels(federation: Federation, client_id: int) -> ChannelIndices | None:
    """Return the channels that a client holds in the last round of the warm-up; None for a full-width client."""
    return federation.indices(client_id, ADDRESS, max(0, federation.config.warmup.num_rounds - 1))


@dataclass(frozen=True)
class Warmup:
    """theta_g and theta_k after the warm-up; a client outside the last cohort has its submodel of theta_g.

    ``generators``: those that clients rehearsed with, of a method that trains them first.
    """

    result: StageResult
    federation: Federation
    models: Models
    generators: Any = None

    @property
    def key(self) -> str:
        return self.result.key

    @property
    def weights(self) -> Weights:
        """theta_g of the student's architecture."""
        return self.models[self.federation.student]

    @property
    def head(self) -> Weights:
        """The head of the student's architecture."""
        return {name: value for name, value in self.weights.items() if name.startswith("head.")}

    def with_student(self, student: Weights) -> Models:
        """Return the global models with ``student`` in place of its architecture's."""
        return self.models | {self.federation.student: student}

    def indices(self, client_id: int) -> ChannelIndices | None:
        """Return the channels of a client's model in the last round; None for a full-width client."""
        return last_channels(self.federation, client_id)

    def personal(self, client_id: int) -> Weights:
        """Return a client's own model, of a strategy that has such models."""
        part, config = f"{_STATE}{client_id:05d}", self.federation.config
        state = self.result.load(part) if part in self.result.parts else {}
        models, name = self.models, self.federation.classifiers[client_id]
        with self.result.read_as(part):
            found: Weights = strategy_named(config.federation.strategy).personal(models[name], state)
            check_entries(found, self.federation.entries(name), finite=False)
        return found

    def trained(self, client_id: int) -> bool:
        """Return whether a client sent a model in the last round."""
        return f"client_{client_id:05d}" in self.result.parts

    def client(self, client_id: int) -> Weights:
        """Load theta_k, as wide as the client is."""
        if self.trained(client_id):
            return self.result.load(f"client_{client_id:05d}")
        return self.federation.submodel(client_id, self.models, self.indices(client_id))


#: The streams of the warm-up's rounds, of the closing ones, and of all trials of a rehearsal weight.
ADDRESS, CLOSING, TRIAL = "local", "closing", "trial"


def warm_up(
    ctx: RunContext,
    stage: Stage = WARMUP,
    after_round: AfterRound | None = None,
    generators: Any = None,
) -> Warmup:
    """Run the federated rounds from the initial weights (stage W); ``after_round``: the method's work on the server.

    ``generators``: what clients rehearse with in these rounds, as the method's stage returns it; None: nothing.
    """
    config, section = ctx.config, ctx.config.warmup
    plan = LocalTrainingConfig(
        section.local_steps, section.batch_size, section.lr, section.weight_decay, section.momentum, section.shuffle,
        loss=section.loss, modality_dropout=section.modality_dropout,
    )  # fmt: skip
    rounds = RoundsConfig(
        stage.name, ADDRESS, section.num_rounds, plan, section.lr_decay, keep_clients=True, send_counts=True,
        after_round=after_round, exact_bn=exact_bn_at_end(config, section.bn),
        prototype_rounds=PROTOTYPE_HISTORY if config.prototypes.rounds == "all" else 0,
        shared=generators and generators.shared(ctx), weight=config.rehearsal.weight,
        whole=generators is not None,
    )  # fmt: skip
    result = _find_or_compute(ctx, stage, rounds, initial_models(ctx.client_context))
    federation = ctx.client_context.federation
    found = Warmup(result, federation, load_models(federation, result), generators)
    if stage.role:
        log_validation(ctx, stage.name, section.num_rounds, found.key, found.weights)
    return found


def close(
    ctx: RunContext,
    stage: Stage,
    models: Models,
    shared: SharedGenerators | None = None,
    weight: float = 0.0,
    same: StageResult | None = None,
) -> StageResult:
    """Run the closing rounds (stage FT) from ``models``, the result of the stage that ``stage`` reads.

    ``shared``: the generators that clients rehearse with, if the ``weight`` of that loss is above zero.
    ``same``: the result of the same rounds under another name, which is copied in their place.
    """
    section = ctx.config.finetune
    if same is not None:
        return ctx.find_or_compute(stage, partial(_copy, same, stage.name))
    rounds = RoundsConfig(
        stage.name, CLOSING, section.num_rounds, closing_plan(ctx), section.lr_decay,
        validation=validation_images(ctx), exact_bn=exact_bn_at_end(ctx.config, section.bn),
        shared=shared if weight else None, weight=weight,
        send_generators=not (weights_tried(ctx.config) or rehearses_early(ctx.config)),
        whole=stage.name == "finetune" and rehearses(ctx.config),
    )  # fmt: skip
    return _find_or_compute(ctx, stage, rounds, models)


def _copy(same: StageResult, stage: str, writer: StageWriter, progress: StageProgress) -> Facts:
    for part in same.parts:
        writer.add(part, same.load(part))
    progress.resume([[own_tag(tag, stage), *row] for tag, *row in same.facts["curve"]], progress.total or 0)
    return {name: fact for name, fact in same.facts.items() if name not in ("seconds", "client_seconds", "curve")}


def try_rehearsal(
    ctx: RunContext, stage: Stage, models: Models, shared: SharedGenerators, weight: float
) -> StageResult:
    """Run a few rounds like the closing ones, but without the images that clients hold back."""
    section, exact = ctx.config.rehearsal, exact_bn_at_end(ctx.config, ctx.config.finetune.bn)
    rounds = RoundsConfig(
        stage.name, TRIAL, section.trial_rounds, closing_plan(ctx), ctx.config.finetune.lr_decay, exact_bn=exact,
        shared=shared if weight else None, weight=weight, send_generators=False, whole=True,
    )  # fmt: skip
    return _find_or_compute(ctx.holding_back(section.held_back), stage, rounds, models)


def closing_plan(ctx: RunContext) -> LocalTrainingConfig:
    """Return what a client does in a closing round, at the learning rate of the first."""
    section, warmup = ctx.config.finetune, ctx.config.warmup
    # statistics of full networks fit no partial-width one
    frozen = section.bn == "frozen" and not ctx.client_context.federation.partial_width
    return LocalTrainingConfig(
        section.local_steps, warmup.batch_size, section.lr, warmup.weight_decay, warmup.momentum, warmup.shuffle,
        section.freeze_head, frozen, warmup.loss, warmup.modality_dropout,
    )  # fmt: skip


def exact_bn_at_end(config: ExperimentConfig, bn: str) -> bool:
    """Return whether rounds with the knob ``bn`` end with exact statistics; no others fit partial widths."""
    return bn == "exact" or any_partial_width(config)


def _find_or_compute(ctx: RunContext, stage: Stage, rounds: RoundsConfig, models: Models) -> StageResult:
    """Find or compute a stage of rounds; replay the losses of a stored one, which its curve does not hold."""
    [key] = ctx.client_keys(stage)

    def compute(writer: StageWriter, progress: StageProgress) -> Facts:
        return federated_rounds(ctx, rounds, models, key, writer, progress)

    result = ctx.find_or_compute(stage, compute)
    if ctx.log[stage.name]["cached"]:
        show_losses(ctx, stage.name, result.load("losses")["losses"])
    return result
