"""The key of every stage: a pure function of configuration, data and upstream keys, known before anything is computed.

A key names all that a result depends on and nothing else. No torch, no Ray and no images are needed, so a whole sweep's
keys can be counted before it starts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ..config.schema import ExperimentConfig
from ..config.user_code import source_digest
from ..core.types import DataFacts
from ..execution.backend import client_threads
from ..storage.store import stage_key

#: Raise a stage's number when its mathematics changes: older results are then computed anew.
VERSIONS = {
    "partition": 1, "warmup": 3, "generator": 2, "generators": 1, "prototypes": 2, "teacher": 3, "distill": 2,
    "rounds": 3, "judged": 1, "evaluate": 3,
}  # fmt: skip


def section_knobs(section: Any, *without: str) -> dict[str, Any]:
    """A room's knobs as plain values, less those that do not touch the result."""
    return {name: value for name, value in asdict(section).items() if name not in without}


def model_knobs(config: ExperimentConfig) -> dict[str, Any]:
    """The networks; of those that a user wrote the source too."""
    names = sorted({config.model.classifier, *config.model.classifiers})
    sources = {name: source for name in names if (source := source_digest(name))}
    return section_knobs(config.model) | ({"sources": sources} if sources else {})


def federation_knobs(config: ExperimentConfig) -> dict[str, Any]:
    """Who trains what; knobs for clients that do not answer only where some may be left out."""
    section = config.federation
    strict = () if section.min_cohort else ("min_cohort", "max_client_failures")  # a failure shows in no result then
    return section_knobs(section, *strict, *(() if section.drop_rate else ("drop_rate",)))


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
    data = identity or {"unseen": section_knobs(config.data, "root", "download")}
    knobs = {
        "data": data, "facts": facts and asdict(facts), "partition": section_knobs(config.partition),
        "seed": config.seed,
    }  # fmt: skip
    return _key("partition", knobs, [])


def warmup_key(config: ExperimentConfig, partition: str) -> str:
    """The global model and each client's own after the warm-up."""
    knobs = {
        "model": model_knobs(config), "federation": federation_knobs(config), "seed": config.seed,
        "warmup": section_knobs(config.warmup, "checkpoint_rounds"), "runtime": numbers_depend_on(config),
    }  # fmt: skip
    if config.prototypes.rounds == "all":  # they are then uploaded during the warm-up
        knobs["prototypes"] = section_knobs(config.prototypes, "held_out", "weighting")
    return _key("warmup", knobs, [partition])


def rounds_key(config: ExperimentConfig, partition: str, start: str) -> str:
    """The closing rounds from the weights under ``start``: the student's, and the control's from the warm-up."""
    knobs = {
        "finetune": section_knobs(config.finetune), "federation": federation_knobs(config),
        "model": model_knobs(config), "seed": config.seed, "runtime": numbers_depend_on(config),
        "warmup": section_knobs(config.warmup, "checkpoint_rounds", "num_rounds", "local_steps", "lr"),
    }  # fmt: skip
    return _key("rounds", knobs, [partition, start])


def evaluated_key(config: ExperimentConfig, partition: str, model: str, split: str) -> str:
    """What the model under the key ``model`` reaches on the images of ``split``; no stage, but shared by stages."""
    return _key("judged", {"split": split, "threads": config.runtime.driver_threads}, [partition, model])


def evaluate_key(config: ExperimentConfig, partition: str, models: Mapping[str, str]) -> str:
    """The closing accuracies; ``models`` maps each role to the key that its model came under."""
    roles = sorted(models)
    knobs = {"roles": roles, "threads": config.runtime.driver_threads}
    return _key("evaluate", knobs, [partition, *(models[role] for role in roles)])
