"""Stages Q and G: what each client uploads once, its prototypes and its generator."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ...core.errors import RunError
from ...core.health import generator_findings, prototype_findings
from ...core.types import Finding, Prototypes, Weights
from ...distillation.generator_training import num_steps
from ...federated.client import initial_models
from ...federated.client_models import Federation
from ...federated.communication import Size, Tally, size_of
from ...pipeline.context import POLL_SECONDS, FailedClients, Progress, Run
from ...pipeline.partition import Shards
from ...pipeline.rounds import Warmup
from ...storage.locks import Lease
from ...storage.store import StageResult, StageWriter
from .graph import generator_keys, generators_key, prototypes_key

#: Clients whose generators are leased at once: each lease is an open file.
MAX_LEASES = 256


#: Prototypes by the architecture of the clients that made them: each has a feature space of its own.
PrototypesOf = dict[str, Prototypes]


def prototypes_stage(run: Run, shards: Shards, warmup: Warmup) -> tuple[str, PrototypesOf]:
    """Every client's prototypes, concatenated in client order, for each architecture."""
    config, federation = run.config, run.context.federation
    key = prototypes_key(config, warmup.key)
    everyone = list(range(config.partition.num_clients))

    def compute(writer: StageWriter, progress: Progress) -> dict[str, Any]:
        traffic, failed_clients = Tally(1, len(everyone)), FailedClients("prototypes")
        if config.prototypes.rounds == "all":
            prototypes = {federation.student: Prototypes(**warmup.result.load("prototypes"))}
            progress.advance(len(everyone))
        else:
            own = _own_weights(warmup) if config.prototypes.model == "client" else _nothing
            if config.prototypes.model == "global":
                for k, name in enumerate(federation.classifiers):
                    traffic.add("downlink", "weights", k, size_of(warmup.models[name]))
            common = {"models": warmup.models, "round": config.warmup.num_rounds}
            parts: dict[str, list[Prototypes]] = {name: [] for name in federation.groups}
            size = shards.sizes.__getitem__
            for k, part in run.ask("prototypes", everyone, common, own, failed_clients=failed_clients, cost=size):
                parts[federation.classifiers[k]].append(part)
                traffic.add("uplink", "prototypes", k, size_of(part.arrays()))
                progress.advance()
            prototypes = {name: Prototypes.concatenate(made) for name, made in parts.items()}
        for part, made in _prototype_parts(federation, prototypes):
            writer.add(part, made.arrays())
        writer.add("communication", traffic.arrays())
        labels = np.concatenate([made.labels for made in prototypes.values()])
        found = np.bincount(labels, minlength=run.dataset.facts.num_classes)
        findings = failed_clients.findings() + prototype_findings(found.tolist(), shards.counts.sum(0).tolist())
        return {
            "communication": traffic.totals(), "findings": [asdict(f) for f in findings], "num_prototypes": len(labels),
        }  # fmt: skip

    result = run.stage("prototypes", key, compute, total=len(everyone), unit="client")
    parts = [part for part, _ in _prototype_parts(federation, dict.fromkeys(federation.groups))]
    return key, {name: Prototypes(**result.load(part)) for name, part in zip(federation.groups, parts, strict=True)}


