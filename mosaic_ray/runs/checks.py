"""Checks of a request against its networks and images, before anything starts."""

from __future__ import annotations

from ..config.plugins import load, trains_generators
from ..config.schema import ExperimentConfig
from ..config.user_code import load_object
from ..core.types import DataFacts
from ..federated.client_models import Federation
from ..models.classifiers import norm_depths
from ..models.generator import check_image_size


def check_models(config: ExperimentConfig, facts: DataFacts) -> None:
    """Raise ``RequestError`` unless every network can be built for these images and cut to its clients' widths.

    A sampler that is user code must load, too.
    """
    if ":" in config.partition.sampler:
        load_object(f"partition.sampler = {config.partition.sampler}", config.partition.sampler, function=True)
    for name in dict.fromkeys((config.model.classifier, *config.model.classifiers)):
        norm_depths(config.model, facts.num_classes, facts.channels, facts.image_size, name)
    if trains_generators(config):
        check_image_size(facts.image_size)
    load("methods", config.method).check_networks(config, facts)
    Federation(config, facts).check()
