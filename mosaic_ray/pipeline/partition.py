"""Stage P: which client holds which images."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..core.errors import RequestError
from ..core.health import partition_findings
from ..data.partition import label_counts, partition, split_validation
from ..storage.store import StageWriter
from .context import Progress, Run
from .keys import partition_key


@dataclass(frozen=True)
class Shards:
    """Index lists of each client, for training and for validation, and the training label counts [K, C]."""

    key: str
    train: list[np.ndarray]
    validation: list[np.ndarray]
    counts: np.ndarray

    @property
    def sizes(self) -> np.ndarray:
        """Training samples of each client, int64 [K]."""
        return self.counts.sum(1)


def partition_stage(run: Run) -> Shards:
    """Deal the training images to clients; needs neither torch nor Ray."""
    config, data = run.config, run.dataset
    key = partition_key(config, data.identity, data.facts)

    def compute(writer: StageWriter, progress: Progress) -> dict[str, Any]:
        shards = partition(data.train.labels, config.partition, config.seed, data.facts.num_classes)
        held = config.partition.validation_fraction
        train, validation = split_validation(data.train.labels, shards, held, config.seed)
        counts = label_counts(data.train.labels, train, data.facts.num_classes)
        arrays = {"counts": counts}
        for name, lists in (("train", train), ("validation", validation)):
            arrays[name] = np.concatenate(lists).astype(np.int64)
            arrays[f"{name}_sizes"] = np.array([len(s) for s in lists], np.int64)
        writer.add("shards", arrays)
        progress.advance()
        return {"findings": [asdict(f) for f in partition_findings(counts.sum(0).tolist())]}

    arrays = run.stage("partition", key, compute, total=1, unit="draw").load("shards")
    lists = {name: np.split(arrays[name], np.cumsum(arrays[f"{name}_sizes"])[:-1]) for name in ("train", "validation")}
    run.train_rows = lists["train"]
    return Shards(key, lists["train"], lists["validation"], arrays["counts"])


def refuse_small(shards: Shards) -> None:
    """Every client must hold something to train on."""
    empty = np.flatnonzero(shards.sizes == 0)
    if len(empty):
        raise RequestError(
            f"partition.num_clients: client {int(empty[0])} is left without training samples; "
            "use fewer clients, a larger partition.omega or a smaller partition.validation_fraction"
        )
