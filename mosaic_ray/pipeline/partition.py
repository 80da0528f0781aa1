"""Stage P: deal the training images, and the modalities of their samples, to the clients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from ..config.client_layout import client_modalities
from ..config.schema import ExperimentConfig
from ..core.errors import RequestError
from ..core.health import partition_findings
from ..core.types import DataFacts, Dataset, ImageSet
from ..data.partition import label_counts, partition, split_validation
from ..data.records import in_subsets, mean_and_scale, present_in, restrict, standardise, subsets, sums_of, unpack
from ..federated.client_models import Federation
from ..federated.communication import Entries, Tally, size_of, size_of_entries
from ..storage.store import StageWriter
from ..tracking.progress import StageProgress
from .context import Facts, RunContext, Shards
from .stages import PARTITION

#: The part of the stage's result with the sums over clients by which vectors are standardised.
SUMS = "standardisation"

#: The kind under which the bytes of these sums count.
STATISTICS = "statistics"


def deal(ctx: RunContext) -> Shards:
    """Deal the training images to the clients; needs neither torch nor Ray.

    Where samples have several modalities, ``ctx.dataset`` is replaced by what clients and test see (``as_held``).

    Raises:
        RequestError: where a client is left without training samples.
    """
    config, data = ctx.config, ctx.dataset
    modalities = data.facts.modalities
    vectors = [modality.name for modality in modalities if modality.kind == "vector"]
    masks = held_modalities(config, data.facts)

    def compute(writer: StageWriter, progress: StageProgress) -> Facts:
        shards = partition(data.train.labels, config.partition, config.seed, data.facts.num_classes, data.groups)
        fraction = config.partition.validation_fraction
        train, validation = split_validation(data.train.labels, shards, fraction, config.seed)
        counts = label_counts(data.train.labels, train, data.facts.num_classes)
        arrays = {"counts": counts}
        for name, lists in (("train", train), ("validation", validation)):
            arrays[name] = np.concatenate(lists).astype(np.int64)
            arrays[f"{name}_sizes"] = np.array([len(s) for s in lists], np.int64)
        writer.add("shards", arrays)
        facts: Facts = {"findings": [f.to_json() for f in partition_findings(counts.sum(0).tolist())]}
        if vectors:
            traffic, sums = Tally(1, len(train)), []
            for client, (rows, held) in enumerate(zip(train, masks, strict=True)):
                sums.append(client_sums(data, rows, held))
                if sums[-1]:
                    traffic.add("uplink", STATISTICS, client, size_of(sums[-1]))
            # every modality has a client that holds it
            writer.add(SUMS, {name: np.sum([own[name] for own in sums if name in own], 0) for name in vectors})
            writer.add("communication", traffic.arrays())
            facts["communication"] = traffic.totals()
        progress.advance()
        return facts

    result = ctx.find_or_compute(PARTITION, compute)
    arrays = result.load("shards")
    lists = {name: np.split(arrays[name], np.cumsum(arrays[f"{name}_sizes"])[:-1]) for name in ("train", "validation")}
    shards = Shards(result.key, lists["train"], lists["validation"], arrays["counts"])
    empty = np.flatnonzero(shards.sizes == 0)
    if len(empty):
        raise RequestError(
            f"partition.num_clients: client {int(empty[0])} is left without training samples; "
            "use fewer clients, a larger partition.omega or a smaller partition.validation_fraction"
        )
    ctx.shards = shards
    if modalities:
        rows = [np.concatenate(own) for own in zip(shards.train, shards.validation, strict=True)]
        ctx.dataset = as_held(data, rows, masks, result.load(SUMS) if vectors else {})
    return shards


def held_modalities(config: ExperimentConfig, facts: DataFacts) -> np.ndarray:
    """Return which modalities each client holds, bool [K, M]; M is 0 where samples are images alone."""
    names = [modality.name for modality in facts.modalities]
    if not names:
        return np.zeros((config.partition.num_clients, 0), bool)
    return np.array([[name in own for name in names] for own in client_modalities(config, names)])


def client_sums(data: Dataset, rows: np.ndarray, held: np.ndarray) -> dict[str, np.ndarray]:
    """Return what a client sends so that vectors can be standardised: ``records.sums_of`` each vector that it holds.

    Args:
        data: the data set, vectors as they were read.
        rows: the client's training samples.
        held: the modalities that it holds, bool [M].
    """
    modalities, records = data.facts.modalities, data.train.images[rows]
    values, present = unpack(modalities, records), present_in(modalities, records)
    return {
        modality.name: sums_of(modality, values[modality.name][present[:, number]])
        for number, modality in enumerate(modalities)
        if modality.kind == "vector" and held[number]
    }


def as_held(data: Dataset, rows: Sequence[np.ndarray], masks: np.ndarray, sums: Mapping[str, np.ndarray]) -> Dataset:
    """Return ``data`` as clients hold it: training samples without the modalities that their client lacks.

    Vectors are standardised by ``sums``, those of all clients. The test samples are there once for each set of
    modalities (``records.in_subsets``), so that accuracy on them is the mean over these sets.

    Args:
        data: the data set as it was read.
        rows: each client's samples, for training and validation; samples of no client keep all modalities.
        masks: the modalities that each client holds, bool [K, M].
        sums: by vector, float64 [3, d], as ``records.standardise`` takes them.
    """
    modalities = data.facts.modalities
    kept = np.ones((len(data.train), len(modalities)), bool)
    for own, held in zip(rows, masks, strict=True):
        kept[own] = held
    train = restrict(modalities, standardise(modalities, data.train.images, sums), kept)
    test = in_subsets(modalities, standardise(modalities, data.test.images, sums))
    labels = np.tile(data.test.labels, len(subsets(len(modalities))))
    return replace(data, train=ImageSet(train, data.train.labels), test=ImageSet(test, labels))


def standardisation(ctx: RunContext) -> dict[str, dict[str, list[float]]]:
    """Return by which means and standard deviations vectors are standardised: by modality ``mean`` and ``scale``, [d].

    A scale of 0 stands for a value that never varies, which becomes 0. Empty where samples have no vectors.
    """
    vectors = [modality.name for modality in ctx.dataset.facts.modalities if modality.kind == "vector"]
    sums = ctx.results[PARTITION.name].load(SUMS) if vectors else {}
    found = {name: mean_and_scale(sums[name]) for name in vectors}
    return {
        name: {"mean": mean.tolist(), "scale": np.where(np.isinf(scale), 0, scale).tolist()}
        for name, (mean, scale) in found.items()
    }


def statistics_messages(federation: Federation, counts: np.ndarray, tally: Tally) -> None:
    """Add the bytes of ``client_sums``, which every client sends once."""
    facts = federation.facts
    for client, held in enumerate(held_modalities(federation.config, facts)):
        entries: Entries = {
            modality.name: ((3, modality.size), np.float64)
            for modality, own in zip(facts.modalities, held, strict=True)
            if own and modality.kind == "vector"
        }
        if entries:
            tally.add("uplink", STATISTICS, client, size_of_entries(entries))
