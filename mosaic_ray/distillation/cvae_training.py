"""Train a client's conditional variational autoencoder; its decoder is the generator (docs/algorithm.md 1.4).

Sohn, Lee and Yan, "Learning Structured Output Representation using Deep Conditional Generative Models", NeurIPS 2015;
on federated clients: FedCVAE (Heinbaugh et al., ICLR 2023). It needs no classifier, so nothing can be fooled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..config.schema import GeneratorConfig
from ..core.seeding import seeded, stream
from ..core.types import DataFacts
from ..data.transforms import pm1_to_normalised
from ..federated.local_training import Shard, no_progress
from ..models.classifiers import Classifier
from ..models.encoder import build_encoder
from ..models.generator import build_generator
from ..models.optimizers import Adam
from ..models.state_dict import freeze, to_weights, use_precision
from .generator_training import (
    NUM_SNAPSHOT_IMAGES,
    TrainedGenerator,
    compare_with_real,
    draw,
    evaluate_generator,
    label_cdf,
    num_steps,
    real_batches,
    snapshot_steps,
    to_pixels,
)


def reconstruction_loss(drawn: Tensor, real: Tensor) -> Tensor:
    """Return the binary cross-entropy of images in [-1, 1], read as [0, 1]: summed over pixels, mean over the batch."""
    wanted, found = (real.float() + 1) / 2, ((drawn.float() + 1) / 2).clamp(0, 1)
    return nn.functional.binary_cross_entropy(found, wanted, reduction="sum") / len(real)


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
        generator = build_generator(config, *shape).to(device)
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
            drawn = generator(mean.float() + (0.5 * log_variance.float()).exp() * unit, labels)
        reconstruction, divergence = reconstruction_loss(drawn, real), prior_divergence(mean, log_variance)
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
    freeze(generator)
    freeze(classifier)
    counts = torch.bincount(shard.labels, minlength=facts.num_classes)
    figures, pixels = evaluate_generator(
        generator, classifier, counts, config, facts, address, lambda done, total: progress(steps + done, steps + total)
    )
    figures |= compare_with_real(generator, classifier, shard, config, facts, address)
    snapshots = snapshots or {0: pixels[:NUM_SNAPSHOT_IMAGES]}  # no step was taken
    pictures = {"images": np.stack([*snapshots.values()]), "steps": np.array([*snapshots], np.int64)}
    return TrainedGenerator(to_weights(generator), pixels, figures, curve, pictures, ("loss", "reconstruction", "kl"))
