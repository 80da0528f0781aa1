"""Stages G and Q of Mosaic: each client uploads its generator and its prototypes once."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from ...core.errors import RunError
from ...core.health import generator_findings, prototype_findings
from ...core.types import Finding, Prototypes, Weights
from ...distillation.client_tasks import GeneratorInput, GeneratorTask, PrototypesTask
from ...distillation.generator_training import num_steps
from ...distillation.rehearsal import SharedGenerators, drawable, generator_size, sent_weights
from ...federated.client import initial_models
from ...federated.client_models import Federation
from ...federated.communication import Size, Tally, size_of, size_of_entries
from ...pipeline.context import POLL_SECONDS, Facts, FailedClients, RunContext
from ...pipeline.graph import Stage
from ...pipeline.round_messages import add_prototypes
from ...pipeline.rounds import Warmup, last_channels
from ...pipeline.stored import check_facts, check_figures
from ...storage.locks import Lease
from ...storage.store import StageResult, StageWriter
from ...tracking.progress import StageProgress
from ..statistics_heads import JUDGE

#: Clients with generators leased at once: each lease is an open file.
MAX_LEASES = 256


#: The curve of generators that were stored without the names of their losses.
GAN_LOSSES = ("loss", "discriminator_loss", "entropy", "diversity")

#: Prototypes by the architecture of the clients that made them: each has a feature space of its own.
PrototypesOf = dict[str, Prototypes]


def collect_prototypes(ctx: RunContext, stage: Stage, warmup: Warmup) -> PrototypesOf:
    """Return every client's prototypes, concatenated in client order, for each architecture (stage Q)."""
    config, federation = ctx.config, ctx.client_context.federation
    everyone, stored = list(range(config.partition.num_clients)), federation.parts("prototypes")

    def compute(writer: StageWriter, progress: StageProgress) -> Facts:
        traffic, failed = Tally(1, len(everyone)), FailedClients(stage.name)
        if config.prototypes.rounds == "all":
            prototypes = {federation.student: Prototypes(**warmup.result.load("prototypes"))}
            progress.advance(len(everyone))
        else:
            if config.prototypes.model == "global":
                for k, name in enumerate(federation.classifiers):
                    traffic.add("downlink", "weights", k, size_of(warmup.models[name]))
            parts: dict[str, list[Prototypes]] = {name: [] for name in federation.groups}

            def own(client_id: int) -> Weights | None:
                return warmup.client(client_id) if config.prototypes.model == "client" else None

            task, size = PrototypesTask(config.warmup.num_rounds), ctx.shards.sizes.__getitem__
            for k, part in ctx.map(
                task, everyone, warmup.models, own, failed_clients=failed, cost=size, units=len(everyone)
            ):
                parts[federation.classifiers[k]].append(part)
                traffic.add("uplink", "prototypes", k, size_of(part.arrays()))
                progress.advance()
            prototypes = {name: Prototypes.concatenate(made) for name, made in parts.items()}
        for name, made in prototypes.items():
            writer.add(stored[name], made.arrays())
        writer.add("communication", traffic.arrays())
        labels = np.concatenate([made.labels for made in prototypes.values()])
        found = np.bincount(labels, minlength=ctx.dataset.facts.num_classes)
        findings = failed.findings() + prototype_findings(found.tolist(), ctx.shards.counts.sum(0).tolist())
        rows = [finding.to_json() for finding in findings]
        return {"communication": traffic.totals(), "findings": rows, "num_prototypes": len(labels)}

    result = ctx.find_or_compute(stage, compute)
    return {name: Prototypes(**result.load(part)) for name, part in stored.items()}


@dataclass(frozen=True)
class Generators:
    """Generators and their health figures, in client order; ``clients`` are the clients that have one."""

    key: str
    clients: list[int]
    results: list[StageResult]

    @property
    def figures(self) -> list[dict[str, float]]:
        return [r.facts["figures"] for r in self.results]

    def weights(self) -> tuple[Weights, ...]:
        return tuple(r.load("generator") for r in self.results)

    def shared(self, ctx: RunContext) -> SharedGenerators:
        """Return the generators that clients rehearse with, and the label counts of classes that each can draw."""
        counts = drawable(ctx.config, ctx.shards.counts)
        return SharedGenerators(self.weights(), tuple(self.clients), counts[self.clients])


