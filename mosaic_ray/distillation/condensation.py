"""Condense a client's images: a few small images of each class, made from noise (docs/algorithm.md 1.4).

Distribution matching (Zhao and Bilen, "Dataset Condensation with Distribution Matching", WACV 2023, arXiv 2110.04181):
the mean features of the images made and of a client's real ones shall agree in networks with random weights, a new one
in each step, after the same random change of both. The images are stored smaller than they are seen (Kim et al.,
"Dataset Condensation via Efficient Synthetic-Data Parameterization", ICML 2022), so more of them cost as many bytes.
Clients of a federation train on such images of each other in FedDM (Xiong et al., CVPR 2023).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from ..config.schema import GeneratorConfig
from ..core.seeding import seeded, stream
from ..core.types import DataFacts
from ..data.transforms import to_pm1
from ..federated.local_training import Shard, batches, no_progress
from ..models.classifiers import Classifier
from ..models.image_bank import ImageBank, build_image_bank, enlarged
from ..models.optimizers import Adam
from ..models.state_dict import freeze, use_precision
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


def matching_loss(
    network: nn.Module, real: Tensor, made: Tensor, changes: torch.Generator, precision: str = "fp32"
) -> Tensor:
    """Return the squared distance between the mean features of two sets of images, summed over the features.

    Both sets are changed alike (``diff_augment``), with numbers drawn from ``changes``.

    Args:
        network: maps images to features [B, d].
        real: images [B, channels, H, W] in [-1, 1], without a gradient.
        made: images [M, channels, H, W]; the loss is differentiable in these.
    """
    changed = diff_augment(torch.cat([real, made]), changes, alike=True)
    with use_precision(precision, real.device):
        with torch.no_grad():
            wanted = network(changed[: len(real)].detach()).float().mean(0)
        distance: Tensor = network(changed[len(real) :]).float().mean(0) - wanted
    return distance.square().sum()


def train_condensed(
    classifier: Classifier,
    shard: Shard,
    config: GeneratorConfig,
    facts: DataFacts,
    address: tuple[int, int],
    precision: str,
    progress: Callable[[int, int], None] = no_progress,
) -> TrainedGenerator:
    """Make ``images_per_class`` images of each class that a client holds, by Adam on their pixels.

    A step is for one class; the client's classes take turns. It takes ``batch_size`` real images of the class and a
    new random network of ``matching_channels``. ``address``, ``progress``: as for ``train_generator``. Returns an
    ``ImageBank``, with rows [step, loss] as its curve. ``classifier``, the client's, measures the result and has no
    part in it.
    """
    seed, client_id = address
    device, side = shard.images.device, facts.image_size
    bank = build_image_bank(config, facts.channels, side, facts.num_classes).to(device)
    bank.label_cdf.copy_(label_cdf(shard.labels, facts.num_classes))
    labels = shard.labels.unique().tolist()
    rows_of = {label: torch.nonzero(shard.labels == label)[:, 0] for label in labels}
    noise = stream(seed, "generator/init", client_id)
    shape = config.images_per_class, *bank.pixels.shape[2:]
    made = {c: (FIRST_SPREAD * torch.randn(shape, generator=noise)).to(device).requires_grad_() for c in labels}
    adam = {label: Adam([images], lr=config.learning_rate) for label, images in made.items()}
    steps, curve = num_steps(config, len(shard)), list[list[float]]()
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
        with seeded(seed, "generator/network", client_id, step):
            network = random_network(facts.channels, config.matching_channels, side).to(device)
        label = labels[step % len(labels)]
        rows = rows_of[label][next(turns[label]).to(device)]
        loss = matching_loss(network, to_pm1(shard.images[rows]), enlarged(made[label], side), changes, precision)
        adam[label].zero_grad(set_to_none=True)
        loss.backward()
        adam[label].step()
        if step % max(1, steps // 20) == 0 or step == steps - 1:
            curve.append([step, float(loss.detach())])
        if step + 1 in moments:
            snapshots[step + 1] = to_pixels(keep()(*snapshot_input), config.gan_range, facts)
        progress(step + 1, steps)
    return measured(keep(), classifier, shard, config, facts, address, snapshots, curve, progress, ("loss",))
