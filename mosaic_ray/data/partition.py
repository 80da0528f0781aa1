"""Split a data set among clients: pure functions from labels to index lists.

K clients, C classes, N samples; omega is the Dirichlet concentration. The ``reference`` sampler equals the Mosaic
authors' code (their "unbalanced" Dirichlet split, docs/algorithm.md 1.2; the scheme of NIID-Bench, Li et al. 2022,
arXiv 2102.02079) bit for bit, because it draws from the same numpy stream in the same order. All others draw from
addressed streams.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from ..config.registry import sampler_kind
from ..config.schema import PartitionConfig
from ..config.user_code import load_object, users_code
from ..core.errors import RequestError
from ..core.seeding import numpy_stream
from ..core.types import Groups

#: The authors seed the partition with the experiment's seed plus this.
REFERENCE_SEED_OFFSET = 5363


def partition(
    labels: np.ndarray, config: PartitionConfig, seed: int, num_classes: int, groups: Mapping[str, Groups] = {}
) -> list[np.ndarray]:
    """Return each client's indices into ``labels`` (int64 [N], values in 0..num_classes-1): K shuffled int64 arrays.

    Every index occurs exactly once, and every client gets at least ``config.min_size``. The class counts of each client
    depend on the class sizes, ``config`` and ``seed`` alone, not on the order of the labels. ``config.sampler`` names
    one of ``SAMPLERS``, or user code with the same arguments (labels, class sizes int64 [C], config, seed). One that
    is in ``groups`` (``Dataset.groups``) gives each client a group; indices in no client's group do not occur.

    If a draw leaves a client below ``config.min_size``, all are drawn again, ``config.max_tries`` times at most.
    Then ``config.policy`` decides: "reject" raises ``RequestError``, "repair" moves samples to the small clients.
    """
    if labels.size and not 0 <= labels.min() <= labels.max() < num_classes:
        raise ValueError(f"labels run from {labels.min()} to {labels.max()}; there are {num_classes} classes")
    num_clients, min_size = config.num_clients, config.min_size
    if len(labels) < num_clients * min_size:
        raise RequestError(
            f"partition.num_clients = {num_clients}: {len(labels)} samples cannot give each client "
            f"partition.min_size = {min_size}; at most {len(labels) // min_size} clients"
        )
    if sampler_kind(config.sampler) in ("file", "natural"):
        return _by_groups(groups[config.sampler], config, seed)
    class_sizes = np.bincount(labels, minlength=num_classes)
    if config.sampler in SAMPLERS:
        return SAMPLERS[config.sampler](labels, class_sizes, config, seed)
    what = f"partition.sampler = {config.sampler}"
    sampler = load_object(what, config.sampler, function=True)
    with users_code(what):
        shards = [np.asarray(shard, np.int64) for shard in sampler(labels, class_sizes, config, seed)]
    if len(shards) != num_clients or not np.array_equal(np.sort(np.concatenate(shards)), np.arange(len(labels))):
        raise RequestError(f"{what}: it must give each of {num_clients} clients indices, and every index exactly once")
    if min(map(len, shards)) < min_size:
        raise RequestError(f"{what}: it left a client with fewer than partition.min_size = {min_size} samples")
    return shards


def chosen_groups(groups: Groups, config: PartitionConfig) -> tuple[np.ndarray, np.ndarray]:
    """Return the group of each client, rising int64 [K], and all groups' sizes int64 [G].

    The K largest groups have a client; of equal ones the first. A file's groups are its clients, so all have one.
    ``RequestError`` where there are too few groups, or a client has less than ``config.min_size``.
    """
    sizes, clients = np.bincount(groups.groups), config.num_clients
    what, asked = f"partition.sampler = {config.sampler}", f"partition.num_clients = {clients}"
    if sampler_kind(config.sampler) == "file" and len(sizes) != clients:
        raise RequestError(f"{what}: it has {len(sizes)} clients, and {asked}; give --clients {len(sizes)}")
    if len(sizes) < clients:
        raise RequestError(f"{what}: the column has {len(sizes)} values, fewer than {asked}; lower that")
    chosen = np.sort(np.argsort(-sizes, kind="stable")[:clients])
    if sizes[chosen].min() < config.min_size:
        enough = np.count_nonzero(sizes >= config.min_size)
        raise RequestError(
            f"{what}: {enough} of {len(sizes)} {'clients' if len(sizes) == clients else 'values'} have "
            f"partition.min_size = {config.min_size} images, and {asked}; lower min_size or num_clients"
        )
    return chosen, sizes


def _by_groups(groups: Groups, config: PartitionConfig, seed: int) -> list[np.ndarray]:
    """Give each client its group (``chosen_groups``). omega, ``policy`` and ``max_tries`` do not apply."""
    chosen, sizes = chosen_groups(groups, config)
    by_group = np.split(groups.rows[np.argsort(groups.groups, kind="stable")], np.cumsum(sizes)[:-1])
    rows = (by_group[group] for group in chosen)
    return [numpy_stream(seed, "partition", "group", k).permutation(own) for k, own in enumerate(rows)]


def _accepted(draw: Callable[[int], np.ndarray], config: PartitionConfig) -> np.ndarray:
    """Return the first counts [K, C] of ``draw(attempt)`` with no client below ``min_size``, else the last ones."""
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
    """Cut each class of ``order`` [N] (sorted by class) in client order by ``counts`` [K, C], and repair the result."""
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
    """Fill clients below ``min_size``, lowest id first, from the most plentiful class of the largest client.

    Changes ``owner`` [N] and ``counts`` [K, C] in place and draws nothing. No donor falls below ``min_size``; if
    N >= K * min_size there is always a donor. A client of ``most_classes`` classes receives only these, so that it
    may have no donor: then ``RequestError``.
    """
    sizes, ends = counts.sum(axis=1), np.cumsum(class_sizes)
    for client in np.flatnonzero(sizes < min_size):
        while sizes[client] < min_size:
            held = counts[client] > 0
            allowed = held if held.sum() >= most_classes else np.ones_like(held)
            givers = sizes > min_size
            if not allowed.all():
                givers &= (counts[:, allowed] > 0).any(axis=1)
            if not givers.any():
                raise RequestError(
                    f"partition.classes_per_client = {most_classes}: client {client} holds {sizes[client]} samples, "
                    f"and no other can spare one of its classes, so it stays below partition.min_size = {min_size}; "
                    "raise classes_per_client, or lower min_size or num_clients"
                )
            donor = np.where(givers, sizes, 0).argmax()
            c = np.where(allowed, counts[donor], 0).argmax()
            amount = min(min_size - sizes[client], sizes[donor] - min_size, counts[donor, c])
            stretch = owner[ends[c] - class_sizes[c] : ends[c]]
            stretch[np.flatnonzero(stretch == donor)[-amount:]] = client
            for party, change in ((donor, -amount), (client, amount)):
                counts[party, c] += change
                sizes[party] += change


def _by_class(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return all indices [N], sorted by class and shuffled within each class."""
    order = rng.permutation(len(labels))
    return order[np.argsort(labels[order], kind="stable")]


