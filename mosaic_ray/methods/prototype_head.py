"""The ablation ``prototype_head``: the student's head re-fitted on prototypes, without one synthetic image.

It is the baseline of distillation: the difference to Mosaic is the gain from generators.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..core.about import About
from ..pipeline.graph import Stage
from ..pipeline.stages import prototype_split
from .base import Distilled, Method
from .mosaic.graph import PROTOTYPES

if TYPE_CHECKING:
    from ..core.types import Prototypes, Weights
    from ..pipeline.context import Facts, RunContext
    from ..pipeline.rounds import Warmup
    from ..storage.store import StageWriter
    from ..tracking.progress import StageProgress

REFIT = Stage(
    "distill", 3, lambda inputs: {"distiller": "prototype_head", "split": prototype_split(inputs.config)},
    "mosaic_ray.methods.prototype_head:refit_head", upstream=("warmup", "prototypes"), role="distilled", unit="fit",
    work=lambda config: {"fits": 1},
)  # fmt: skip


class PrototypeHead(Method):
    """The head re-fitted on prototypes."""

    name = "prototype_head"
    about = About(rounds="once, after the warm-up", statistics="prototypes")
    stages = (PROTOTYPES, REFIT)

    def run(self, ctx: RunContext, warmup: Warmup) -> Distilled:
        prototypes = ctx.run(PROTOTYPES, warmup)
        student, held_out = ctx.run(REFIT, warmup, prototypes)
        return Distilled(student, held_out)


PROTOTYPE_HEAD = PrototypeHead()


def refit_head(
    ctx: RunContext, stage: Stage, warmup: Warmup, prototypes: dict[str, Prototypes]
) -> tuple[Weights, float]:
    """Return the global model with its head re-fitted on all prototypes, and an accuracy on held-out ones.

    These choose the number of steps; the accuracy is that of the head which has not seen them.
    """
    from ..distillation.linear_head import fit_heads
    from ..distillation.prototypes import split_held_out
    from ..pipeline.evaluate import log_validation

    section, own = ctx.config.prototypes, prototypes[warmup.federation.student]

    def compute(writer: StageWriter, progress: StageProgress) -> Facts:
        kept, held_out = split_held_out(own, section.held_out, ctx.config.seed)
        _, head, figures = fit_heads(kept, held_out, warmup.weights, section.weighting)
        writer.add("global", warmup.weights | head)
        progress.advance(note=f"held-out prototypes {figures['held_out_accuracy']:.1%}")
        return {"figures": {name: float(value) for name, value in figures.items()}}

    result = ctx.find_or_compute(stage, compute)
    student = result.load("global")
    log_validation(ctx, stage.name, 1, result.key, student)
    return student, result.facts["figures"]["held_out_accuracy"]
