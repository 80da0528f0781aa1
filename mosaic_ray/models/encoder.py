"""The encoder of a conditional variational autoencoder, whose decoder is a labelled ``Generator``.

Initialisers draw from torch's global generator, so build networks inside ``seeding.seeded(...)``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..config.schema import GeneratorConfig
from .discriminator import STAGES
from .generator import check_image_size
from .state_dict import channels_last


class Encoder(nn.Module):
    """Maps images [B, channels, H, W] in [-1, 1] with labels int64 [B] to mean and log-variance [B, latent_dim]."""

    def __init__(self, ndf: int, channels: int, num_stages: int, side: int, latent_dim: int, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        layers: list[nn.Module] = []
        for depth in range(num_stages):
            outputs = ndf << depth
            layers += [nn.Conv2d(channels, outputs, 4, stride=2, padding=1, bias=False), nn.BatchNorm2d(outputs)]
            layers += [nn.LeakyReLU(0.2)]
            channels = outputs
        self.layers = nn.Sequential(*layers, nn.Flatten())
        self.head = nn.Linear(channels * side**2 + num_classes, 2 * latent_dim)

    def forward(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        asked = nn.functional.one_hot(labels, self.num_classes).to(x.dtype)
        mean, log_variance = self.head(torch.cat([self.layers(x), asked], 1)).chunk(2, 1)
        return mean, log_variance


def build_encoder(config: GeneratorConfig, channels: int, image_size: int, num_classes: int) -> Encoder:
    """Build a fresh encoder with the discriminator's convolutions."""
    check_image_size(image_size)
    num_stages, side = STAGES[image_size]
    return channels_last(Encoder(config.ndf, channels, num_stages, side, config.latent_dim, num_classes))
