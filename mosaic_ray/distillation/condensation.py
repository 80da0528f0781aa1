"""Condense a client's images: a few small images of each class, made from noise (docs/algorithm.md 1.4).

Distribution matching (Zhao and Bilen, "Dataset Condensation with Distribution Matching", WACV 2023, arXiv 2110.04181):
the mean features of the images made and of a client's real ones shall agree in networks with random weights, a new one
in each step, after the same random change of both. In a share of the steps they shall agree in the federation's global
model (trained networks among the random ones: IDM, Zhao et al., CVPR 2023, arXiv 2307.09742). The images are stored
smaller than they are seen (Kim et al., "Dataset Condensation via Efficient Synthetic-Data Parameterization", ICML
2022), so more of them cost as many bytes. FedDM (Xiong et al., CVPR 2023) lets the server train on such images.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from ..config.schema import GeneratorConfig
from ..core.seeding import seeded, stream
from ..core.types import DataFacts
from ..data.transforms import pm1_to_normalised, to_pm1
from ..federated.local_training import Shard, batches, no_progress
from ..models.classifiers import Classifier
from ..models.image_bank import ImageBank, build_image_bank, enlarged
from ..models.optimizers import Adam
from ..models.state_dict import freeze, use_precision
from .cvae_training import feature_maps
from .diff_augment import diff_augment
from .generator_training import (
    NUM_SNAPSHOT_IMAGES,
    TrainedGenerator,
    draw,
    label_cdf,
    measured,
    num_steps,
    snapshot_steps,
    to_pixels,
)

FEATURE_SCALE = 64  # makes distances in the global model's features about as large as in a random network's
FIRST_SPREAD = 0.5  # standard deviation of the noise that images begin as


def random_network(channels: int, width: int, side: int) -> nn.Sequential:
    """Build a network with random weights that maps images to features: the ConvNet of the paper, without a head.

    Up to three blocks of a 3x3 convolution, instance norm, ReLU and average pooling by 2, of ``width`` channels each.
    """
    layers: list[nn.Module] = []
    for _ in range(min(3, max(1, side.bit_length() - 2))):
        layers += [nn.Conv2d(channels, width, 3, padding=1), nn.GroupNorm(width, width), nn.ReLU(), nn.AvgPool2d(2)]
        channels = width
    return freeze(nn.Sequential(*layers, nn.Flatten()))


#: Maps images in [-1, 1] to sets of features, each [B, d].
Features = Callable[[Tensor], list[Tensor]]


def random_features(network: nn.Module) -> Features:
    """Return the one set of features that a random ``network`` gives."""
    return lambda images: [network(images)]


def global_features(model: Classifier, facts: DataFacts) -> Features:
    """Return the features that ``model``, the global one, gives.

    They are the outputs of all batch norms after ReLU, averaged over the quarters of an image, and the penultimate
    features, each set multiplied so that the squared distance of two is ``FEATURE_SCALE`` times their mean squared
    difference.
    """

    def found(images: Tensor) -> list[Tensor]:
        *maps, last = feature_maps(model, pm1_to_normalised(images, facts.mean, facts.std))
        pooled = [nn.functional.adaptive_avg_pool2d(each.relu(), 2).flatten(1) for each in maps if each.dim() == 4]
        return [each * (FEATURE_SCALE / each.shape[1]) ** 0.5 for each in (*pooled, last)]

    return found


def matching_loss(
    features: Features, real: Tensor, made: Tensor, changes: torch.Generator, precision: str = "fp32"
) -> Tensor:
    """Return the squared distance between the mean features of two sets of images, summed over the features.

    Both sets are changed alike (``diff_augment``), with numbers drawn from ``changes``.

    Args:
        features: ``random_features`` or ``global_features``.
        real: images [B, channels, H, W] in [-1, 1], without a gradient.
        made: images [M, channels, H, W]; the loss is differentiable in these.
    """
    changed = diff_augment(torch.cat([real, made]), changes, alike=True)
    with use_precision(precision, real.device):
        with torch.no_grad():
            wanted = features(changed[: len(real)].detach())
        pairs = zip(features(changed[len(real) :]), wanted, strict=True)
        distances = [(found.float().mean(0) - goal.float().mean(0)).square().sum() for found, goal in pairs]
    return torch.stack(distances).sum()


def matches_globally(turn: int, share: float) -> bool:
    """Return whether a class's step number ``turn``, from 0, is one of the ``share`` in the global model's features."""
    return math.floor((turn + 1) * share) > math.floor(turn * share)


def train_condensed(
    classifier: Classifier,
    shard: Shard,
    config: GeneratorConfig,
    facts: DataFacts,
    address: tuple[int, int],
    precision: str,
    progress: Callable[[int, int], None] = no_progress,
    global_model: Classifier | None = None,
) -> TrainedGenerator:
    """Make ``images_per_class`` images of each class of which a client has ``least_images``, by Adam on their pixels.

    Of a class with few images they would be copies: the features of a single image are the mean to be reached. The bank
    stays grey where no class has enough.

    A step is for one class; the client's classes take turns. It takes ``batch_size`` real images of the class and a
    new random network of ``matching_channels``; or, in a share ``matching_global`` of the steps, ``global_model``.
    ``address``, ``progress``: as for ``train_generator``. Returns an ``ImageBank``, with rows [step, loss] as its
    curve. ``classifier``, the client's, measures the result and has no part in it.
    """
    seed, client_id = address
    device, side = shard.images.device, facts.image_size
    if global_model is not None:
        freeze(global_model)
    bank = build_image_bank(config, facts.channels, side, facts.num_classes).to(device)
    counts = torch.bincount(shard.labels, minlength=facts.num_classes)
    enough = counts >= config.least_images
    labels = torch.nonzero(enough)[:, 0].tolist()
    if labels:
        bank.label_cdf.copy_(label_cdf(shard.labels[enough[shard.labels]], facts.num_classes))
    rows_of = {label: torch.nonzero(shard.labels == label)[:, 0] for label in labels}
    noise = stream(seed, "generator/init", client_id)
    shape = config.images_per_class, *bank.pixels.shape[2:]
    made = {c: (FIRST_SPREAD * torch.randn(shape, generator=noise)).to(device).requires_grad_() for c in labels}
    adam = {label: Adam([images], lr=config.learning_rate) for label, images in made.items()}
    steps, curve = num_steps(config, len(shard)) if labels else 0, list[list[float]]()
    snapshots, moments = dict[int, np.ndarray](), snapshot_steps(steps)
    snapshot_input = draw(bank, NUM_SNAPSHOT_IMAGES, stream(seed, "generator/watched", client_id), device)
    changes = stream(seed, "generator/diff_augment", client_id)
    turns = {
        c: batches(len(rows), config.batch_size, steps, generator=stream(seed, "generator/batches", client_id, c))
        for c, rows in rows_of.items()
    }

    def keep() -> ImageBank:
        for label, images in made.items():
            bank.keep(label, images)
        return bank

    for step in range(steps):
        label = labels[step % len(labels)]
        rows = rows_of[label][next(turns[label]).to(device)]
        if global_model is not None and matches_globally(step // len(labels), config.matching_global):
            features = global_features(global_model, facts)
        else:
            with seeded(seed, "generator/network", client_id, step):
                network = random_network(facts.channels, config.matching_channels, side)
            features = random_features(network.to(device))
        real, images = to_pm1(shard.images[rows]), enlarged(made[label], side)
        loss = matching_loss(features, real, images, changes, precision)
        adam[label].zero_grad(set_to_none=True)
        loss.backward()
        adam[label].step()
        if step % max(1, steps // 20) == 0 or step == steps - 1:
            curve.append([step, float(loss.detach())])
        if step + 1 in moments:
            snapshots[step + 1] = to_pixels(keep()(*snapshot_input), config.gan_range, facts)
        progress(step + 1, steps)
    return measured(keep(), classifier, shard, config, facts, address, snapshots, curve, progress, ("loss",))
