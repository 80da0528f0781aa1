"""Stages A, M and KD of Mosaic on the server: the teacher, and the student that learns from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from ...config.schema import ExperimentConfig
from ...core.errors import RunError
from ...core.health import SINGLE_OWNER_BELOW, distill_findings, teacher_findings
from ...core.types import Finding, Prototypes, Weights
from ...distillation.experts import Holdings, effective_owners
from ...distillation.meta_model import Teacher, modality_tokens
from ...distillation.student_training import AGAIN, make_task
from ...distillation.teacher import MixedTeacher, TeacherState, group_shares
from ...distillation.teacher_training import class_experts, teach
from ...federated.client import ClientContext
from ...federated.client_models import Federation, Models, group_counts
from ...federated.communication import Tally, size_of_entries
from ...models.multimodal import modality_of
from ...models.state_dict import load_weights
from ...pipeline.context import Facts, RunContext, known
from ...pipeline.evaluate import log_validation, validation_images
from ...pipeline.graph import Stage
from ...pipeline.rounds import Warmup
from ...pipeline.stored import check_entries
from ...storage.store import StageResult, StageWriter
from ...tracking.progress import StageProgress
from .client_uploads import Generators, PrototypesOf

#: Fields of ``TeacherState`` that are stored as they are, where they are not empty.
TEACHER_PARTS = ("meta", "head", "trial_meta", "trial_head")


def train_teacher(
    ctx: RunContext, stage: Stage, warmup: Warmup, prototypes: PrototypesOf, generators: Generators
) -> TeacherState | MixedTeacher:
    """Return distinct class experts and the meta model (stages A, M); one such teacher for each architecture."""
    config, federation = ctx.config, ctx.client_context.federation

    def compute(writer: StageWriter, progress: StageProgress) -> Facts:
        figures: dict[str, float] = {}
        findings: list[Finding] = []
        for number, (name, clients) in enumerate(federation.groups.items()):
            counts = group_counts(ctx.shards.counts, clients)
            state, found, arrays = _teach(ctx, warmup, prototypes[name], generators, name, clients, progress)
            prefix, owners = _prefix(federation, name, number), effective_owners(counts)
            for part in TEACHER_PARTS:
                if getattr(state, part):
                    writer.add(prefix + part, getattr(state, part))
            writer.add(f"{prefix}index", {"index": state.index})
            for place, expert in enumerate(state.experts):
                writer.add(f"{prefix}expert_{place:04d}", expert)
            writer.add(f"{prefix}diagnostics", arrays)
            own = name == federation.student
            for what, value in found.items():
                progress.scalar(f"teacher/{what}" if own else f"teacher_{name}/{what}", config.meta.updates, value)
            figures |= found if own else {f"{name}/{what}": value for what, value in found.items()}
            alone = [int(c) for c in np.flatnonzero((owners > 0) & (owners < SINGLE_OWNER_BELOW))]
            findings += teacher_findings(
                found, ctx.dataset.facts.num_classes, alone, name=name if len(federation.groups) > 1 else "",
                holds_out=config.prototypes.held_out > 0,
            )  # fmt: skip
        return {"figures": known(figures), "findings": [f.to_json() for f in findings]}

    result = ctx.find_or_compute(stage, compute)
    teacher = read_teacher(ctx.client_context, result, warmup.models, ctx.shards.counts)
    log_validation(ctx, stage.name, config.meta.updates, result.key, teacher)
    return teacher


def _teach(
    ctx: RunContext,
    warmup: Warmup,
    prototypes: Prototypes,
    generators: Generators,
    name: str,
    clients: Sequence[int],
    progress: StageProgress,
) -> tuple[TeacherState, dict[str, float], Weights]:
    """Train the teacher of one architecture from its clients; return it, figures and diagnostic arrays."""
    done = 0
    federation = warmup.federation
    prefix = "meta" if name == federation.student else f"meta_{name}"

    def look(update: int, metrics: Mapping[str, float]) -> None:
        nonlocal done
        for what, value in metrics.items():
            progress.scalar(f"{prefix}/{what}", update, value)
        if update > done:
            progress.advance(update - done, note=f"held-out prototypes {metrics['held_out_accuracy']:.1%}")
            done = update

    channels = federation.channels(name) if federation.partial_width else None
    models = ((k, warmup.client(k), warmup.indices(k)) for k in clients)
    counts, backbone = group_counts(ctx.shards.counts, clients), warmup.models[name]
    makers = zip(generators.clients, generators.results, strict=True)
    sources = ((k, warmup.client(k), made.load("generator")) for k, made in makers)
    try:
        experts, index = class_experts(ctx.config, backbone, models, counts, channels, _holdings(federation, name))
    except ValueError as error:  # a class without an owner, where that is asked to be an error
        raise RunError(str(error)) from error
    synthetic = ctx.config.meta.data != "prototypes"
    state, figures, arrays = ctx.on_server(
        teach, backbone, experts, index, counts, prototypes, sources if synthetic else (), report=look
    )
    return replace(state, backbone=backbone, experts=experts), figures, arrays


def _holdings(federation: Federation, name: str) -> Holdings | None:
    """Return which modalities the clients hold, for averages among those of the architecture ``name``."""
    if not federation.facts.modalities or federation.config.model.fusion == "zero_fill":
        return None  # all clients have trained all weights
    return Holdings(federation.modalities, modality_of, federation.head_columns(name))


def _prefix(federation: Federation, name: str, number: int) -> str:
    """Return the prefix of a teacher's stored parts: empty for the student's architecture, others are numbered."""
    return "" if name == federation.student else f"group_{number:03d}_"


def read_teacher(
    context: ClientContext, result: StageResult, models: Models, counts: np.ndarray
) -> TeacherState | MixedTeacher:
    """Return the teacher that the stage stored; ``models``: the warm-up's, ``counts`` [K, C]: the label counts."""
    groups = context.federation.groups
    states = tuple(
        _read_group(context, result, _prefix(context.federation, name, number), models[name], name)
        for number, name in enumerate(groups)
    )
    if len(states) == 1:
        return states[0]
    shares = group_shares(counts, list(groups.values()))
    return MixedTeacher(states, shares, list(groups).index(context.federation.student))


