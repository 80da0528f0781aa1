"""The tasks that a client host can run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..distillation.client_tasks import generate, prototypes
from ..federated.client import ClientContext, statistics, train
from ..federated.local_training import Shard

Work = Callable[[ClientContext, Shard, int, Mapping[str, Any], Mapping[str, Any]], Any]

WORK: dict[str, Work] = {
    "train": train, "generate": generate, "prototypes": prototypes, "statistics": statistics,
}  # fmt: skip
