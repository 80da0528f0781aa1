"""Predict the messages of federated rounds, for the ledger: by arithmetic alone, without training."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..config.plugins import strategy_named
from ..data.records import subsets
from ..distillation.rehearsal import generator_size
from ..federated.client_models import Federation
from ..federated.communication import (
    Size,
    Tally,
    num_prototypes,
    prototype_entries,
    size_of_entries,
    statistics_entries,
)
from .rounds import ADDRESS, CLOSING, PROTOTYPE_HISTORY, TRIAL, answering, cohort_of, exact_bn_at_end
from .stages import rehearses, rehearses_early, weights_tried


def warmup_messages(federation: Federation, counts: np.ndarray, tally: Tally) -> None:
    """Add the messages of the warm-up: label counts, models, and prototypes if they are sent after every round."""
    config = federation.config
    for client_id in range(config.partition.num_clients):
        tally.add("uplink", "counts", client_id, size_of_entries({"counts": (counts.shape[1:], np.int64)}))
    whole = rehearses_early(config)
    collected = _rounds_messages(federation, tally, ADDRESS, config.warmup.num_rounds, config.warmup.bn, whole)
    if rehearses_early(config):
        add_generators(federation, tally)
    if config.prototypes.rounds == "all":
        add_prototypes(federation, counts, tally, collected)


def closing_messages(federation: Federation, counts: np.ndarray, tally: Tally) -> None:
    """Add the messages of the closing rounds."""
    section = federation.config.finetune
    _rounds_messages(federation, tally, CLOSING, section.num_rounds, section.bn, rehearses(federation.config))
    if rehearses(federation.config) and not (weights_tried(federation.config) or rehearses_early(federation.config)):
        add_generators(federation, tally)


def add_generators(federation: Federation, tally: Tally) -> None:
    """Add the others' generators to every client."""
    clients = range(len(federation.classifiers))
    if not federation.facts.modalities:
        size = generator_size(federation.config, federation.facts)
        for k in clients:
            tally.add("downlink", "generators", k, size, times=len(clients) - 1)
        return
    sizes = [generator_size(federation.config, federation.facts, owner) for owner in clients]
    for k in clients:
        for owner in clients:
            if owner != k:
                tally.add("downlink", "generators", k, sizes[owner])


def trial_messages(federation: Federation, counts: np.ndarray, tally: Tally) -> None:
    """Add the messages of one trial of a rehearsal weight."""
    config = federation.config
    _rounds_messages(federation, tally, TRIAL, config.rehearsal.trial_rounds, config.finetune.bn, True)


def _rounds_messages(
    federation: Federation, tally: Tally, address: str, num_rounds: int, bn: str, whole: bool
) -> np.ndarray:
    """Add the messages of rounds; returns how often each client answered in the last rounds of P3, int64 [K].

    ``whole``: as in ``RoundsConfig``.
    """
    config, clients = federation.config, federation.config.partition.num_clients
    asked, answered, collected = np.zeros((3, clients), np.int64)
    for round_num in range(num_rounds):
        cohort = cohort_of(config, address, round_num)
        there = answering(config, address, round_num, cohort)
        asked[cohort] += 1
        answered[there] += 1
        if round_num >= num_rounds - PROTOTYPE_HISTORY:
            collected[there] += 1
    strategy = strategy_named(config.federation.strategy)
    sizes: dict[Any, tuple[Size, Size, Size]] = {}
    modalities = federation.modalities if federation.facts.modalities else [()] * clients
    for k, maker in enumerate(zip(federation.classifiers, federation.widths, strict=True)):
        if (maker, modalities[k]) not in sizes:
            down, up = strategy.messages(federation.entries(*maker))
            own = federation.trained_entries(k, federation.entries(*maker), whole)
            sizes[maker, modalities[k]] = tuple(map(size_of_entries, (own, down, up)))  # type: ignore[assignment]
        model, down_size, up_size = sizes[maker, modalities[k]]
        for direction, extra, times in (("downlink", down_size, int(asked[k])), ("uplink", up_size, int(answered[k]))):
            tally.add(direction, "weights", k, model, times=times if strategy.every_round else min(times, 1))
            if extra.payload:
                tally.add(direction, "strategy", k, extra, times=times)
        if exact_bn_at_end(config, bn) and num_rounds:
            network = federation.entries(maker[0])
            for layers in federation.statistics_passes(maker[0]):
                tally.add("downlink", "weights", k, size_of_entries(federation.trained_entries(k, network, whole=True)))
                read = federation.trained_entries(k, dict.fromkeys(layers))  # absent modalities are in no sum
                tally.add("uplink", "statistics", k, size_of_entries(statistics_entries(network, read)))
    return collected


def add_prototypes(federation: Federation, counts: np.ndarray, tally: Tally, times: np.ndarray) -> None:
    """Add each client's prototypes, ``times`` [K] times."""
    section = federation.config.prototypes
    for k, name in enumerate(federation.classifiers):
        sets = len(subsets(len(federation.modalities[k]))) if section.subsets == "all" else 1
        count = sets * int(num_prototypes(counts[k], section).sum())
        feature_dim = federation.entries(name)["head.weight"][0][1]
        message = size_of_entries(prototype_entries(count, feature_dim, section.judging > 0))
        tally.add("uplink", "prototypes", k, message, times=int(times[k]))
