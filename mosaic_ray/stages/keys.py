"""The key of every stage: a pure function of configuration, data and upstream keys, known before anything is computed.

A key names all that a result depends on and nothing else. No torch, no Ray and no images are needed, so a whole sweep's
keys can be counted before it starts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ..config import ExperimentConfig
from ..presets import METHODS
from ..records import DataFacts
from ..roster import any_narrow
from ..runtime.cohort import client_threads
from ..runtime.store import stage_key
from ..user_code import source_digest

#: Raise a stage's number when its mathematics changes: older results are then computed anew.
VERSIONS = {
    "partition": 1, "warmup": 3, "generator": 2, "generators": 1, "prototypes": 2, "teacher": 3, "distill": 2,
    "rounds": 3, "judged": 1, "evaluate": 3,
}  # fmt: skip


def knobs_of(room: Any, *without: str) -> dict[str, Any]:
    """A room's knobs as plain values, less those that do not touch the result."""
    return {name: value for name, value in asdict(room).items() if name not in without}


def model_knobs(config: ExperimentConfig) -> dict[str, Any]:
    """The networks; of those that a user wrote the source too."""
    names = sorted({config.model.classifier, *config.model.classifiers})
    sources = {name: source for name in names if (source := source_digest(name))}
    return knobs_of(config.model) | ({"sources": sources} if sources else {})


def federation_knobs(config: ExperimentConfig) -> dict[str, Any]:
    """Who trains what; knobs for clients that do not answer only where some may be left out."""
    room = config.federation
    strict = () if room.min_cohort else ("min_cohort", "max_client_failures")  # a failure shows in no result then
    return knobs_of(room, *strict, *(() if room.drop_rate else ("drop_rate",)))


def numbers_depend_on(config: ExperimentConfig) -> dict[str, Any]:
    """Knobs of the runtime that can show in the last bit of a client's result."""
    device = "cuda" if config.runtime.gpus_per_client else "cpu"
    return {"precision": config.runtime.precision, "threads": client_threads(config), "device": device}


def _key(stage: str, knobs: Mapping[str, Any], upstream: Sequence[str]) -> str:
    return stage_key(stage, VERSIONS[stage], knobs, upstream)


def partition_key(config: ExperimentConfig, identity: str | None, facts: DataFacts | None) -> str:
    """Which client holds which images; ``identity`` as in ``Dataset``.

    Without ``identity``, where the data are not at hand: a stand-in that no run has, other for other data.
    """
    data = identity or {"unseen": knobs_of(config.data, "root", "download")}
    knobs = {
        "data": data, "facts": facts and asdict(facts), "partition": knobs_of(config.partition), "seed": config.seed,
    }  # fmt: skip
    return _key("partition", knobs, [])


def warmup_key(config: ExperimentConfig, partition: str) -> str:
    """The global model and each client's own after the warm-up."""
    knobs = {
        "model": model_knobs(config), "federation": federation_knobs(config), "seed": config.seed,
        "warmup": knobs_of(config.warmup, "checkpoint_rounds"), "runtime": numbers_depend_on(config),
    }  # fmt: skip
    if config.prototypes.rounds == "all":  # they are then uploaded during the warm-up
        knobs["prototypes"] = knobs_of(config.prototypes, "held_out", "weighting")
    return _key("warmup", knobs, [partition])


def generator_keys(config: ExperimentConfig, sizes: Sequence[int], partition: str, warmup: str) -> list[str]:
    """One key per client; ``sizes`` [K] are n_k.

    A client with n_k >= tau never meets the inversion term: its key leaves it out (O15).
    """
    room, own = config.generator, knobs_of(config.generator)
    if room.conditional:  # the label takes the place of diversity
        own |= {"lambda_d": 0.0, "div_support": "all"}
    without = own | {"tau": 0, "lambda_i": 0.0, "inversion_scale": 0.0}
    inverts = room.lambda_i * room.inversion_scale != 0
    common = {"model": model_knobs(config), "seed": config.seed, "runtime": numbers_depend_on(config)}
    if any_narrow(config):  # which channels a client holds does not show in "start"
        common["federation"] = federation_knobs(config)
    if room.classifier_source == "fresh":
        common["fresh"] = [config.warmup.batch_size, config.warmup.shuffle]
    upstream = [partition, "start" if room.stage == "before" else warmup]
    return [
        _key(
            "generator", common | {"generator": own if inverts and size < room.tau else without, "client": k}, upstream
        )
        for k, size in enumerate(sizes)
    ]