def _reference(labels: np.ndarray, class_sizes: np.ndarray, config: PartitionConfig, seed: int) -> list[np.ndarray]:
    """Split every class by shares from Dir(omega * 1_K) over the clients that hold less than N / K so far.

    Far below omega = 0.01 the Dirichlet draw underflows: it is NaN, or 0 at every client still below its quota. Then
    one such client gets the whole class, as in the limit omega -> 0. It is drawn from a separate stream, so the
    reference stream does not move.
    """
    rng = np.random.RandomState(seed + REFERENCE_SEED_OFFSET)
    num_clients, quota = config.num_clients, len(labels) / config.num_clients
    by_class = np.argsort(labels, kind="stable")
    order = np.empty_like(by_class)

    def draw(attempt: int) -> np.ndarray:
        """Shuffle each class's part of ``order`` in place; return the samples of each client, int64 [K, C]."""
        order[:] = by_class
        counts = np.zeros((num_clients, len(class_sizes)), np.int64)
        sizes, start = np.zeros(num_clients, np.int64), 0
        for c, class_size in enumerate(class_sizes):
            rng.shuffle(order[start : start + class_size])
            wanting = sizes < quota
            shares = np.where(wanting, rng.dirichlet(np.repeat(config.omega, num_clients)), 0.0)
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

    counts = _accepted(draw, config)
    return _dealt(order, counts, config, rng)


