"""Stages A, M and KD on the driver: the teacher, and the student that learns from it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from ...core.errors import RunError
from ...core.health import SINGLE_OWNER_BELOW, distill_findings, teacher_findings
from ...core.types import Finding, Prototypes, Weights
from ...distillation.experts import effective_owners
from ...distillation.student_training import DistillTask, inspect_student, make_task
from ...distillation.teacher import MixedTeacher, TeacherState, group_shares
from ...distillation.teacher_training import inspect_teacher, make_teacher
from ...federated.client_models import Federation, group_counts
from ...pipeline.context import Progress, Run, known
from ...pipeline.evaluate import log_validation
from ...pipeline.partition import Shards
from ...pipeline.rounds import Warmup
from ...storage.store import StageResult, StageWriter
from . import graph
from .client_uploads import Generators, PrototypesOf

#: Runs a distillation task; ``execution.ray_train`` has the hosts.
Host = Callable[[DistillTask, Callable[[int, Mapping[str, float]], None]], Any]


def teacher_stage(
    run: Run, shards: Shards, warmup: Warmup, prototypes_key: str, prototypes: PrototypesOf, generators: Generators
) -> tuple[str, TeacherState | MixedTeacher]:
    """Distinct class experts and the meta model; one such teacher for each architecture, where there are several."""
    config, federation = run.config, run.context.federation
    key = graph.teacher_key(config, warmup.key, prototypes_key, generators.key)

    def compute(writer: StageWriter, progress: Progress) -> dict[str, Any]:
        figures: dict[str, float] = {}
        findings: list[Finding] = []
        for number, (name, clients) in enumerate(federation.groups.items()):
            state, found = _teach(run, shards, warmup, prototypes[name], generators, name, clients, progress)
            counts = group_counts(shards.counts, clients)
            looked, arrays = inspect_teacher(config, run.dataset.facts, state, counts, prototypes[name])
            found |= looked
            prefix, owners = _prefix(federation, name, number), effective_owners(counts)
            _write_teacher(writer, state, prefix)
            writer.add(f"{prefix}diagnostics", arrays)
            own = name == federation.student
            for what, value in found.items():
                progress.scalar(f"teacher/{what}" if own else f"teacher_{name}/{what}", config.meta.updates, value)
            figures |= found if own else {f"{name}/{what}": value for what, value in found.items()}
            alone = [int(c) for c in np.flatnonzero((owners > 0) & (owners < SINGLE_OWNER_BELOW))]
            findings += teacher_findings(
                found, run.dataset.facts.num_classes, alone, name=name if len(federation.groups) > 1 else "",
                holds_out=config.prototypes.held_out > 0,
            )  # fmt: skip
        return {"figures": known(figures), "findings": [asdict(f) for f in findings]}

    total = config.meta.updates * len(federation.groups)
    result = run.stage("teacher", key, compute, total=total, unit="update")
    states = tuple(
        _read_teacher(result, _prefix(federation, name, number), warmup.models[name], name)
        for number, name in enumerate(federation.groups)
    )
    teacher: TeacherState | MixedTeacher = states[0]
    if len(states) > 1:
        shares = group_shares(shards.counts, list(federation.groups.values()))
        teacher = MixedTeacher(states, shares, list(federation.groups).index(federation.student))
    log_validation(run, shards, "teacher", config.meta.updates, key, teacher)
    return key, teacher


def _teach(
    run: Run,
    shards: Shards,
    warmup: Warmup,
    prototypes: Prototypes,
    generators: Generators,
    name: str,
    clients: Sequence[int],
    progress: Progress,
) -> tuple[TeacherState, dict[str, float]]:
    """The teacher of one architecture, from the clients that hold it."""
    done = 0
    federation = warmup.federation
    prefix = "meta" if name == federation.student else f"meta_{name}"

    def look(update: int, metrics: dict[str, float]) -> None:
        nonlocal done
        for what, value in metrics.items():
            progress.scalar(f"{prefix}/{what}", update, value)
        if update > done:
            progress.advance(update - done, note=f"held-out prototypes {metrics['held_out_accuracy']:.1%}")
            done = update

    channels = federation.channels(name) if federation.partial_width else None
    models: Iterable[Any] = warmup.clients(clients)
    if federation.partial_width:
        models = ((k, weights, warmup.sets(k)) for k, weights in models)
    makers = zip(generators.clients, generators.results, strict=True)
    try:
        return make_teacher(
            run.config, run.dataset.facts, warmup.models[name], models, group_counts(shards.counts, clients),
            prototypes, look,
            ((k, warmup.client(k), made.load("generator")) for k, made in makers),
            run.context.device, channels,
        )  # fmt: skip
    except ValueError as error:  # a class without an owner, where that is asked to be an error
        raise RunError(str(error)) from error


def _prefix(federation: Federation, name: str, number: int) -> str:
    """Before the names of a teacher's stored parts: nothing for the student's architecture, others are numbered."""
    return "" if name == federation.student else f"group_{number:03d}_"


def _write_teacher(writer: StageWriter, state: TeacherState, prefix: str) -> None:
    writer.add(f"{prefix}meta", state.meta)
    writer.add(f"{prefix}index", {"index": state.index})
    for number, expert in enumerate(state.experts):
        writer.add(f"{prefix}expert_{number:04d}", expert)


def _read_teacher(result: StageResult, prefix: str, backbone: Weights, name: str) -> TeacherState:
    experts = tuple(result.load(part) for part in sorted(result.parts) if part.startswith(f"{prefix}expert_"))
    index = result.load(f"{prefix}index")["index"]
    return TeacherState(backbone, experts, index, result.load(f"{prefix}meta"), name)


def distill_stage(
    run: Run,
    shards: Shards,
    warmup: Warmup,
    prototypes: PrototypesOf,
    teacher_key: str,
    teacher: TeacherState | MixedTeacher,
    generators: Generators,
    host: Host,
) -> StageResult:
    """The student (part "global"), taught on synthetic batches by one Ray Train ``fit()``."""
    config = run.config
    key = graph.distill_key(config, teacher_key, generators.key)

    def compute(writer: StageWriter, progress: Progress) -> dict[str, Any]:
        task = make_task(
            config, run.dataset.facts, warmup.weights, teacher, generators.weights(), generators.figures,
            shards.sizes[generators.clients], prototypes[warmup.federation.student],
        )  # fmt: skip
        if config.distill.workers:
            run.cohort.release()  # Train's workers need the CPUs that idle client actors hold
        done = 0

        def look(step: int, metrics: Mapping[str, float]) -> None:
            nonlocal done
            for name, value in metrics.items():
                progress.scalar(f"student/{name}", step, value)
            progress.advance(step - done, note=f"agreement {metrics['agreement']:.1%}")
            done = step

        weights, figures, _ = host(task, look)
        writer.add("global", weights)
        looked, named = inspect_student(task, weights, run.context.device)
        figures |= looked
        writer.add("diagnostics", {"synthetic_counts": named})
        for what in ("entropy", "confidence"):
            progress.scalar(f"teacher/synthetic_{what}", config.distill.steps, looked[f"teacher_{what}"])
        for what in ("class_entropy", "shift"):
            progress.scalar(f"teacher/synthetic_{what}", config.distill.steps, looked[what])
        held = float((shards.counts.sum(0) > 0).mean())
        findings = [] if run.alarmed else distill_findings(figures, held)
        return {"figures": known(figures), "findings": [asdict(f) for f in findings]}

    result = run.stage("distill", key, compute, total=config.distill.steps, unit="step")
    log_validation(run, shards, "distill", config.distill.steps, key, student_of(result))
    return result


def student_of(result: StageResult) -> Weights:
    """The weights that a stage hands on."""
    return result.load("global")
