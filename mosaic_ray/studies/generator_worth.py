"""`mosaic experiment generator-worth`: what trained generators add to the closing rounds, beside a placebo.

The arms have one warm-up and the same closing rounds. In ``real only`` clients train on their own images; in
``trained`` they rehearse on synthetic images, too (docs/algorithm.md 1.10); in ``placebo`` these come from generators
of the same family that took no step, so they show the labels and nothing of the images. A gain over ``real only`` that
the placebo has as well is not the generators'. All differences are paired: within one seed.

``floor`` is the LDA head on the features of the warm-up, without synthetic images or closing rounds. ``ceiling`` is a
linear probe of each arm's features on all clients' real images, for reporting alone. With ``--equal-compute`` an arm of
federated averaging has as many more rounds as the generators cost the clients.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..config.plugins import trains_generators
from ..config.resolve import override
from ..config.schema import ExperimentConfig
from ..config.validate import check as check_config
from ..core.errors import RequestError
from ..core.types import DataFacts, Dataset
from .harness import Row, Study, StudyContext, measured

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..storage.store import StageResult

#: Defaults below --config and --set: closing rounds that move the features, and no other use of the generators.
BASE: dict[str, Any] = {"rehearsal.candidates": (), "rehearsal.weight": 1.0, "runtime.eval_rounds": 0}

#: Knobs of the arms; an untrained generator takes no step.
REAL: dict[str, Any] = {"method": "fedavg", "rehearsal.weight": 0.0}
ARMS: dict[str, dict[str, Any]] = {
    "real only": REAL, "placebo": {"generator.steps": 0, "generator.epochs": 0}, "trained": {},
}  # fmt: skip
FLOOR: dict[str, Any] = REAL | {"method": "lda_head", "finetune.num_rounds": 0}


def arms(config: ExperimentConfig, facts: DataFacts, options: Mapping[str, Any]) -> dict[str, ExperimentConfig]:
    """Return the configuration of each arm by name; ``RequestError`` where it cannot be run."""
    from ..runs.equal_compute import extra_rounds, label

    knobs = ARMS | {"floor": FLOOR}
    if options["equal_compute"]:
        more = extra_rounds(config, facts)
        knobs[label(more)] = REAL | {"warmup.num_rounds": config.warmup.num_rounds + more}
    found = {name: override(config, own | {"runtime.ceiling": True}) for name, own in knobs.items()}
    for arm in found.values():
        check_config(arm)
    return found


def check(config: ExperimentConfig, dataset: Dataset, options: Mapping[str, Any]) -> None:
    """``RequestError`` unless ``config`` rehearses on generators that are trained."""
    if not (config.rehearsal.weight or config.rehearsal.candidates):
        raise RequestError("rehearsal.weight = 0: the arms of this experiment differ in rehearsal; set it above 0")
    if not trains_generators(config):
        raise RequestError(f"method = {config.method}: it trains no generators, which this experiment measures")
    if not (config.generator.steps or config.generator.epochs):
        raise RequestError("generator.steps = 0: one arm of this experiment trains generators; set it above 0")
    arms(config, dataset.facts, options)


def measure(context: StudyContext, config: ExperimentConfig) -> StageResult:
    """Run every arm, and compare their test accuracies."""
    reached, keys = {}, []
    for name, arm in arms(config, context.dataset.facts, context.options).items():
        reached[name], used = _run(context, arm, name == "floor")
        keys += used

    def compute() -> tuple[list[Row], dict[str, np.ndarray]]:
        rows: list[Row] = [{"arm": name} | found for name, found in reached.items()]
        for row in rows:
            for other, column in (("real only", "over_real"), ("placebo", "over_placebo")):
                row[column] = None if row["arm"] == other else row["accuracy"] - reached[other]["accuracy"]
        return rows, {"accuracy": np.array([row["accuracy"] for row in rows])}

    with context.run(config) as run:
        return measured(run, STUDY, {"arms": list(reached)}, keys, compute)


def _run(context: StudyContext, config: ExperimentConfig, floor: bool) -> tuple[dict[str, float], list[str]]:
    """Run one arm; return its accuracy and the ceiling of its features on test images, and the keys of both."""
    from ..pipeline.evaluate import evaluated
    from ..pipeline.stages import ceiling
    from ..runs.experiment import run_experiment

    with context.run(config) as run:
        place = context.store.where("experiments/train")
        run.distil = lambda task, report: context.hosts.distil(task, report, place, run.on_server, run.server_hung)
        accuracy = run_experiment(run)["accuracy"]
        if floor:
            found = {"accuracy": accuracy["distilled"], "ceiling": accuracy["ceiling"]}
            return found, [run.keys["distill"], run.keys["ceiling"]]
        probe = run.run(ceiling("closing_ceiling", "finetune", ""), run.results["finetune"].load("global"))
        key = run.keys["closing_ceiling"]
        highest = evaluated(run, key, probe, "test", run.dataset.test).facts["accuracy"]
        return {"accuracy": accuracy["final"], "ceiling": highest}, [run.keys["evaluate"], key]


def figure(figure: Figure, rows: Sequence[Row], arrays: Mapping[str, np.ndarray]) -> None:
    """Draw accuracy and ceiling of every arm, a line for each seed, and the paired differences."""
    left, right = figure.subplots(1, 2, width_ratios=(1.5, 1))
    names = list(dict.fromkeys(row["arm"] for row in rows))
    for seed in dict.fromkeys(row["seed"] for row in rows):
        found = [row for row in rows if row["seed"] == seed]
        [line] = left.plot([row["accuracy"] for row in found], "o-", lw=0.8, mfc="none", label=f"seed {seed}")
        left.plot([row["ceiling"] for row in found], "v", ms=4, color=line.get_color())
        for place, column in enumerate(("over_real", "over_placebo")):
            [trained] = [row[column] for row in found if row["arm"] == "trained"]
            right.plot(place, 100 * trained, "o", mfc="none", color=line.get_color())
    left.set_xticks(range(len(names)), [name.replace(", ", "\n").replace(" (", "\n(") for name in names])
    left.set(title="test accuracy (triangles: ceiling)", xlim=(-0.4, len(names) - 0.6))
    left.legend(frameon=False)
    right.set_xticks((0, 1), ("real only", "placebo"))
    right.axhline(0, color="0.6", lw=0.8)
    right.set(title="trained minus ..., points", xlim=(-0.6, 1.6))


STUDY = Study(
    "generator-worth", measure, "arm",
    {
        "accuracy": ("test accuracy", ".1%"), "over_real": ("paired, over real only", "+.1%"),
        "over_placebo": ("paired, over placebo", "+.1%"), "ceiling": ("ceiling (reads all images)", ".1%"),
    },
    figure, check,
)  # fmt: skip
