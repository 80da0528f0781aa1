"""The ablation ``prototype_head``: the student's head re-fitted on prototypes, without one synthetic image.

It is a floor that generators have to beat. ``finetune.head=prototype_head`` makes such a head after the closing rounds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from ..core.about import About
from ..pipeline.graph import Graph, Stage
from ..pipeline.stages import prototype_knobs, prototype_split
from .base import Distilled, Method
from .mosaic.graph import PROTOTYPES

if TYPE_CHECKING:
    from ..core.types import Prototypes, Weights
    from ..federated.client_models import Federation, Models
    from ..federated.communication import Tally
    from ..pipeline.context import Facts, FailedClients, RunContext
    from ..pipeline.rounds import Warmup
    from ..storage.store import StageWriter
    from ..tracking.progress import StageProgress

_HERE = "mosaic_ray.methods.prototype_head"

REFIT = Stage(
    "distill", 3, lambda inputs: {"distiller": "prototype_head", "split": prototype_split(inputs.config)},
    f"{_HERE}:refit_head", upstream=("warmup", "prototypes"), role="distilled", unit="fit",
    work=lambda config: {"fits": 1},
)  # fmt: skip


class PrototypeHead(Method):
    """The head re-fitted on prototypes."""

    name = "prototype_head"
    about = About(rounds="once, after the warm-up", statistics="prototypes")
    head_only = True
    stages = (PROTOTYPES, REFIT)

    def run(self, ctx: RunContext, warmup: Warmup) -> Distilled:
        prototypes = ctx.run(PROTOTYPES, warmup)
        student, held_out = ctx.run(REFIT, warmup.weights, prototypes[warmup.federation.student])
        return Distilled(student, held_out)


PROTOTYPE_HEAD = PrototypeHead()


class ClosingPrototypeHead:
    """The head re-fitted after the closing rounds, on prototypes in the new features of the global model."""

    name = "prototype_head"
    prototypes = Stage(
        "closing_prototypes", 1, lambda inputs: {"prototypes": prototype_knobs(inputs.config)},
        f"{_HERE}:collect_anew", upstream=("finetune",), unit="client",
        total=lambda config: config.partition.num_clients,
        work=lambda config: {"clients": config.partition.num_clients}, messages=f"{_HERE}:messages",
    )  # fmt: skip
    fit = Stage(
        "closing_head", 1, lambda inputs: {"split": prototype_split(inputs.config)},
        f"{_HERE}:refit_head", upstream=("finetune", "closing_prototypes"), kind="prototype_head", role="final",
        unit="fit", work=lambda config: {"fits": 1},
    )  # fmt: skip
    stages: Graph = (prototypes, fit)

    def renew(self, ctx: RunContext, models: Models) -> Weights:
        found = ctx.run(self.prototypes, models)
        student: Weights = ctx.run(self.fit, models[ctx.client_context.federation.student], found)[0]
        return student

    def tried(self, ctx: RunContext, models: Models, traffic: Tally, failed: FailedClients) -> Weights:
        weights = models[ctx.client_context.federation.student]
        return weights | _heads(ctx, weights, _gather(ctx, models, traffic, failed))[0]

    def messages(self, federation: Federation, counts: np.ndarray, tally: Tally) -> None:
        messages(federation, counts, tally)


CLOSING_PROTOTYPE_HEAD = ClosingPrototypeHead()


def collect_anew(ctx: RunContext, stage: Stage, models: Models) -> Prototypes:
    """Return the prototypes of all clients with the student's network in the features of its global model."""
    from ..core.health import prototype_findings
    from ..core.types import Prototypes
    from ..federated.communication import Tally
    from ..pipeline.context import FailedClients

    def compute(writer: StageWriter, progress: StageProgress) -> Facts:
        traffic, failed = Tally(1, ctx.config.partition.num_clients), FailedClients(stage.name)
        found = _gather(ctx, models, traffic, failed, progress.advance)
        writer.add("prototypes", found.arrays())
        writer.add("communication", traffic.arrays())
        each = np.bincount(found.labels, minlength=ctx.dataset.facts.num_classes)
        findings = failed.findings() + prototype_findings(each.tolist(), ctx.shards.counts.sum(0).tolist())
        rows = [finding.to_json() for finding in findings]
        return {"communication": traffic.totals(), "findings": rows, "num_prototypes": len(found.labels)}

    return Prototypes(**ctx.find_or_compute(stage, compute).load("prototypes"))


def _gather(
    ctx: RunContext,
    models: Models,
    traffic: Tally,
    failed: FailedClients,
    advance: Callable[[], object] | None = None,
) -> Prototypes:
    """Collect prototypes; ``advance`` is called after each client, whose work is then a unit of the running stage."""
    from ..core.types import Prototypes
    from ..distillation.client_tasks import PrototypesTask
    from ..federated.communication import size_of

    federation, config = ctx.client_context.federation, ctx.config
    clients, parts = list(federation.groups[federation.student]), []
    for client_id in clients:
        traffic.add("downlink", "weights", client_id, size_of(models[federation.student]))
    task, size = PrototypesTask(config.warmup.num_rounds + config.finetune.num_rounds), ctx.shards.sizes.__getitem__
    units = len(clients) if advance else 0
    for client_id, part in ctx.map(
        task, clients, models, lambda k: None, failed_clients=failed, cost=size, units=units
    ):
        parts.append(part)
        traffic.add("uplink", "prototypes", client_id, size_of(part.arrays()))
        if advance:
            advance()
    return Prototypes.concatenate(parts)


def messages(federation: Federation, counts: np.ndarray, tally: Tally) -> None:
    """Add the student's model to every client with its network, and prototypes back."""
    from ..federated.communication import size_of_entries
    from ..pipeline.round_messages import add_prototypes

    times = np.zeros(len(counts), np.int64)
    for client_id in federation.groups[federation.student]:
        tally.add("downlink", "weights", client_id, size_of_entries(federation.entries(federation.student)))
        times[client_id] = 1
    add_prototypes(federation, counts, tally, times)


def _heads(ctx: RunContext, weights: Weights, prototypes: Prototypes) -> tuple[Weights, dict[str, float]]:
    """Return the head of ``weights`` re-fitted on all prototypes, and the figures of one without the held-out ones."""
    from ..distillation.linear_head import fit_heads
    from ..distillation.prototypes import split_held_out

    section = ctx.config.prototypes
    kept, held_out = split_held_out(prototypes, section.held_out, ctx.config.seed)
    _, head, figures = fit_heads(kept, held_out, weights, section.weighting)
    return head, figures


def refit_head(ctx: RunContext, stage: Stage, weights: Weights, prototypes: Prototypes) -> tuple[Weights, float]:
    """Return the global model with its head re-fitted on all prototypes, and an accuracy on held-out ones.

    These choose the number of steps; the accuracy is that of the head which has not seen them.
    """
    from ..pipeline.evaluate import log_validation

    def compute(writer: StageWriter, progress: StageProgress) -> Facts:
        head, figures = _heads(ctx, weights, prototypes)
        writer.add("global", weights | head)
        progress.advance(note=f"held-out prototypes {figures['held_out_accuracy']:.1%}")
        return {"figures": {name: float(value) for name, value in figures.items()}}

    result = ctx.find_or_compute(stage, compute)
    student = result.load("global")
    log_validation(ctx, stage.name, 1, result.key, student)
    with result.read_as():
        return student, result.facts["figures"]["held_out_accuracy"]
