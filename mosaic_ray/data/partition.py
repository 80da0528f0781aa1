"""Dealing a data set to clients: pure functions from labels to index lists. Numpy only.

K clients, C classes, N samples; omega is the Dirichlet concentration. The ``reference`` sampler is the one of the
Mosaic authors' code (their "unbalanced" Dirichlet split, ALGORITHM §1.2; the scheme known from NIID-Bench, Li et al.
2022, arXiv 2102.02079), equal to it bit for bit because it draws from the same numpy stream in the same order. All
others draw from addressed streams.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..config.schema import PartitionConfig
from ..core.errors import RequestError
from ..core.seeding import numpy_stream

#: The authors seed the partition with the experiment's seed plus this.
REFERENCE_SEED_OFFSET = 5363


def partition(labels: np.ndarray, config: PartitionConfig, seed: int, num_classes: int) -> list[np.ndarray]:
    """Each client's indices into ``labels`` (int64 [N], values in 0..num_classes-1): K shuffled int64 lists.

    Every index is dealt exactly once and every client gets at least ``config.min_size``. Which client gets how many
    of each class depends on the class sizes, ``config`` and ``seed`` alone, not on the order of the labels.

    Where a draw leaves a client below ``config.min_size``, all is drawn again, ``config.max_tries`` times in all; then
    ``config.policy`` decides: "reject" refuses, "repair" moves samples to the small clients of the last draw.
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


# --- what samplers share ---------------------------------------------------------------------------------------------


def _accepted(draw: Callable[[int], np.ndarray], config: PartitionConfig) -> np.ndarray:
    """The first counts [K, C] of ``draw(attempt)`` that leave nobody below ``min_size``; the last, to be repaired."""
    for attempt in range(config.max_tries):
        counts = draw(attempt)
        if counts.sum(axis=1).min() >= config.min_size:
            return counts
    if config.policy == "reject":
        name = "classes_per_client" if config.sampler == "pathological" else "omega"
        raise RequestError(
            f"partition.{name} = {getattr(config, name):g}: in partition.max_tries = {config.max_tries} draws the "
            f"smallest of partition.num_clients = {config.num_clients} never held partition.min_size = "
            f"{config.min_size}; raise {name} or max_tries, lower num_clients or min_size, or set "
            "partition.policy=repair"
        )
    return counts


def _dealt(
    order: np.ndarray,
    counts: np.ndarray,
    config: PartitionConfig,
    rng: np.random.Generator | np.random.RandomState,
    most_classes: int | None = None,
) -> list[np.ndarray]:
    """``order`` [N], its classes one after another, each cut in client order by ``counts`` [K, C]; then repaired."""
    num_clients, num_classes = counts.shape
    class_sizes = counts.sum(axis=0)
    # owner[i]: the client of sample order[i]
    owner = np.repeat(np.tile(np.arange(num_clients), num_classes), counts.T.ravel())
    _repair(owner, counts, class_sizes, config.min_size, most_classes or num_classes)
    shards = np.split(order[np.argsort(owner, kind="stable")], np.cumsum(counts.sum(axis=1))[:-1])
    for shard in shards:
        rng.shuffle(shard)
    return shards


def _repair(owner: np.ndarray, counts: np.ndarray, class_sizes: np.ndarray, min_size: int, most_classes: int) -> None:
    """Fills clients below ``min_size``, lowest id first, from the most plentiful class of the largest client.

    Changes ``owner`` [N] and ``counts`` [K, C] in place and draws nothing. No donor falls below ``min_size``; where
    N >= K * min_size there is always one to give. A client of ``most_classes`` classes takes of these alone, and there
    may be none to give.
    """
    sizes, ends = counts.sum(axis=1), np.cumsum(class_sizes)
    for client in np.flatnonzero(sizes < min_size):
        while sizes[client] < min_size:
            held = counts[client] > 0
            common_options = held if held.sum() >= most_classes else np.ones_like(held)
            givers = sizes > min_size
            if not common_options.all():
                givers &= (counts[:, common_options] > 0).any(axis=1)
            if not givers.any():
                raise RequestError(
                    f"partition.classes_per_client = {most_classes}: client {client} holds {sizes[client]} samples, "
                    f"and no other can spare one of its classes, so it stays below partition.min_size = {min_size}; "
                    "raise classes_per_client, or lower min_size or num_clients"
                )
            donor = np.where(givers, sizes, 0).argmax()
            c = np.where(common_options, counts[donor], 0).argmax()
            amount = min(min_size - sizes[client], sizes[donor] - min_size, counts[donor, c])
            stretch = owner[ends[c] - class_sizes[c] : ends[c]]
            stretch[np.flatnonzero(stretch == donor)[-amount:]] = client
            for party, change in ((donor, -amount), (client, amount)):
                counts[party, c] += change
                sizes[party] += change


