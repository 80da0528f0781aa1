"""What everything that was made reaches on test images, for reporting alone, and on clients' validation images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import nn

from ..core.types import ROLES, ImageSet, Weights
from ..distillation.teacher import MixedTeacher, TeacherState, build_teacher
from ..federated.evaluation import accuracy, calibration, confusion, logits_on, per_class_accuracy
from ..storage.store import StageResult, StageWriter
from .context import Progress, Run
from .keys import evaluate_key, evaluated_key
from .partition import Shards

Model = Weights | TeacherState | MixedTeacher


def validation_images(run: Run, shards: Shards) -> ImageSet | None:
    """All clients' validation images; None where nothing is held out."""
    rows = np.sort(np.concatenate(shards.validation)).astype(np.int64)
    return run.dataset.train.take(rows) if len(rows) else None


def _logits(run: Run, model: Model, data: ImageSet) -> np.ndarray:
    facts, device = run.dataset.facts, run.context.device
    network: nn.Module
    if isinstance(model, TeacherState | MixedTeacher):
        network = build_teacher(run.config, facts, model).to(device)
    else:
        network = run.context.classifier(model).eval()
    return logits_on(network, data, facts, device, run.config.runtime.precision)


def table_of(run: Run, model: Model, data: ImageSet) -> np.ndarray:
    """The confusion table of a classifier or a teacher."""
    return confusion(_logits(run, model, data), data.labels)


def evaluated(run: Run, shards: Shards, key: str, model: Model, split: str, data: ImageSet) -> StageResult:
    """What the model that came under ``key`` reaches on ``data``, the images of ``split``.

    Kept by model, so that no model is looked at twice: not in a run, and not by the trials of a sweep that share it.
    """
    own = evaluated_key(run.config, shards.key, key, split)
    found, _ = run.get_or_wait("evaluate", own)
    if isinstance(found, StageResult):
        return found
    with found:
        logits = _logits(run, model, data)
        table = confusion(logits, data.labels)
        facts = {"accuracy": accuracy(table), "per_class": per_class_accuracy(table)} | calibration(logits, data.labels)
        return run.store.put(own, facts, {"confusion": {"table": table}})


def log_validation(run: Run, shards: Shards, stage: str, step: int, key: str, model: Model) -> None:
    """Put a finished stage's model on the curves by its accuracy on validation images, where there are any."""
    data = validation_images(run, shards)
    if data is not None:
        reached = evaluated(run, shards, key, model, "validation", data).facts["accuracy"]
        run.tracker.scalar(stage, f"{stage}/validation_accuracy", step, reached)


def _curve(run: Run, role: str) -> tuple[str, int]:
    """Tag and step of a role's accuracy; steps are federated rounds until then."""
    warmup, closing = run.config.warmup.num_rounds, run.config.finetune.num_rounds
    tag = {"teacher": "teacher/accuracy", "control": "student/accuracy_control"}.get(role, "student/accuracy")
    return tag, warmup + (closing if role in ("final", "control") else 0)


def evaluate_stage(run: Run, shards: Shards, models: Mapping[str, tuple[str, Model]]) -> StageResult:
    """Accuracy of each role's model, (key it came under, weights), on test and validation images, and calibration."""
    roles = [role for role in ROLES if role in models]
    key = evaluate_key(run.config, shards.key, {role: models[role][0] for role in roles})

    def compute(writer: StageWriter, progress: Progress) -> dict[str, Any]:
        splits = {"test": run.dataset.test, "validation": validation_images(run, shards)}
        found: dict[str, dict[str, StageResult]] = {name: {} for name, data in splits.items() if data is not None}
        for role in roles:
            for split, results in found.items():
                results[role] = evaluated(run, shards, *models[role], split, splits[split])
            reached = found["test"][role].facts["accuracy"]
            progress.advance(note=f"{role} {reached:.1%}")
            progress.scalar(*_curve(run, role), reached)
        writer.add(
            "confusion",
            {f"{role}/{split}": r.load("confusion")["table"] for split in found for role, r in found[split].items()},
        )
        accuracies = {split: {role: r.facts["accuracy"] for role, r in found[split].items()} for split in found}
        return accuracies | {
            name: {role: r.facts[name] for role, r in found["test"].items()} for name in ("per_class", "nll", "ece")
        }

    return run.stage("evaluate", key, compute, total=len(roles), unit="model")
