"""Classifiers: a trunk that gives features and one linear head on top, ``f(x) = head(features(x))``.

Initialisers draw from torch's global stream, so build inside ``seeding.seeded(...)``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import RequestError
from ..presets import METHODS
from ..records import DataFacts
from ..rooms import ExperimentConfig, ModelConfig
from ..seeding import seeded
from .mobilenet import mobilenet
from .resnets import BasicBlock, Bottleneck, resnet
from .tensors import channels_last
from .user_networks import user_network

MIN_IMAGE_SIZE = 8


class Classifier(nn.Module):
    """``trunk`` maps images [B, channels, H, W] to features [B, d]; ``head`` maps those to logits [B, C]."""

    def __init__(self, trunk: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = head
        self.feature_dim = head.in_features

    def features(self, x: Tensor) -> Tensor:
        """Images [B, channels, H, W] to penultimate features [B, d]."""
        features: Tensor = self.trunk(x)
        return features

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, channels, H, W] to logits [B, C]."""
        logits: Tensor = self.head(self.features(x))
        return logits


def build_classifier(
    model: ModelConfig, num_classes: int, channels: int, image_size: int, name: str | None = None
) -> Classifier:
    """A fresh classifier for square images of ``image_size`` pixels; ``name``: another than ``model.classifier``.

    The networks of this house take 8 pixels or more; module:function makes one of the user's (``user_networks``).
    """
    name = name or model.classifier
    if name not in CLASSIFIERS:
        made = user_network(name, num_classes=num_classes, channels=channels, image_size=image_size, width=model.width)
        return Classifier(*made)
    if image_size < MIN_IMAGE_SIZE:
        raise RequestError(f"data.image_size = {image_size}: classifiers take {MIN_IMAGE_SIZE} pixels or more")
    trunk, feature_dim = CLASSIFIERS[name](model.width, channels)
    return channels_last(Classifier(trunk, nn.Linear(feature_dim, num_classes)))


def check_networks(config: ExperimentConfig, facts: DataFacts) -> None:
    """``RequestError`` unless every network that ``config`` names can be built and takes images of ``facts``."""
    room = config.generator
    inverts = METHODS[config.method][0] == "mosaic" and room.lambda_i > 0 and room.tau > 0
    for name in dict.fromkeys((config.model.classifier, *config.model.classifiers)):
        if not _num_norms(config.model, facts.num_classes, facts.channels, facts.image_size, name) and inverts:
            raise RequestError(
                f"model.classifier = {name}: it has no batch norm, whose statistics the generators' inversion loss "
                "reads; give it one, or set generator.lambda_i=0"
            )


@functools.cache
def _num_norms(model: ModelConfig, num_classes: int, channels: int, image_size: int, name: str) -> int:
    """Batch norms with running statistics, of a network that is built for this alone."""
    with seeded(0, "check networks"), torch.device("meta" if name in CLASSIFIERS else "cpu"):
        network = build_classifier(model, num_classes, channels, image_size, name)
    return sum(isinstance(part, _BatchNorm) and part.running_mean is not None for part in network.modules())


# --- trunks ----------------------------------------------------------------------------------------------------------


def _cnn(width: int, channels: int) -> tuple[nn.Module, int]:
    """Six 3x3 convolutions (widths w, w | 2w, 2w | 4w, 4w), each with batch norm; torch's default initialisation."""
    layers: list[nn.Module] = []
    for stage, multiple in enumerate((1, 2, 4)):
        layers += [nn.MaxPool2d(2)] if stage else []
        for _ in range(2):
            out = multiple * width
            layers += [nn.Conv2d(channels, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
            channels = out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()), channels


#: name -> (width, channels) -> (trunk, feature_dim); ``presets.CLASSIFIERS`` says what each is
CLASSIFIERS: dict[str, Callable[[int, int], tuple[nn.Module, int]]] = {
    "cnn": _cnn,
    "resnet18": partial(resnet, BasicBlock, (2, 2, 2, 2)),
    "resnet34": partial(resnet, BasicBlock, (3, 4, 6, 3)),
    "resnet50": partial(resnet, Bottleneck, (3, 4, 6, 3)),
    "mobilenet": mobilenet,
}
