"""The ablations ``lda_head`` and ``ccvr``: the student's head made from class statistics, without one synthetic image.

Every client sends the means and the scatter of its classes in the features of the global model; the server adds them
up. ``lda_head`` solves for the head of Gaussian classes with one covariance; ``ccvr`` (Luo et al., "No Fear of
Heterogeneity", NeurIPS 2021) draws features from one Gaussian a class and goes on training the head on them. Both are
floors that generators have to beat. docs/algorithm.md 3.11, 3.12.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..config.fields import knob
from ..config.plugins import own_knobs, section_of
from ..core.about import About, Paper
from ..pipeline.graph import KeyInputs, Knobs, Stage
from ..pipeline.stages import driver_knobs, subset_knobs
from .base import Distilled, Method

if TYPE_CHECKING:
    from ..core.types import Weights
    from ..distillation.class_statistics import Pooled
    from ..federated.client_models import Federation, Models
    from ..federated.communication import Tally
    from ..pipeline.context import Facts, FailedClients, RunContext
    from ..pipeline.rounds import Warmup
    from ..storage.store import StageWriter
    from ..tracking.progress import StageProgress

_HERE = "mosaic_ray.methods.statistics_heads"


@dataclass(frozen=True)
class LdaKnobs:
    shrinkage: float = knob(
        0.01, "share of the mean variance times the identity in the covariance", above=0.0, high=1.0
    )


@dataclass(frozen=True)
class CcvrKnobs:
    samples: int = knob(2000, "features drawn of each class", low=1, high=1_000_000)
    epochs: int = knob(10, "passes over the features drawn", low=0)
    batch_size: int = knob(64, "features per step", low=1)
    lr: float = knob(1e-2, "SGD learning rate of the head", above=0.0)
    momentum: float = knob(0.9, "SGD momentum", low=0.0, high=0.999)
    clip: bool = knob(True, "set values drawn below zero to zero, as the ReLU before the head does")


class StatisticsHead(Method):
    """A head from class statistics. ``per_class``: clients send a scatter for each class, not one for all.

    ``after``: the stage whose model gets the head. ``names``: of its two stages; ``role``: of its model.
    """

    head_only = True

    def __init__(
        self, name: str, per_class: bool, knobs: type, after: str = "warmup",
        names: tuple[str, str] = ("class_statistics", "distill"), role: str = "distilled",
    ) -> None:  # fmt: skip
        self.name, self.per_class, self.knobs = name, per_class, knobs
        self.statistics = Stage(
            names[0], 1, lambda inputs: {"per_class": per_class} | subset_knobs(inputs.config),
            f"{_HERE}:collect_statistics", upstream=(after,), kind="class_statistics", unit="client",
            total=lambda config: config.partition.num_clients,
            work=lambda config: {"clients": config.partition.num_clients},
            messages=f"{_HERE}:{name}_messages",
        )  # fmt: skip
        self.fit = Stage(
            names[1], 1, self._fit_knobs, f"{_HERE}:fit", upstream=(after, names[0]), kind=name, role=role,
            unit="fit", work=lambda config: {"fits": 1},
        )  # fmt: skip
        self.stages = (self.statistics, self.fit)

    def _fit_knobs(self, inputs: KeyInputs) -> Knobs:
        return own_knobs(inputs.config, self.name) | {"seed": inputs.config.seed} | driver_knobs(inputs.config)

    def run(self, ctx: RunContext, warmup: Warmup) -> Distilled:
        return Distilled(self.renew(ctx, warmup.models))

    def renew(self, ctx: RunContext, models: Models) -> Weights:
        """Return the student of the global ``models`` with the new head."""
        pooled = ctx.run(self.statistics, models, self.per_class)
        student: Weights = ctx.run(self.fit, models[ctx.client_context.federation.student], pooled, self)
        return student

    def tried(self, ctx: RunContext, models: Models, traffic: Tally, failed: FailedClients) -> Weights:
        """Return the same as ``renew`` within another stage, whose ``traffic`` counts the bytes."""
        weights = models[ctx.client_context.federation.student]
        matrix, bias = self.head(ctx, weights, gather_statistics(ctx, models, self.per_class, traffic, failed))
        return weights | {"head.weight": matrix, "head.bias": bias}

    def messages(self, federation: Federation, counts: np.ndarray, tally: Tally) -> None:
        """Add the bytes of ``tried``."""
        statistics_messages(federation, counts, tally, self.per_class)

    def head(self, ctx: RunContext, weights: Weights, pooled: Pooled) -> tuple[np.ndarray, np.ndarray]:
        """Return the new head, V [C, d] and b [C]."""
        raise NotImplementedError


class LdaHead(StatisticsHead):
    """Linear discriminant analysis of all clients' features."""

    about = About(
        rounds="once, after the warm-up", statistics="class means and one scatter", label_counts="on the server"
    )

    def head(self, ctx: RunContext, weights: Weights, pooled: Pooled) -> tuple[np.ndarray, np.ndarray]:
        from ..distillation.class_statistics import PooledModalities, lda_by_modality, lda_head

        shrinkage = section_of(ctx.config, self.name, LdaKnobs).shrinkage
        if isinstance(pooled, PooledModalities):
            federation = ctx.client_context.federation
            columns = federation.head_columns(federation.student)
            return lda_by_modality(pooled, shrinkage, columns, ctx.shards.counts.sum(0))
        return lda_head(pooled, shrinkage)


