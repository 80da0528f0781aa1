"""What makes the student's head anew after the closing rounds (``finetune.head``).

With ``refit`` a method that makes a head after the warm-up makes it again in the same way after the closing rounds, so
that floors and methods with generators can be compared at equal rounds. Every other method gets an LDA head.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Protocol

from .prototype_head import CLOSING_PROTOTYPE_HEAD
from .statistics_heads import CLOSING_CCVR, CLOSING_LDA_HEAD

if TYPE_CHECKING:
    import numpy as np

    from ..config.schema import ExperimentConfig
    from ..core.types import Weights
    from ..federated.client_models import Federation, Models
    from ..federated.communication import Tally
    from ..pipeline.context import FailedClients, RunContext
    from ..pipeline.graph import Graph, Stage


class ClosingHead(Protocol):
    """What makes a head; ``fit`` is the last of its ``stages``."""

    name: str
    stages: Graph
    fit: Stage

    def renew(self, ctx: RunContext, models: Models) -> Weights:
        """Run the stages; return the student of the global ``models`` with a new head."""

    def tried(self, ctx: RunContext, models: Models, traffic: Tally, failed: FailedClients) -> Weights:
        """Return the same as ``renew`` within another stage, whose ``traffic`` counts the bytes."""

    def messages(self, federation: Federation, counts: np.ndarray, tally: Tally) -> None:
        """Add the bytes of ``tried``."""


CLOSING_HEADS: Mapping[str, ClosingHead] = MappingProxyType(
    {head.name: head for head in (CLOSING_LDA_HEAD, CLOSING_CCVR, CLOSING_PROTOTYPE_HEAD)}
)


def closing_head(config: ExperimentConfig) -> ClosingHead | None:
    """Return what makes the student's head anew after the closing rounds, if anything does."""
    if config.finetune.head == "refit":
        return CLOSING_HEADS.get(config.method, CLOSING_LDA_HEAD)
    return CLOSING_HEADS.get(config.finetune.head)
