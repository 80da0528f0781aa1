"""Generators and encoders for samples of several modalities: one latent and class, one decoder for each modality.

Initialisers draw from torch's global generator, so build networks inside ``seeding.seeded(...)``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from ..config.schema import GeneratorConfig
from ..core.types import Modality
from .discriminator import STAGES as ENCODER_STAGES
from .generator import STAGES, Generator, check_image_size
from .multimodal import EMBEDDING, Tokens


class MultimodalGenerator(nn.Module):
    """Maps latents z [B, latent_dim] and labels int64 [B] to rows [B, D + M] of all modalities and their mask.

    Images are in [-1, 1], vectors as the classifier takes them, tokens are numbers. The buffer ``held`` float32 [M] has
    1 for modalities of the client that trained it: the rows have these and zeros for others, as its client's samples.
    ``label_cdf`` is as a ``Generator``'s.
    """

    label_cdf: Tensor
    held: Tensor

    def __init__(self, config: GeneratorConfig, modalities: Sequence[Modality], num_classes: int) -> None:
        super().__init__()
        self.latent_dim, self.num_classes, self.modalities = config.latent_dim, num_classes, tuple(modalities)
        self.decoders = nn.ModuleDict({m.name: _decoder(config, m) for m in modalities})
        self.embedding = nn.Embedding(num_classes, config.latent_dim)
        self.register_buffer("label_cdf", torch.from_numpy(np.arange(1, num_classes + 1) / num_classes))
        self.register_buffer("held", torch.ones(len(self.modalities)))

    def parts(self, z: Tensor, labels: Tensor, held: bool = False) -> dict[str, Tensor]:
        """Return what each decoder gives: images [B, C, H, W], vectors [B, d], logits of tokens [B, V, L].

        ``held``: only those of the modalities that the client has.
        """
        z = z.flatten(1) + self.embedding(labels)
        found = {}
        for number, modality in enumerate(self.modalities):
            if held and not self.held[number]:
                continue
            made = self.decoders[modality.name](z[:, :, None, None] if modality.kind == "image" else z)
            found[modality.name] = made.view(-1, modality.vocabulary, *modality.shape) if modality.vocabulary else made
        return found

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        return self.rows(self.parts(z, labels), len(z))

    def rows(self, found: Mapping[str, Tensor], count: int) -> Tensor:
        """Return what ``parts`` found as rows [count, D + M]; a text is its likeliest tokens."""
        rows = []
        for number, modality in enumerate(self.modalities):
            if modality.name not in found:
                rows.append(self.held.new_zeros(count, modality.size))
                continue
            made = found[modality.name]
            made = made.argmax(1) if modality.kind == "text" else made
            rows.append(made.float().flatten(1) * self.held[number])
        return torch.cat([*rows, self.held.expand(count, -1)], 1)


def _decoder(config: GeneratorConfig, modality: Modality) -> nn.Module:
    if modality.kind == "image":
        channels, side = modality.shape[0], modality.shape[1]
        check_image_size(side)
        return Generator(config.latent_dim, config.ngf, channels, STAGES[side]).layers
    hidden = 8 * config.ngf
    return nn.Sequential(
        nn.Linear(config.latent_dim, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(),
        nn.Linear(hidden, modality.size * max(1, modality.vocabulary)),
    )  # fmt: skip


def generator_modality(entry: str) -> str:
    """Return the modality that the entry ``entry`` of a generator belongs to; "" for what all have."""
    return entry.removeprefix("decoders.").partition(".")[0] if entry.startswith("decoders.") else ""


class MultimodalEncoder(nn.Module):
    """Maps rows [B, D + M] as generators draw them, and labels int64 [B], to mean and log-variance [B, latent_dim].

    The hidden features of all modalities are added up; those of absent ones are left out.
    """

    def __init__(self, config: GeneratorConfig, modalities: Sequence[Modality], num_classes: int) -> None:
        super().__init__()
        hidden = 8 * config.ndf
        self.modalities, self.num_classes = tuple(modalities), num_classes
        self.encoders = nn.ModuleDict({m.name: modality_encoder(config, m, hidden) for m in modalities})
        self.head = nn.Linear(hidden + num_classes, 2 * config.latent_dim)

    def forward(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        total, first, count = x.new_zeros(()), 0, len(self.modalities)
        for number, modality in enumerate(self.modalities):
            values = x[:, first : first + modality.size].reshape(-1, *modality.shape)
            total = total + self.encoders[modality.name](values) * x[:, number - count, None]
            first += modality.size
        asked = nn.functional.one_hot(labels, self.num_classes).to(x.dtype)
        mean, log_variance = self.head(torch.cat([total.relu(), asked], 1)).chunk(2, 1)
        return mean, log_variance


def modality_encoder(config: GeneratorConfig, modality: Modality, hidden: int) -> nn.Module:
    """Build a network from one modality's values to hidden features [B, hidden]; a text's begins with ``Tokens``."""
    if modality.kind == "vector":
        return nn.Sequential(nn.Linear(modality.size, hidden), nn.ReLU(), nn.Linear(hidden, hidden))
    if modality.kind == "text":
        return nn.Sequential(
            Tokens(modality.vocabulary), nn.Conv1d(EMBEDDING, hidden, 5, padding=2), nn.ReLU(),
            nn.AdaptiveMaxPool1d(1), nn.Flatten(), nn.Linear(hidden, hidden),
        )  # fmt: skip
    channels, side, _ = modality.shape
    check_image_size(side)
    stages, last = ENCODER_STAGES[side]
    layers: list[nn.Module] = []
    for depth in range(stages):  # without batch norm, which absent images would shift
        layers += [nn.Conv2d(channels, config.ndf << depth, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        channels = config.ndf << depth
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * last**2, hidden))