def train_generators(ctx: RunContext, stage: Stage, warmup: Warmup | None) -> Generators:
    """Train one generator on every client (stage G); each is stored as soon as it is there, and found again alone.

    ``warmup``: None before it, where ``generator.stage`` is before.
    """
    if warmup is not None and warmup.generators is not None:
        found_early: Generators = warmup.generators
        return found_early
    judge = JUDGE.renew(ctx, warmup.models) if warmup and ctx.config.generator.judge == "calibrated" else None
    began, before = time.perf_counter(), ctx.client_seconds
    keys = ctx.client_keys(stage)
    key = stage.joint_key(keys)
    found = {k: _checked(ctx, result) for k, name in enumerate(keys) if (result := ctx.store.get(name)) is not None}
    spent, waited, computed, failed = 0.0, 0.0, 0, FailedClients(stage.name)
    if len(found) < len(keys):
        try:
            with ctx.tracker.stage(stage.name, total=len(keys), unit=stage.unit) as progress:
                progress.resume([], len(found))
                computed, waited = _fill(ctx, warmup, judge, keys, found, failed, progress)
        except RunError as error:
            raise error.at(stage.name) from error
        spent = time.perf_counter() - began
    else:
        ctx.tracker.replay(stage.name, [])
    clients = sorted(found)
    if failed.rounds:
        key = stage.joint_key([keys[k] for k in clients])
    ctx.keys[stage.name] = key
    results = [found[k] for k in clients]
    ctx.generators.update((k, found[k]) for k in clients)
    findings = [row for r in results for row in r.facts["findings"]] + [f.to_json() for f in failed.findings()]
    facts: Facts = {"communication": exchanged(ctx).totals(), "findings": findings}
    facts["client_seconds"] = ctx.client_seconds - before
    ctx.note(stage.name, key, not computed, spent, facts, waited)
    ctx.log[stage.name]["cached_clients"] = len(clients) - computed
    for client_id, result in zip(clients, results, strict=True):
        for name, value in result.facts["figures"].items():
            ctx.tracker.scalar(stage.name, f"generator/{name}", client_id, value)
        for row in result.facts["curve"]:
            for name, value in zip(result.facts.get("losses", GAN_LOSSES), row[1:], strict=True):
                ctx.tracker.scalar(stage.name, f"generator_{client_id:03d}/{name}", int(row[0]), value)
    return Generators(key, clients, results)


def _checked(ctx: RunContext, result: StageResult) -> StageResult:
    """Return a client's stored generator, its content checked here and by ``load``."""
    with result.read_as():
        check_figures(result.facts["figures"])
        check_facts({"findings": result.facts["findings"], "curve": []})
        size, names = Size(**result.facts["communication"]), result.facts.get("losses", GAN_LOSSES)
        rows = [dict(zip(("step", *names), row, strict=True)) for row in result.facts["curve"]]
        check_figures(asdict(size))
        for row in rows:
            check_figures(row)
    return ctx.checked(result)


def exchanged(ctx: RunContext) -> Tally:
    """Return the bytes that clients sent for their generators, and those of the judge's head."""
    traffic = Tally(1, ctx.config.partition.num_clients)
    for client_id, result in ctx.generators.items():
        traffic.add("uplink", "generators", client_id, Size(**result.facts["communication"]))
    if ctx.generators:
        _add_judge(ctx.client_context.federation, traffic)
    return traffic


