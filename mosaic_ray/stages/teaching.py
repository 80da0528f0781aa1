"""Stages A, M and KD on the driver: the teacher, and the student that learns from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from ..algorithm.distillation import DistillTask
from ..algorithm.teacher import TeacherState
from ..errors import RunError
from ..methods.distillers.mosaic import make_task, make_teacher
from ..methods.distillers.prototype_head import refit
from ..records import Finding, Prototypes, Weights
from ..runtime.store import StageResult, StageWriter
from . import keys
from .evaluation import watch
from .partition import Shards
from .rounds import Warmup
from .run import Progress, Run
from .uploads import Generators

#: Runs a distillation task; ``runtime.distiller`` has the hosts.
Host = Callable[[DistillTask, Callable[[int, Mapping[str, float]], None]], Any]


def teacher_stage(
    run: Run, shards: Shards, warmup: Warmup, prototypes_key: str, prototypes: Prototypes, generators: Generators
) -> tuple[str, TeacherState]:
    """Distinct class experts and the meta model."""
    config = run.config
    key = keys.teacher_key(config, warmup.key, prototypes_key, generators.key)

    def compute(writer: StageWriter, progress: Progress) -> dict[str, Any]:
        done = 0

        def look(update: int, metrics: dict[str, float]) -> None:
            nonlocal done
            for name, value in metrics.items():
                progress.scalar(f"meta/{name}", update, value)
            if update > done:
                progress.advance(update - done, note=f"held-out prototypes {metrics['held_out_accuracy']:.1%}")
                done = update

        try:
            state, figures = make_teacher(
                config, run.dataset.facts, warmup.weights, warmup.clients(config.partition.num_clients), shards.counts,
                prototypes, look,
                ((k, warmup.client(k), made.load("generator")) for k, made in enumerate(generators.results)),
                run.bench.device,
            )  # fmt: skip
        except ValueError as error:  # a class without an owner, where that is asked to be an error
            raise RunError(str(error)) from error
        writer.add("meta", state.meta)
        writer.add("index", {"index": state.index})
        for number, expert in enumerate(state.experts):
            writer.add(f"expert_{number:04d}", expert)
        findings = []
        if figures["meta_held_out_accuracy"] < figures["student_held_out_accuracy"]:
            message = (
                f"on held-out prototypes the teacher is right on {figures['meta_held_out_accuracy']:.1%}, the "
                f"student it would teach on {figures['student_held_out_accuracy']:.1%}; see meta.input and meta.init"
            )
            findings.append(Finding("teacher.below_student", "warning", "teacher", message))
        return {"figures": figures, "findings": [asdict(f) for f in findings]}

    result = run.stage("teacher", key, compute, total=config.meta.updates, unit="update")
    experts = tuple(result.load(part) for part in sorted(result.parts) if part.startswith("expert_"))
    teacher = TeacherState(warmup.weights, experts, result.load("index")["index"], result.load("meta"))
    watch(run, shards, "teacher", config.meta.updates, key, teacher)
    return key, teacher


def distill_stage(
    run: Run,
    shards: Shards,
    warmup: Warmup,
    prototypes: Prototypes,
    teacher_key: str,
    teacher: TeacherState,
    generators: Generators,
    host: Host,
) -> StageResult:
    """The student (part "global"), taught on synthetic batches by one Ray Train ``fit()``."""
    config = run.config
    key = keys.distill_key(config, teacher_key, generators.key)

    def compute(writer: StageWriter, progress: Progress) -> dict[str, Any]:
        task = make_task(
            config, run.dataset.facts, warmup.weights, teacher, generators.weights(), generators.figures, shards.sizes,
            prototypes,
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
        return {"figures": figures, "findings": [asdict(f) for f in _findings(figures)]}

    result = run.stage("distill", key, compute, total=config.distill.steps, unit="step")
    watch(run, shards, "distill", config.distill.steps, key, student_of(result))
    return result


def _findings(figures: Mapping[str, float]) -> list[Finding]:
    findings = []
    if figures["class_coverage"] < 0.5:
        message = (
            f"the teacher sees {figures['class_coverage']:.0%} of the classes in the synthetic images; "
            "raise generator.steps, or see the generators' findings"
        )
        findings.append(
            Finding("generator.low_coverage", "warning", "distill", message, value=figures["class_coverage"])
        )
    if figures["step"] == 0:
        message = "no state on the way was better on held-out prototypes: the student that went in is handed back"
        findings.append(Finding("distill.guarded", "info", "distill", message, value=figures["held_out_before"]))
    elif figures["held_out_after"] < figures["held_out_before"]:
        message = (
            f"held-out prototypes fell from {figures['held_out_before']:.1%} to {figures['held_out_after']:.1%}; "
            "see distill.guard and distill.backbone_lr"
        )
        findings.append(Finding("distill.forgetting", "warning", "distill", message, value=figures["held_out_after"]))
    return findings


def refit_stage(run: Run, shards: Shards, warmup: Warmup, prototypes_key: str, prototypes: Prototypes) -> StageResult:
    """The ablation's student (part "global"): the head re-fitted on prototypes."""
    key = keys.refit_key(run.config, warmup.key, prototypes_key)

    def compute(writer: StageWriter, progress: Progress) -> dict[str, Any]:
        weights, figures = refit(run.config, warmup.weights, prototypes)
        writer.add("global", weights)
        progress.advance(note=f"held-out prototypes {figures['held_out_accuracy']:.1%}")
        return {"figures": {name: float(np.float64(value)) for name, value in figures.items()}}

    result = run.stage("distill", key, compute, total=1, unit="fit")
    watch(run, shards, "distill", 1, key, student_of(result))
    return result


def student_of(result: StageResult) -> Weights:
    """The weights that a stage hands on."""
    return result.load("global")
