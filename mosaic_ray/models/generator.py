"""Generators: DCGAN networks (Radford et al. 2016) that end in a 1x1 convolution and tanh, like the authors'.

Initialisers draw from torch's global generator, so build networks inside ``seeding.seeded(...)``.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from ..config.schema import GeneratorConfig
from ..core.errors import RequestError
from .state_dict import channels_last


class Generator(nn.Module):
    """Maps latents z [B, latent_dim] or [B, latent_dim, 1, 1] to images [B, channels, H, W] in [-1, 1].

    With ``num_classes`` > 0 it is conditional: it also takes labels int64 [B] and maps z + e_y, so latents are a
    mixture of C Gaussians around the class embeddings e (initialised N(0, 1), like z). The buffer ``label_cdf``
    float64 [C] then holds the cumulative distribution of the training labels, from which callers draw labels.
    """

    label_cdf: Tensor

    def __init__(
        self, latent_dim: int, ngf: int, channels: int, stages: tuple[tuple[int, int], ...], num_classes: int = 0
    ) -> None:
        super().__init__()
        self.latent_dim, self.num_classes = latent_dim, num_classes
        layers: list[nn.Module] = []
        inputs = latent_dim
        for depth, (multiple, padding) in enumerate(stages):
            outputs = multiple * ngf
            layers += [
                nn.ConvTranspose2d(inputs, outputs, 4, stride=2 if depth else 1, padding=padding, bias=False),
                nn.BatchNorm2d(outputs),
                nn.ReLU(),
            ]
            inputs = outputs
        self.layers = nn.Sequential(*layers, nn.ConvTranspose2d(inputs, channels, 1, bias=False), nn.Tanh())
        initialise_dcgan(self)
        if num_classes:
            self.embedding = nn.Embedding(num_classes, latent_dim)
            self.register_buffer("label_cdf", torch.from_numpy(np.arange(1, num_classes + 1) / num_classes))

    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        z = z.flatten(1)
        z = z if labels is None else z + self.embedding(labels)
        return self.layers(z[:, :, None, None])


def build_generator(config: GeneratorConfig, channels: int, image_size: int, num_classes: int = 0) -> Generator:
    """Build a fresh generator: 3,573,824 parameters (3.57 M in the paper) at 32x32x3 with 100 latents and ngf 64.

    With m_i ngf channels in stage i that is ngf (16 (latent_dim m_1 + ngf sum m_i m_{i+1}) + 2 sum m_i + channels
    m_last); ``num_classes`` C adds latent_dim C where ``config.labelled``, 20,000 for 200 classes.
    """
    check_image_size(image_size)
    conditioned = num_classes if config.labelled else 0
    return channels_last(Generator(config.latent_dim, config.ngf, channels, STAGES[image_size], conditioned))


def check_image_size(image_size: int) -> None:
    """Raise ``RequestError`` unless there are a generator and a discriminator for this image size."""
    if image_size not in STAGES:
        raise RequestError(
            f"data.image_size = {image_size}: generators draw {', '.join(map(str, STAGES))} pixels a side; "
            f"set data.image_size={min(STAGES, key=lambda side: (abs(side - image_size), side))}"
        )


def initialise_dcgan(module: nn.Module) -> None:
    """Initialise in place: convolutions N(0, 0.02), batch norm gamma N(1, 0.02) and beta 0 (Radford et al. 2016)."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.normal_(part.weight, 0.0, 0.02)
        elif isinstance(part, nn.BatchNorm2d):
            nn.init.normal_(part.weight, 1.0, 0.02)
            nn.init.zeros_(part.bias)


#: image size -> (channels in units of ngf, padding) of each 4x4 stage; the first gives 4x4 pixels, others double.
STAGES: dict[int, tuple[tuple[int, int], ...]] = {
    8: ((2, 0), (1, 1)),
    16: ((4, 0), (2, 1), (1, 1)),
    28: ((8, 0), (4, 1), (2, 2), (1, 1)),  # padding 2: from 8 to 14 pixels
    32: ((8, 0), (4, 1), (2, 1), (1, 1)),
    64: ((8, 0), (4, 1), (2, 1), (1, 1), (1, 1)),
}