def _prototype_parts(federation: Federation, prototypes: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Names and contents of the stored parts: "prototypes" is the student's architecture's, others are numbered."""
    return [
        ("prototypes" if name == federation.student else f"prototypes_{number:03d}", prototypes[name])
        for number, name in enumerate(federation.groups)
    ]


def _nothing(client_id: int) -> Mapping[str, Any]:
    return {}


def _own_weights(warmup: Warmup) -> Callable[[int], Mapping[str, Any]]:
    return lambda client_id: {"weights": warmup.client(client_id)}


@dataclass(frozen=True)
class Generators:
    """The clients' generators and their health figures, in client order; ``clients`` are those that have one."""

    key: str
    clients: list[int]
    results: list[StageResult]

    @property
    def figures(self) -> list[dict[str, float]]:
        return [r.facts["figures"] for r in self.results]

    def weights(self) -> tuple[Weights, ...]:
        return tuple(r.load("generator") for r in self.results)


def generators_stage(run: Run, shards: Shards, warmup: Warmup) -> Generators:
    """One generator per client, each stored as soon as it is there; only the missing ones are computed."""
    began = time.perf_counter()
    keys = generator_keys(run.config, shards.sizes, shards.key, warmup.key)
    key = generators_key(keys)
    found = {k: result for k, name in enumerate(keys) if (result := run.store.get(name)) is not None}
    spent, waited, computed, failed_clients = 0.0, 0.0, 0, FailedClients("generators")
    if len(found) < len(keys):
        try:
            with run.tracker.stage("generators", total=len(keys), unit="client") as progress:
                progress.resume([], len(found))
                computed, waited = _fill(run, shards, warmup, keys, found, failed_clients, progress)
        except RunError as error:
            raise error.at("generators") from error
        spent = time.perf_counter() - began
    else:
        run.tracker.replay("generators", [])
    clients = sorted(found)
    if failed_clients.rounds:
        key = generators_key([keys[k] for k in clients])
    results = [found[k] for k in clients]
    run.generators.update((k, found[k]) for k in clients)
    findings = [row for r in results for row in r.facts["findings"]] + [asdict(f) for f in failed_clients.findings()]
    facts = {"communication": uploaded(run.generators, len(keys)).totals(), "findings": findings}
    run.note("generators", key, not computed, spent, facts, waited)
    run.log["generators"]["cached_clients"] = len(clients) - computed
    for client_id, result in zip(clients, results, strict=True):
        for name, value in result.facts["figures"].items():
            run.tracker.scalar("generators", f"generator/{name}", client_id, value)
        for row in result.facts["curve"]:
            for name, value in zip(("loss", "discriminator_loss", "entropy", "diversity"), row[1:], strict=True):
                run.tracker.scalar("generators", f"generator_{client_id:03d}/{name}", int(row[0]), value)
    return Generators(key, clients, results)


def uploaded(generators: Mapping[int, StageResult], num_clients: int) -> Tally:
    """What clients sent for their generators."""
    traffic = Tally(1, num_clients)
    for client_id, result in generators.items():
        traffic.add("uplink", "generators", client_id, Size(**result.facts["communication"]))
    return traffic


def _fill(
    run: Run,
    shards: Shards,
    warmup: Warmup,
    keys: list[str],
    found: dict[int, StageResult],
    failed_clients: FailedClients,
    progress: Progress,
) -> tuple[int, float]:
    """Fill ``found`` for all clients but ``failed_clients``: compute unlocked keys, wait for locked ones.

    Returns (clients computed here, seconds waited).
    """
    computed, waited = 0, 0.0
    while missing := [k for k in range(len(keys)) if k not in found and k not in failed_clients.rounds]:
        leases: dict[int, Lease] = {}
        with contextlib.ExitStack() as release:
            for client_id in missing:
                got = run.store.get_or_lease(keys[client_id])
                if isinstance(got, StageResult):
                    found[client_id] = got
                    progress.advance(note=f"client {client_id}: found")
                elif got is not None:
                    leases[client_id] = release.enter_context(got)
                if len(leases) == MAX_LEASES:
                    break
            if leases:
                for client_id, result in _computed(run, shards, warmup, keys, list(leases), failed_clients):
                    found[client_id] = result
                    leases[client_id].release()
                    computed += 1
                    run.warn_of(Finding(**row) for row in result.facts["findings"])
                    coverage = result.facts["figures"]["coverage"]
                    progress.advance(note=f"client {client_id}: {coverage:.0%} of its classes")
                continue
        # Nobody waits here with a lease in hand, so no two runs can ever wait for each other.
        others = len(missing) - sum(k in found for k in missing)
        if others:
            if not waited:
                run.tracker.say(f"generators: waiting for another run that computes {others} of {len(keys)}")
            slept = time.perf_counter()
            time.sleep(POLL_SECONDS)
            waited += time.perf_counter() - slept
    return computed, waited


def _computed(
    run: Run, shards: Shards, warmup: Warmup, keys: list[str], clients: list[int], failed_clients: FailedClients
) -> Iterator[tuple[int, StageResult]]:
    """(k, its generator) of ``clients`` as they arrive, each stored."""
    knobs = run.config.generator
    before = knobs.stage == "before"
    start = initial_models(run.context) if before else warmup.models
    federation = run.context.federation

    def own(client_id: int) -> Mapping[str, Any]:
        sets = warmup.sets(client_id)
        weights = federation.share(client_id, start, sets) if before else warmup.client(client_id)
        return {"weights": weights} if sets is None else {"weights": weights, "sets": sets}

    arrivals = run.ask(
        "generate", clients, {"models": start}, own, ordered=False,
        cost=lambda k: float(num_steps(knobs, int(shards.sizes[k]))),
        failed_clients=failed_clients, max_missing=run.failure_budget(len(keys)) - len(failed_clients.rounds),
    )  # fmt: skip
    for client_id, made in arrivals:
        facts = {
            "figures": made.figures, "curve": made.curve,
            "findings": [asdict(f) for f in generator_findings(client_id, made.figures)],
            "communication": asdict(size_of(made.weights)),
        }  # fmt: skip
        parts = {"generator": made.weights, "samples": {"images": made.samples}, "progress": made.progress}
        yield client_id, run.store.put(keys[client_id], facts, parts)
