"""The method ``rehearsal``: Mosaic's generators serve the closing rounds alone, without teacher and distillation.

Clients train generators after the warm-up and rehearse with each other's (``rehearsal.weight`` or
``rehearsal.candidates``, docs/algorithm.md 1.10) in the closing rounds, which begin at the warm-up's model. The
difference to ``mosaic`` is what distillation adds; the difference to ``fedavg`` is what rehearsal adds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..core.about import About
from ..core.errors import RequestError
from .base import Distilled, Method
from .mosaic.graph import GENERATORS

if TYPE_CHECKING:
    from ..config.schema import ExperimentConfig
    from ..pipeline.context import RunContext
    from ..pipeline.rounds import Warmup


class Rehearsal(Method):
    """Generators for rehearsal in the closing rounds."""

    name = "rehearsal"
    about = About(
        rounds="once, after the warm-up, and in the closing rounds", generators=True, label_counts="on the server"
    )
    stages = (GENERATORS,)

    def check(self, config: ExperimentConfig) -> None:
        if not (config.rehearsal.weight or config.rehearsal.candidates):
            raise RequestError("method rehearsal: it needs rehearsal.weight above 0, or rehearsal.candidates")

    def run(self, ctx: RunContext, warmup: Warmup) -> Distilled:
        generators = ctx.run(GENERATORS, warmup)
        return Distilled(warmup.weights, shared=generators.shared(ctx.shards.counts))


REHEARSAL = Rehearsal()
