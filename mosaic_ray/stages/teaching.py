"""Stages A, M and KD on the driver: the teacher, and the student that learns from it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from ..algorithm.distillation import DistillTask, look_at_student
from ..algorithm.experts import effective_owners
from ..algorithm.health import ONE_OWNER, distill_findings, teacher_findings
from ..algorithm.teacher import MixedTeacher, TeacherState, group_shares
from ..errors import RunError
from ..methods.distillers.mosaic import look_at_teacher, make_task, make_teacher
from ..methods.distillers.prototype_head import refit
from ..methods.federation import Federation, group_counts
from ..records import Finding, Prototypes, Weights
from ..runtime.store import StageResult, StageWriter
from . import keys
from .evaluation import watch
from .partition import Shards
from .rounds import Warmup
from .run import Progress, Run, known
from .uploads import Generators, PrototypesOf

#: Runs a distillation task; ``runtime.distiller`` has the hosts.
Host = Callable[[DistillTask, Callable[[int, Mapping[str, float]], None]], Any]


def teacher_stage(
    run: Run, shards: Shards, warmup: Warmup, prototypes_key: str, prototypes: PrototypesOf, generators: Generators
) -> tuple[str, TeacherState | MixedTeacher]:
    """Distinct class experts and the meta model; one such teacher for each architecture, where there are several."""
    config, federation = run.config, run.bench.federation
    key = keys.teacher_key(config, warmup.key, prototypes_key, generators.key)

    def compute(writer: StageWriter, progress: Progress) -> dict[str, Any]:
        figures: dict[str, float] = {}
        findings: list[Finding] = []
        for number, (name, clients) in enumerate(federation.groups.items()):
            state, found = _teach(run, shards, warmup, prototypes[name], generators, name, clients, progress)
            counts = group_counts(shards.counts, clients)
            looked, arrays = look_at_teacher(config, run.dataset.facts, state, counts, prototypes[name])
            found |= looked
            prefix, owners = _prefix(federation, name, number), effective_owners(counts)
            _write_teacher(writer, state, prefix)
            writer.add(f"{prefix}diagnostics", arrays)
            own = name == federation.student
            for what, value in found.items():
                progress.scalar(f"teacher/{what}" if own else f"teacher_{name}/{what}", config.meta.updates, value)
            figures |= found if own else {f"{name}/{what}": value for what, value in found.items()}
            alone = [int(c) for c in np.flatnonzero((owners > 0) & (owners < ONE_OWNER))]
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
    watch(run, shards, "teacher", config.meta.updates, key, teacher)
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

    channels = federation.channels(name) if federation.narrow else None
    models: Iterable[Any] = warmup.clients(clients)
    if federation.narrow:
        models = ((k, weights, warmup.sets(k)) for k, weights in models)
    makers = zip(generators.clients, generators.results, strict=True)
    try:
        return make_teacher(
            run.config, run.dataset.facts, warmup.models[name], models, group_counts(shards.counts, clients),
            prototypes, look,
            ((k, warmup.client(k), made.load("generator")) for k, made in makers),
            run.bench.device, channels,
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
    key = keys.distill_key(config, teacher_key, generators.key)

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
        looked, named = look_at_student(task, weights, run.bench.device)
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
    watch(run, shards, "distill", config.distill.steps, key, student_of(result))
    return result


def refit_stage(run: Run, shards: Shards, warmup: Warmup, prototypes_key: str, prototypes: PrototypesOf) -> StageResult:
    """The ablation's student (part "global"): the head re-fitted on prototypes."""
    key = keys.refit_key(run.config, warmup.key, prototypes_key)

    def compute(writer: StageWriter, progress: Progress) -> dict[str, Any]:
        weights, figures = refit(run.config, warmup.weights, prototypes[warmup.federation.student])
        writer.add("global", weights)
        progress.advance(note=f"held-out prototypes {figures['held_out_accuracy']:.1%}")
        return {"figures": {name: float(np.float64(value)) for name, value in figures.items()}}

    result = run.stage("distill", key, compute, total=1, unit="fit")
    watch(run, shards, "distill", 1, key, student_of(result))
    return result


def student_of(result: StageResult) -> Weights:
    """The weights that a stage hands on."""
    return result.load("global")
