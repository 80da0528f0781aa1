"""The contract of a method, which teaches the student between the warm-up and the closing rounds, or in every round.

A run is a federated strategy and a method. A method declares its stages as data, and runs them in one function that
reads like the paper's algorithm. Keys, dry run, bytes, garbage collection and reports follow from the declaration.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..core.about import About
from ..pipeline.graph import Graph

if TYPE_CHECKING:
    from ..config.schema import ExperimentConfig
    from ..core.types import DataFacts, Weights
    from ..distillation.rehearsal import SharedGenerators
    from ..pipeline.context import RunContext
    from ..pipeline.evaluate import Model
    from ..pipeline.rounds import AfterRound, Warmup


@dataclass(frozen=True)
class Distilled:
    """The result of a method: the student, and its teacher if there is one.

    ``held_out``: the student's accuracy on held-out prototypes, None without prototypes. ``shared``: generators with
    which clients rehearse in the closing rounds (``rehearsal.weight``), where the method has any. ``new_student``: the
    network ``model.student``, where a stage of the method with the role "server_student" trains it.
    """

    student: Weights
    held_out: float | None = None
    teacher: Model | None = None
    shared: SharedGenerators | None = None
    new_student: Model | None = None


class Method:
    """A method. The last of its ``stages`` with the role "distilled" makes the student.

    Without such a stage the closing rounds begin at the warm-up's model.
    """

    kind = "methods"
    #: The name under which its own knobs are set (``NAME.KNOB``), and under which results list it.
    name: str
    #: Raise it when the mathematics of ``after_round`` changes; stages have versions of their own.
    version: int = 1
    #: A frozen dataclass of ``config.fields.knob`` fields, or None.
    knobs: type | None = None
    #: What it needs of its clients and where it was published; None: nothing is declared.
    about: About | None = None
    stages: Graph = ()
    #: Whether the student is the warm-up's model with another head.
    head_only: bool = False
    #: Whether samples must be images alone.
    images_only: bool = False
    #: The server's work after every round of the warm-up, for methods that distil in each (``AfterRound``), or None.
    after_round: AfterRound | None = None

    def graph(self, config: ExperimentConfig) -> Graph:
        """Return the stages of a run of ``config``: all, unless a knob leaves some out."""
        return self.stages

    def check(self, config: ExperimentConfig) -> None:
        """Raise ``RequestError`` where ``config`` asks for something that this method cannot do."""

    def check_networks(self, config: ExperimentConfig, facts: DataFacts) -> None:
        """Raise ``RequestError`` if a network of ``config`` does not fit this method; images have ``facts``."""

    def run(self, ctx: RunContext, warmup: Warmup) -> Distilled | None:
        """Run the stages; return the student, or None where the warm-up's model stays as it is."""
        return None


class FedAvgOnly(Method):
    """Federated averaging (or another strategy) alone: the warm-up and the closing rounds."""

    name = "fedavg"
    about = About(rounds="no rounds of its own")


NONE = FedAvgOnly()
