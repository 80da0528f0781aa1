"""Rehearsal: clients train on synthetic images of classes that they lack, beside their own (docs/algorithm.md 1.10).

A client draws the images from the generators of the clients that hold these classes. Unlike distillation with a frozen
backbone, this changes the features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from ..config.client_layout import client_modalities
from ..config.schema import ExperimentConfig
from ..core.seeding import numpy_stream, stream
from ..core.types import DataFacts, Weights
from ..data.transforms import drawn_to_stored
from ..federated.communication import Entries, Size, entries_of, size_of_entries
from ..federated.local_training import Shard
from ..models.multimodal_generator import generator_modality
from ..models.state_dict import load_weights, shapes_only, use_precision
from .generator_training import generator_for, load_generator, to_pixels

E = TypeVar("E")

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


def drawable(config: ExperimentConfig, counts: np.ndarray) -> np.ndarray:
    """Return the label ``counts`` [K, C] without those of classes that a client's generator was not trained on."""
    section = config.generator
    return np.where(counts >= section.least_images, counts, 0) if section.family == "condensed" else counts


def lacking_classes(counts: np.ndarray) -> np.ndarray:
    """Return the classes, int64, that a client with label ``counts`` [C] lacks."""
    return np.flatnonzero(counts < LACKING_BELOW * counts.sum() / len(counts))


def allocate_draws(
    shared: SharedGenerators,
    client_id: int,
    wanted: Sequence[int],
    count: int,
    draws: np.random.Generator,
    richer: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the place in ``shared`` and the label of ``count`` images: int64 [count] each, empty if nobody can draw.

    Labels spread evenly over the classes ``wanted`` that another client's generator can draw; among those the generator
    is drawn with probabilities proportional to its client's images of the class. ``richer`` bool [G]: generators of
    which all classes are wanted, since they draw modalities that the client lacks.
    """
    able = np.where(shared.counts >= LEAST_IMAGES, shared.counts, 0).astype(np.float64)
    able[[k == client_id for k in shared.clients]] = 0
    if richer is not None:
        asked = np.isin(np.arange(able.shape[1]), wanted)
        able[~(asked | richer[:, None])] = 0
        wanted = range(able.shape[1])
    classes = np.array([c for c in wanted if able[:, c].sum() > 0], np.int64)
    if not len(classes):
        return np.empty(0, np.int64), np.empty(0, np.int64)
    labels = draws.permutation(np.resize(draws.permutation(classes), count))
    return _drawn_owners(able, labels, draws), labels


def _drawn_owners(able: np.ndarray, labels: np.ndarray, draws: np.random.Generator) -> np.ndarray:
    """Draw a row of ``able`` float64 [G, C] for each of ``labels`` int64 [N], in proportion to its column."""
    shares = able.cumsum(0) / np.maximum(able.sum(0), 1)
    places: np.ndarray = (draws.random(len(labels)) >= shares[:, labels]).sum(0)
    return np.asarray(np.minimum(places, len(able) - 1))


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
    images = np.empty((len(labels), *facts.stored_shape), np.uint8)
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
    richer = None
    if facts.modalities:
        held = client_modalities(config, [modality.name for modality in facts.modalities])
        richer = np.array([not {*held[k]} <= {*held[client_id]} for k in shared.clients])
    places, labels = allocate_draws(shared, client_id, list(wanted), count, draws, richer)
    if not len(labels):
        return None
    noise = stream(config.seed, phase + "/rehearsal/z", round_num, client_id)
    if facts.modalities and config.rehearsal.modalities == "joined":
        owners = allocate_modalities(shared, client_id, labels, draws)
        return draw_joined(config, facts, shared, owners, labels, noise, device)
    return draw_images(config, facts, shared, places, labels, noise, device)


def allocate_modalities(
    shared: SharedGenerators, client_id: int, labels: np.ndarray, draws: np.random.Generator
) -> np.ndarray:
    """Return the place in ``shared`` of the generator that draws each modality of each sample, int64 [N, M].

    Among the other clients' generators that have the modality one is drawn with probabilities proportional to its
    client's samples of the class; -1 where there is none. ``labels``: int64 [N].
    """
    able = np.where(shared.counts >= LEAST_IMAGES, shared.counts, 0).astype(np.float64)
    able[[k == client_id for k in shared.clients]] = 0
    held = np.stack([weights["held"] for weights in shared.weights]) > 0
    owners = np.full((len(labels), held.shape[1]), -1, np.int64)
    for modality in range(held.shape[1]):
        weights = able * held[:, modality, None]
        drawn = _drawn_owners(weights, labels, draws)
        owners[:, modality] = np.where(weights.sum(0)[labels] > 0, drawn, -1)
    return owners


@torch.no_grad()
def draw_joined(
    config: ExperimentConfig,
    facts: DataFacts,
    shared: SharedGenerators,
    owners: np.ndarray,
    labels: np.ndarray,
    noise: torch.Generator,
    device: torch.device,
) -> Shard:
    """Draw samples whose modalities come from the generators ``owners`` [N, M] (places in ``shared``, -1: absent).

    Given the class the modalities are independent of each other. ``labels``: int64 [N].
    """
    count = len(facts.modalities)
    rows = torch.zeros(len(labels), *facts.input_shape, device=device)
    asked, generator = torch.as_tensor(labels, device=device), None
    for place in np.unique(owners[owners >= 0]):
        weights = shared.weights[place]
        if generator is None:
            generator = load_generator(config.generator, facts, weights).to(device)
        else:  # building one takes as long as drawing
            load_weights(generator, weights)
        chosen = np.flatnonzero((owners == place).any(1))
        z = torch.randn(len(chosen), config.generator.latent_dim, generator=noise).to(device)
        with use_precision(config.runtime.precision, device):
            drawn = generator(z, asked[chosen]).float()
        first = 0
        for number, modality in enumerate(facts.modalities):
            own = owners[chosen, number] == place
            columns = slice(first, first + modality.size)
            rows[chosen[own], columns] = drawn[own, columns]
            rows[chosen[own], number - count] = 1.0
            first += modality.size
    return Shard(drawn_to_stored(rows, facts), asked)


def generator_entries(config: ExperimentConfig, facts: DataFacts) -> Entries:
    """Return names, shapes and types of one client's generator."""
    with shapes_only():
        made = generator_for(config.generator, facts)
    return entries_of(made.state_dict())


def generator_size(config: ExperimentConfig, facts: DataFacts, client_id: int | None = None) -> Size:
    """Return the bytes of one client's generator; without ``client_id`` of a client that has all modalities."""
    entries = generator_entries(config, facts)
    if facts.modalities and client_id is not None:
        entries = sent_entries(entries, client_modalities(config, [m.name for m in facts.modalities])[client_id])
    return size_of_entries(entries)


def sent_weights(weights: Weights, facts: DataFacts) -> Weights:
    """Return the weights of a generator that travel: all, but for decoders that its client has no samples for."""
    if not facts.modalities:
        return weights
    names = [modality.name for modality, held in zip(facts.modalities, weights["held"], strict=True) if held > 0]
    return sent_entries(weights, names)


def sent_entries(entries: Mapping[str, E], held: Sequence[str]) -> dict[str, E]:
    """Return the entries of a generator that travel: not the decoders of modalities that are not ``held``."""
    return {name: entry for name, entry in entries.items() if generator_modality(name) in ("", *held)}
