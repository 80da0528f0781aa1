"""The ablation ``prototype_head``: the student's head re-fitted on prototypes, without one synthetic image.

It is the floor that distillation has to beat: what Mosaic's generators add is what it ends above this.
"""

from __future__ import annotations

from ...algorithm.heads import fit_head
from ...algorithm.prototypes import split_held_out
from ...config import ExperimentConfig
from ...models.tensors import head_of
from ...records import Prototypes, Weights


def refit(
    config: ExperimentConfig, global_weights: Weights, prototypes: Prototypes
) -> tuple[Weights, dict[str, float]]:
    """(the global model with its head re-fitted, figures); stopped by held-out prototypes, never worse on them."""
    kept, held_out = split_held_out(prototypes, config.prototypes.held_out, config.seed)
    matrix, bias, figures = fit_head(kept, held_out, head_of(global_weights), config.prototypes.weighting)
    return global_weights | {"head.weight": matrix, "head.bias": bias}, figures