def _fill(
    ctx: RunContext,
    warmup: Warmup | None,
    judge: Weights | None,
    keys: Sequence[str],
    found: dict[int, StageResult],
    failed: FailedClients,
    progress: StageProgress,
) -> tuple[int, float]:
    """Fill ``found`` for all clients but ``failed``: compute unlocked keys, wait for locked ones.

    Returns (clients computed here, seconds waited).
    """
    computed, waited = 0, 0.0
    while missing := [k for k in range(len(keys)) if k not in found and k not in failed.rounds]:
        leases: dict[int, Lease] = {}
        with contextlib.ExitStack() as release:
            for client_id in missing:
                got = ctx.store.get_or_lease(keys[client_id])
                if isinstance(got, StageResult):
                    found[client_id] = _checked(ctx, got)
                    progress.advance(note=f"client {client_id}: found")
                elif got is not None:
                    leases[client_id] = release.enter_context(got)
                if len(leases) == MAX_LEASES:
                    break
            if leases:
                for client_id, result in _computed(ctx, warmup, judge, keys, list(leases), failed):
                    found[client_id] = result
                    leases[client_id].release()
                    computed += 1
                    ctx.warn_of(Finding.from_json(row) for row in result.facts["findings"])
                    coverage = result.facts["figures"]["coverage"]
                    progress.advance(note=f"client {client_id}: {coverage:.0%} of its classes")
                continue
        # Nobody waits here with a lease in hand, so no two runs can ever wait for each other.
        others = len(missing) - sum(k in found for k in missing)
        if others:
            if not waited:
                ctx.tracker.say(f"generators: waiting for another run that computes {others} of {len(keys)}")
            slept = time.perf_counter()
            time.sleep(POLL_SECONDS)
            waited += time.perf_counter() - slept
    return computed, waited


def _computed(
    ctx: RunContext, warmup: Warmup | None, judge: Weights | None, keys: Sequence[str], clients: list[int],
    failed: FailedClients,
) -> Iterator[tuple[int, StageResult]]:
    """Yield (k, its generator) of ``clients`` as they arrive, each stored."""
    knobs = ctx.config.generator
    warmup = None if knobs.stage == "before" else warmup
    start = warmup.models if warmup else initial_models(ctx.client_context)
    federation = ctx.client_context.federation

    def own(client_id: int) -> GeneratorInput:
        indices = last_channels(federation, client_id)
        weights = warmup.client(client_id) if warmup else federation.submodel(client_id, start, indices)
        return GeneratorInput(judge or weights, indices)

    arrivals = ctx.map(
        GeneratorTask(), clients, start, own, ordered=False,
        cost=lambda k: float(num_steps(knobs, int(ctx.shards.sizes[k]))), failed_clients=failed,
        max_missing=ctx.failure_budget(len(keys)) - len(failed.rounds), units=len(clients),
    )  # fmt: skip
    for client_id, made in arrivals:
        facts = {
            "figures": made.figures, "curve": made.curve, "losses": list(made.losses),
            "findings": [f.to_json() for f in generator_findings(client_id, made.figures)],
            "communication": asdict(size_of(sent_weights(made.weights, ctx.dataset.facts))),
        }  # fmt: skip
        parts = {"generator": made.weights, "samples": {"images": made.samples}, "progress": made.progress}
        yield client_id, ctx.store.put(keys[client_id], facts, parts)


def generator_messages(federation: Federation, counts: np.ndarray, tally: Tally) -> None:
    """Add one generator from every client, and before it the judge's head to every client."""
    for k in range(len(counts)):
        tally.add("uplink", "generators", k, generator_size(federation.config, federation.facts, k))
    _add_judge(federation, tally)


def _add_judge(federation: Federation, tally: Tally) -> None:
    """Add the judge's head to every client, which has the rest of the model; nothing if clients judge themselves."""
    head = {name: entry for name, entry in federation.entries(federation.student).items() if name.startswith("head.")}
    for k in range(len(federation.classifiers) if federation.config.generator.judge == "calibrated" else 0):
        tally.add("downlink", "weights", k, size_of_entries(head))


def prototype_messages(federation: Federation, counts: np.ndarray, tally: Tally) -> None:
    """Add the global model to every client and its prototypes back, unless they came with the warm-up."""
    section = federation.config.prototypes
    if section.rounds != "last":
        return
    for k, name in enumerate(federation.classifiers):
        if section.model == "global":
            tally.add("downlink", "weights", k, size_of_entries(federation.entries(name)))
    add_prototypes(federation, counts, tally, np.ones(len(counts), np.int64))
