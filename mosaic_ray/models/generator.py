"""Generators: DCGAN-like nets (Radford et al. 2016) that end in a 1x1 convolution and tanh, as the authors' do.

Initialisers draw from torch's global stream, so build inside ``seeding.seeded(...)``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..config.schema import GeneratorConfig
from ..core.errors import RequestError
from .state_dict import channels_last


class Generator(nn.Module):
    """Latents z [B, latent_dim], or [B, latent_dim, 1, 1], to images [B, channels, H, W] in [-1, 1].

    With ``num_classes`` it takes labels int64 [B] too, and draws the image from z + e_y: latents are a mixture of C
    Gaussians, one around the embedding e of each class (N(0, 1) at the start, as z is). The buffer ``label_cdf``,
    float64 [C], is then the cumulative distribution of the labels that it was trained with, for whoever draws images.
    """

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
            self.register_buffer("label_cdf", torch.arange(1, num_classes + 1, dtype=torch.float64) / num_classes)

    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        z = z.reshape(len(z), self.latent_dim)
        z = z if labels is None else z + self.embedding(labels)
        images: Tensor = self.layers(z[:, :, None, None])
        return images


def build_generator(config: GeneratorConfig, channels: int, image_size: int, num_classes: int = 0) -> Generator:
    """A fresh generator; 3,573,824 parameters (the paper's 3.57 M) at 32x32x3 with the paper's 100 latents, ngf 64.

    With m_i ngf channels in stage i that is ngf (16 (latent_dim m_1 + ngf sum m_i m_{i+1}) + 2 sum m_i + channels
    m_last); ``num_classes`` C adds latent_dim C where ``config.conditional``, 20,000 for 200 classes.
    """
    check_image_size(image_size)
    told = num_classes if config.conditional else 0
    return channels_last(Generator(config.latent_dim, config.ngf, channels, STAGES[image_size], told))


def check_image_size(image_size: int) -> None:
    """``RequestError`` unless the image game can be played at this size."""
    if image_size not in STAGES:
        raise RequestError(
            f"data.image_size = {image_size}: generators draw {', '.join(map(str, STAGES))} pixels a side"
        )


def initialise_dcgan(module: nn.Module) -> None:
    """In place: convolutions N(0, 0.02), batch norm gamma N(1, 0.02) and beta 0 (Radford et al. 2016)."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.normal_(part.weight, 0.0, 0.02)
        elif isinstance(part, nn.BatchNorm2d):
            nn.init.normal_(part.weight, 1.0, 0.02)
            nn.init.zeros_(part.bias)


#: image size -> (channels in units of ngf, padding) of each 4x4 stage; the first gives 4x4 pixels, each other doubles.
STAGES: dict[int, tuple[tuple[int, int], ...]] = {
    8: ((2, 0), (1, 1)),
    16: ((4, 0), (2, 1), (1, 1)),
    28: ((8, 0), (4, 1), (2, 2), (1, 1)),  # padding 2 takes 8 to 14
    32: ((8, 0), (4, 1), (2, 1), (1, 1)),
    64: ((8, 0), (4, 1), (2, 1), (1, 1), (1, 1)),
}