class Ccvr(StatisticsHead):
    """Classifier calibration with virtual representations."""

    about = About(
        rounds="once, after the warm-up", statistics="class means and scatters", label_counts="on the server",
        papers=(Paper(
            "luo2021no", "No Fear of Heterogeneity: Classifier Calibration for Federated Learning with Non-IID Data",
            "NeurIPS", 2021, "Mi Luo, Fei Chen, Dapeng Hu, Yifan Zhang, Jian Liang, Jiashi Feng", arxiv="2106.05001",
        ),),
    )  # fmt: skip

    def head(self, ctx: RunContext, weights: Weights, pooled: Pooled) -> tuple[np.ndarray, np.ndarray]:
        from ..distillation.class_statistics import PooledStatistics, calibrate_head, draw_features
        from ..models.state_dict import head_of

        assert isinstance(pooled, PooledStatistics)  # CCVR's clients send one scatter a class
        own = section_of(ctx.config, self.name, CcvrKnobs)
        features, labels = draw_features(pooled, own.samples, own.clip, ctx.config.seed)
        return calibrate_head(
            head_of(weights), features, labels, epochs=own.epochs, batch_size=own.batch_size, lr=own.lr,
            momentum=own.momentum, seed=ctx.config.seed,
        )  # fmt: skip


LDA_HEAD = LdaHead("lda_head", False, LdaKnobs)
CCVR = Ccvr("ccvr", True, CcvrKnobs)

#: Make the head after the closing rounds.
_CLOSING = "finetune", ("closing_statistics", "closing_head"), "final"
CLOSING_LDA_HEAD = LdaHead("lda_head", False, LdaKnobs, *_CLOSING)
CLOSING_CCVR = Ccvr("ccvr", True, CcvrKnobs, *_CLOSING)

#: Makes the head of the judge of generators (``generator.judge``); shares its results with the method ``lda_head``.
JUDGE = LdaHead("lda_head", False, LdaKnobs, "warmup", ("judge_statistics", "judge"), "")


