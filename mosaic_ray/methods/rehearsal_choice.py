"""Choose the weight of rehearsal by images that clients hold back (docs/algorithm.md 1.10).

Every candidate weight, and 0, is tried for a few rounds from the model that the closing rounds begin at. In these
trials each client leaves out a share of its images, and scores the models on it: it sends three numbers a model. So
rehearsal is chosen only where it helps, and no test image has a part in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..pipeline.graph import Graph, KeyInputs, Knobs, Stage
from ..pipeline.stages import CHOICE, driver_knobs, prototype_knobs, rehearsal_trials, rehearses_early, subset_knobs
from .closing_head import closing_head

if TYPE_CHECKING:
    from ..config.schema import ExperimentConfig
    from ..distillation.rehearsal import SharedGenerators
    from ..federated.client_models import Federation, Models
    from ..federated.communication import Tally
    from ..pipeline.context import Facts, RunContext
    from ..storage.store import StageWriter
    from ..tracking.progress import StageProgress

_HERE = "mosaic_ray.methods.rehearsal_choice"


def choice_stages(config: ExperimentConfig, start: str) -> Graph:
    """Return the trials and the choice among them; none without candidates. ``start``: the stage of their model."""
    trials = tuple(rehearsal_trials(config, start).values())
    return (*trials, _choice(tuple(trial.name for trial in trials))) if trials else ()


def _choice(trials: tuple[str, ...]) -> Stage:
    return Stage(
        CHOICE, 1, _knobs, f"{_HERE}:score_trials", upstream=("partition", *trials), unit="trial",
        total=lambda config: len(trials), work=lambda config: {"trials": len(trials)}, messages=f"{_HERE}:messages",
    )  # fmt: skip


def _knobs(inputs: KeyInputs) -> Knobs:
    head = closing_head(inputs.config)
    own: Knobs = {} if head is None else {"head": head.name} | head.fit.knobs(inputs) | subset_knobs(inputs.config)
    if head is not None and head.name == "prototype_head":
        own["prototypes"] = prototype_knobs(inputs.config)
    return own | {"held_back": inputs.config.rehearsal.held_back} | driver_knobs(inputs.config)


def choose_weight(ctx: RunContext, stages: dict[str, Stage], models: Models, shared: SharedGenerators | None) -> float:
    """Return the weight of rehearsal in the closing rounds, which begin at ``models``.

    With candidates it is the one whose trial answers the most held-back images right. Equal counts are decided by the
    lower cross-entropy, and then by the smaller weight.
    """
    trials = rehearsal_trials(ctx.config, "")
    if shared is None or not trials:
        return ctx.config.rehearsal.weight if shared else 0.0
    from ..pipeline.rounds import load_models, try_rehearsal

    tried = []
    for weight, stage in trials.items():
        result = try_rehearsal(ctx, stages[stage.name], models, shared, weight)
        tried.append((weight, load_models(ctx.client_context.federation, result)))
    weights = [weight for weight, _ in tried]
    scores = ctx.run(stages[CHOICE], [found for _, found in tried], shared)
    return weights[best(scores)]


def best(scores: np.ndarray) -> int:
    """Return the row of ``scores`` [models, 3] (images, right answers, sum of losses) that wins."""
    return min(range(len(scores)), key=lambda row: (-scores[row, 1], scores[row, 2], row))


def score_trials(
    ctx: RunContext, stage: Stage, trials: Sequence[Models], shared: SharedGenerators
) -> np.ndarray:
    """Return the scores of the models of ``trials`` on all held-back images, float64 [trials, 3] as in ``ScoreTask``.

    Where the closing rounds end with a new head, each trial's model gets such a head first, from images that are not
    held back.
    """
    from ..federated.client import OnPart, ScoreTask
    from ..federated.communication import Tally, size_of
    from ..pipeline.context import FailedClients
    from ..pipeline.rounds import send_generators

    federation, everyone = ctx.client_context.federation, ctx.config.partition.num_clients
    held_back, head = ctx.config.rehearsal.held_back, closing_head(ctx.config)

    def compute(writer: StageWriter, progress: StageProgress) -> Facts:
        traffic, failed = Tally(1, everyone), FailedClients(stage.name)
        if not rehearses_early(ctx.config):
            send_generators(traffic, shared, everyone, federation.facts)
        tried = []
        for models in trials:
            weights = models[federation.student]
            if head is not None:
                weights = head.tried(ctx.holding_back(held_back), models, traffic, failed)
            tried.append(weights)
            progress.advance()
        clients = list(federation.groups[federation.student])
        scores = np.zeros((len(tried), 3))
        answers = ctx.map(
            OnPart(ScoreTask(), held_back, held_back=True), clients, tuple(tried), lambda k: None,
            failed_clients=failed, cost=ctx.shards.sizes.__getitem__, units=0,
        )  # fmt: skip
        for client_id, found in answers:
            scores += found
            for row, weights in zip(found, tried, strict=True):
                traffic.add("downlink", "weights", client_id, size_of(weights))
                traffic.add("uplink", "scores", client_id, size_of({"scores": row}))
        for number, (images, right, loss) in enumerate(scores):
            progress.scalar(f"{CHOICE}/held_back_accuracy", number, right / max(images, 1))
            progress.scalar(f"{CHOICE}/held_back_loss", number, loss / max(images, 1))
        writer.add("scores", {"scores": scores})
        writer.add("communication", traffic.arrays())
        rows = [finding.to_json() for finding in failed.findings()]
        return {"communication": traffic.totals(), "findings": rows}

    result = ctx.find_or_compute(stage, compute)
    with result.read_as("scores"):
        scores: np.ndarray = result.load("scores")["scores"]
        if scores.shape != (len(trials), 3):
            raise ValueError("they are of other trials")
    return scores


def messages(federation: Federation, counts: np.ndarray, tally: Tally) -> None:
    """Add the others' generators, what each trial's head is made from, each trial's model, and its scores."""
    from ..federated.communication import size_of_entries
    from ..pipeline.round_messages import add_generators

    config = federation.config
    if not rehearses_early(config):
        add_generators(federation, tally)
    head = closing_head(config)
    for _ in rehearsal_trials(config, ""):
        if head is not None:
            head.messages(federation, counts, tally)
        for k in federation.groups[federation.student]:
            tally.add("downlink", "weights", k, size_of_entries(federation.entries(federation.student)))
            tally.add("uplink", "scores", k, size_of_entries({"scores": ((3,), np.float64)}))
