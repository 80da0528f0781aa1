"""Networks for samples of several modalities: an encoder for each, fused over those that a sample has.

A sample arrives as one row: the values of every modality, and a mask (``data.transforms.to_input``). Encoders see the
rows that have their modality and no others, so absent ones touch neither features nor batch-norm statistics.

Initialisers draw from torch's global generator, so build networks inside ``seeding.seeded(...)``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..core.errors import RequestError
from ..core.types import Modality

#: The values of ``model.fusion``, and how each joins the features of several modalities.
FUSIONS = {
    "mean": "the mean of the features of the modalities that a sample has",
    "gated": "their mean weighted by a gate, a sigmoid of a linear function of each modality's features",
    "late": "a head for each modality; the logits are the mean over the modalities that a sample has",
    "zero_fill": "all features side by side; zeros in the place of absent modalities, which count as there",
    "prototypes": "all features side by side; a class's prototypes in the place of absent modalities (PmcmFL)",
}
#: Fusions that lay features side by side: the head's columns belong to modalities.
SIDE_BY_SIDE = ("late", "zero_fill")
#: The entry of a state dict that holds the prototypes, float32 [M, C, d].
PROTOTYPES = "trunk.prototypes"

#: Channels of a token's embedding.
EMBEDDING = 32


class Encoded(nn.Module):
    """Computes the features of one modality: rows [B, D + M] to [B, d], zeros for rows that do not have it.

    ``first``, ``number``: where its values begin in a row, and its place in the mask. ``always``: rows without it are
    encoded, too, as zeros. ``masked``, in eval mode alone: all rows are encoded, and the features of those without it
    set to zero, so that no shape depends on the data, as files for others need it.
    """

    def __init__(
        self, encoder: nn.Module, modality: Modality, first: int, number: int, count: int, feature_dim: int,
        always: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.encoder = encoder
        self.modality, self.first, self.place = modality, first, number - count
        self.feature_dim, self.always, self.masked = feature_dim, always, False

    def forward(self, x: Tensor) -> Tensor:
        values = x[:, self.first : self.first + self.modality.size].reshape(-1, *self.modality.shape)
        if self.always or x.is_meta:
            return self.encoder(values)
        if self.masked:
            features: Tensor = self.encoder(values)
            return features * x[:, self.place, None]
        present = x[:, self.place] > 0
        if bool(present.all()):
            return self.encoder(values)
        if not bool(present.any()):
            return x.new_zeros(len(x), self.feature_dim)
        found = self.encoder(values[present])
        return found.new_zeros(len(x), found.shape[1]).index_put((present.nonzero()[:, 0],), found)


class Present(nn.Module):
    """Reads whether a row has the modality at ``place`` of the mask: [B, D + M] to [B, 1] of 0 and 1."""

    def __init__(self, place: int) -> None:
        super().__init__()
        self.place = place

    def forward(self, x: Tensor) -> Tensor:
        return x[:, self.place, None]


class Tokens(nn.Embedding):
    """Maps token numbers as floats [B, L] to their embeddings [B, E, L]; token 0 is a zero vector."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__(vocabulary, EMBEDDING, padding_idx=0)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.long()).transpose(1, 2)


