"""Discriminators: map each image to one *logit*, positive for real. Losses take the logits.

Conditional discriminators also take labels y. They add <v_y, sum of phi(x) over positions> to the score of the features
phi(x), with one vector v per class: the projection of Miyato & Koyama (2018, eq. 3), dim(phi) C more parameters.

Initialisers draw from torch's global generator, so build networks inside ``seeding.seeded(...)``.
"""

from __future__ import annotations

import copy
from typing import Self

from torch import Tensor, nn

from ..config.schema import GeneratorConfig
from .classifiers import Classifier
from .generator import check_image_size, initialise_dcgan
from .state_dict import channels_last, freeze


class Discriminator(nn.Module):
    """DCGAN discriminator: ``num_stages`` stride-2 convolutions, then one with a kernel as large as the remaining map.

    With ``num_classes`` > 0 it is conditional and also takes labels int64 [B].
    """

    def __init__(self, ndf: int, channels: int, num_stages: int, last_kernel: int, num_classes: int = 0) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for depth in range(num_stages):
            outputs = ndf << depth
            layers += [nn.Conv2d(channels, outputs, 4, stride=2, padding=1, bias=False)]
            layers += [nn.BatchNorm2d(outputs)] if depth else []
            layers += [nn.LeakyReLU(0.2)]
            channels = outputs
        self.layers = nn.Sequential(*layers, nn.Conv2d(channels, 1, last_kernel, bias=False))
        initialise_dcgan(self)
        if num_classes:
            self.embedding = class_embedding(num_classes, channels)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """Map images [B, channels, H, W] to logits [B]."""
        maps = self.layers[:-1](x)
        scores: Tensor = self.layers[-1](maps).reshape(len(x))  # raises if there is more than one score per image
        return scores if labels is None else scores + (self.embedding(labels) * maps.sum((2, 3))).sum(1)


class SharedTrunkDiscriminator(nn.Module):
    """A frozen copy of a classifier's trunk with a trainable one-logit head (G11, ``shared_trunk`` in the paper).

    Gradients reach the images but not the trunk. Images must be normalised as the classifier expects them.
    """

    def __init__(self, classifier: Classifier, num_classes: int = 0) -> None:
        super().__init__()
        self.trunk = freeze(copy.deepcopy(classifier.trunk))
        self.head = nn.Linear(classifier.feature_dim, 1)
        if num_classes:
            self.embedding = class_embedding(num_classes, classifier.feature_dim)

    def train(self, mode: bool = True) -> Self:
        """Set the training mode of the head; the trunk stays in eval mode and keeps the classifier's statistics."""
        super().train(mode)
        self.trunk.eval()
        return self

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """Map images [B, channels, H, W] to logits [B]."""
        features = self.trunk(x)
        scores: Tensor = self.head(features).squeeze(1)
        return scores if labels is None else scores + (self.embedding(labels) * features).sum(1)


def class_embedding(num_classes: int, dim: int) -> nn.Embedding:
    """Build one vector [dim] per class, initialised N(0, 0.02) like the convolutions."""
    embedding = nn.Embedding(num_classes, dim)
    nn.init.normal_(embedding.weight, 0.0, 0.02)
    return embedding


def build_discriminator(config: GeneratorConfig, channels: int, image_size: int, num_classes: int = 0) -> Discriminator:
    """Build a fresh DCGAN discriminator: 2,759,424 parameters at 32x32x3 with ndf 64, and 512 C more if conditional."""
    check_image_size(image_size)
    conditioned = num_classes if config.labelled else 0
    return channels_last(Discriminator(config.ndf, channels, *STAGES[image_size], conditioned))


#: image size -> (stride-2 stages, kernel of the last convolution = side of the remaining map)
STAGES: dict[int, tuple[int, int]] = {8: (2, 2), 16: (3, 2), 28: (3, 3), 32: (4, 2), 64: (4, 4)}
