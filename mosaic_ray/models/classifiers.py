"""Classifiers: a trunk that computes features and a linear head, ``f(x) = head(features(x))``.

Initialisers draw from torch's global generator, so build networks inside ``seeding.seeded(...)``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..config.schema import ModelConfig
from ..core.errors import RequestError
from ..core.seeding import seeded
from ..core.types import DataFacts, Modality
from .mobilenet import mobilenet
from .multimodal import check_names, fused
from .resnet import BasicBlock, Bottleneck, resnet
from .state_dict import channels_last
from .user_models import user_network

MIN_IMAGE_SIZE = 8


class Classifier(nn.Module):
    """A trunk that maps images [B, channels, H, W] to features [B, d], and a head that maps those to logits [B, C]."""

    def __init__(self, trunk: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = head
        self.feature_dim = head.in_features

    def features(self, x: Tensor) -> Tensor:
        """Map images [B, channels, H, W] to penultimate features [B, d]."""
        return self.trunk(x)

    def forward(self, x: Tensor) -> Tensor:
        """Map images [B, channels, H, W] to logits [B, C]."""
        return self.head(self.features(x))


def build_classifier(
    model: ModelConfig,
    num_classes: int,
    channels: int,
    image_size: int,
    name: str | None = None,
    modalities: Sequence[Modality] = (),
) -> Classifier:
    """Build a fresh classifier for square images with sides of ``image_size`` pixels, or for several ``modalities``.

    ``name`` overrides ``model.classifier``: one of ``CLASSIFIERS``, which take 8 pixels or more (else
    ``RequestError``), or ``module:function`` for a network of the user's (see ``user_models``). With several
    modalities it is the encoder of images (``multimodal``).
    """
    name = name or model.classifier
    if modalities:
        return _multimodal(model, num_classes, image_size, name, modalities)
    if name not in CLASSIFIERS:
        made = user_network(name, num_classes=num_classes, channels=channels, image_size=image_size, width=model.width)
        return Classifier(*made)
    if image_size < MIN_IMAGE_SIZE:
        raise RequestError(f"data.image_size = {image_size}: classifiers take {MIN_IMAGE_SIZE} pixels or more")
    trunk, feature_dim = CLASSIFIERS[name](model.width, channels)
    return channels_last(Classifier(trunk, nn.Linear(feature_dim, num_classes)))


def _multimodal(
    model: ModelConfig, num_classes: int, image_size: int, name: str, modalities: Sequence[Modality]
) -> Classifier:
    check_names([modality.name for modality in modalities])
    if name not in CLASSIFIERS:
        known = ", ".join(CLASSIFIERS)
        raise RequestError(f"model.classifier = {name}: with several modalities it takes one of {known}")
    if image_size < MIN_IMAGE_SIZE:
        raise RequestError(f"data.image_size = {image_size}: classifiers take {MIN_IMAGE_SIZE} pixels or more")
    image_trunk = partial(CLASSIFIERS[name], model.width)
    trunk, feature_dim = fused(modalities, model.width, model.fusion, num_classes, image_trunk)
    return channels_last(Classifier(trunk, nn.Linear(feature_dim, num_classes)))


@functools.cache
def norm_depths(
    model: ModelConfig,
    num_classes: int,
    channels: int,
    image_size: int,
    name: str | None = None,
    modalities: tuple[Modality, ...] = (),
) -> dict[str, int]:
    """Return the depth of each batch norm that has running statistics, in the order of the forward pass.

    The depth is the number of batch norms on the longest path from the images to this one, itself included. Paths are
    read off the autograd graph of a forward pass, so a detached path is not counted.
    """
    with seeded(0, "norm depths"), torch.enable_grad():
        network = build_classifier(model, num_classes, channels, image_size, name, modalities).eval()
        shape = DataFacts("", num_classes, channels, image_size, (), (), modalities=modalities).input_shape
        images = torch.zeros(2, *shape)
        if modalities:
            images[:, -len(modalities) :] = 1  # all are there
        images.requires_grad_()
        depths: dict[str, int] = {}
        depth_of: dict[Any, int] = {}  # autograd node of a batch norm -> its depth

        def enter(name: str, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            depths[name] = max(depths.get(name, 0), 1 + _depth_before(inputs[0].grad_fn, depth_of))

        def leave(name: str, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            depth_of[output.grad_fn] = depths[name]

        for path, part in network.named_modules():
            if isinstance(part, _BatchNorm) and part.running_mean is not None:
                part.register_forward_pre_hook(partial(enter, path))
                part.register_forward_hook(partial(leave, path))
        network(images)
    return depths


def _depth_before(node: Any, depth_of: Mapping[Any, int]) -> int:
    """Return the largest depth among the nearest ancestors of ``node`` that have one, 0 if none has."""
    largest, seen, ahead = 0, {None}, [node]
    while ahead:
        node = ahead.pop()
        if node in seen:
            continue
        seen.add(node)
        if node in depth_of:
            largest = max(largest, depth_of[node])
        else:
            ahead += [before for before, _ in node.next_functions]
    return largest


def _cnn(width: int, channels: int) -> tuple[nn.Module, int]:
    """Build six 3x3 convolutions (widths w, w | 2w, 2w | 4w, 4w) with batch norm and torch's default initialisation."""
    layers: list[nn.Module] = []
    for stage, multiple in enumerate((1, 2, 4)):
        layers += [nn.MaxPool2d(2)] if stage else []
        for _ in range(2):
            out = multiple * width
            layers += [nn.Conv2d(channels, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
            channels = out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()), channels


#: name -> (width, channels) -> (trunk, feature_dim); ``config.registry.CLASSIFIERS`` describes each
CLASSIFIERS: dict[str, Callable[[int, int], tuple[nn.Module, int]]] = {
    "cnn": _cnn,
    "resnet18": partial(resnet, BasicBlock, (2, 2, 2, 2)),
    "resnet34": partial(resnet, BasicBlock, (3, 4, 6, 3)),
    "resnet50": partial(resnet, Bottleneck, (3, 4, 6, 3)),
    "mobilenet": mobilenet,
}
