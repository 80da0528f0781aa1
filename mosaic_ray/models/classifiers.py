"""Classifiers: a trunk that gives features and one linear head on top, ``f(x) = head(features(x))``.

Initialisers draw from torch's global stream, so build inside ``seeding.seeded(...)``.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

from ..config import ModelConfig
from ..errors import RequestError

MIN_IMAGE_SIZE = 8


class Classifier(nn.Module):
    """``trunk`` maps images [B, channels, H, W] to features [B, d]; ``head`` maps those to logits [B, C]."""

    def __init__(self, trunk: nn.Module, feature_dim: int, num_classes: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = nn.Linear(feature_dim, num_classes)
        self.feature_dim = feature_dim

    def features(self, x: Tensor) -> Tensor:
        """Images [B, channels, H, W] to penultimate features [B, d]."""
        features: Tensor = self.trunk(x)
        return features

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, channels, H, W] to logits [B, C]."""
        logits: Tensor = self.head(self.features(x))
        return logits


def build_classifier(model: ModelConfig, num_classes: int, channels: int, image_size: int) -> Classifier:
    """A fresh classifier for square images of ``image_size`` >= 8 pixels."""
    if image_size < MIN_IMAGE_SIZE:
        raise RequestError(f"data.image_size = {image_size}: classifiers take {MIN_IMAGE_SIZE} pixels or more")
    trunk, feature_dim = CLASSIFIERS[model.classifier](model.width, channels)
    return Classifier(trunk, feature_dim, num_classes)


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


class _BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut, activation after the sum (He et al. 2016, option B)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


def _resnet18(width: int, channels: int) -> tuple[nn.Module, int]:
    """ResNet-18 with the CIFAR stem (3x3, stride 1, no max-pool); convolutions Kaiming-normal over fan-out."""
    layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    inputs = width
    for stage in range(4):
        outputs = width << stage
        layers += [_BasicBlock(inputs, outputs, 1 if stage == 0 else 2), _BasicBlock(outputs, outputs, 1)]
        inputs = outputs
    trunk = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    for module in trunk.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return trunk, inputs


#: name -> (width, channels) -> (trunk, feature_dim)
CLASSIFIERS: dict[str, Callable[[int, int], tuple[nn.Module, int]]] = {
    "cnn": _cnn,
    "resnet18": _resnet18,
}
