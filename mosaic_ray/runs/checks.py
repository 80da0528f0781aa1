"""Checks of a request against its networks and images, before anything starts."""

from __future__ import annotations

from ..config.registry import METHODS
from ..config.schema import ExperimentConfig
from ..core.errors import RequestError
from ..core.types import DataFacts
from ..federated.client_models import Federation
from ..models.classifiers import norm_depths


def check_models(config: ExperimentConfig, facts: DataFacts) -> None:
    """``RequestError`` unless every client's network can be built for these images, and cut to its width."""
    check_networks(config, facts)
    Federation(config, facts).check()


def check_networks(config: ExperimentConfig, facts: DataFacts) -> None:
    """``RequestError`` unless every network that ``config`` names can be built and takes images of ``facts``."""
    section = config.generator
    inverts = METHODS[config.method][0] == "mosaic" and section.lambda_i > 0 and section.tau > 0
    for name in dict.fromkeys((config.model.classifier, *config.model.classifiers)):
        if not norm_depths(config.model, facts.num_classes, facts.channels, facts.image_size, name) and inverts:
            raise RequestError(
                f"model.classifier = {name}: it has no batch norm, whose statistics the generators' inversion loss "
                "reads; give it one, or set generator.lambda_i=0"
            )
