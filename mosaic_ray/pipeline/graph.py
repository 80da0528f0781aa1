"""Stages as data: the inputs, the function, the work and the messages of each.

A run is a graph of ``Stage`` records, in the order in which they run. Keys of stored results, the dry run, the
communication ledger, garbage collection, reports and sweeps all walk it. Nothing here needs torch, Ray or images, so a
whole sweep's keys can be counted before it starts.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..config.schema import ExperimentConfig
from ..config.user_code import digest_of
from ..core.types import DataFacts
from ..storage.hashing import stage_key

Knobs = dict[str, Any]
#: Amounts of work by unit, such as {"local steps": 3000}.
Work = dict[str, int]


@dataclass(frozen=True)
class KeyInputs:
    """Inputs of a stage's key, beside upstream keys.

    ``identity`` (``Dataset.identity``) and ``facts`` are None where the data are not at hand. ``sizes`` [K] are the
    clients' training samples; without them every client counts as small (n_k < ``generator.tau``). ``groups``: digests
    of ``Dataset.groups``.
    """

    config: ExperimentConfig
    identity: str | None = None
    facts: DataFacts | None = None
    sizes: Sequence[int] | None = None
    groups: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Stage:
    """One step of a run. Its result is stored under a key, and all runs with this key share it.

    Args:
        name: unique within a graph; the stage's name in summary.json and in progress.
        version: raise it when the mathematics changes: older results are then computed again.
        knobs: the knobs that the key depends on; those at their default are left out (``fields.changed_knobs``).
        compute: ``module:function``, called as ``function(ctx, stage, *inputs)`` by ``RunContext.run``.
        upstream: names of the stages that it reads results of, or a function of the configuration that gives them.
        kind: the first part of the key; stages of one kind share results where all else is equal. Default: the name.
        per_client: further inputs of client k's key, if every client's result is stored on its own.
        role: the entry of summary.json's ``accuracy`` that its model fills, where it makes one.
        total: how many units its progress counts.
        unit: the name of one of them.
        work: the amount of work of one result (of one client), for the dry run.
        messages: ``module:function(federation, counts, tally)`` that adds the bytes that it will send.
    """

    name: str
    version: int
    knobs: Callable[[KeyInputs], Knobs]
    compute: str = ""
    upstream: tuple[str, ...] | Callable[[ExperimentConfig], tuple[str, ...]] = ()
    kind: str = ""
    per_client: Callable[[KeyInputs, int], Knobs] | None = None
    role: str = ""
    total: Callable[[ExperimentConfig], int] = field(default=lambda config: 1)
    unit: str = "round"
    work: Callable[[ExperimentConfig], Work] = field(default=lambda config: {})
    messages: str = ""

    def reads(self, config: ExperimentConfig) -> tuple[str, ...]:
        """Return the names of the stages that it reads results of."""
        return self.upstream(config) if callable(self.upstream) else self.upstream

    def keys(self, inputs: KeyInputs, upstream: Mapping[str, str]) -> tuple[str, ...]:
        """Return the stage's key, or one for each client; ``upstream`` maps stage names to keys."""
        knobs, above = self.knobs(inputs), [upstream[name] for name in self.reads(inputs.config)]
        if self.compute and not self.compute.startswith("mosaic_ray."):  # a plug-in's stage follows its source
            knobs = knobs | {"source": digest_of(self.compute)}
        kind = self.kind or self.name
        if self.per_client is None:
            return (stage_key(kind, self.version, knobs, above),)
        clients = range(inputs.config.partition.num_clients)
        return tuple(stage_key(kind, self.version, knobs | self.per_client(inputs, k), above) for k in clients)

    def joint_key(self, keys: Sequence[str]) -> str:
        """Return the one key that stands for ``keys``, some or all clients', in the keys of later stages."""
        if self.per_client is None:
            [key] = keys
            return key
        return f"{self.name}-{hashlib.sha256(''.join(keys).encode()).hexdigest()[:20]}"


Graph = tuple[Stage, ...]


def graph_keys(graph: Graph, inputs: KeyInputs, known: Mapping[str, str] = {}) -> dict[str, tuple[str, ...]]:
    """Return the keys of a whole run, stage by stage: one each, or one per client. ``known``: stages' keys at hand."""
    found: dict[str, tuple[str, ...]] = {}
    joint: dict[str, str] = {}
    for stage in graph:
        found[stage.name] = (known[stage.name],) if stage.name in known else stage.keys(inputs, joint)
        joint[stage.name] = stage.joint_key(found[stage.name])
    return found


def load_function(reference: str) -> Callable[..., Any]:
    """Import what ``module:function`` names."""
    module, _, name = reference.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return found