def generators_key(keys: Sequence[str]) -> str:
    """All clients' generators together."""
    return "generators-" + hashlib.sha256("".join(keys).encode()).hexdigest()[:20]


def prototypes_key(config: ExperimentConfig, warmup: str) -> str:
    """Every client's prototypes."""
    return _key("prototypes", {"prototypes": knobs_of(config.prototypes, "held_out", "weighting")}, [warmup])


def _split(config: ExperimentConfig) -> dict[str, Any]:
    """What divides prototypes into kept and held out, and weighs them."""
    room = config.prototypes
    return {"held_out": room.held_out, "weighting": room.weighting, "seed": config.seed}


def _driver(config: ExperimentConfig) -> dict[str, Any]:
    """The driver's threads show in the last bit; named where they are not one, as stored results have it."""
    threads = config.runtime.driver_threads
    return {} if threads == 1 else {"driver_threads": threads}


def teacher_key(config: ExperimentConfig, warmup: str, prototypes: str, generators: str) -> str:
    """Class experts and the meta model; generators matter, and ``meta.data`` is named, where it learns from them."""
    without, upstream = (["data"], []) if config.meta.data == "prototypes" else ([], [generators])
    knobs = {"meta": knobs_of(config.meta, *without), "split": _split(config)} | _driver(config)
    return _key("teacher", knobs, [warmup, prototypes, *upstream])


def distill_key(config: ExperimentConfig, teacher: str, generators: str) -> str:
    """The student taught on synthetic batches."""
    # 0 (in process) and 1 worker are the same arithmetic; more differ in rounding
    room = knobs_of(config.distill) | {"workers": max(1, config.distill.workers)}
    return _key("distill", {"distill": room, "split": _split(config)} | _driver(config), [teacher, generators])


def refit_key(config: ExperimentConfig, warmup: str, prototypes: str) -> str:
    """The ablation's student: the head re-fitted on prototypes."""
    knobs = {"distiller": "prototype_head", "split": _split(config)} | _driver(config)
    return _key("distill", knobs, [warmup, prototypes])


def rounds_key(config: ExperimentConfig, partition: str, start: str) -> str:
    """The closing rounds from the weights under ``start``: the student's, and the control's from the warm-up."""
    knobs = {
        "finetune": knobs_of(config.finetune), "federation": federation_knobs(config),
        "model": model_knobs(config), "seed": config.seed, "runtime": numbers_depend_on(config),
        "warmup": knobs_of(config.warmup, "checkpoint_rounds", "num_rounds", "local_steps", "lr"),
    }  # fmt: skip
    return _key("rounds", knobs, [partition, start])


def judged_key(config: ExperimentConfig, partition: str, model: str, split: str) -> str:
    """What the model under the key ``model`` reaches on the images of ``split``; no stage, but shared by stages."""
    return _key("judged", {"split": split, "threads": config.runtime.driver_threads}, [partition, model])


def evaluate_key(config: ExperimentConfig, partition: str, models: Mapping[str, str]) -> str:
    """The closing accuracies; ``models`` maps each role to the key that its model came under."""
    roles = sorted(models)
    knobs = {"roles": roles, "threads": config.runtime.driver_threads}
    return _key("evaluate", knobs, [partition, *(models[role] for role in roles)])


def stage_keys(
    config: ExperimentConfig,
    identity: str | None = None,
    facts: DataFacts | None = None,
    sizes: Sequence[int] | None = None,
) -> dict[str, tuple[str, ...]]:
    """The keys of a whole run, stage by stage in ``run_experiment``'s order: one, or for ``generators`` one per client.

    They are a run's once ``runtime.precision`` is settled (not "auto") and the data are known. Without ``sizes`` [K],
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
