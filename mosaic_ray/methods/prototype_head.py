"""The ablation ``prototype_head``: the student's head re-fitted on prototypes, without one synthetic image.

It is the floor that distillation has to beat: what Mosaic's generators add is what it ends above this.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..config.schema import ExperimentConfig
from ..core.types import Prototypes, Weights
from ..distillation.linear_head import fit_head
from ..distillation.prototypes import split_held_out
from ..models.state_dict import head_of
from ..pipeline.context import Progress, Run
from ..pipeline.evaluate import log_validation
from ..pipeline.partition import Shards
from ..pipeline.rounds import Warmup
from ..storage.store import StageResult, StageWriter
from .mosaic.client_uploads import PrototypesOf
from .mosaic.graph import refit_key
from .mosaic.server import student_of


def refit(
    config: ExperimentConfig, global_weights: Weights, prototypes: Prototypes
) -> tuple[Weights, dict[str, float]]:
    """(the global model with its head re-fitted, figures); stopped by held-out prototypes, never worse on them."""
    kept, held_out = split_held_out(prototypes, config.prototypes.held_out, config.seed)
    matrix, bias, figures = fit_head(kept, held_out, head_of(global_weights), config.prototypes.weighting)
    return global_weights | {"head.weight": matrix, "head.bias": bias}, figures


def refit_stage(run: Run, shards: Shards, warmup: Warmup, prototypes_key: str, prototypes: PrototypesOf) -> StageResult:
    """The ablation's student (part "global"): the head re-fitted on prototypes."""
    key = refit_key(run.config, warmup.key, prototypes_key)

    def compute(writer: StageWriter, progress: Progress) -> dict[str, Any]:
        weights, figures = refit(run.config, warmup.weights, prototypes[warmup.federation.student])
        writer.add("global", weights)
        progress.advance(note=f"held-out prototypes {figures['held_out_accuracy']:.1%}")
        return {"figures": {name: float(np.float64(value)) for name, value in figures.items()}}

    result = run.stage("distill", key, compute, total=1, unit="fit")
    log_validation(run, shards, "distill", 1, key, student_of(result))
    return result
