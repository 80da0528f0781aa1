"""Which stored results a run's summary.json refers to: for `mosaic store`, which frees what no run needs."""

from __future__ import annotations

import contextlib
from collections.abc import Container, Mapping, Sequence
from typing import Any

from ..config.resolve import override
from ..config.schema import ExperimentConfig
from ..core.errors import RequestError
from ..pipeline.graph import KeyInputs
from ..pipeline.stages import evaluated_key, models_of
from ..storage.store import CorruptResult, Store
from .plan import graph_of

#: Kinds of results that summary.json does not name: their keys are worked out.
UNNAMED = ("generator", "judged")


def client_keys(config: ExperimentConfig, stage: str, sizes: Sequence[int], keys: Mapping[str, str]) -> tuple[str, ...]:
    """Return each client's key in a stage that stores one result per client.

    Args:
        sizes: the clients' training samples, [K].
        keys: the keys of the stages before it, by name.
    """
    [found] = [declared for declared in graph_of(config) if declared.name == stage]
    return found.keys(KeyInputs(config, sizes=[int(size) for size in sizes]), keys)


def joint_keys(config: ExperimentConfig, stage: str, keys: Sequence[str]) -> str:
    """Return the one key that stands for the clients' ``keys`` in summary.json."""
    [found] = [declared for declared in graph_of(config) if declared.name == stage]
    return found.joint_key(keys)


def _sizes(store: Store, key: str) -> Sequence[int]:
    """Return the clients' training samples in the partition stored under ``key``; empty if it cannot be read."""
    with contextlib.suppress(CorruptResult):
        if partition := store.get(key):
            with partition.read_as("shards"):
                return [int(size) for size in partition.load("shards")["counts"].sum(1)]
    return ()


def keys_used(summary: Mapping[str, Any], store: Store, stored: Container[str]) -> tuple[set[str], bool]:
    """Return the keys of the results behind ``summary``, and whether these are all, as far as ``stored`` keys go.

    A summary names the keys of stages. Each client's generator and the evaluations of models follow from its config,
    unless another version of this package made them, or user code (its source would have to be loaded).
    """
    stages = {name: stage["key"] for name, stage in (summary.get("stages") or {}).items()}
    used = set(stages.values())
    if "partition" not in stages:
        return used, True
    try:
        written, model = summary["config"], summary["config"]["model"]
        strategy = written["federation"].get("strategy", "")
        if any(":" in name for name in (written["method"], strategy, model["classifier"], *model["classifiers"])):
            return used, False  # user code
        config = override(ExperimentConfig(), summary["config"])
        graph = graph_of(config)
    except (RequestError, KeyError, TypeError, AttributeError):
        return used, False
    models = models_of(graph, stages).values()
    used |= {
        evaluated_key(config, stages["partition"], key, split) for key in models for split in ("test", "validation")
    }
    whole = True
    for stage in graph:
        if stage.per_client is None or stage.name not in stages:
            continue
        sizes = _sizes(store, stages["partition"])
        if len(sizes) != config.partition.num_clients:
            return used, False
        clients = client_keys(config, stage.name, sizes, stages)
        found = [key for key in clients if key in stored]  # without those that were left out
        used |= set(clients)
        whole &= stages[stage.name] in (stage.joint_key(clients), stage.joint_key(found))
    return used, whole
