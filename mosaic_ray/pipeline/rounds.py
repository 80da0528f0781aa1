"""Stages W and FT: federated rounds, checkpointed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..config.schema import ExperimentConfig
from ..core.seeding import numpy_stream
from ..core.types import ImageSet, Prototypes, Weights
from ..execution.backend import Own
from ..federated.client import initial_models
from ..federated.client_models import Federation, Models
from ..federated.communication import Tally, size_of
from ..federated.evaluation import accuracy
from ..federated.local_training import LocalTrainingConfig
from ..federated.static_batch_norm import pooled, with_statistics
from ..models.submodel import ChannelIndices
from ..storage.store import StageResult, StageWriter
from .context import Compute, FailedClients, Progress, Run
from .evaluate import log_validation, table_of, validation_images
from .keys import rounds_key, warmup_key
from .partition import Shards

#: The authors' prototypes come from the last 41 rounds (0..40 of their second program, P3).
PROTOTYPE_HISTORY = 41


def cohort_of(config: ExperimentConfig, phase: str, round_num: int) -> list[int]:
    """The clients asked in a round: all, or ``cohort_size`` drawn without replacement."""
    everyone, size = config.partition.num_clients, config.federation.cohort_size
    if not size or size >= everyone:
        return list(range(everyone))
    draws = numpy_stream(config.seed, "cohort", phase, round_num)
    return sorted(int(k) for k in draws.choice(everyone, size, replace=False))


def answering(config: ExperimentConfig, phase: str, round_num: int, asked: list[int]) -> list[int]:
    """Those of ``asked`` that do not drop out of a round: each stays with probability 1 - ``drop_rate``, and where
    too few would, the surest stay, so that ``min_cohort`` (at least one) do."""
    rate, least = config.federation.drop_rate, max(1, config.federation.min_cohort)
    if not rate:
        return asked
    draws = numpy_stream(config.seed, "drop_out", phase, round_num).random(config.partition.num_clients)
    surest = sorted(asked, key=lambda k: -draws[k])
    staying = sum(draws[k] >= rate for k in asked)
    return sorted(surest[: max(least, staying)])


@dataclass(frozen=True)
class RoundsConfig:
    """A series of federated rounds. ``address`` names its random streams: the student's and the control's closing
    rounds share one, so that they differ in nothing but where they start."""

    name: str
    address: str
    num_rounds: int
    plan: LocalTrainingConfig
    keep_clients: bool = False
    prototype_rounds: int = 0
    send_counts: bool = False  # clients tell their label counts
    validation: ImageSet | None = None  # looked at after every round


def federated_rounds(
    run: Run, shards: Shards, phase: RoundsConfig, models: Models, key: str, writer: StageWriter, progress: Progress
) -> dict[str, Any]:
    """``phase.num_rounds`` of ask, fold, average; the result's parts are the global models (``model_parts``) and,
    where asked, each client's; ``losses`` float32 [rounds, clients], NaN where there was no answer; ``communication``
    as ``Tally.arrays`` has it.

    Every few rounds a checkpoint is stored; a run that was killed begins at the last one, with the same numbers.
    """
    config, federation = run.config, run.context.federation
    shape = phase.num_rounds, config.partition.num_clients
    begun, gathered, failed_clients = 0, [], FailedClients(phase.name)
    traffic, client_losses = Tally(*shape), np.full(shape, np.nan, np.float32)
    checkpoint = run.store.load_checkpoint(key)
    last = phase.num_rounds - 1
    if checkpoint is not None:
        begun, traffic = checkpoint.facts["round"], Tally(*shape, checkpoint.load("communication"))
        client_losses[:begun] = checkpoint.load("losses")["losses"]
        show_losses(run, phase.name, client_losses[:begun])
        failed_clients = FailedClients.of(phase.name, checkpoint.facts.get("left_out", []))
        models = load_models(federation, checkpoint)
        if "prototypes" in checkpoint.parts:
            gathered = [Prototypes(**checkpoint.load("prototypes"))]
        progress.resume(checkpoint.facts["curve"], begun)
    elif phase.send_counts:
        for client_id, counts in enumerate(shards.counts):
            traffic.add("uplink", "counts", client_id, size_of({"counts": counts}))
    for round_num in range(begun, phase.num_rounds):
        asked = cohort_of(config, phase.address, round_num)
        clients = answering(config, phase.address, round_num, asked)
        collect = round_num > last - phase.prototype_rounds
        common = {
            "models": models, "phase": phase.address, "round": round_num, "plan": phase.plan,
            "collect_prototypes": collect,
        }  # fmt: skip
        fold, losses = federation.fold(models, phase.address, round_num, shards.counts), []
        holds = holdings(federation, phase, round_num)
        for client_id in asked:  # also one from which nothing comes back is sent the model
            share = federation.share(client_id, models, holds(client_id).get("sets"))
            traffic.add("downlink", "weights", client_id, size_of(share), round_num=round_num)
        for client_id, result in run.ask("train", clients, common, holds, failed_clients=failed_clients):
            fold.add(result.update)
            losses.append(result.update.metrics["loss"])
            client_losses[round_num, client_id] = losses[-1]
            traffic.add("uplink", "weights", client_id, size_of(result.update.weights), round_num=round_num)
            if collect:
                gathered.append(result.prototypes)
                size = size_of(result.prototypes.arrays())
                traffic.add("uplink", "prototypes", client_id, size, round_num=round_num)
            if phase.keep_clients and (round_num == last):
                writer.add(f"client_{client_id:05d}", result.update.weights)
        models = fold.result()
        done = round_num + 1
        if federation.partial_width and done == phase.num_rounds:
            models = static_statistics(run, models, traffic, failed_clients, round_num)
        progress.scalar(f"{phase.name}/client_loss", done, float(np.mean(losses)))
        for what, of in (("median", np.median), ("min", np.min), ("max", np.max)):
            progress.scalar(f"{phase.name}/client_loss_{what}", done, float(of(losses)))
        show_losses(run, phase.name, client_losses[round_num:done], round_num)
        if len(losses) < len(asked) or config.federation.cohort_size:
            progress.scalar(f"{phase.name}/cohort", done, float(len(losses)))
        every = config.runtime.eval_rounds
        if every and (done % every == 0 or done == phase.num_rounds):
            progress.scalar(f"{phase.name}/accuracy", done, quick_eval(run, models[federation.student]))
        if phase.validation is not None:
            seen = accuracy(table_of(run, models[federation.student], phase.validation))
            progress.scalar(f"{phase.name}/validation_accuracy", done, seen)
        progress.advance(note=f"loss {np.mean(losses):.3f}")
        if done % config.warmup.checkpoint_rounds == 0 and done < phase.num_rounds:
            parts = dict(model_parts(federation, models))
            parts |= {"communication": traffic.arrays(), "losses": {"losses": client_losses[:done]}}
            if gathered:
                parts["prototypes"] = Prototypes.concatenate(gathered).arrays()
            facts = {
                "round": done, "curve": [list(row) for row in progress.recorded], "left_out": failed_clients.facts(),
            }  # fmt: skip
            run.store.save_checkpoint(key, facts, parts)
    for part, weights in model_parts(federation, models):
        writer.add(part, weights)
    if gathered:
        writer.add("prototypes", Prototypes.concatenate(gathered).arrays())
    writer.add("communication", traffic.arrays())
    writer.add("losses", {"losses": client_losses})
    return {"communication": traffic.totals(), "findings": [asdict(finding) for finding in failed_clients.findings()]}


def show_losses(run: Run, stage: str, losses: np.ndarray, begun: int = 0) -> None:
    """The clients' losses [rounds, clients] as a histogram a round, after ``begun`` rounds of ``stage``.

    Closing rounds go on where the warm-up ended; the control is a comparison, and not shown.
    """
    before = {"warmup": begun, "finetune": begun + run.config.warmup.num_rounds}
    if stage in before:
        for number, row in enumerate(losses, before[stage] + 1):
            run.tracker.histogram("client/loss", number, row)


def holdings(federation: Federation, phase: RoundsConfig, round_num: int) -> Own:
    """client -> the channels that it holds in a round, where it is narrow."""

    def own(client_id: int) -> dict[str, Any]:
        sets = federation.sets(client_id, phase.address, round_num)
        return {} if sets is None else {"sets": sets}

    return own


def model_parts(federation: Federation, models: Models) -> Iterator[tuple[str, Weights]]:
    """Names and contents of a result's parts: "global" is the student's architecture, others are numbered."""
    for number, name in enumerate(federation.groups):
        yield _part(federation, name, number), models[name]


def load_models(federation: Federation, result: StageResult) -> Models:
    """What ``model_parts`` stored."""
    return {name: result.load(_part(federation, name, number)) for number, name in enumerate(federation.groups)}


def _part(federation: Federation, name: str, number: int) -> str:
    return "global" if name == federation.student else f"global_{number:03d}"


def static_statistics(
    run: Run, models: Models, traffic: Tally, failed_clients: FailedClients, round_num: int
) -> Models:
    """``models`` with batch-norm statistics of all clients' images under the whole networks (static BN, 3.6).

    What narrow clients' statistics average to fits no network. Every pass makes the statistics of one more layer exact.
    """
    federation = run.context.federation
    layers = {name: federation.statistics_passes(name) for name in models}
    for number in range(max(map(len, layers.values()))):
        now = {name: passes[number] for name, passes in layers.items() if number < len(passes)}
        asked = sorted(client_id for name in now for client_id in federation.groups[name])
        parts: dict[str, list[Any]] = {name: [] for name in now}
        for client_id in asked:
            size = size_of(models[federation.classifiers[client_id]])
            traffic.add("downlink", "weights", client_id, size, round_num=round_num)
        common = {"models": models, "layers": now}
        for client_id, found in run.ask("statistics", asked, common, failed_clients=failed_clients):
            parts[federation.classifiers[client_id]].append(found)
            told = ((layer, *entry) for layer, moments in found.items() for entry in moments._asdict().items())
            message = {f"{layer}/{what}": np.asarray(value) for layer, what, value in told}
            traffic.add("uplink", "statistics", client_id, size_of(message), round_num=round_num)
        models = models | {name: with_statistics(models[name], pooled(parts[name])) for name in now}
    return models


def quick_eval(run: Run, weights: Weights) -> float:
    """Accuracy on a fixed sample of the test images, for curves only."""
    test, wanted = run.dataset.test, run.config.runtime.eval_samples
    if wanted < len(test):
        test = test.take(numpy_stream(0, "glance").permutation(len(test))[:wanted])
    return accuracy(table_of(run, weights, test))


@dataclass(frozen=True)
class Warmup:
    """theta_g and theta_k after the warm-up; a client that the last cohort left out has its share of theta_g."""

    result: StageResult
    federation: Federation
    models: Models

    @property
    def key(self) -> str:
        return self.result.key

    @property
    def weights(self) -> Weights:
        """The student's architecture's theta_g."""
        return self.models[self.federation.student]

    def with_student(self, student: Weights) -> Models:
        """The global models, the student in the place of its architecture's."""
        return self.models | {self.federation.student: student}

    def sets(self, client_id: int) -> ChannelIndices | None:
        """The channels that ``client`` speaks of, those of the last round; None for a whole model."""
        return self.federation.sets(client_id, ADDRESS, max(0, self.federation.config.warmup.num_rounds - 1))

    def client(self, client_id: int) -> Weights:
        """theta_k, loaded when asked; as wide as the client is."""
        part = f"client_{client_id:05d}"
        if part in self.result.parts:
            return self.result.load(part)
        return self.federation.share(client_id, self.models, self.sets(client_id))

    def clients(self, wanted: Iterable[int]) -> Iterable[tuple[int, Weights]]:
        """(k, theta_k) in the order ``wanted``, one at a time in memory."""
        return ((k, self.client(k)) for k in wanted)


