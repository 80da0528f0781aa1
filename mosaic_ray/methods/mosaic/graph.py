"""The stages of Mosaic and what their keys depend on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from ...config.client_layout import any_partial_width
from ...config.schema import ExperimentConfig
from ...pipeline.keys import _key, federation_knobs, model_knobs, numbers_depend_on, section_knobs


def generator_keys(config: ExperimentConfig, sizes: Sequence[int], partition: str, warmup: str) -> list[str]:
    """One key per client; ``sizes`` [K] are n_k.

    A client with n_k >= tau never meets the inversion term: its key leaves it out (O15).
    """
    section, own = config.generator, section_knobs(config.generator)
    if section.conditional:  # the label takes the place of diversity
        own |= {"lambda_d": 0.0, "div_support": "all"}
    without = own | {"tau": 0, "lambda_i": 0.0, "inversion_scale": 0.0}
    inverts = section.lambda_i * section.inversion_scale != 0
    common = {"model": model_knobs(config), "seed": config.seed, "runtime": numbers_depend_on(config)}
    if any_partial_width(config):  # which channels a client holds does not show in "start"
        common["federation"] = federation_knobs(config)
    if section.classifier_source == "fresh":
        common["fresh"] = [config.warmup.batch_size, config.warmup.shuffle]
    upstream = [partition, "start" if section.stage == "before" else warmup]
    return [
        _key(
            "generator",
            common | {"generator": own if inverts and size < section.tau else without, "client": k},
            upstream,
        )
        for k, size in enumerate(sizes)
    ]


def generators_key(keys: Sequence[str]) -> str:
    """All clients' generators together."""
    return "generators-" + hashlib.sha256("".join(keys).encode()).hexdigest()[:20]


def prototypes_key(config: ExperimentConfig, warmup: str) -> str:
    """Every client's prototypes."""
    return _key("prototypes", {"prototypes": section_knobs(config.prototypes, "held_out", "weighting")}, [warmup])


def _split(config: ExperimentConfig) -> dict[str, Any]:
    """What divides prototypes into kept and held out, and weighs them."""
    section = config.prototypes
    return {"held_out": section.held_out, "weighting": section.weighting, "seed": config.seed}


def _driver(config: ExperimentConfig) -> dict[str, Any]:
    """The driver's threads show in the last bit; named where they are not one, as stored results have it."""
    threads = config.runtime.driver_threads
    return {} if threads == 1 else {"driver_threads": threads}


def teacher_key(config: ExperimentConfig, warmup: str, prototypes: str, generators: str) -> str:
    """Class experts and the meta model; generators matter, and ``meta.data`` is named, where it learns from them."""
    without, upstream = (["data"], []) if config.meta.data == "prototypes" else ([], [generators])
    knobs = {"meta": section_knobs(config.meta, *without), "split": _split(config)} | _driver(config)
    return _key("teacher", knobs, [warmup, prototypes, *upstream])


def distill_key(config: ExperimentConfig, teacher: str, generators: str) -> str:
    """The student taught on synthetic batches."""
    # 0 (in process) and 1 worker are the same arithmetic; more differ in rounding
    section = section_knobs(config.distill) | {"workers": max(1, config.distill.workers)}
    return _key("distill", {"distill": section, "split": _split(config)} | _driver(config), [teacher, generators])


def refit_key(config: ExperimentConfig, warmup: str, prototypes: str) -> str:
    """The ablation's student: the head re-fitted on prototypes."""
    knobs = {"distiller": "prototype_head", "split": _split(config)} | _driver(config)
    return _key("distill", knobs, [warmup, prototypes])
