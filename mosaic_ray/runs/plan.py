"""Count the work of many runs together, when nothing is computed twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..config.client_layout import groups
from ..config.plugins import load, strategy_named
from ..config.schema import ExperimentConfig
from ..core.types import DataFacts
from ..methods.closing_head import closing_head
from ..methods.rehearsal_choice import choice_stages
from ..pipeline.graph import Graph, KeyInputs, Stage, Work, graph_keys
from ..pipeline.stages import (
    OWN_MODELS,
    PERSONAL,
    ceiling,
    evaluated_key,
    final_models,
    models_of,
    rehearses_early,
    server_student,
    student_of,
    whole_graph,
)

#: Stage -> its keys, as ``stage_keys`` gives them.
Chain = Mapping[str, Sequence[str]]


def graph_of(config: ExperimentConfig) -> Graph:
    """Return the stages of a run of ``config``, in order."""
    method = load("methods", config.method)
    own, head = method.graph(config), closing_head(config)
    trials, in_rounds = choice_stages(config, student_of(own)), method.after_round is not None
    final = head.fit.name if head else "finetune"
    start = "warmup" if head and method.head_only else student_of(own)
    taught = any(stage.role == "server_student" for stage in own)  # by the method itself
    further = (
        (ceiling(), config.runtime.ceiling),
        (server_student(final), config.model.student and not taught),
        (PERSONAL if strategy_named(config.federation.strategy).personal_models else OWN_MODELS, True),
        (final_models(final), config.finetune.adapt_steps or len(groups(config)) > 1),
    )
    wanted = tuple(stage for stage, asked in further if asked)
    return whole_graph(own, start, in_rounds, trials, head.stages if head else (), wanted, rehearses_early(config))


def stage_keys(
    config: ExperimentConfig,
    identity: str | None = None,
    facts: DataFacts | None = None,
    sizes: Sequence[int] | None = None,
    partition: str | None = None,
) -> dict[str, tuple[str, ...]]:
    """Return the keys of a whole run, stage by stage: one each, or one per client.

    They are a run's once ``runtime.precision`` is settled (not "auto") and the data are known. Without ``sizes`` [K],
    the clients' training samples, every client counts as one with n_k < tau: keys that larger clients share between
    configurations then differ, so that a count of distinct keys is an upper bound. ``partition`` is the key of the
    partition where it is known; it takes the place of ``identity`` and ``facts``.
    """
    known = {"partition": partition} if partition else {}
    return graph_keys(graph_of(config), KeyInputs(config, identity, facts, sizes), known)


def merged(chains: Iterable[Iterable[str]]) -> list[str]:
    """Return the stage names of all ``chains`` in one order that keeps each chain's own."""
    order: list[str] = []
    for chain in chains:
        place = 0
        for name in chain:
            if name not in order:
                order.insert(place, name)
            place = order.index(name) + 1
    return order


@dataclass(frozen=True)
class StageWork:
    """One stage over all trials.

    ``asked`` counts the results that trials need (of generators one per client), ``unique`` the distinct ones that are
    to be computed, ``stored`` those that are in the store. ``work`` is what the former take, by unit; a teacher's
    updates are an upper bound, since ``meta.patience`` may end training.
    """

    stage: str
    asked: int
    unique: int
    work: dict[str, int]
    stored: int = 0


def unique_work(
    chains: Sequence[Chain],
    configs: Sequence[ExperimentConfig],
    stored: Container[str] = (),
    each: Callable[[Stage, ExperimentConfig, Work], None] = lambda stage, config, work: None,
) -> list[StageWork]:
    """Return a row for each stage that any trial has; trial i has ``chains[i]`` and ``configs[i]``.

    ``stored``: keys of results that need no computing. ``each`` is called for every other one, with its work.

    A result that two stages share (without distillation the student's closing rounds are the control's) counts in the
    first. So does the evaluation of a model that several runs share.
    """
    graphs = [{stage.name: stage for stage in graph_of(config)} for config in configs]
    rows, counted = [], set[str]()
    for name in merged(chains):
        trials = [trial for trial in zip(chains, configs, graphs, strict=True) if name in trial[0]]
        every = {key: trial for trial in trials for key in trial[0][name] if key not in counted}
        found = {key: trial for key, trial in every.items() if key not in stored}
        work: Counter[str] = Counter()
        models: set[str] = set()
        for chain, config, graph in found.values():
            if name == "evaluate":
                keys = {stage: first for stage, (first, *_) in chain.items()}
                evaluated = models_of(tuple(graph.values()), keys).values()
                wanted = {evaluated_key(config, keys["partition"], model, "test") for model in evaluated}
                new = {key for key in wanted - models if key not in stored}
                models |= new
                each(graph[name], config, {"models": len(new)})
            else:
                own = graph[name].work(config)
                work.update(own)
                each(graph[name], config, own)
        asked = sum(len(chain[name]) for chain, _, _ in trials)
        amounts = {"models": len(models)} if name == "evaluate" else dict(work)
        rows.append(StageWork(name, asked, len(found), amounts, len(every) - len(found)))
        counted |= every.keys()
    return rows
