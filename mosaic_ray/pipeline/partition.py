"""Stage P: deal the training images to the clients."""

from __future__ import annotations

import numpy as np

from ..core.errors import RequestError
from ..core.health import partition_findings
from ..data.partition import label_counts, partition, split_validation
from ..storage.store import StageWriter
from ..tracking.progress import StageProgress
from .context import Facts, RunContext, Shards
from .stages import PARTITION


def deal(ctx: RunContext) -> Shards:
    """Deal the training images to the clients; needs neither torch nor Ray.

    Raises:
        RequestError: where a client is left without training samples.
    """
    config, data = ctx.config, ctx.dataset

    def compute(writer: StageWriter, progress: StageProgress) -> Facts:
        shards = partition(
            data.train.labels, config.partition, config.seed, data.facts.num_classes, data.groups
        )
        held = config.partition.validation_fraction
        train, validation = split_validation(data.train.labels, shards, held, config.seed)
        counts = label_counts(data.train.labels, train, data.facts.num_classes)
        arrays = {"counts": counts}
        for name, lists in (("train", train), ("validation", validation)):
            arrays[name] = np.concatenate(lists).astype(np.int64)
            arrays[f"{name}_sizes"] = np.array([len(s) for s in lists], np.int64)
        writer.add("shards", arrays)
        progress.advance()
        return {"findings": [f.to_json() for f in partition_findings(counts.sum(0).tolist())]}

    result = ctx.find_or_compute(PARTITION, compute)
    arrays = result.load("shards")
    lists = {name: np.split(arrays[name], np.cumsum(arrays[f"{name}_sizes"])[:-1]) for name in ("train", "validation")}
    shards = Shards(result.key, lists["train"], lists["validation"], arrays["counts"])
    empty = np.flatnonzero(shards.sizes == 0)
    if len(empty):
        raise RequestError(
            f"partition.num_clients: client {int(empty[0])} is left without training samples; "
            "use fewer clients, a larger partition.omega or a smaller partition.validation_fraction"
        )
    ctx.shards = shards
    return shards