def _dirichlet(labels: np.ndarray, class_sizes: np.ndarray, config: PartitionConfig, seed: int) -> list[np.ndarray]:
    """Split every class by shares from Dir(omega * 1_K) over all clients (Yurochkin et al. 2019, arXiv 1905.12022).

    This is ``reference`` without its quota: a client may hold nearly all samples.
    """
    rng = numpy_stream(seed, "partition", "dirichlet")
    counts = _accepted(lambda _: _over_clients(rng, class_sizes, config), config)
    return _dealt(_by_class(labels, rng), counts, config, rng)


def _over_clients(rng: np.random.Generator, class_sizes: np.ndarray, config: PartitionConfig) -> np.ndarray:
    """Return counts [K, C] of each class by shares from Dir(omega * 1_K), cut at the nearest sample.

    Cut at the sample below, as in ``reference``, the last client would hold a sample of nearly every class.
    """
    shares = rng.dirichlet(np.full(config.num_clients, config.omega), len(class_sizes))
    cuts = np.rint(np.cumsum(shares.T[:-1], axis=0) * class_sizes).astype(np.int64)
    return np.diff(cuts, axis=0, prepend=0, append=class_sizes[None])


def _quantity(labels: np.ndarray, class_sizes: np.ndarray, config: PartitionConfig, seed: int) -> list[np.ndarray]:
    """Draw sizes from Dir(omega * 1_K), the quantity skew of NIID-Bench (Li et al. 2022), with even classes.

    NIID-Bench assigns labels at random. Here each class is spread evenly over a line, and the line is cut by the sizes,
    so that clients of every size hold the classes in the same proportion, to a sample or two.
    """
    rng = numpy_stream(seed, "partition", "quantity")
    counts = _accepted(lambda _: _over_clients(rng, np.array([len(labels)]), config), config)
    num_classes = len(class_sizes)
    classes = np.repeat(np.arange(num_classes), class_sizes)
    rank = np.arange(len(labels)) - (np.cumsum(class_sizes) - class_sizes)[classes]
    place = (rank + rng.random(num_classes)[classes]) / class_sizes[classes]
    return _dealt(_by_class(labels, rng)[np.argsort(place, kind="stable")], counts, config, rng)


