"""Stages Q and G: what each client uploads once, its prototypes and its generator."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..algorithm.generation import generator_findings, num_steps
from ..errors import RunError
from ..methods.client_work import initial_weights
from ..models.tensors import num_bytes
from ..records import Finding, Prototypes, Weights
from ..runtime.store import StageResult, StageWriter, stage_key
from ..runtime.tracking import image_grid
from .partition import Shards
from .rounds import Warmup
from .run import VERSIONS, Progress, Run, knobs_of, numbers_depend_on


def prototypes_stage(run: Run, shards: Shards, warmup: Warmup) -> tuple[str, Prototypes]:
    """Every client's prototypes, concatenated in client order."""
    config = run.config
    knobs = {"prototypes": knobs_of(config.prototypes, "held_out", "weighting")}
    key = stage_key("prototypes", VERSIONS["prototypes"], knobs, [warmup.key])
    everyone = list(range(config.partition.num_clients))

    def compute(writer: StageWriter, progress: Progress) -> dict[str, Any]:
        traffic = {"uplink": {}, "downlink": {}}
        if config.prototypes.rounds == "all":
            prototypes = Prototypes(**warmup.result.load("prototypes"))
            progress.advance(len(everyone))
        else:
            own = _own_weights(warmup) if config.prototypes.model == "client" else _nothing
            if config.prototypes.model == "global":
                traffic["downlink"]["weights"] = num_bytes(warmup.weights) * len(everyone)
            common = {"weights": warmup.weights, "round": config.warmup.num_rounds}
            parts = []
            for _, part in run.cohort.ask("prototypes", everyone, common, own, cost=lambda k: float(shards.sizes[k])):
                parts.append(part)
                progress.advance()
            prototypes = Prototypes.concatenate(parts)
            traffic["uplink"]["prototypes"] = num_bytes(prototypes.arrays())
        writer.add("prototypes", prototypes.arrays())
        found = np.bincount(prototypes.labels, minlength=run.dataset.facts.num_classes)
        missing = [int(c) for c in np.flatnonzero((found == 0) & (shards.counts.sum(0) > 0))]
        findings = []
        if missing:
            message = f"no prototype of class {', '.join(map(str, missing))}; raise prototypes.k or prototypes.samples"
            findings.append(Finding("prototypes.too_few", "warning", "prototypes", message, value=float(len(missing))))
        return {"communication": traffic, "findings": [asdict(f) for f in findings], "num_prototypes": len(prototypes)}

    result = run.stage("prototypes", key, compute, total=len(everyone), unit="client")
    return key, Prototypes(**result.load("prototypes"))


def _nothing(client_id: int) -> Mapping[str, Any]:
    return {}


def _own_weights(warmup: Warmup) -> Callable[[int], Mapping[str, Any]]:
    return lambda client_id: {"weights": warmup.client(client_id)}


@dataclass(frozen=True)
class Generators:
    """Every client's generator and its health figures, in client order."""

    key: str
    results: list[StageResult]

    @property
    def figures(self) -> list[dict[str, float]]:
        return [r.facts["figures"] for r in self.results]

    def weights(self) -> tuple[Weights, ...]:
        return tuple(r.load("generator") for r in self.results)


def generator_keys(run: Run, shards: Shards, start: str) -> list[str]:
    """One key per client. A client with n_k >= tau never meets the inversion term: its key leaves it out (O15)."""
    config, keys = run.config, []
    for client_id, size in enumerate(shards.sizes):
        knobs = knobs_of(config.generator)
        if size >= config.generator.tau or not config.generator.lambda_i * config.generator.inversion_scale:
            knobs |= {"tau": 0, "lambda_i": 0.0, "inversion_scale": 0.0}
        knobs = {
            "generator": knobs, "client": client_id, "model": knobs_of(config.model), "seed": config.seed,
            "runtime": numbers_depend_on(config),
        }  # fmt: skip
        if config.generator.classifier_source == "fresh":
            knobs["fresh"] = [config.warmup.batch_size, config.warmup.shuffle]
        keys.append(stage_key("generator", VERSIONS["generator"], knobs, [shards.key, start]))
    return keys


def generators_stage(run: Run, shards: Shards, warmup: Warmup) -> Generators:
    """One generator per client, each stored as soon as it is there; only the missing ones are computed."""
    config, began = run.config, time.perf_counter()
    before = config.generator.stage == "before"
    keys = generator_keys(run, shards, "start" if before else warmup.key)
    key = "generators-" + hashlib.sha256("".join(keys).encode()).hexdigest()[:20]
    found = {k: result for k, name in enumerate(keys) if (result := run.store.get(name)) is not None}
    missing = [k for k in range(len(keys)) if k not in found]
    spent = 0.0
    if missing:
        try:
            with run.tracker.stage("generators", total=len(keys), unit="client") as progress:
                progress.resume([], len(found))
                start = initial_weights(run.bench) if before else warmup.weights
                own = _own_weights(warmup) if not before else lambda k: {"weights": start}
                arrivals = run.cohort.ask(
                    "generate", missing, {"weights": start}, own, ordered=False,
                    cost=lambda k: float(num_steps(config.generator, int(shards.sizes[k]))),
                )  # fmt: skip
                for client_id, made in arrivals:
                    facts = {
                        "figures": made.figures, "curve": made.curve,
                        "findings": [asdict(f) for f in generator_findings(client_id, made.figures)],
                        "communication": {"uplink": {"generators": num_bytes(made.weights)}},
                    }  # fmt: skip
                    parts = {"generator": made.weights, "samples": {"images": made.samples}}
                    found[client_id] = run.store.put(keys[client_id], facts, parts)
                    progress.advance(note=f"client {client_id}: {made.figures['coverage']:.0%} of its classes")
        except RunError as error:
            raise error.at("generators") from error
        spent = time.perf_counter() - began
    else:
        run.tracker.replay("generators", [])
    results = [found[k] for k in range(len(keys))]
    uplink = sum(r.facts["communication"]["uplink"]["generators"] for r in results)
    findings = [row for r in results for row in r.facts["findings"]]
    facts = {"communication": {"uplink": {"generators": uplink}}, "findings": findings}
    run.note("generators", key, not missing, spent, facts)
    run.log["generators"]["cached_clients"] = len(keys) - len(missing)
    for client_id, result in enumerate(results):
        for name, value in result.facts["figures"].items():
            run.tracker.scalar("generators", f"generator/{name}", client_id, value)
        for row in result.facts["curve"]:
            for name, value in zip(("loss", "discriminator_loss", "entropy", "diversity"), row[1:], strict=True):
                run.tracker.scalar("generators", f"generator_{client_id:03d}/{name}", int(row[0]), value)
        run.tracker.image(f"generator/client_{client_id:03d}", 0, image_grid(result.load("samples")["images"], 8))
    return Generators(key, results)
