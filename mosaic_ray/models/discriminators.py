"""Discriminators: images to one *logit* each, real above zero. Losses take the logits; ``probability`` is for people.

Initialisers draw from torch's global stream, so build inside ``seeding.seeded(...)``.
"""

from __future__ import annotations

import copy
from typing import Self

import torch
from torch import Tensor, nn

from ..config import GeneratorConfig
from .classifiers import Classifier
from .generators import check_image_size, initialise_dcgan
from .tensors import freeze


class Discriminator(nn.Module):
    """DCGAN's: ``num_stages`` stride-2 convolutions, then one as large as the map that is left."""

    def __init__(self, ndf: int, channels: int, num_stages: int, last_kernel: int) -> None:
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

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, channels, H, W] to logits [B]."""
        scores: Tensor = self.layers(x)
        return scores.reshape(len(x))  # raises, rather than flattens, if an image had several scores

    def probability(self, x: Tensor) -> Tensor:
        """Images to the probability of being real, [B] in (0, 1)."""
        return torch.sigmoid(self(x))


class SharedTrunkDiscriminator(nn.Module):
    """A frozen copy of a classifier's trunk with a trainable head of one logit (G11, the paper's ``shared_trunk``).

    Gradients reach the images but not the trunk. Images must be normalised as that classifier expects them.
    """

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.trunk = freeze(copy.deepcopy(classifier.trunk))
        self.head = nn.Linear(classifier.feature_dim, 1)

    def train(self, mode: bool = True) -> Self:
        """As usual, save that the trunk stays in eval mode: its statistics are the classifier's."""
        super().train(mode)
        self.trunk.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, channels, H, W] to logits [B]."""
        scores: Tensor = self.head(self.trunk(x))
        return scores.squeeze(1)

    def probability(self, x: Tensor) -> Tensor:
        """Images to the probability of being real, [B] in (0, 1)."""
        return torch.sigmoid(self(x))


def build_discriminator(config: GeneratorConfig, channels: int, image_size: int) -> Discriminator:
    """A fresh DCGAN discriminator; 2,759,424 parameters at 32x32x3 with ndf 64."""
    check_image_size(image_size)
    return Discriminator(config.ndf, channels, *STAGES[image_size])


#: image size -> (stride-2 stages, kernel of the last convolution = side of the map that those leave)
STAGES: dict[int, tuple[int, int]] = {8: (2, 2), 16: (3, 2), 28: (3, 3), 32: (4, 2), 64: (4, 4)}
