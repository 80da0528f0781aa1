"""The stage of ``model.student``: a network that no client holds, trained on the clients' synthetic images."""

from __future__ import annotations

from functools import partial

from ..core.types import Weights
from ..distillation.rehearsal import SharedGenerators
from ..distillation.server_student import train_server_student
from ..models.classifiers import Classifier
from ..storage.store import StageWriter
from ..tracking.progress import StageProgress
from .context import Facts, RunContext
from .graph import Stage


def train(ctx: RunContext, stage: Stage, teacher: Weights, shared: SharedGenerators) -> Classifier:
    """Return the trained network; ``teacher``: the run's final model."""

    def compute(writer: StageWriter, progress: StageProgress) -> Facts:
        inside = ctx.tracker.inside("step", units=1)
        weights = ctx.on_server(train_server_student, teacher, shared, progress=partial(inside, 0))
        inside.close()
        writer.add("student", weights)
        progress.advance()
        return {}

    result = ctx.find_or_compute(stage, compute)
    with result.read_as("student"):
        return ctx.client_context.classifier(result.load("student"), ctx.config.model.student)
