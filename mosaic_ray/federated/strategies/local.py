"""Local training: every client trains its own model alone. It is the floor of federated and of personal methods.

A client begins at theta_0 and goes on from its own model in every round (docs/algorithm.md 3.18). Clients are sent
theta_0 in the first round, and send their models after the last, so the bytes are those of one round.

**The global model** is the average of the clients' models after the last round, weighted by their numbers of samples.
Methods begin with this average and with the clients' models, as one-shot methods do. Closing rounds start at the
student and are local again. The figure of local training itself is ``personal_accuracy`` in summary.json: each
client's own model after the warm-up.

Every client has the same number of rounds, so cohorts and drop-outs are refused. A client whose work fails for good in
a round (``federation.min_cohort``) misses the steps of that round; after the last one the average leaves it out.
"""

from __future__ import annotations

from torch import nn

from ...config.plugins import load
from ...config.schema import ExperimentConfig
from ...core.about import About
from ...core.errors import RequestError
from ...core.types import Weights
from ...models.state_dict import to_weights
from ..local_training import LocalStart, Objective
from .base import Strategy


class KeptModel(Objective):
    """Cross-entropy; the client keeps its model."""

    def finish(self, model: nn.Module, num_steps: int) -> tuple[Weights, Weights]:
        return {}, to_weights(model)


class Local(Strategy):
    """No averaging before the end."""

    name = "local"
    about = About(rounds="once, after the last round", state="their model")
    whole_models = personal_models = True
    step_cost = 1.0
    every_round = False

    def check(self, config: ExperimentConfig) -> None:
        section = config.federation
        if section.cohort_size or section.drop_rate:
            name = "cohort_size" if section.cohort_size else "drop_rate"
            value = getattr(section, name)
            raise RequestError(f"federation.{name} = {value:g}: with local all clients train in every round; take 0")
        for knob, value, each in (
            ("method", config.method, load("methods", config.method).after_round),
            ("prototypes.rounds", config.prototypes.rounds, config.prototypes.rounds == "all"),
        ):
            if each:
                raise RequestError(f"{knob} = {value}: it needs a global model in every round, and local has none")

    def receive(self, weights: Weights, state: Weights) -> Weights:
        return state or weights

    def objective(self, start: LocalStart) -> Objective:
        return KeptModel()

    def personal(self, weights: Weights, state: Weights) -> Weights:
        return state or weights


LOCAL = Local()