class Fusion(nn.Module):
    """Encoders by modality, and the fusion of their features: rows [B, D + M] to features [B, d].

    See ``FUSIONS``. Side by side they are [B, M d]; with ``late`` [B, M (d + 1)]: each modality's block is its features
    and a one, all times its share of the modalities that are there, so that the head has a bias for each.
    """

    prototypes: Tensor

    def __init__(
        self, modalities: Sequence[Modality], encoders: Sequence[nn.Module], dim: int, fusion: str, num_classes: int
    ) -> None:
        super().__init__()
        self.fusion, count = fusion, len(modalities)
        self.encoders, self.present, first = nn.ModuleDict(), nn.ModuleList(), 0
        for number, (modality, encoder) in enumerate(zip(modalities, encoders, strict=True)):
            always = fusion == "zero_fill"
            self.encoders[modality.name] = Encoded(encoder, modality, first, number, count, dim, always)
            self.present.append(Present(number - count))
            first += modality.size
        if fusion == "prototypes":
            self.register_buffer("prototypes", torch.zeros(count, num_classes, dim))
        self.gates = nn.ModuleDict({m.name: nn.Linear(dim, 1) for m in modalities} if fusion == "gated" else {})

    def encode(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Return each modality's features [B, d], zeros where absent, and whether it is there, [B, 1] of 0 and 1."""
        return [encoder(x) for encoder in self.encoders.values()], [present(x) for present in self.present]

    def complete(
        self, features: Sequence[Tensor], present: Sequence[Tensor], labels: Tensor | None = None
    ) -> Tensor:
        """Return features side by side [B, M d], with the prototypes of ``labels`` [B] in place of absent modalities.

        Without labels the class is the one with the nearest prototypes, by the mean of the squared distances in the
        modalities that a sample has.
        """
        if labels is None:
            far = [
                there * _squared_distances(found.detach().float(), prototypes)
                for found, there, prototypes in zip(features, present, self.prototypes, strict=True)
            ]
            labels = torch.stack(far).sum(0).argmin(1)
        pairs = zip(features, present, self.prototypes, strict=True)
        return torch.cat([found + (1 - there) * known[labels] for found, there, known in pairs], 1)

    def forward(self, x: Tensor) -> Tensor:
        features, weights = self.encode(x)
        if self.fusion == "zero_fill":
            return torch.cat(features, 1)
        if self.fusion == "prototypes":
            return self.complete(features, weights)
        if self.fusion == "gated":
            pairs = zip(self.gates.values(), features, weights, strict=True)
            weights = [gate(found).sigmoid() * weight for gate, found, weight in pairs]
        total = weights[0]
        for weight in weights[1:]:
            total = total + weight
        total = total.clamp(min=1e-6)
        if self.fusion == "late":
            blocks = []
            for found, weight in zip(features, weights, strict=True):
                blocks += [found * (weight / total), weight / total]
            return torch.cat(blocks, 1)
        fused = features[0] * weights[0]
        for found, weight in zip(features[1:], weights[1:], strict=True):
            fused = fused + found * weight
        return fused / total


def _squared_distances(rows: Tensor, others: Tensor) -> Tensor:
    """Return squared distances [B, C] of ``rows`` [B, d] and ``others`` [C, d]; torch.cdist cannot go into ONNX."""
    return rows.square().sum(1, keepdim=True) - 2 * rows @ others.T + others.square().sum(1)


def fused(
    modalities: Sequence[Modality],
    width: int,
    fusion: str,
    num_classes: int,
    image_trunk: Callable[[int], tuple[nn.Module, int]],
) -> tuple[Fusion, int]:
    """Build a trunk for samples of several modalities; returns it and the number of its features.

    Every encoder gives 4 ``width`` features.

    Args:
        modalities: the parts of a sample, in the order of its row.
        width: channels of the first layers, as ``model.width``.
        fusion: one of ``FUSIONS``.
        num_classes: of the prototypes, where the fusion has any.
        image_trunk: builds the trunk for images of so many channels: (trunk, its features).
    """
    dim = 4 * width
    encoders = [_encoder(modality, width, dim, image_trunk) for modality in modalities]
    joined = dim * len(modalities)
    found = {"late": joined + len(modalities), "zero_fill": joined, "prototypes": joined}.get(fusion, dim)
    return Fusion(modalities, encoders, dim, fusion, num_classes), found


def _encoder(
    modality: Modality, width: int, dim: int, image_trunk: Callable[[int], tuple[nn.Module, int]]
) -> nn.Module:
    if modality.kind == "image":
        trunk, found = image_trunk(modality.shape[0])
        return trunk if found == dim else nn.Sequential(trunk, nn.Linear(found, dim), nn.ReLU())
    if modality.kind == "vector":
        return nn.Sequential(nn.Linear(modality.size, dim), nn.ReLU(), nn.Linear(dim, dim), nn.ReLU())
    return nn.Sequential(  # Kim, "Convolutional Neural Networks for Sentence Classification", EMNLP 2014, one width
        Tokens(modality.vocabulary), nn.Conv1d(EMBEDDING, 2 * width, 5, padding=2), nn.ReLU(),
        nn.AdaptiveMaxPool1d(1), nn.Flatten(), nn.Linear(2 * width, dim), nn.ReLU(),
    )  # fmt: skip


def modality_of(entry: str) -> str:
    """Return the modality that the entry ``entry`` of a state dict belongs to; "" for what all clients share."""
    for stem in ("trunk.encoders.", "trunk.gates."):
        if entry.startswith(stem):
            return entry.removeprefix(stem).partition(".")[0]
    return ""


def check_names(names: Sequence[str]) -> None:
    """Raise ``RequestError`` where a modality's name cannot be part of a weight's name."""
    for name in names:
        if not name or "." in name or "+" in name:
            raise RequestError(f"data.modalities: the name {name!r} of a column holds a dot or a plus; rename it")
