"""Rehearsal: clients train on synthetic images of classes that they lack, beside their own (docs/algorithm.md 1.10).

A client draws the images from the generators of the clients that hold these classes. Unlike distillation with a frozen
backbone, this changes the features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..config.schema import ExperimentConfig
from ..core.seeding import numpy_stream, stream
from ..core.types import DataFacts, Weights
from ..federated.communication import Entries, Size, entries_of, size_of_entries
from ..federated.local_training import Shard
from ..models.generator import build_generator
from ..models.state_dict import shapes_only, use_precision
from .generator_training import load_generator, to_pixels

#: A client lacks a class if it holds fewer of its images than this share of an equal share n_k / C.
LACKING_BELOW = 0.1

#: A generator can be asked for a class of which its client held so many images.
LEAST_IMAGES = 5


@dataclass(frozen=True)
class SharedGenerators:
    """Hold the generators that clients rehearse with, their clients, and these clients' label counts int64 [G, C]."""

    weights: tuple[Weights, ...]
    clients: tuple[int, ...]
    counts: np.ndarray


def lacking_classes(counts: np.ndarray) -> np.ndarray:
    """Return the classes, int64, that a client with label ``counts`` [C] lacks."""
    return np.flatnonzero(counts < LACKING_BELOW * counts.sum() / len(counts))


def allocate_draws(
    shared: SharedGenerators, client_id: int, wanted: Sequence[int], count: int, draws: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Return the place in ``shared`` and the label of ``count`` images: int64 [count] each, empty if nobody can draw.

    Labels spread evenly over the classes ``wanted`` that another client's generator can draw; among those the generator
    is drawn with probabilities proportional to its client's images of the class.
    """
    able = np.where(shared.counts >= LEAST_IMAGES, shared.counts, 0).astype(np.float64)
    able[[k == client_id for k in shared.clients]] = 0
    classes = np.array([c for c in wanted if able[:, c].sum() > 0], np.int64)
    if not len(classes):
        return np.empty(0, np.int64), np.empty(0, np.int64)
    labels = draws.permutation(np.resize(draws.permutation(classes), count))
    shares = able.cumsum(0) / np.maximum(able.sum(0), 1)
    places = (draws.random(count) >= shares[:, labels]).sum(0)
    return np.minimum(places, len(able) - 1), labels


@torch.no_grad()
def draw_images(
    config: ExperimentConfig,
    facts: DataFacts,
    shared: SharedGenerators,
    places: np.ndarray,
    labels: np.ndarray,
    noise: torch.Generator,
    device: torch.device,
) -> Shard:
    """Draw one image for each row of ``places`` (of a generator in ``shared``) and ``labels``, int64 [N] each."""
    images = np.empty((len(labels), facts.channels, facts.image_size, facts.image_size), np.uint8)
    for place in np.unique(places):
        rows = np.flatnonzero(places == place)
        generator = load_generator(config.generator, facts, shared.weights[place]).to(device)
        z = torch.randn(len(rows), config.generator.latent_dim, generator=noise).to(device)
        with use_precision(config.runtime.precision, device):
            drawn = generator(z, torch.as_tensor(labels[rows], device=device))
        images[rows] = to_pixels(drawn.float(), config.generator.gan_range, facts)
    return Shard(torch.as_tensor(images, device=device), torch.as_tensor(labels, device=device))


def rehearsal_images(
    config: ExperimentConfig,
    facts: DataFacts,
    shared: SharedGenerators,
    own: np.ndarray,
    address: tuple[str, int, int],
    count: int,
    device: torch.device,
) -> Shard | None:
    """Draw ``count`` images for one client and round; None where no other client can draw what it lacks.

    ``own``: its label counts int64 [C]. ``address``: (phase, round, client).
    """
    phase, round_num, client_id = address
    wanted = lacking_classes(own) if config.rehearsal.classes == "lacking" else np.arange(len(own))
    draws = numpy_stream(config.seed, phase + "/rehearsal", round_num, client_id)
    places, labels = allocate_draws(shared, client_id, list(wanted), count, draws)
    if not len(labels):
        return None
    noise = stream(config.seed, phase + "/rehearsal/z", round_num, client_id)
    return draw_images(config, facts, shared, places, labels, noise, device)


def generator_entries(config: ExperimentConfig, facts: DataFacts) -> Entries:
    """Return names, shapes and types of one client's generator."""
    with shapes_only():
        made = build_generator(config.generator, facts.channels, facts.image_size, facts.num_classes)
    return entries_of(made.state_dict())


def generator_size(config: ExperimentConfig, facts: DataFacts) -> Size:
    """Return the bytes of one client's generator."""
    return size_of_entries(generator_entries(config, facts))
