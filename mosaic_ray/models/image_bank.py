"""A generator that holds a few small images of each class and draws one of them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from ..config.schema import GeneratorConfig
from ..core.errors import RequestError


class ImageBank(nn.Module):
    """Maps latents z [B, latent_dim] and labels int64 [B] to images [B, channels, side, side] in [-1, 1].

    It holds M images of each class, whose sides are ``side`` / ``scale`` pixels. The image is number floor(M Phi(z_1)),
    so that all are drawn equally often, enlarged bilinearly. The buffer ``label_cdf``: as for ``Generator``.
    """

    pixels: Tensor
    label_cdf: Tensor

    def __init__(
        self, num_classes: int, images_per_class: int, channels: int, side: int, scale: int, latent_dim: int
    ) -> None:
        super().__init__()
        self.num_classes, self.latent_dim, self.side = num_classes, latent_dim, side
        shape = num_classes, images_per_class, channels, side // scale, side // scale
        self.register_buffer("pixels", torch.full(shape, 128, dtype=torch.uint8))
        self.register_buffer("label_cdf", torch.from_numpy(np.arange(1, num_classes + 1) / num_classes))

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        count = self.pixels.shape[1]
        places = (torch.special.ndtr(z.flatten(1)[:, 0]) * count).long().clamp(max=count - 1)
        return enlarged(self.pixels[labels, places].float() / 127.5 - 1, self.side)

    @torch.no_grad()
    def keep(self, label: int, images: Tensor) -> None:
        """Make ``images`` [M, channels, side / scale, side / scale] in [-1, 1] the images of the class ``label``."""
        self.pixels[label] = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def enlarged(images: Tensor, side: int) -> Tensor:
    """Enlarge ``images`` [B, channels, s, s] to ``side`` pixels a side, bilinearly; the same where they have that."""
    if images.shape[-1] == side:
        return images
    return nn.functional.interpolate(images, size=(side, side), mode="bilinear", align_corners=False)


def check_image_scale(config: GeneratorConfig, image_size: int) -> None:
    """Raise ``RequestError`` unless ``image_scale`` divides the side of the images."""
    if image_size % config.image_scale:
        raise RequestError(
            f"generator.image_scale = {config.image_scale}: it must divide the side of the images, {image_size} pixels"
        )


def build_image_bank(config: GeneratorConfig, channels: int, image_size: int, num_classes: int) -> ImageBank:
    """Build a bank of grey images."""
    check_image_scale(config, image_size)
    scale, count = config.image_scale, config.images_per_class
    return ImageBank(num_classes, count, channels, image_size, scale, config.latent_dim)
