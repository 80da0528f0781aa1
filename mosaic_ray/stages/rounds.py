"""Stages W and FT: federated rounds, checkpointed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..algorithm.evaluation import accuracy
from ..algorithm.local_training import LocalPlan
from ..config import ExperimentConfig
from ..methods.client_work import initial_weights
from ..methods.optimisers import OPTIMISERS
from ..models.tensors import num_bytes
from ..records import ImageSet, Prototypes, Weights
from ..runtime.store import StageResult, StageWriter
from ..seeding import numpy_stream
from .evaluation import table_of, validation_images, watch
from .keys import rounds_key, warmup_key
from .partition import Shards
from .run import Progress, Run

#: The authors' prototypes come from the last 41 rounds (0..40 of their second program, P3).
PROTOTYPE_HISTORY = 41


def cohort_of(config: ExperimentConfig, phase: str, round_num: int) -> list[int]:
    """The clients asked in a round: all, or ``cohort_size`` drawn without replacement."""
    everyone, size = config.partition.num_clients, config.federation.cohort_size
    if not size or size >= everyone:
        return list(range(everyone))
    draws = numpy_stream(config.seed, "cohort", phase, round_num)
    return sorted(int(k) for k in draws.choice(everyone, size, replace=False))


@dataclass(frozen=True)
class Phase:
    """A series of federated rounds. ``address`` names its random streams: the student's and the control's closing
    rounds share one, so that they differ in nothing but where they start."""

    name: str
    address: str
    num_rounds: int
    plan: LocalPlan
    keep_clients: bool = False
    prototype_rounds: int = 0
    validation: ImageSet | None = None  # looked at after every round


def federated_rounds(
    run: Run, phase: Phase, weights: Weights, key: str, writer: StageWriter, progress: Progress
) -> dict[str, Any]:
    """``phase.num_rounds`` of ask, fold, average; the result's parts are "global" and, where asked, each client's.

    Every few rounds a checkpoint is stored; a run that was killed begins at the last one, with the same numbers.
    """
    config = run.config
    begun, gathered, traffic = 0, [], {"downlink": 0, "uplink": 0}
    checkpoint = run.store.load_checkpoint(key)
    last = phase.num_rounds - 1
    if checkpoint is not None:
        begun, traffic = checkpoint.facts["round"], dict(checkpoint.facts["traffic"])
        weights = checkpoint.load("global")
        if "prototypes" in checkpoint.parts:
            gathered = [Prototypes(**checkpoint.load("prototypes"))]
        progress.resume(checkpoint.facts["curve"], begun)
    optimiser = OPTIMISERS[config.federation.optimiser]
    for round_num in range(begun, phase.num_rounds):
        clients = cohort_of(config, phase.address, round_num)
        collect = round_num > last - phase.prototype_rounds
        common = {
            "weights": weights, "phase": phase.address, "round": round_num, "plan": phase.plan,
            "collect_prototypes": collect,
        }  # fmt: skip
        fold, losses = optimiser.begin(weights), []
        for client_id, result in run.cohort.ask("train", clients, common):
            fold.add(result.update)
            losses.append(result.update.metrics["loss"])
            traffic["downlink"] += num_bytes(weights)
            traffic["uplink"] += num_bytes(result.update.weights)
            if collect:
                gathered.append(result.prototypes)
            if phase.keep_clients and (round_num == last):
                writer.add(f"client_{client_id:05d}", result.update.weights)
        weights = fold.result()
        done = round_num + 1
        progress.scalar(f"{phase.name}/client_loss", done, float(np.mean(losses)))
        every = config.runtime.eval_rounds
        if every and (done % every == 0 or done == phase.num_rounds):
            progress.scalar(f"{phase.name}/accuracy", done, glance(run, weights))
        if phase.validation is not None:
            seen = accuracy(table_of(run, weights, phase.validation))
            progress.scalar(f"{phase.name}/validation_accuracy", done, seen)
        progress.advance(note=f"loss {np.mean(losses):.3f}")
        if done % config.warmup.checkpoint_rounds == 0 and done < phase.num_rounds:
            parts = {"global": weights}
            if gathered:
                parts["prototypes"] = Prototypes.concatenate(gathered).arrays()
            facts = {"round": done, "traffic": traffic, "curve": [list(row) for row in progress.recorded]}
            run.store.save_checkpoint(key, facts, parts)
    writer.add("global", weights)
    if gathered:
        writer.add("prototypes", Prototypes.concatenate(gathered).arrays())
    kinds = {"uplink": {"weights": traffic["uplink"]}, "downlink": {"weights": traffic["downlink"]}}
    if gathered:
        kinds["uplink"]["prototypes"] = sum(num_bytes(p.arrays()) for p in gathered)
    return {"communication": kinds}


def glance(run: Run, weights: Weights) -> float:
    """Accuracy on a fixed sample of the test images, for curves only."""
    test, wanted = run.dataset.test, run.config.runtime.eval_samples
    if wanted < len(test):
        test = test.take(numpy_stream(0, "glance").permutation(len(test))[:wanted])
    return accuracy(table_of(run, weights, test))


@dataclass(frozen=True)
class Warmup:
    """theta_g and theta_k after the warm-up; a client that the last cohort left out has theta_g."""

    result: StageResult
    weights: Weights

    @property
    def key(self) -> str:
        return self.result.key

    def client(self, client_id: int) -> Weights:
        """theta_k, loaded when asked."""
        part = f"client_{client_id:05d}"
        return self.result.load(part) if part in self.result.parts else self.weights

    def clients(self, num_clients: int) -> Iterable[tuple[int, Weights]]:
        """(k, theta_k) in order, one at a time in memory."""
        return ((k, self.client(k)) for k in range(num_clients))


def warmup_stage(run: Run, shards: Shards) -> Warmup:
    """Federated averaging from the initial weights."""
    config = run.config
    history = PROTOTYPE_HISTORY if config.prototypes.rounds == "all" else 0
    key = warmup_key(config, shards.key)
    room = config.warmup
    plan = LocalPlan(room.local_steps, room.batch_size, room.lr, room.weight_decay, room.momentum, room.shuffle)
    phase = Phase("warmup", "local", room.num_rounds, plan, keep_clients=True, prototype_rounds=history)

    def compute(writer: StageWriter, progress: Progress) -> dict[str, Any]:
        facts = federated_rounds(run, phase, initial_weights(run.bench), key, writer, progress)
        facts["communication"]["uplink"]["label_counts"] = int(shards.counts.nbytes)
        return facts

    result = run.stage("warmup", key, compute, total=room.num_rounds)
    warmup = Warmup(result, result.load("global"))
    watch(run, shards, "warmup", room.num_rounds, key, warmup.weights)
    return warmup


def closing_stage(run: Run, name: str, start: str, weights: Weights, shards: Shards) -> StageResult:
    """The closing rounds (stage FT) from ``weights``, which came under the key ``start``."""
    config, room = run.config, run.config.finetune
    key = rounds_key(config, shards.key, start)
    warmup = config.warmup
    plan = LocalPlan(
        room.local_steps, warmup.batch_size, room.lr, warmup.weight_decay, warmup.momentum, warmup.shuffle,
        room.freeze_head, room.bn == "frozen",
    )  # fmt: skip

    def compute(writer: StageWriter, progress: Progress) -> dict[str, Any]:
        phase = Phase(name, "closing", room.num_rounds, plan, validation=validation_images(run, shards))
        return federated_rounds(run, phase, weights, key, writer, progress)

    return run.stage(name, key, compute, total=room.num_rounds)