def _by_class(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """All indices, class after class, each class shuffled."""
    order = rng.permutation(len(labels))
    return order[np.argsort(labels[order], kind="stable")]


# --- the authors' sampler --------------------------------------------------------------------------------------------


def _reference(labels: np.ndarray, config: PartitionConfig, seed: int, num_classes: int) -> list[np.ndarray]:
    """Every class by shares from Dir(omega * 1_K) over the clients that hold less than N / K so far."""
    rng = np.random.RandomState(seed + REFERENCE_SEED_OFFSET)
    class_sizes = np.bincount(labels, minlength=num_classes)
    by_class = np.argsort(labels, kind="stable")
    order = np.empty_like(by_class)

    def draw(attempt: int) -> np.ndarray:
        order[:] = by_class
        return _draw(rng, order, class_sizes, config, seed, attempt)

    counts = _accepted(draw, config)
    return _dealt(order, counts, config, rng)


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


# --- the others ------------------------------------------------------------------------------------------------------


def _dirichlet(labels: np.ndarray, config: PartitionConfig, seed: int, num_classes: int) -> list[np.ndarray]:
    """Every class by shares from Dir(omega * 1_K) over all clients (Yurochkin et al. 2019, arXiv 1905.12022).

    ``reference`` without its quota: a client may come to hold nearly everything.
    """
    rng = numpy_stream(seed, "partition", "dirichlet")
    class_sizes = np.bincount(labels, minlength=num_classes)
    counts = _accepted(lambda _: _over_clients(rng, class_sizes, config), config)
    return _dealt(_by_class(labels, rng), counts, config, rng)


def _over_clients(rng: np.random.Generator, class_sizes: np.ndarray, config: PartitionConfig) -> np.ndarray:
    """Each class cut by shares from Dir(omega * 1_K): counts [K, C].

    At the nearest sample: cut at the one below, as ``reference`` is, the last client holds one of nearly every class.
    """
    shares = rng.dirichlet(np.full(config.num_clients, config.omega), len(class_sizes))
    cuts = np.rint(np.cumsum(shares.T[:-1], axis=0) * class_sizes).astype(np.int64)
    return np.diff(cuts, axis=0, prepend=0, append=class_sizes[None])


def _quantity(labels: np.ndarray, config: PartitionConfig, seed: int, num_classes: int) -> list[np.ndarray]:
    """Sizes from Dir(omega * 1_K), the quantity skew of NIID-Bench (Li et al. 2022); classes as even as sizes allow.

    Theirs deals labels at random; here each class is spread evenly over a line, which is cut by the sizes, so that
    small clients hold the classes of large ones in proportion, to a sample or two.
    """
    rng = numpy_stream(seed, "partition", "quantity")
    counts = _accepted(lambda _: _over_clients(rng, np.array([len(labels)]), config), config)
    class_sizes = np.bincount(labels, minlength=num_classes)
    classes = np.repeat(np.arange(num_classes), class_sizes)
    rank = np.arange(len(labels)) - (np.cumsum(class_sizes) - class_sizes)[classes]
    place = (rank + rng.random(num_classes)[classes]) / class_sizes[classes]
    return _dealt(_by_class(labels, rng)[np.argsort(place, kind="stable")], counts, config, rng)


def _balanced(labels: np.ndarray, config: PartitionConfig, seed: int, num_classes: int) -> list[np.ndarray]:
    """Equal sizes (to one sample); every client draws its shares of the classes from Dir(omega * 1_C).

    Clients choose one after another, in random order: a sample that is left, of class c, is worth share c (ALGORITHM
    §1.2; with equal class sizes nearly the scheme of Hsu et al. 2019, arXiv 1909.06335). Samples asked of a class
    beyond its end are drawn again from the client's other classes, and where it wants none of those that are left, by
    new shares of them: nobody is dealt another's leftovers (D5). Nobody can be too small, so ``max_tries`` and
    ``policy`` have no say.
    """
    rng = numpy_stream(seed, "partition", "balanced")
    left = np.bincount(labels, minlength=num_classes)
    sizes = np.diff(np.arange(config.num_clients + 1) * len(labels) // config.num_clients)
    counts = np.zeros((config.num_clients, num_classes), np.int64)
    for client in rng.permutation(config.num_clients):
        shares = rng.dirichlet(np.full(num_classes, config.omega))
        while missing := sizes[client] - counts[client].sum():
            if not (left * shares).any():
                classes = np.flatnonzero(left)
                shares[classes] = rng.dirichlet(np.full(len(classes), config.omega))
            weights = left * shares
            taken = np.minimum(rng.multinomial(missing, weights / weights.sum()), left)
            counts[client] += taken
            left -= taken
    return _dealt(_by_class(labels, rng), counts, config, rng)


def _pathological(labels: np.ndarray, config: PartitionConfig, seed: int, num_classes: int) -> list[np.ndarray]:
    """At most ``classes_per_client`` classes for every client (McMahan et al. 2017, arXiv 1602.05629); omega is unused.

    Theirs cuts the sorted labels into K * classes_per_client pieces of one size; here no piece holds two classes: a
    class is cut into as many equal ones as its size earns, and its clients are drawn at random. A repair keeps the
    bound, too; where it cannot, the request is refused.
    """
    num_clients, most = config.num_clients, config.classes_per_client
    rng = numpy_stream(seed, "partition", "pathological")
    class_sizes = np.bincount(labels, minlength=num_classes)
    num_held = np.count_nonzero(class_sizes)
    if num_clients * most < num_held:
        raise RequestError(
            f"partition.classes_per_client = {most}: partition.num_clients = {num_clients} of so few classes cannot "
            f"hold all {num_held}; it takes at least {-(-num_held // num_clients)}, or {-(-num_held // most)} clients"
        )
    pieces = _pieces(rng, class_sizes, num_clients, most)
    counts = _accepted(lambda _: _by_pieces(rng, class_sizes, pieces, num_clients), config)
    return _dealt(_by_class(labels, rng), counts, config, rng, most)


def _pieces(rng: np.random.Generator, class_sizes: np.ndarray, num_clients: int, most: int) -> np.ndarray:
    """Into how many pieces each class is cut, int64 [C]: K * ``most`` in all, K and a class's samples at most of one.

    The smallest is as large as can be (D'Hondt's rule, ties by lot).
    """
    pieces = np.minimum(class_sizes, 1)
    divisors = np.arange(2, num_clients + 1)
    quotients = np.where(divisors <= class_sizes[:, None], class_sizes[:, None] / divisors, 0.0).ravel()
    lots = np.repeat(rng.random(len(class_sizes)), len(divisors))
    best = np.lexsort((lots, -quotients))[: num_clients * most - pieces.sum()]
    classes = np.repeat(np.arange(len(class_sizes)), len(divisors))
    return pieces + np.bincount(classes[best[quotients[best] > 0]], minlength=len(class_sizes))


def _by_pieces(rng: np.random.Generator, class_sizes: np.ndarray, pieces: np.ndarray, num_clients: int) -> np.ndarray:
    """Each class's ``pieces`` to as many clients, those that have fewest so far, drawn among equals: counts [K, C].

    Numbers of pieces then differ by one at most, so there are always enough clients with room for another class.
    """
    counts, held = np.zeros((num_clients, len(class_sizes)), np.int64), np.zeros(num_clients, np.int64)
    for c in rng.permutation(np.flatnonzero(class_sizes)):
        chosen = np.lexsort((rng.random(num_clients), held))[: pieces[c]]
        counts[chosen, c] = np.diff(np.arange(pieces[c] + 1) * class_sizes[c] // pieces[c])
        held[chosen] += 1
    return counts


def _iid(labels: np.ndarray, config: PartitionConfig, seed: int, num_classes: int) -> list[np.ndarray]:
    """Classes shuffled, laid end to end and dealt like cards: class counts and sizes differ by at most one (D6).

    Nobody can be too small, so ``max_tries`` and ``policy`` have no say, and nor has omega.
    """
    rng = numpy_stream(seed, "partition", "iid")
    order = _by_class(labels, rng)
    return [rng.permutation(order[client :: config.num_clients]) for client in range(config.num_clients)]


# --- what is said of a partition -------------------------------------------------------------------------------------


def label_counts(labels: np.ndarray, shards: list[np.ndarray], num_classes: int) -> np.ndarray:
    """How many samples of each class each client holds: int64 [K, C]."""
    return np.stack([np.bincount(labels[shard], minlength=num_classes) for shard in shards]).astype(np.int64)


def held_out_mask(labels: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """A random bool mask [N] with ``count`` of the samples, every class within one of its proportional share."""
    order = _by_class(labels, rng)
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


SAMPLERS = {
    "reference": _reference,
    "dirichlet": _dirichlet,
    "balanced": _balanced,
    "iid": _iid,
    "pathological": _pathological,
    "quantity": _quantity,
}
