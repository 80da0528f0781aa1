"""Evaluate models on test images, for reporting alone, and on clients' validation images."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
from torch import nn

from ..core.types import ROLES, ImageSet, Modality, Weights
from ..data.records import subsets
from ..distillation.teacher import MixedTeacher, TeacherState, build_teacher
from ..federated.client import ClientContext
from ..federated.evaluation import accuracy, calibration, confusion, logits_on, per_class_accuracy
from ..storage.store import StageResult, StageWriter
from ..tracking.progress import StageProgress
from .context import Facts, RunContext
from .graph import Stage
from .stages import evaluated_key

#: A classifier's weights, Mosaic's teacher, or any network from images to logits.
Model = Weights | TeacherState | MixedTeacher | nn.Module


def validation_images(ctx: RunContext) -> ImageSet | None:
    """Return all clients' validation images; None where nothing is held out."""
    rows = np.sort(np.concatenate(ctx.shards.validation)).astype(np.int64)
    return ctx.dataset.train.take(rows) if len(rows) else None


def logits_of(context: ClientContext, model: Model, data: ImageSet) -> np.ndarray:
    """Return the logits float32 [N, C] of a classifier or a teacher."""
    network: nn.Module
    if isinstance(model, TeacherState | MixedTeacher):
        network = build_teacher(context.config, context.facts, model).to(context.device)
    elif isinstance(model, nn.Module):
        network = model.to(context.device).eval()
    else:
        network = context.classifier(model).eval()
    precision = context.config.runtime.precision
    return logits_on(network, data, context.facts, context.device, precision, progress=context.progress)


def _logits(ctx: RunContext, model: Model, data: ImageSet, units: float = 0.0) -> np.ndarray:
    inside = ctx.tracker.inside("image", units=units)
    found = ctx.on_server(logits_of, model, data, progress=partial(inside, 0))
    inside.close()
    return found


def table_of(ctx: RunContext, model: Model, data: ImageSet) -> np.ndarray:
    """Return the confusion table of a classifier or a teacher, int64 [C, C]."""
    return confusion(_logits(ctx, model, data), data.labels)


def evaluated(
    ctx: RunContext, key: str, model: Model, split: str, data: ImageSet, units: float = 0.0
) -> StageResult:
    """Evaluate the model stored under ``key`` on ``data``, the images of ``split``; they are ``units`` of a stage.

    The result is stored by model, so that runs and trials that share a model evaluate it once.
    """
    own = evaluated_key(ctx.config, ctx.shards.key, key, split)
    found, _ = ctx.get_or_wait("evaluate", own)
    if isinstance(found, StageResult):
        with found.read_as():
            _check(found, ctx.dataset.facts.num_classes)
        return found
    with found:
        logits = _logits(ctx, model, data, units)
        table = confusion(logits, data.labels)
        facts = {"accuracy": accuracy(table), "per_class": per_class_accuracy(table)} | calibration(logits, data.labels)
        if split == "test":
            facts |= by_subset(ctx.dataset.facts.modalities, logits, data.labels)
        return ctx.store.put(own, facts, {"confusion": {"table": table}})


def by_subset(modalities: Sequence[Modality], logits: np.ndarray, labels: np.ndarray) -> Facts:
    """Return ``subsets``: the accuracy where only these modalities are there, by their names joined by a plus.

    Args:
        modalities: the parts of a sample; without any the result is empty.
        logits: float32 [S * N, C] of test samples that are there once for each subset (``data.records.in_subsets``).
        labels: int64 [S * N].
    """
    if not modalities:
        return {}
    chosen = subsets(len(modalities))
    right = (logits.argmax(1) == labels).reshape(len(chosen), -1).mean(1)
    names = ("+".join(modalities[k].name for k in subset) for subset in chosen)
    return {"subsets": dict(zip(names, right.tolist(), strict=True))}


def _check(found: StageResult, classes: int) -> None:
    """Raise ``ValueError`` where ``found`` is no result of ``evaluated``."""
    table = found.load("confusion")["table"]
    if table.shape != (classes, classes) or table.dtype.kind not in "iu":
        raise ValueError("its confusion table has another form")
    if (found.facts["accuracy"], found.facts["per_class"]) != (accuracy(table), per_class_accuracy(table)):
        raise ValueError("its accuracies are not those of its confusion table")
    if not all(value is None or abs(value) < math.inf for value in (found.facts["nll"], found.facts["ece"])):
        raise ValueError("its calibration is no number")


def log_validation(ctx: RunContext, stage: str, step: int, key: str, model: Model) -> None:
    """Log the accuracy of a finished stage's model on validation images, where there are any."""
    data = validation_images(ctx)
    if data is not None:
        reached = evaluated(ctx, key, model, "validation", data).facts["accuracy"]
        ctx.tracker.scalar(stage, f"{stage}/validation_accuracy", step, reached)


def _curve(ctx: RunContext, role: str) -> tuple[str, int]:
    """Return tag and step of a role's accuracy; steps are the federated rounds so far."""
    warmup, closing = ctx.config.warmup.num_rounds, ctx.config.finetune.num_rounds
    beside = ("control", "ceiling", "server_student")
    own = {"teacher": "teacher/accuracy"} | {name: f"student/accuracy_{name}" for name in beside}
    tag = own.get(role, "student/accuracy")
    return tag, warmup + (closing if role in ("final", "control", "server_student") else 0)


def evaluate(ctx: RunContext, stage: Stage, models: Mapping[str, tuple[str, Model]]) -> StageResult:
    """Evaluate each role's model, (its key, weights), on test and validation images: accuracy and calibration."""
    roles = [role for role in ROLES if role in models]

    def compute(writer: StageWriter, progress: StageProgress) -> Facts:
        validation = validation_images(ctx)
        splits = {"test": ctx.dataset.test} | ({} if validation is None else {"validation": validation})
        found: dict[str, dict[str, StageResult]] = {split: {} for split in splits}
        for role in roles:
            for split, data in splits.items():
                found[split][role] = evaluated(ctx, *models[role], split, data, 1 / len(splits))
            reached = found["test"][role].facts["accuracy"]
            progress.advance(note=f"{role} {reached:.1%}")
            progress.scalar(*_curve(ctx, role), reached)
        writer.add(
            "confusion",
            {f"{role}/{split}": r.load("confusion")["table"] for split in found for role, r in found[split].items()},
        )
        accuracies = {split: {role: r.facts["accuracy"] for role, r in found[split].items()} for split in found}
        names = ("per_class", "nll", "ece", *(("subsets",) if ctx.dataset.facts.modalities else ()))
        for role, r in found["test"].items():
            for subset, reached in r.facts.get("subsets", {}).items():
                progress.scalar(f"modalities/{role}/{subset}", _curve(ctx, role)[1], reached)
        return accuracies | {name: {role: r.facts[name] for role, r in found["test"].items()} for name in names}

    result = ctx.find_or_compute(stage, compute)
    with result.read_as():
        tables = result.load("confusion")
        for role in roles:
            table = tables[f"{role}/test"]
            if (result.facts["test"][role], result.facts["per_class"][role]) != (
                accuracy(table), per_class_accuracy(table)
            ) or {"nll", "ece"} - result.facts.keys():  # fmt: skip
                raise ValueError(f"the accuracies of {role} are not those of its confusion table")
    return result
