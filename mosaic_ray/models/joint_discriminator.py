"""The discriminator of samples of several modalities, and the relaxed texts that it and classifiers read.

A synthetic text enters as weights of its tokens [B, V, L]. Their product with the embedding matrix takes the place of
the embeddings that are looked up for a real text, so a gradient reaches the generator.

Initialisers draw from torch's global generator, so build networks inside ``seeding.seeded(...)``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..config.schema import GeneratorConfig
from ..core.types import Modality
from .discriminator import class_embedding
from .multimodal import Encoded, Tokens
from .multimodal_generator import modality_encoder


@dataclass(frozen=True)
class JointSamples:
    """Samples as a discriminator reads them.

    ``values``: by modality, images [B, C, H, W] in [-1, 1], vectors [B, d], texts as tokens int64 [B, L] or as weights
    of tokens [B, V, L]. ``present``: float32 [B, M] of 0 and 1; modalities that no sample has may have no values.
    """

    values: Mapping[str, Tensor]
    present: Tensor

    def detach(self) -> JointSamples:
        """Return the same values without their gradients."""
        return JointSamples({name: value.detach() for name, value in self.values.items()}, self.present)


def read_samples(rows: Tensor, modalities: Sequence[Modality]) -> JointSamples:
    """Return real samples, rows [B, D + M] with images in [-1, 1], as a discriminator reads them."""
    values, first = {}, 0
    for modality in modalities:
        value = rows[:, first : first + modality.size].reshape(-1, *modality.shape)
        values[modality.name] = value.long() if modality.kind == "text" else value
        first += modality.size
    return JointSamples(values, rows[:, first:])


def straight_through(logits: Tensor) -> Tensor:
    """Return weights of tokens [B, V, L]: one for the likeliest token and else zero, with the gradient of the softmax.

    The straight-through estimator of Bengio, Leonard and Courville (arXiv 1308.3432, 2013). ``logits``: [B, V, L].
    """
    soft = logits.float().softmax(1)
    chosen = torch.zeros_like(soft).scatter_(1, soft.argmax(1, keepdim=True), 1.0)
    return chosen + soft - soft.detach()


def embedded(tokens: Tokens, text: Tensor) -> Tensor:
    """Return the embeddings [B, E, L] of a text, given as tokens [B, L] or as their weights [B, V, L]."""
    if text.dim() == 2:
        return tokens(text)
    matrix = torch.cat([torch.zeros_like(tokens.weight[:1]), tokens.weight[1:]])  # token 0 stays a zero vector
    return torch.einsum("bvl,ve->bel", text, matrix)


class JointDiscriminator(nn.Module):
    """Maps samples of several modalities and labels int64 [B] to logits [B], positive for real.

    The hidden features h_i of the modalities that a sample has are added up; phi is their leaky rectifier. The score is
    a . phi + b + <v_y, phi>, with a vector v for each class: the projection of Miyato and Koyama (2018, eq. 3).
    """

    def __init__(self, config: GeneratorConfig, modalities: Sequence[Modality], num_classes: int) -> None:
        super().__init__()
        hidden = 8 * config.ndf
        self.modalities = tuple(modalities)
        self.encoders = nn.ModuleDict({m.name: modality_encoder(config, m, hidden) for m in modalities})
        self.head = nn.Linear(hidden, 1)
        self.embedding = class_embedding(num_classes, hidden)

    def forward(self, samples: JointSamples, labels: Tensor) -> Tensor:
        total = self.head.weight.new_zeros(())
        for number, modality in enumerate(self.modalities):
            there = samples.present[:, number, None]
            if not there.is_meta and not bool(there.any()):
                continue
            values, encoder = samples.values[modality.name], self.encoders[modality.name]
            for layer in encoder.children():
                values = embedded(layer, values) if isinstance(layer, Tokens) else layer(values)
            total = total + values * there
        features = nn.functional.leaky_relu(total, 0.2)
        scores: Tensor = self.head(features).squeeze(1)
        return scores + (self.embedding(labels) * features).sum(1)


@contextlib.contextmanager
def relaxed_texts(classifier: nn.Module, texts: Mapping[str, Tensor]) -> Iterator[None]:
    """Let the classifier read ``texts``, weights of tokens [B, V, L] by modality, in place of the tokens in its rows.

    All rows that it gets inside the block must have these modalities. The gradient reaches the weights.
    """
    hooks = []
    for name, part in ((path.rpartition(".")[2], part) for path, part in classifier.named_modules()):
        if not isinstance(part, Encoded) or name not in texts:
            continue
        for layer in part.modules():
            if isinstance(layer, Tokens):
                weights = texts[name]
                hooks.append(layer.register_forward_hook(lambda own, _, out, w=weights: embedded(own, w).to(out.dtype)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
