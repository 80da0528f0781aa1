"""Evaluate clients' own models on test images, for reporting alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

from ..core.types import ImageSet, Weights
from ..federated.client import ClientContext
from ..federated.evaluation import accuracy, confusion, logits_on
from ..storage.store import StageWriter
from ..tracking.progress import StageProgress
from .context import Facts, RunContext
from .graph import Stage
from .rounds import Warmup


def evaluate_personal(ctx: RunContext, stage: Stage, warmup: Warmup) -> dict[str, Any]:
    """Return the accuracy of the clients' own models after the warm-up, of a strategy that has such models.

    ``own``: the mean over the clients of ``clients`` [K], the accuracy of each on test images whose classes have the
    shares of the client's own training images. ``all``: the mean over the clients on all test images alike.
    """
    counts = ctx.shards.counts

    def compute(writer: StageWriter, progress: StageProgress) -> Facts:
        inside = ctx.tracker.inside("image", len(counts))
        names, models = warmup.federation.classifiers, map(warmup.personal, range(len(counts)))
        test, shown = ctx.dataset.test, partial(inside, 0)
        tables = ctx.on_server(personal_tables, names, models, test, progress=shown)
        inside.close()
        writer.add("confusion", {"tables": tables})
        own = [own_accuracy(table, held) for table, held in zip(tables, counts, strict=True)]
        found = {"own": float(np.mean(own)), "all": float(np.mean([accuracy(table) for table in tables]))}
        progress.advance(len(counts), note=f"own classes {found['own']:.1%}")
        return {"accuracy": found | {"clients": own}}

    found: dict[str, Any] = ctx.find_or_compute(stage, compute).facts["accuracy"]
    return found


def own_accuracy(table: np.ndarray, held: np.ndarray) -> float:
    """Return sum_c q_c recall_c from a confusion table [C, C] and a client's label counts [C], q_c being their shares.

    Classes without test images are left out; 0 where none is left.
    """
    shares = held * (table.sum(1) > 0)
    recalls = np.diag(table) / np.maximum(table.sum(1), 1)
    return float(shares @ recalls / max(shares.sum(), 1))


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