#: The streams of the warm-up's rounds, and of the closing ones.
ADDRESS, CLOSING = "local", "closing"


def warmup_stage(run: Run, shards: Shards) -> Warmup:
    """Federated averaging from the initial weights."""
    config = run.config
    history = PROTOTYPE_HISTORY if config.prototypes.rounds == "all" else 0
    key = warmup_key(config, shards.key)
    section = config.warmup
    plan = LocalTrainingConfig(
        section.local_steps, section.batch_size, section.lr, section.weight_decay, section.momentum, section.shuffle
    )
    phase = RoundsConfig(
        "warmup", ADDRESS, section.num_rounds, plan, keep_clients=True, prototype_rounds=history, send_counts=True
    )

    def compute(writer: StageWriter, progress: Progress) -> dict[str, Any]:
        return federated_rounds(run, shards, phase, initial_models(run.context), key, writer, progress)

    result = _rounds_stage(run, "warmup", key, compute, section.num_rounds)
    federation = run.context.federation
    warmup = Warmup(result, federation, load_models(federation, result))
    log_validation(run, shards, "warmup", section.num_rounds, key, warmup.weights)
    return warmup


def closing_stage(run: Run, name: str, start: str, models: Models, shards: Shards) -> StageResult:
    """The closing rounds (stage FT) from ``models``, which came under the key ``start``."""
    config, section = run.config, run.config.finetune
    key = rounds_key(config, shards.key, start)
    warmup = config.warmup
    frozen = (
        section.bn == "frozen" and not run.context.federation.partial_width
    )  # whole networks' statistics fit no narrow one
    plan = LocalTrainingConfig(
        section.local_steps, warmup.batch_size, section.lr, warmup.weight_decay, warmup.momentum, warmup.shuffle,
        section.freeze_head, frozen,
    )  # fmt: skip

    def compute(writer: StageWriter, progress: Progress) -> dict[str, Any]:
        phase = RoundsConfig(name, CLOSING, section.num_rounds, plan, validation=validation_images(run, shards))
        return federated_rounds(run, shards, phase, models, key, writer, progress)

    return _rounds_stage(run, name, key, compute, section.num_rounds)


def _rounds_stage(run: Run, name: str, key: str, compute: Compute, num_rounds: int) -> StageResult:
    """``run.stage``, and what a cached result's curve does not hold."""
    result = run.stage(name, key, compute, total=num_rounds)
    if run.log[name]["cached"]:
        show_losses(run, name, result.load("losses")["losses"])
    return result