def _balanced(labels: np.ndarray, class_sizes: np.ndarray, config: PartitionConfig, seed: int) -> list[np.ndarray]:
    """Give clients equal sizes (to one sample); each draws its class shares from Dir(omega * 1_C).

    Clients draw one after another, in random order: each remaining sample of class c has weight share c
    (docs/algorithm.md 1.2; with equal class sizes nearly the scheme of Hsu et al. 2019, arXiv 1909.06335). When a class
    runs out, the client draws from its other classes; if its shares of all remaining classes are 0, it draws new shares
    of them, so that no client gets only the rest (D5). ``max_tries`` and ``policy`` do not apply.
    """
    rng = numpy_stream(seed, "partition", "balanced")
    left = class_sizes.copy()
    sizes = np.diff(np.arange(config.num_clients + 1) * len(labels) // config.num_clients)
    counts = np.zeros((config.num_clients, len(left)), np.int64)
    for client in rng.permutation(config.num_clients):
        shares = rng.dirichlet(np.full(len(left), config.omega))
        while missing := sizes[client] - counts[client].sum():
            if not (left * shares).any():
                classes = np.flatnonzero(left)
                shares[classes] = rng.dirichlet(np.full(len(classes), config.omega))
            weights = left * shares
            taken = np.minimum(rng.multinomial(missing, weights / weights.sum()), left)
            counts[client] += taken
            left -= taken
    return _dealt(_by_class(labels, rng), counts, config, rng)


def _pathological(labels: np.ndarray, class_sizes: np.ndarray, config: PartitionConfig, seed: int) -> list[np.ndarray]:
    """Give each client at most ``classes_per_client`` classes (McMahan et al. 2017, arXiv 1602.05629); omega is unused.

    McMahan et al. cut the sorted labels into K * classes_per_client pieces of one size. Here no piece holds two
    classes: each class is cut into equal pieces, their number in proportion to its size, and its clients are drawn at
    random. A repair keeps the bound; ``RequestError`` if it cannot.
    """
    num_clients, most = config.num_clients, config.classes_per_client
    rng = numpy_stream(seed, "partition", "pathological")
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
    """Return the number of pieces of each class, int64 [C]: K * ``most`` in all, at most min(K, its samples) each.

    The smallest piece is as large as possible (D'Hondt's rule, random ties).
    """
    pieces = np.minimum(class_sizes, 1)
    divisors = np.arange(2, num_clients + 1)
    quotients = np.where(divisors <= class_sizes[:, None], class_sizes[:, None] / divisors, 0.0).ravel()
    lots = np.repeat(rng.random(len(class_sizes)), len(divisors))
    best = np.lexsort((lots, -quotients))[: num_clients * most - pieces.sum()]
    classes = np.repeat(np.arange(len(class_sizes)), len(divisors))
    return pieces + np.bincount(classes[best[quotients[best] > 0]], minlength=len(class_sizes))


def _by_pieces(rng: np.random.Generator, class_sizes: np.ndarray, pieces: np.ndarray, num_clients: int) -> np.ndarray:
    """Return counts [K, C]: the pieces of each class go to the clients with the fewest so far, with random ties.

    The clients' numbers of pieces differ by at most one, so there are always enough clients for another class.
    """
    counts, held = np.zeros((num_clients, len(class_sizes)), np.int64), np.zeros(num_clients, np.int64)
    for c in rng.permutation(np.flatnonzero(class_sizes)):
        chosen = np.lexsort((rng.random(num_clients), held))[: pieces[c]]
        counts[chosen, c] = np.diff(np.arange(pieces[c] + 1) * class_sizes[c] // pieces[c])
        held[chosen] += 1
    return counts


def _iid(labels: np.ndarray, class_sizes: np.ndarray, config: PartitionConfig, seed: int) -> list[np.ndarray]:
    """Deal the samples, sorted by class, to the clients in turn: class counts and sizes differ by at most one (D6).

    ``max_tries``, ``policy`` and omega do not apply.
    """
    rng = numpy_stream(seed, "partition", "iid")
    order = _by_class(labels, rng)
    return [rng.permutation(order[client :: config.num_clients]) for client in range(config.num_clients)]


def label_counts(labels: np.ndarray, shards: list[np.ndarray], num_classes: int) -> np.ndarray:
    """Count the samples of each client and class: int64 [K, C]."""
    return np.stack([np.bincount(labels[shard], minlength=num_classes) for shard in shards]).astype(np.int64)


def held_out_mask(labels: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Draw a bool mask [N] of ``count`` samples, with each class within one of its proportional share."""
    order = _by_class(labels, rng)
    mask = np.zeros(len(labels), bool)
    if count:
        mask[order[(np.arange(count) * len(labels) + rng.integers(len(labels))) // count]] = True
    return mask


def split_validation(
    labels: np.ndarray, shards: list[np.ndarray], fraction: float, seed: int
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Return train and validation shards; a client of n_k samples holds out floor(fraction * n_k), stratified."""
    train, validation = [], []
    for client, shard in enumerate(shards):
        rng = numpy_stream(seed, "validation", client)
        mask = held_out_mask(labels[shard], int(fraction * len(shard)), rng)
        train.append(shard[~mask])
        validation.append(shard[mask])
    return train, validation


def skew(counts: np.ndarray) -> float:
    """Return the mean over clients of KL(client's labels || uniform), in nats: 0 (even) to log C (one class each).

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
