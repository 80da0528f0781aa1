"""Each client's network, width and channels, and the aggregation of a round's updates.

Weights are averaged among clients of one architecture. A partial-width client trains some channels of its
architecture's global model, and each coordinate is averaged over the clients that held it (docs/algorithm.md 3.5-3.7).
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from typing import TypeVar

import numpy as np

from ..config.client_layout import any_partial_width, client_classifiers, client_modalities, client_widths, groups
from ..config.plugins import strategy_named
from ..config.schema import ExperimentConfig, ModelConfig
from ..core.seeding import derive, seeded
from ..core.types import DataFacts, Modality, Update, Weights
from ..models.classifiers import CLASSIFIERS, build_classifier, norm_depths
from ..models.multimodal import SIDE_BY_SIDE, modality_of
from ..models.state_dict import shapes_only
from ..models.submodel import ChannelIndices, ChannelLayout, channel_layout, check_width, extract, num_kept
from .aggregation import ModalityAverage, PartialAverage, RunningAverage, entry_weight
from .communication import Entries, entries_of
from .static_batch_norm import passes

T = TypeVar("T")

#: The global model of each architecture.
Models = dict[str, Weights]


@lru_cache(maxsize=32)
def _channels(
    model: ModelConfig, num_classes: int, channels: int, image_size: int, name: str, modalities: tuple[Modality, ...]
) -> ChannelLayout:
    return channel_layout(build_classifier(model, num_classes, channels, image_size, name, modalities))


@lru_cache(maxsize=32)
def _entries(
    model: ModelConfig, num_classes: int, channels: int, image_size: int, name: str, modalities: tuple[Modality, ...]
) -> Entries:
    with seeded(0, "entries"), shapes_only() if name in CLASSIFIERS else contextlib.nullcontext():
        return entries_of(build_classifier(model, num_classes, channels, image_size, name, modalities).state_dict())


@dataclass(frozen=True)
class Federation:
    """The networks, widths and channels of an experiment's clients."""

    config: ExperimentConfig
    facts: DataFacts

    @cached_property
    def classifiers(self) -> tuple[str, ...]:
        """Each client's architecture."""
        return client_classifiers(self.config)

    @cached_property
    def widths(self) -> tuple[float, ...]:
        """Each client's width."""
        return client_widths(self.config)

    @cached_property
    def groups(self) -> dict[str, tuple[int, ...]]:
        """Clients by architecture."""
        return groups(self.config)

    @property
    def student(self) -> str:
        """The architecture of the student; its global model becomes the student."""
        return self.config.model.classifier

    @cached_property
    def partial_width(self) -> bool:
        """Whether some client trains only a part of its network; batch-norm statistics are then static (3.6)."""
        return any_partial_width(self.config)

    @cached_property
    def modalities(self) -> tuple[tuple[str, ...], ...]:
        """Return each client's modalities; of data with one, none."""
        return client_modalities(self.config, [modality.name for modality in self.facts.modalities])

    def head_columns(self, name: str) -> dict[str, slice]:
        """Return the columns of an architecture's head that belong to each modality, where features are not joined."""
        parts = self.facts.modalities
        if self.config.model.fusion not in SIDE_BY_SIDE or not parts:
            return {}
        each = self.entries(name)["head.weight"][0][1] // len(parts)
        return {part.name: slice(k * each, (k + 1) * each) for k, part in enumerate(parts)}

    def trained_entries(self, client_id: int, entries: Mapping[str, T], whole: bool = False) -> dict[str, T]:
        """Return the ``entries`` of its network that a client trains, so that only these travel.

        ``whole``: all of them, as in rounds in which clients may rehearse modalities that they lack.
        """
        if not self.facts.modalities or whole or self.config.model.fusion == "zero_fill":
            return dict(entries)
        held = ("", *self.modalities[client_id])
        return {name: entry for name, entry in entries.items() if modality_of(name) in held}

    def channels(self, name: str) -> ChannelLayout:
        """Return which dimensions of an architecture's weights are channels of which group."""
        facts = self.facts
        return _channels(self.config.model, facts.num_classes, facts.channels, facts.image_size, name, facts.modalities)

    def entries(self, name: str, width: float = 1.0) -> Entries:
        """Return names, shapes and types of an architecture's weights at this ``width``."""
        facts = self.facts
        whole = _entries(self.config.model, facts.num_classes, facts.channels, facts.image_size, name, facts.modalities)
        if width == 1:
            return whole
        channels = self.channels(name)
        return {
            entry: (
                tuple(
                    size if held is None else num_kept(width, channels.sizes[held[0]]) * held[1]
                    for size, held in zip(shape, channels.entries[entry], strict=True)
                ),
                kind,
            )
            for entry, (shape, kind) in whole.items()
        }

    def statistics_passes(self, name: str) -> list[list[str]]:
        """Return the batch norms that each pass over the clients' images reads (static BN, 3.6)."""
        facts = self.facts
        shape = facts.num_classes, facts.channels, facts.image_size
        depths = norm_depths(self.config.model, *shape, name, facts.modalities)
        return passes(depths, self.config.federation.bn_passes)

    def parts(self, stem: str) -> dict[str, str]:
        """Return the name of each architecture's part in a result: ``stem`` for the student's, others are numbered."""
        return {name: stem if name == self.student else f"{stem}_{k:03d}" for k, name in enumerate(self.groups)}

    def check(self) -> None:
        """Raise ``RequestError`` where a network cannot be cut, or a width leaves a layer without channels."""
        for client_id, width in enumerate(self.widths):
            if width < 1:
                check_width(self.channels(self.classifiers[client_id]), width)

    def indices(self, client_id: int, phase: str, round_num: int) -> ChannelIndices | None:
        """Return the channels that a client holds in a round; None for a full-width client."""
        width = self.widths[client_id]
        if width == 1:
            return None
        found: ChannelIndices = strategy_named(self.config.federation.strategy).channel_indices(
            self.channels(self.classifiers[client_id]), width, round_num=round_num,
            seed=derive(self.config.seed, "widths", phase), client_id=client_id,
        )  # fmt: skip
        return found

    def submodel(self, client_id: int, models: Models, indices: ChannelIndices | None) -> Weights:
        """Return the part of its architecture's global model that a client gets."""
        name = self.classifiers[client_id]
        return models[name] if indices is None else extract(models[name], self.channels(name), indices)


