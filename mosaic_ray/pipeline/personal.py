"""Evaluate models at the clients, for reporting alone: each client's own, the final one, and the final one adapted.

A client's accuracy is that on test images whose classes have the shares of its own training images. All clients are
scored on the same images, none of which trained or chose a model, also where a client holds few.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from statistics import fmean, pstdev
from typing import Any

import numpy as np

from ..core.types import ImageSet, Weights
from ..federated.client import AdaptTask, ClientContext, OwnScoreTask, Task
from ..federated.client_models import Models
from ..federated.evaluation import accuracy, confusion, logits_on, own_accuracy, per_class_accuracy
from ..storage.store import StageWriter
from ..tracking.progress import StageProgress
from .context import Facts, FailedClients, RunContext
from .graph import Stage
from .rounds import CLOSING, Warmup, closing_plan

#: Each client's accuracy [K]; None for a client whose work failed.
Accuracies = list[float | None]


def evaluate_personal(ctx: RunContext, stage: Stage, warmup: Warmup) -> dict[str, Any]:
    """Return the accuracy of the clients' own models after the warm-up, of a strategy that has such models.

    ``own``: the mean over the clients of ``clients`` [K], the accuracy of each on test images whose classes have the
    shares of the client's own training images. ``all``: the mean over the clients on all test images alike.
    """
    counts = ctx.shards.counts

    def compute(writer: StageWriter, progress: StageProgress) -> Facts:
        names, models = warmup.federation.classifiers, map(warmup.personal, range(len(counts)))
        tables = _tables(ctx, names, models)
        writer.add("confusion", {"tables": tables})
        own = [own_accuracy(per_class_accuracy(table), held) for table, held in zip(tables, counts, strict=True)]
        found = {"own": float(np.mean(own)), "all": float(np.mean([accuracy(table) for table in tables]))}
        progress.advance(len(counts), note=f"own classes {found['own']:.1%}")
        return {"accuracy": found | {"clients": own}}

    result = ctx.find_or_compute(stage, compute)
    with result.read_as():
        found: dict[str, Any] = result.facts["accuracy"]
        _check([found["own"], found["all"]], 2)
        _check(found["clients"], len(counts))
    return found


def _check(shares: Sequence[float | None], count: int) -> None:
    """Raise ``ValueError`` unless ``shares`` are ``count`` accuracies."""
    if len(shares) != count or not all(share is None or 0 <= share <= 1 for share in shares):
        raise ValueError(f"they are not {count} accuracies")


def evaluate_own(ctx: RunContext, stage: Stage, warmup: Warmup) -> Accuracies:
    """Return the accuracy of the model that each client trained in the last round of the warm-up.

    A client that was not in this round has the global model of its network.
    """
    names, everyone = warmup.federation.classifiers, range(len(ctx.shards.counts))

    def compute(writer: StageWriter, progress: StageProgress) -> Facts:
        own = [k for k in everyone if warmup.trained(k)]
        found, findings = _scored(ctx, stage, progress, OwnScoreTask(), own, ctx.dataset.test, warmup.client)
        absent = [k for k in everyone if k not in own]
        recalls = _recalls(ctx, {name: warmup.models[name] for name in dict.fromkeys(names[k] for k in absent)})
        for k in absent:
            found[k] = own_accuracy(recalls[names[k]], ctx.shards.counts[k])
        progress.advance(len(absent))
        return {"accuracy": found, "findings": findings}

    result = ctx.find_or_compute(stage, compute)
    with result.read_as():
        _check(result.facts["accuracy"], len(names))
    accuracies: Accuracies = result.facts["accuracy"]
    return accuracies


def evaluate_final(ctx: RunContext, stage: Stage, models: Models) -> Facts:
    """Return ``recalls`` of the final models of networks other than the student's, by name and class, and ``adapted``.

    These are the accuracies of the clients after ``finetune.adapt_steps`` local steps from ``models``; None without.
    """
    federation, steps = ctx.client_context.federation, ctx.config.finetune.adapt_steps

    def compute(writer: StageWriter, progress: StageProgress) -> Facts:
        recalls = _recalls(ctx, {name: found for name, found in models.items() if name != federation.student})
        if not steps:
            return {"recalls": recalls, "adapted": None}
        last = max(0, ctx.config.finetune.num_rounds - 1)
        task = AdaptTask(replace(closing_plan(ctx), steps=steps, loss="ce"))
        everyone = list(range(len(ctx.shards.counts)))
        adapted, findings = _scored(
            ctx, stage, progress, task, everyone, (models, ctx.dataset.test),
            lambda k: federation.indices(k, CLOSING, last),
        )  # fmt: skip
        return {"recalls": recalls, "adapted": adapted, "findings": findings}

    result = ctx.find_or_compute(stage, compute)
    with result.read_as():
        for name in models.keys() - {federation.student}:
            _check(result.facts["recalls"][name], ctx.dataset.facts.num_classes)
        if steps:
            _check(result.facts["adapted"], len(ctx.shards.counts))
    return result.facts


def client_accuracy(
    ctx: RunContext, own: Accuracies, student: Sequence[float | None], final: Mapping[str, Any]
) -> dict[str, Any]:
    """Return summary.json's ``client_accuracy``, and show it in TensorBoard.

    Args:
        own: each client's accuracy with its own model.
        student: the final model's recall of each class.
        final: the result of ``evaluate_final``, empty where it did not run.
    """
    federation, section = ctx.client_context.federation, ctx.config
    recalls = {federation.student: student} | final.get("recalls", {})
    layouts = list(zip(federation.classifiers, federation.widths, strict=True))
    clients = {"own": own}
    clients["final"] = [own_accuracy(recalls[n], c) for (n, _), c in zip(layouts, ctx.shards.counts, strict=True)]
    if adapted := final.get("adapted"):
        clients["adapted"] = adapted
    for name, values in clients.items():
        step = section.warmup.num_rounds + (section.finetune.num_rounds if name != "own" else 0)
        for what, value in spread(values).items():
            ctx.tracker.scalar("evaluate", f"clients/{name}_{what}", step, value)
        ctx.tracker.histogram(f"clients/{name}_accuracy", step, np.array(values, np.float64))
    groups = [
        {"classifier": layout[0], "width": layout[1], "clients": layouts.count(layout)}
        | {name: spread([v for v, its in zip(values, layouts, strict=True) if its == layout])
           for name, values in clients.items()}
        for layout in dict.fromkeys(layouts)
    ]  # fmt: skip
    return {"all": {name: spread(v) for name, v in clients.items()}, "groups": groups, "clients": clients}


def spread(values: Accuracies) -> dict[str, float]:
    """Return mean, population standard deviation, and the mean of the worst tenth (rounded up) of the known values."""
    known = sorted(value for value in values if value is not None)
    if not known:
        return {}
    worst = known[: math.ceil(len(known) / 10)]
    return {"mean": fmean(known), "sd": pstdev(known), "worst_tenth": fmean(worst)}


def _scored(
    ctx: RunContext, stage: Stage, progress: StageProgress, task: Task[Any, Any, float], clients: Sequence[int],
    broadcast: Any, own: Callable[[int], Any],
) -> tuple[Accuracies, list[Any]]:  # fmt: skip
    """Return every client's accuracy, None but for ``clients`` that succeed, and findings about those that fail."""
    found: Accuracies = [None] * len(ctx.shards.counts)
    failed = FailedClients(stage.name)
    for k, reached in ctx.map(task, clients, broadcast, own, failed_clients=failed, units=len(clients)):
        found[k] = reached
        progress.advance(note=f"own classes {reached:.1%}")
    return found, [finding.to_json() for finding in failed.findings()]


def _recalls(ctx: RunContext, models: Models) -> dict[str, list[float | None]]:
    """Return the recall of each class by global models, by network."""
    if not models:
        return {}
    tables = _tables(ctx, list(models), iter(models.values()))
    return {name: per_class_accuracy(table) for name, table in zip(models, tables, strict=True)}


def _tables(ctx: RunContext, names: Sequence[str], models: Iterator[Weights]) -> np.ndarray:
    inside = ctx.tracker.inside("image", len(names))
    found = ctx.on_server(personal_tables, names, models, ctx.dataset.test, progress=partial(inside, 0))
    inside.close()
    return found


def personal_tables(
    context: ClientContext, names: Sequence[str], models: Iterator[Weights], test: ImageSet
) -> np.ndarray:
    """Return the confusion table of each client's model, int64 [K, C, C]; ``names`` [K] are their networks."""
    tables = []
    for name, weights in zip(names, models, strict=True):
        model = context.classifier(weights, name).eval()
        logits = logits_on(
            model, test, context.facts, context.device, context.config.runtime.precision, progress=context.progress
        )
        tables.append(confusion(logits, test.labels))
    return np.stack(tables)
