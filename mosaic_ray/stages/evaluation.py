"""The last stage: what everything that was made reaches on test images, for reporting alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..algorithm.evaluation import accuracy, confusion, per_class_accuracy
from ..algorithm.teacher import TeacherState, build_teacher
from ..records import ImageSet, Weights
from ..runtime.store import StageResult, StageWriter, stage_key
from .partition import Shards
from .rounds import confusion_of
from .run import VERSIONS, Progress, Run

#: Columns of the accuracy table, in order.
ROLES = ("initial", "teacher", "distilled", "final", "control")


def evaluate_stage(run: Run, shards: Shards, models: Mapping[str, tuple[str, Weights | TeacherState]]) -> StageResult:
    """Accuracy of each role's model, (key it came under, weights), on test and validation images."""
    keys = {role: models[role][0] for role in ROLES if role in models}
    knobs = {"roles": sorted(keys), "threads": run.config.runtime.driver_threads}
    key = stage_key("evaluate", VERSIONS["evaluate"], knobs, [shards.key, *(keys[role] for role in sorted(keys))])
    rows = np.sort(np.concatenate(shards.validation)).astype(np.int64)
    splits: dict[str, ImageSet] = {"test": run.dataset.test}
    if len(rows):
        splits["validation"] = run.dataset.train.take(rows)

    def compute(writer: StageWriter, progress: Progress) -> dict[str, Any]:
        tables: dict[str, np.ndarray] = {}
        for role in keys:
            for split, data in splits.items():
                tables[f"{role}/{split}"] = _table(run, models[role][1], data)
            progress.advance(note=f"{role} {accuracy(tables[f'{role}/test']):.1%}")
        writer.add("confusion", tables)
        for role in keys:
            progress.scalar(
                f"{'student' if role != 'teacher' else 'teacher'}/accuracy_{role}", 0, accuracy(tables[f"{role}/test"])
            )
        return {split: {role: accuracy(tables[f"{role}/{split}"]) for role in keys} for split in splits} | {
            "per_class": {role: per_class_accuracy(tables[f"{role}/test"]) for role in keys}
        }

    return run.stage("evaluate", key, compute, total=len(keys), unit="model")


def _table(run: Run, model: Weights | TeacherState, data: ImageSet) -> np.ndarray:
    if isinstance(model, TeacherState):
        teacher = build_teacher(run.config, run.dataset.facts, model).to(run.bench.device)
        return confusion(teacher, data, run.dataset.facts, run.bench.device, run.config.runtime.precision)
    return confusion_of(run, model, data)