def collect_statistics(ctx: RunContext, stage: Stage, models: Models, per_class: bool) -> Pooled:
    """Return the class statistics of the clients with the student's network, pooled on the server."""
    from ..distillation.class_statistics import read_pooled
    from ..federated.communication import Tally
    from ..pipeline.context import FailedClients

    def compute(writer: StageWriter, progress: StageProgress) -> Facts:
        traffic, failed = Tally(1, ctx.config.partition.num_clients), FailedClients(stage.name)
        pooled = gather_statistics(ctx, models, per_class, traffic, failed, progress.advance)
        writer.add("pooled", pooled.arrays())
        writer.add("communication", traffic.arrays())
        rows = [finding.to_json() for finding in failed.findings()]
        return {"communication": traffic.totals(), "findings": rows}

    result = ctx.find_or_compute(stage, compute)
    with result.read_as("pooled"):
        return read_pooled(result.load("pooled"))


def gather_statistics(
    ctx: RunContext,
    models: Models,
    per_class: bool,
    traffic: Tally,
    failed: FailedClients,
    advance: Callable[[], object] | None = None,
) -> Pooled:
    """Collect class statistics from the clients with the student's network and pool them.

    ``advance`` is called after each client, whose work is then one unit of the running stage.
    """
    from ..distillation.class_statistics import ClassStatisticsTask, pool_all
    from ..federated.communication import size_of

    federation = ctx.client_context.federation
    clients, parts = list(federation.groups[federation.student]), []
    for client_id in clients:
        traffic.add("downlink", "weights", client_id, size_of(models[federation.student]))
    task, size = ClassStatisticsTask(per_class), ctx.shards.sizes.__getitem__
    units = len(clients) if advance else 0
    answers = ctx.map(task, clients, models, lambda k: None, failed_clients=failed, cost=size, units=units)
    for client_id, part in answers:
        parts.append(part)
        traffic.add("uplink", "class_statistics", client_id, size_of(part.arrays()))
        if advance:
            advance()
    return pool_all(parts, ctx.dataset.facts.num_classes, per_class=per_class)


def fit(ctx: RunContext, stage: Stage, weights: Weights, pooled: Pooled, method: StatisticsHead) -> Weights:
    """Return the global model ``weights`` with the head of ``method``."""
    from ..pipeline.evaluate import log_validation

    def compute(writer: StageWriter, progress: StageProgress) -> Facts:
        matrix, bias = method.head(ctx, weights, pooled)
        writer.add("global", weights | {"head.weight": matrix, "head.bias": bias})
        progress.advance()
        return {}

    result = ctx.find_or_compute(stage, compute)
    student = result.load("global")
    log_validation(ctx, stage.name, 1, result.key, student)
    return student


def statistics_messages(federation: Federation, counts: np.ndarray, tally: Tally, per_class: bool) -> None:
    """Add the student's model to every client with its network, and the class statistics back."""
    from ..federated.communication import size_of_entries

    entries = federation.entries(federation.student)
    feature_dim = entries["head.weight"][0][1]
    columns = federation.head_columns(federation.student) if federation.config.model.fusion == "late" else {}
    for k in federation.groups[federation.student]:
        held = int((counts[k] > 0).sum())

        def sums(dim: int, held: int = held) -> dict[str, tuple[tuple[int, ...], Any]]:
            return {
                "labels": ((held,), np.int64), "counts": ((held,), np.int64), "means": ((held, dim), np.float32),
                "scatter": ((held if per_class else 1, dim * (dim + 1) // 2), np.float32),
            }  # fmt: skip

        message = sums(feature_dim)
        if columns and not per_class:
            message = {
                f"{modality}/{name}": entry for modality in federation.modalities[k]
                for name, entry in sums(columns[modality].stop - columns[modality].start - 1).items()
            }  # fmt: skip
        tally.add("downlink", "weights", k, size_of_entries(entries))
        tally.add("uplink", "class_statistics", k, size_of_entries(message))


def lda_head_messages(federation: Federation, counts: np.ndarray, tally: Tally) -> None:
    """Add the global model to every client, and its class statistics with one scatter back."""
    statistics_messages(federation, counts, tally, per_class=False)


def ccvr_messages(federation: Federation, counts: np.ndarray, tally: Tally) -> None:
    """Add the global model to every client, and its class statistics with a scatter of every class back."""
    statistics_messages(federation, counts, tally, per_class=True)