@dataclass(frozen=True)
class RoundStart:
    """The input of one round's aggregation.

    ``models``: the global models. ``server``: the strategy's arrays. ``counts`` int64 [K, C]: training samples by
    client and class. ``phase`` names the random streams.
    """

    federation: Federation
    models: Models
    server: Weights
    phase: str
    round_num: int
    counts: np.ndarray


class RoundAggregator:
    """Aggregate the updates of one round, added in client order: FedAvg, or averages by coordinate of submodels.

    One running sum for each architecture, so memory does not grow with the number of clients.
    """

    def __init__(self, start: RoundStart) -> None:
        self.start = start
        self._masked = start.federation.config.federation.masked
        self._averages: dict[str, RunningAverage | PartialAverage | ModalityAverage] = {}

    def add(self, update: Update) -> None:
        """Add one client's weights, weighted by its number of samples."""
        start, client_id = self.start, update.client_id
        name, samples = start.federation.classifiers[client_id], update.samples
        if samples is not None and not (start.federation.partial_width or self._masked):
            joined = self._averages.setdefault(
                name, ModalityAverage(start.models[name], modality_of, start.federation.head_columns(name))
            )
            assert isinstance(joined, ModalityAverage)
            joined.add(update.weights, update.num_samples, samples)
            return
        if not (start.federation.partial_width or self._masked):
            average = self._averages.setdefault(name, RunningAverage())
            assert isinstance(average, RunningAverage)
            average.add(update.weights, update.num_samples)
            return
        if name not in self._averages:
            self._averages[name] = PartialAverage(start.models[name], start.federation.channels(name))
        classes = start.counts[client_id] > 0 if self._masked else None
        indices = start.federation.indices(client_id, start.phase, start.round_num)
        average = self._averages[name]
        assert isinstance(average, PartialAverage)
        held = None if samples is None else partial(entry_weight, modality_of, samples, update.num_samples)
        average.add(update.weights, update.num_samples, sets=indices, classes=classes, held=held)

    def result(self) -> Models:
        """Return the new models; an architecture from which no update came keeps its old one."""
        return {
            name: self._averages[name].result() if name in self._averages else weights
            for name, weights in self.start.models.items()
        }

    def server_state(self) -> Weights:
        """Return the strategy's arrays after the round."""
        return self.start.server


def group_counts(counts: np.ndarray, clients: Sequence[int]) -> np.ndarray:
    """Return ``counts`` [K, C] with zero rows for all but ``clients``."""
    kept = np.zeros_like(counts)
    kept[list(clients)] = counts[list(clients)]
    return kept