def _read_group(
    context: ClientContext, result: StageResult, prefix: str, backbone: Weights, name: str
) -> TeacherState:
    experts = tuple(result.load(part) for part in sorted(result.parts) if part.startswith(f"{prefix}expert_"))
    trained = {part: result.load(prefix + part) for part in TEACHER_PARTS if prefix + part in result.parts}
    classes = context.facts.num_classes
    with result.read_as(f"{prefix}teacher"):
        index = result.load(f"{prefix}index")["index"]
        state = TeacherState(backbone, experts, index, classifier=name, **trained)
        entries = context.federation.entries(name)
        heads = {entry: what for entry, what in entries.items() if entry.startswith("head.")}
        for expert in experts:
            check_entries(expert, entries if context.config.meta.input == "full" else heads, finite=False)
        if index.shape != (classes,) or not (index.min() >= 0 and index.max() < len(experts)):
            raise ValueError("its index names other experts")
        modalities = modality_tokens(context.config.meta, context.facts)
        meta = Teacher(classes, classes, context.config.meta, heads["head.weight"][0][1], modalities)
        for trained_meta in filter(None, (state.meta, state.trial_meta)):
            load_weights(meta, trained_meta)
        for head in filter(None, (state.head, state.trial_head)):
            check_entries(head, heads, finite=False)
    return state


def distill(
    ctx: RunContext,
    stage: Stage,
    warmup: Warmup,
    prototypes: PrototypesOf,
    teacher: TeacherState | MixedTeacher,
    generators: Generators,
) -> tuple[Weights, float | None]:
    """Teach the student on the generators' images (stage KD).

    Returns the student (part "global" of the result) and its accuracy on held-out prototypes.
    """
    config = ctx.config

    def compute(writer: StageWriter, progress: StageProgress) -> Facts:
        task = make_task(
            config, ctx.dataset.facts, warmup.weights, teacher, generators.weights(), generators.figures,
            ctx.shards.sizes[generators.clients], prototypes[warmup.federation.student],
            validation_images(ctx) if _judged_by_clients(config) else None,
        )  # fmt: skip
        if config.distill.train_workers:
            ctx.release()  # Train's workers need what idle actors hold
        done = 0

        def look(step: int, metrics: Mapping[str, float]) -> None:
            nonlocal done
            if AGAIN in metrics:
                progress.total = config.distill.steps + int(metrics[AGAIN])
                note = "again, on all prototypes"
            else:
                for name, value in metrics.items():
                    progress.scalar(f"student/{name}", step, value)
                note = f"agreement {metrics['agreement']:.1%}"
            progress.advance(step - done, note=note)
            done = step

        weights, figures, named, _ = ctx.distil(task, look)
        writer.add("global", weights)
        writer.add("diagnostics", {"synthetic_counts": named})
        traffic = Tally(1, config.partition.num_clients)
        distill_messages(warmup.federation, ctx.shards.counts, traffic)
        writer.add("communication", traffic.arrays())
        for what in ("teacher_entropy", "teacher_confidence", "class_entropy", "shift"):
            tag = f"teacher/synthetic_{what.removeprefix('teacher_')}"
            progress.scalar(tag, config.distill.steps, figures[what])
        held = float((ctx.shards.counts.sum(0) > 0).mean())
        findings = [] if ctx.alarmed else distill_findings(figures, held)
        found: Facts = {"figures": known(figures), "findings": [f.to_json() for f in findings]}
        return found | {"communication": traffic.totals()}

    result = ctx.find_or_compute(stage, compute)
    student = result.load("global")
    log_validation(ctx, stage.name, config.distill.steps, result.key, student)
    with result.read_as():
        return student, result.facts["figures"]["held_out_after"]


def _judged_by_clients(config: ExperimentConfig) -> bool:
    """Check whether clients' validation images choose the student's state."""
    section = config.distill
    return section.guard and section.moves_features and config.partition.validation_fraction > 0


def distill_messages(federation: Federation, counts: np.ndarray, tally: Tally) -> None:
    """Add every state of the student to every client, and its loss on validation images back, where these choose."""
    looks = federation.config.distill.looks if _judged_by_clients(federation.config) else 0
    student = size_of_entries(federation.entries(federation.student))
    loss = size_of_entries({"loss": ((), np.float64), "count": ((), np.int64)})
    for k in range(len(counts)):
        tally.add("downlink", "weights", k, student, times=looks)
        tally.add("uplink", "validation", k, loss, times=looks)
