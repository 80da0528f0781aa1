"""Which stored results a run's summary.json speaks of: for `mosaic store`, which frees what no run needs."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

from ..config.resolve import override
from ..config.schema import ExperimentConfig
from ..core.errors import RequestError
from ..methods.mosaic.graph import generator_keys, generators_key
from ..pipeline.keys import evaluated_key
from ..storage.store import Store

#: Results that summary.json does not name: their keys are worked out.
UNNAMED = ("generator", "judged")


def keys_used(summary: Mapping[str, Any], store: Store, stored: Container[str]) -> tuple[set[str], bool]:
    """Keys of the results behind ``summary``, and whether these are all, as far as ``stored`` keys go.

    Named there are those of stages. Each client's generator and what models were judged by follow from its config,
    unless another version of this package made them, or a user's own network, whose source would have to be loaded.
    """
    stages = {name: stage["key"] for name, stage in (summary.get("stages") or {}).items()}
    used = set(stages.values())
    if "partition" not in stages:
        return used, True
    try:
        config = override(ExperimentConfig(), summary["config"])
    except (RequestError, KeyError, TypeError, AttributeError):
        return used, False
    models = [stages[name] for name in ("warmup", "teacher", "distill", "finetune", "control") if name in stages]
    used |= {
        evaluated_key(config, stages["partition"], key, split) for key in models for split in ("test", "validation")
    }
    if "generators" not in stages:
        return used, True
    partition = store.get(stages["partition"])
    if partition is None or any(":" in name for name in (config.model.classifier, *config.model.classifiers)):
        return used, False
    sizes = partition.load("shards")["counts"].sum(1)
    clients = generator_keys(config, sizes, stages["partition"], stages["warmup"])
    found = [key for key in clients if key in stored]  # without those that were left out
    return used | set(clients), stages["generators"] in (generators_key(clients), generators_key(found))
