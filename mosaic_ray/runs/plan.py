"""What many runs ask of each stage together, and what is left of it once nothing is computed twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..config.registry import METHODS
from ..config.schema import ExperimentConfig
from ..core.types import STAGES, DataFacts
from ..methods.mosaic.graph import (
    distill_key,
    generator_keys,
    generators_key,
    prototypes_key,
    refit_key,
    teacher_key,
)
from ..pipeline.keys import evaluate_key, evaluated_key, partition_key, rounds_key, warmup_key

#: Stage -> its keys, as ``stage_keys`` gives them.
Chain = Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class StageWork:
    """One stage over all trials.

    ``asked`` counts the results that ``trials`` ask for (of generators one per client), ``unique`` the distinct ones,
    ``stored`` those of them that are there already. ``work`` is what the unique ones take, by unit, and ``left`` the
    part of it that is not stored; a teacher's updates are the most it takes, since ``meta.patience`` may end it.
    """

    stage: str
    trials: int
    asked: int
    unique: int
    stored: int
    work: dict[str, int]
    left: dict[str, int]


def unique_work(
    chains: Sequence[Chain], configs: Sequence[ExperimentConfig], stored: Callable[[str], bool] | None = None
) -> list[StageWork]:
    """A row for each stage that any trial has, in the order of ``STAGES``; trial i has ``chains[i]``, ``configs[i]``.

    ``stored`` tells whether a key's result exists. A result that two stages ask for (without distillation the student's
    closing rounds are the control's) counts in the first.
    """
    rows, counted = [], set()
    for stage in STAGES:
        askers = [(chain, config) for chain, config in zip(chains, configs, strict=True) if stage in chain]
        if not askers:
            continue
        found = {key: asker for asker in askers for key in asker[0][stage] if key not in counted}
        missing = [key for key in found if not (stored and stored(key))]
        asked = sum(len(chain[stage]) for chain, _ in askers)
        if stage == "evaluate":
            models = {evaluated for chain, config in found.values() for evaluated in _evaluated(chain, config)}
            unjudged = {evaluated for key in missing for evaluated in _evaluated(*found[key])}
            work = {"models": len(models)}
            left = {"models": sum(not (stored and stored(evaluated)) for evaluated in unjudged)}
        else:
            work, left = _total(stage, found.values()), _total(stage, (found[key] for key in missing))
        rows.append(StageWork(stage, len(askers), asked, len(found), len(found) - len(missing), work, left))
        counted |= found.keys()
    return rows


def _total(stage: str, askers: Iterable[tuple[Chain, ExperimentConfig]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for _, config in askers:
        total.update(_amounts(stage, config))
    return dict(total)


def _amounts(stage: str, config: ExperimentConfig) -> dict[str, int]:
    """What one result of ``stage`` takes."""
    if stage == "partition":
        return {"draws": 1}
    if stage == "warmup":
        return _rounds(config, config.warmup.num_rounds, config.warmup.local_steps)
    if stage == "generators":
        section = config.generator
        own = {"epochs": section.epochs} if section.epochs else {"steps": section.steps}
        return own | ({"classifier epochs": section.classifier_epochs} if section.classifier_source == "fresh" else {})
    if stage == "prototypes":  # of all rounds: they came up with the warm-up
        return {"clients": config.partition.num_clients if config.prototypes.rounds == "last" else 0}
    if stage == "teacher":
        return {"updates": config.meta.updates}
    if stage == "distill":
        return {"steps": config.distill.steps} if METHODS[config.method][0] == "mosaic" else {"fits": 1}
    return _rounds(config, config.finetune.num_rounds, config.finetune.local_steps)


def _rounds(config: ExperimentConfig, num_rounds: int, local_steps: int) -> dict[str, int]:
    clients, asked = config.partition.num_clients, config.federation.cohort_size
    client_rounds = num_rounds * min(asked or clients, clients)
    return {"client rounds": client_rounds, "local steps": client_rounds * local_steps}


def _evaluated(chain: Chain, config: ExperimentConfig) -> set[str]:
    """The looks at test images that a run asks for, one per model; runs that share a model share its look."""
    models = {chain[stage][0] for stage in ("warmup", "teacher", "distill", "finetune", "control") if stage in chain}
    return {evaluated_key(config, chain["partition"][0], model, "test") for model in models}


def stage_keys(
    config: ExperimentConfig,
    identity: str | None = None,
    facts: DataFacts | None = None,
    sizes: Sequence[int] | None = None,
) -> dict[str, tuple[str, ...]]:
    """The keys of a whole run, stage by stage in ``run_experiment``'s order: one, or for ``generators`` one per client.

    They are a run's once ``execution.precision`` is settled (not "auto") and the data are known. Without ``sizes`` [K],
    the clients' training samples, every client counts as one with n_k < tau: keys that larger clients share between
    configurations then differ, so that a count of distinct keys is an upper bound.
    """
    partition = partition_key(config, identity, facts)
    warmup = warmup_key(config, partition)
    keys: dict[str, tuple[str, ...]] = {"partition": (partition,), "warmup": (warmup,)}
    models, distiller = {"initial": warmup}, METHODS[config.method][0]
    student = warmup
    if distiller == "mosaic":
        generators = generator_keys(
            config, [0] * config.partition.num_clients if sizes is None else sizes, partition, warmup
        )
        prototypes = prototypes_key(config, warmup)
        made = generators_key(generators)
        models["teacher"] = teacher_key(config, warmup, prototypes, made)
        student = models["distilled"] = distill_key(config, models["teacher"], made)
        keys |= {"generators": tuple(generators), "prototypes": (prototypes,), "teacher": (models["teacher"],)}
    elif distiller == "prototype_head":
        prototypes = prototypes_key(config, warmup)
        student = models["distilled"] = refit_key(config, warmup, prototypes)
        keys["prototypes"] = (prototypes,)
    if student != warmup:
        keys["distill"] = (student,)
    models["final"] = rounds_key(config, partition, student)
    models["control"] = rounds_key(config, partition, warmup)
    closing = {"finetune": (models["final"],), "control": (models["control"],)}
    return keys | closing | {"evaluate": (evaluate_key(config, partition, models),)}
