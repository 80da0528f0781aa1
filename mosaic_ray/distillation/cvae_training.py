"""Train a client's conditional variational autoencoder; its decoder is the generator (docs/algorithm.md 1.4).

Sohn, Lee and Yan, "Learning Structured Output Representation using Deep Conditional Generative Models", NeurIPS 2015;
on federated clients: FedCVAE (Heinbaugh et al., ICLR 2023). It needs no classifier, so nothing can be fooled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..config.schema import GeneratorConfig
from ..core.seeding import seeded, stream
from ..core.types import DataFacts, Modality
from ..data.transforms import pm1_to_normalised
from ..federated.local_training import Shard, no_progress
from ..models.classifiers import Classifier
from ..models.encoder import build_encoder
from ..models.multimodal_generator import MultimodalEncoder, MultimodalGenerator
from ..models.optimizers import Adam
from ..models.state_dict import freeze, use_precision
from .generator_training import (
    NUM_SNAPSHOT_IMAGES,
    TrainedGenerator,
    draw,
    generator_for,
    label_cdf,
    measured,
    num_steps,
    real_batches,
    snapshot_steps,
    to_pixels,
)


def reconstruction_loss(drawn: Tensor, real: Tensor) -> Tensor:
    """Return the binary cross-entropy of images in [-1, 1], read as [0, 1]: summed over pixels, mean over the batch."""
    wanted, found = (real.float() + 1) / 2, ((drawn.float() + 1) / 2).clamp(0, 1)
    return nn.functional.binary_cross_entropy(found, wanted, reduction="sum") / len(real)


def joint_reconstruction_loss(drawn: Mapping[str, Tensor], real: Tensor, modalities: Sequence[Modality]) -> Tensor:
    """Return the loss of all modalities that the samples have: summed over their values, mean over the batch.

    Images: as ``reconstruction_loss``. Texts: the cross-entropy of their tokens. Vectors: the negative log-likelihood
    of a Gaussian whose variance, one for a modality, is the best for this batch, d / 2 log(mean squared error) up to a
    constant (Rybkin, Daniilidis and Levine, "Simple and Effective VAE Training with Calibrated Decoders", ICML 2021).

    Args:
        drawn: what each decoder gives, as ``MultimodalGenerator.parts`` returns it.
        real: rows [B, D + M], images in [-1, 1].
        modalities: the parts, in the order of the rows.
    """
    total, first, count = real.new_zeros(()), 0, len(modalities)
    for number, modality in enumerate(modalities):
        wanted = real[:, first : first + modality.size].float()
        there = real[:, number - count] > 0
        first += modality.size
        if not bool(there.any()):
            continue
        found, wanted = drawn[modality.name].float()[there], wanted[there]
        if modality.kind == "image":
            loss = reconstruction_loss(found.flatten(1), wanted) * len(wanted)
        elif modality.kind == "text":
            loss = nn.functional.cross_entropy(found, wanted.long(), reduction="sum")
        else:
            spread = nn.functional.mse_loss(found, wanted).clamp(min=1e-4)
            loss = 0.5 * modality.size * spread.log() * len(wanted)
        total = total + loss / len(real)
    return total


def prior_divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """Return KL(N(mean, exp(log_variance)) || N(0, I)), summed over latents [B, latent_dim], mean over the batch."""
    mean, log_variance = mean.float(), log_variance.float()
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1).mean()


@contextmanager
def norm_outputs(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the outputs of all batch norms of ``model`` in the yielded list, in the order of the forward pass."""
    found: list[Tensor] = []
    hooks = [
        part.register_forward_hook(lambda _, inputs, output: found.append(output))
        for part in model.modules()
        if isinstance(part, _BatchNorm)
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def feature_maps(model: Classifier, images: Tensor) -> list[Tensor]:
    """Return the outputs of all batch norms and the penultimate features of ``images``, float32."""
    with norm_outputs(model) as maps:
        last = model.features(images)
    return [each.float() for each in (*maps, last)]


def feature_loss(model: Classifier, drawn: Tensor, real: Tensor) -> Tensor:
    """Return the feature reconstruction loss of the images ``drawn`` against ``real``.

    It is the mean squared difference of each feature map, averaged over the maps, times the number of an image's
    values, so that it compares with a sum over pixels.

    After Hou et al., "Deep Feature Consistent Variational Autoencoder", WACV 2017, who take a
    network trained on other data; here it is the federation's own.

    Args:
        model: a classifier in eval mode, whose parameters need no gradient.
        drawn: images [B, channels, H, W] as ``model`` takes them; the loss is differentiable in these.
        real: images of the same shape.
    """
    with torch.no_grad():
        wanted = feature_maps(model, real)
    pairs = zip(feature_maps(model, drawn), wanted, strict=True)
    return torch.stack([nn.functional.mse_loss(found, goal) for found, goal in pairs]).mean() * real[0].numel()


def train_cvae(
    classifier: Classifier,
    shard: Shard,
    config: GeneratorConfig,
    facts: DataFacts,
    address: tuple[int, int],
    precision: str,
    progress: Callable[[int, int], None] = no_progress,
    features: Classifier | None = None,
) -> TrainedGenerator:
    """Train encoder and decoder on a client's images by Adam; ``address``, ``progress``: as for ``train_generator``.

    Minimises reconstruction loss + KL to the prior, + ``feature_weight`` x ``feature_loss`` in ``features``, the global
    model. Returns the decoder, with rows [step, loss, reconstruction, KL] as its curve. ``classifier``, the client's,
    measures the result and takes no part in training.
    """
    seed, client_id = address
    device = shard.images.device
    with seeded(seed, "generator/init", client_id):
        shape = facts.channels, facts.image_size, facts.num_classes
        generator = generator_for(config, facts).to(device)
        if isinstance(generator, MultimodalGenerator):
            encoder: nn.Module = MultimodalEncoder(config, facts.modalities, facts.num_classes).to(device)
            there = shard.images[:, 0, 0, -len(facts.modalities) :] > 0
            generator.held.copy_(there.any(0))
        else:
            encoder = build_encoder(config, *shape).to(device)
    generator.label_cdf.copy_(label_cdf(shard.labels, facts.num_classes))
    if features is not None:
        freeze(features)
    adam = Adam([*generator.parameters(), *encoder.parameters()], lr=config.learning_rate)
    noise = stream(seed, "generator/z", client_id)
    steps, curve = num_steps(config, len(shard)), []
    snapshots, moments = dict[int, np.ndarray](), snapshot_steps(steps)
    snapshot_input = draw(generator, NUM_SNAPSHOT_IMAGES, stream(seed, "generator/watched", client_id), device)
    for step, (real, labels) in enumerate(real_batches(shard, config, facts, address, steps)):
        unit = torch.randn(len(real), config.latent_dim, generator=noise).to(device)
        if len(real) == 1:  # batch norm needs two images
            continue
        with use_precision(precision, device):
            mean, log_variance = encoder(real, labels)
            code = mean.float() + (0.5 * log_variance.float()).exp() * unit
            drawn = generator.parts(code, labels) if facts.modalities else generator(code, labels)
        divergence = prior_divergence(mean, log_variance)
        if facts.modalities:
            reconstruction = joint_reconstruction_loss(drawn, real, facts.modalities)
        else:
            reconstruction = reconstruction_loss(drawn, real)
        loss = reconstruction + divergence
        if features is not None:
            with use_precision(precision, device):
                seen = (pm1_to_normalised(images, facts.mean, facts.std) for images in (drawn, real))
                loss = loss + config.feature_weight * feature_loss(features, *seen)
        adam.zero_grad(set_to_none=True)
        loss.backward()
        adam.step()
        if step % max(1, steps // 20) == 0 or step == steps - 1:
            curve.append([step, *(float(x.detach()) for x in (loss, reconstruction, divergence))])
        if step + 1 in moments:
            with torch.no_grad():
                snapshots[step + 1] = to_pixels(generator.eval()(*snapshot_input).float(), config.gan_range, facts)
            generator.train()
        progress(step + 1, steps)
    losses = "loss", "reconstruction", "kl"
    return measured(generator, classifier, shard, config, facts, address, snapshots, curve, progress, losses)
