"""Dealing a data set to clients: pure functions from labels to index lists. Numpy only.

K clients, C classes, N samples; omega is the Dirichlet concentration. The ``reference`` sampler is the one of the
Mosaic authors' code (their "unbalanced" Dirichlet split, ALGORITHM §1.2; the scheme known from NIID-Bench, Li et al.
2022, arXiv 2102.02079), equal to it bit for bit because it draws from the same numpy stream in the same order.
"""

from __future__ import annotations

import numpy as np

from ..config import PartitionConfig
from ..errors import RequestError
from ..seeding import numpy_stream

#: The authors seed the partition with the experiment's seed plus this.
REFERENCE_SEED_OFFSET = 5363


def partition(labels: np.ndarray, config: PartitionConfig, seed: int, num_classes: int) -> list[np.ndarray]:
    """Each client's indices into ``labels`` (int64 [N], values in 0..num_classes-1): K shuffled int64 lists.

    Every index is dealt exactly once and every client gets at least ``config.min_size``. Which client gets how many
    of each class depends on the class sizes, ``config`` and ``seed`` alone, not on the order of the labels.
    """
    if labels.size and not 0 <= labels.min() <= labels.max() < num_classes:
        raise ValueError(f"labels run from {labels.min()} to {labels.max()}; there are {num_classes} classes")
    num_clients, min_size = config.num_clients, config.min_size
    if len(labels) < num_clients * min_size:
        raise RequestError(
            f"partition.num_clients = {num_clients}: {len(labels)} samples cannot give each client "
            f"partition.min_size = {min_size}; at most {len(labels) // min_size} clients"
        )
    return SAMPLERS[config.sampler](labels, config, seed, num_classes)


def _reference(labels: np.ndarray, config: PartitionConfig, seed: int, num_classes: int) -> list[np.ndarray]:
    rng = np.random.RandomState(seed + REFERENCE_SEED_OFFSET)
    class_sizes = np.bincount(labels, minlength=num_classes)
    by_class = np.argsort(labels, kind="stable")
    for attempt in range(config.max_tries):
        order = by_class.copy()
        counts = _draw(rng, order, class_sizes, config, seed, attempt)
        if counts.sum(axis=1).min() >= config.min_size:
            break
    else:
        if config.policy == "reject":
            raise RequestError(
                f"partition.omega = {config.omega:g}: in partition.max_tries = {config.max_tries} draws the smallest "
                f"of partition.num_clients = {config.num_clients} never held partition.min_size = {config.min_size}; "
                "raise omega or max_tries, lower num_clients or min_size, or set partition.policy=repair"
            )
    # owner[i]: the client of sample order[i]; classes lie one after another, each cut in client order
    owner = np.repeat(np.tile(np.arange(config.num_clients), num_classes), counts.T.ravel())
    _repair(owner, counts, class_sizes, config.min_size)
    shards = np.split(order[np.argsort(owner, kind="stable")], np.cumsum(counts.sum(axis=1))[:-1])
    for shard in shards:
        rng.shuffle(shard)
    return shards


def _draw(
    rng: np.random.RandomState,
    order: np.ndarray,
    class_sizes: np.ndarray,
    config: PartitionConfig,
    seed: int,
    attempt: int,
) -> np.ndarray:
    """One draw: shuffles each class's stretch of ``order`` in place; how many each client is dealt, int64 [K, C].

    Far below omega = 0.01 the Dirichlet draw underflows: it is NaN, or 0 at every client still below its quota. The
    law's limit for omega -> 0 takes over, one such client gets the whole class, chosen on a stream of its own so
    that the reference stream stays where it was.
    """
    num_clients, quota = config.num_clients, len(order) / config.num_clients
    counts = np.zeros((num_clients, len(class_sizes)), np.int64)
    sizes, start = np.zeros(num_clients, np.int64), 0
    concentration = np.repeat(config.omega, num_clients)
    for c, class_size in enumerate(class_sizes):
        rng.shuffle(order[start : start + class_size])
        wanting = sizes < quota
        shares = np.where(wanting, rng.dirichlet(concentration), 0.0)
        total = shares.sum()
        if np.isfinite(total) and total > 0:
            shares = shares / total
        else:
            candidates = np.flatnonzero(wanting) if wanting.any() else np.arange(num_clients)
            one = numpy_stream(seed, "partition", "underflow", attempt, c).choice(candidates)
            shares = (np.arange(num_clients) == one).astype(float)
        cuts = (np.cumsum(shares) * class_size).astype(int)[:-1]
        counts[:, c] = np.diff(cuts, prepend=0, append=class_size)
        sizes += counts[:, c]
        start += class_size
    return counts


def _repair(owner: np.ndarray, counts: np.ndarray, class_sizes: np.ndarray, min_size: int) -> None:
    """Fills clients below ``min_size``, lowest id first, from the most plentiful class of the largest client.

    Changes ``owner`` [N] and ``counts`` [K, C] in place and draws nothing. No donor falls below ``min_size``; where
    N >= K * min_size there is always one to give.
    """
    sizes, ends = counts.sum(axis=1), np.cumsum(class_sizes)
    for client in np.flatnonzero(sizes < min_size):
        while sizes[client] < min_size:
            donor = sizes.argmax()
            c = counts[donor].argmax()
            amount = min(min_size - sizes[client], sizes[donor] - min_size, counts[donor, c])
            stretch = owner[ends[c] - class_sizes[c] : ends[c]]
            stretch[np.flatnonzero(stretch == donor)[-amount:]] = client
            for party, change in ((donor, -amount), (client, amount)):
                counts[party, c] += change
                sizes[party] += change


def _iid(labels: np.ndarray, config: PartitionConfig, seed: int, num_classes: int) -> list[np.ndarray]:
    """Classes shuffled, laid end to end and dealt like cards: class counts and sizes differ by at most one."""
    rng = numpy_stream(seed, "partition", "iid")
    order = rng.permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    return [rng.permutation(order[client :: config.num_clients]) for client in range(config.num_clients)]


def label_counts(labels: np.ndarray, shards: list[np.ndarray], num_classes: int) -> np.ndarray:
    """How many samples of each class each client holds: int64 [K, C]."""
    return np.stack([np.bincount(labels[shard], minlength=num_classes) for shard in shards]).astype(np.int64)


def held_out_mask(labels: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """A random bool mask [N] with ``count`` of the samples, every class within one of its proportional share."""
    order = rng.permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    mask = np.zeros(len(labels), bool)
    if count:
        mask[order[(np.arange(count) * len(labels) + rng.integers(len(labels))) // count]] = True
    return mask


def split_validation(
    labels: np.ndarray, shards: list[np.ndarray], fraction: float, seed: int
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """(train shards, validation shards): client k of n_k samples holds out floor(fraction * n_k), by class."""
    train, validation = [], []
    for client, shard in enumerate(shards):
        rng = numpy_stream(seed, "validation", client)
        mask = held_out_mask(labels[shard], int(fraction * len(shard)), rng)
        train.append(shard[~mask])
        validation.append(shard[mask])
    return train, validation


def skew(counts: np.ndarray) -> float:
    """Mean over clients of KL(client's label distribution || uniform), in nats: 0 (even) to log C (one class each).

    ``counts``: [K, C]; clients without samples are left out.
    """
    counts = counts[counts.sum(axis=1) > 0]
    shares = counts / counts.sum(axis=1, keepdims=True)
    entropy = -np.sum(shares * np.log(np.where(shares > 0, shares, 1.0)), axis=1)
    return float(np.log(counts.shape[1]) - entropy.mean())


SAMPLERS = {"reference": _reference, "iid": _iid}
