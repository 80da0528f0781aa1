"""Checks of a request against its networks and images, before anything starts."""

from __future__ import annotations

import numpy as np

from ..config.client_layout import any_partial_width, client_modalities
from ..config.fields import shown
from ..config.plugins import load, strategy_named, trains_generators
from ..config.registry import sampler_kind
from ..config.resolve import flatten
from ..config.schema import ExperimentConfig
from ..config.user_code import load_object
from ..core.errors import RequestError
from ..core.machine import memory
from ..core.types import DataFacts
from ..core.units import size
from ..execution.devices import settle
from ..execution.gpu_memory import surely_taken, work_of
from ..execution.ray_session import Resources
from ..federated.client_models import Federation
from ..models.classifiers import norm_depths
from ..models.generator import check_image_size
from ..models.multimodal import SIDE_BY_SIDE


def check_models(config: ExperimentConfig, facts: DataFacts) -> None:
    """Raise ``RequestError`` unless every network can be built for these images and cut to its clients' widths.

    ``partition.modalities`` must name modalities that the samples have.

    A sampler that is user code must load, too.
    """
    if sampler_kind(config.partition.sampler) == "plugin":
        load_object(f"partition.sampler = {config.partition.sampler}", config.partition.sampler, function=True)
    client_modalities(config, [modality.name for modality in facts.modalities])
    if facts.modalities:
        _check_several(config)
    elif strategy_named(config.federation.strategy).several_modalities:
        raise RequestError(
            f"federation.strategy = {config.federation.strategy}: it is about samples of several modalities, and those "
            f"of {config.data.name} have one; see docs/howto/modalities.md"
        )
    _check_sets(config, facts)
    for name in dict.fromkeys((config.model.classifier, *config.model.classifiers)):
        norm_depths(config.model, facts.num_classes, facts.channels, facts.image_size, name, facts.modalities)
    if trains_generators(config):
        check_image_size(facts.image_size)
    load("methods", config.method).check_networks(config, facts)
    Federation(config, facts).check()


def _check_sets(config: ExperimentConfig, facts: DataFacts) -> None:
    """Raise ``RequestError`` where switches about several modalities have nothing to act on."""
    asked = {
        "prototypes.subsets": config.prototypes.subsets == "all", "meta.tokens": config.meta.tokens == "modality",
        "warmup.modality_dropout": config.warmup.modality_dropout > 0,
        "distill.modality_dropout": config.distill.modality_dropout > 0,
    }  # fmt: skip
    for name in (name for name, is_set in asked.items() if is_set and not facts.modalities):
        raise RequestError(f"{name}: samples of {config.data.name} have one modality; leave it at its default")
    if config.meta.tokens == "modality" and (config.model.fusion != "late" or config.meta.input != "head"):
        raise RequestError(
            "meta.tokens = modality: the modalities of a sample can be told apart in the features of model.fusion = "
            "late alone, read by experts' heads; set model.fusion=late and meta.input=head"
        )


def _check_several(config: ExperimentConfig) -> None:
    """Raise ``RequestError`` where method or strategy cannot do with samples of several modalities."""
    if load("methods", config.method).images_only:
        raise RequestError(
            f"method = {config.method}: it draws images alone, and samples of {config.data.name} have several "
            "modalities; take mosaic, lda_head, ccvr, prototype_head or fedavg"
        )
    several = strategy_named(config.federation.strategy).several_modalities
    if config.model.fusion == "prototypes" and not several:
        raise RequestError(
            f"federation.strategy = {config.federation.strategy}: model.fusion = prototypes needs a strategy that "
            "makes them; take pmcmfl"
        )
    if config.model.fusion in (*SIDE_BY_SIDE, "prototypes") and any_partial_width(config):
        raise RequestError(
            f"model.fusion = {config.model.fusion}: features side by side cannot be cut to federation.widths; take "
            "mean or gated"
        )
    if config.partition.modalities and not strategy_named(config.federation.strategy).partial_modalities:
        raise RequestError(
            f"federation.strategy = {config.federation.strategy}: its arrays have the shape of the whole model, and "
            "with partition.modalities clients lack parts of it; take fedavg or fedprox, or let all hold everything"
        )


def check_memory(config: ExperimentConfig, facts: DataFacts, samples: int, there: Resources) -> None:
    """Raise ``RequestError`` where the shapes of one stage surely need more memory than there is.

    Compared with all memory of the cluster, or of this machine if that is more. Work on GPUs is not checked.
    ``samples``: training images, 0 if unknown.
    """
    there_is = max(there.memory, memory().total)
    if not there.memory or settle(config, there).runtime.device != "cpu":
        return
    try:
        taken = surely_taken(work_of(config, facts, samples))
    except Exception:  # a network of the user's own that has no shapes without memory
        return
    for stage, (knobs, needs) in taken.items():
        if needs > there_is:
            values = flatten(config)
            named = ", ".join(f"{knob} = {shown(values[knob])}" for knob in knobs)
            raise RequestError(
                f"{named}: {stage} would take {size(needs, 'GiB')} of memory at least, and there are "
                f"{size(there_is, 'GiB')}; give a smaller number"
            )


def check_owned(config: ExperimentConfig, facts: DataFacts, counts: np.ndarray) -> None:
    """Raise ``RequestError`` where a class expert has no owner and that is to be an error.

    ``counts``: training images, int [clients, classes].
    """
    for clients in Federation(config, facts).groups.values() if config.meta.expert_fallback == "error" else ():
        lacking = np.flatnonzero(counts[list(clients)].sum(axis=0) == 0)
        if len(lacking):
            raise RequestError(f"meta.expert_fallback = error: no client holds class {lacking[0]}; take global")
