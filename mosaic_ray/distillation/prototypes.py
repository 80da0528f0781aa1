"""Prototypes: class centroids in feature space (docs/algorithm.md stage Q; idea of Tan et al. 2022)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from ..config.schema import PrototypesConfig
from ..core.seeding import numpy_stream, stream
from ..core.types import DataFacts, Prototypes
from ..data.records import subsets
from ..data.transforms import augment, to_input
from ..federated.communication import num_judging
from ..federated.local_training import Shard, batches, no_progress
from ..models.classifiers import Classifier
from ..models.state_dict import use_precision
from .kmeans import kmeans

KMEANS_SEED = 42  # as in the authors' code; fixed, so centroids depend only on the features


def centroids(features: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return ``k`` k-means centres [k, d] of features [n, d] and cluster sizes [k]; the single mean if n < k.

    Each centre is the mean of its cluster, so the size-weighted mean of the centres is the class mean. If points
    coincide, clusters can be empty; their centre is a copy of another one.
    """
    if len(features) < k or k == 1:
        mean = features.mean(0, keepdims=True, dtype=np.float64)
        return mean.astype(np.float32), np.array([len(features)], np.float32)
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1):  # so that the order of summation and the last bit do not depend on the host
        labels = kmeans(features, k, KMEANS_SEED)
    sizes = np.bincount(labels, minlength=k)
    sums = np.zeros((k, features.shape[1]))
    np.add.at(sums, labels, features.astype(np.float64))
    centres = sums / np.maximum(sizes, 1)[:, None]
    centres[sizes == 0] = centres[np.flatnonzero(sizes)[0]]
    return centres.astype(np.float32), sizes.astype(np.float32)


@torch.no_grad()
def extract_features(
    model: Classifier,
    shard: Shard,
    facts: DataFacts,
    precision: str,
    chunk: int = 500,
    progress: Callable[[int, int], None] = no_progress,
) -> np.ndarray:
    """Return penultimate features float32 [n, d] of a shard without augmentation; sets ``model`` to eval mode."""
    model.eval()
    parts: list[torch.Tensor] = []
    chunks = torch.arange(len(shard)).split(chunk)
    for rows in chunks:
        with use_precision(precision, shard.images.device):
            parts.append(model.features(to_input(shard.images[rows], facts)).float().cpu())
        progress(len(parts), len(chunks))
    return torch.cat(parts).numpy()


def client_prototypes(
    model: Classifier,
    shard: Shard,
    config: PrototypesConfig,
    facts: DataFacts,
    address: tuple[int, int, int],
    precision: str,
    progress: Callable[[int, int], None] = no_progress,
) -> Prototypes:
    """Compute one client's prototypes in the features of ``model``; ``address`` is (seed, round, client).

    ``progress(done, total)`` counts batches of images, then classes. With ``split`` = halves a share of each class's
    images, the same in every round, gets centroids of its own, which judge what is fitted to the others. With
    ``subsets`` = all each set of modalities has centroids of its own.
    """
    seed, round_num, client_id = address
    judging = judging_images(shard.labels.cpu().numpy(), config.judging, seed, client_id)
    if config.samples:
        draws = stream(seed, "prototypes", round_num, client_id)
        rows = torch.cat(list(batches(len(shard), 64, -(-config.samples // 64), generator=draws)))[: config.samples]
        shard, judging = Shard(shard.images[rows], shard.labels[rows]), judging[rows.numpy()]
    if config.augment:
        draws = stream(seed, "prototypes/augment", round_num, client_id)
        shard = Shard(augment(shard.images, facts.augmentations, draws), shard.labels)
    sets, parts = feature_sets(shard, facts, config.subsets), []
    for number, kept in enumerate(sets):
        (having, seen), report = seen_with(shard, kept), partial(part_done, progress, number, len(sets))
        parts += _centroids_of(model, seen, judging[having], config, facts, client_id, precision, report)
    return Prototypes.concatenate(parts)


def part_done(progress: Callable[[int, int], None], number: int, count: int, done: int, total: int) -> None:
    """Report ``done`` of ``total`` steps of part ``number`` among ``count`` parts of equal length."""
    progress(number * total + done, count * total)


def _centroids_of(
    model: Classifier,
    shard: Shard,
    judging: np.ndarray,
    config: PrototypesConfig,
    facts: DataFacts,
    client_id: int,
    precision: str,
    progress: Callable[[int, int], None],
) -> list[Prototypes]:
    """Return the centroids of each class of ``shard``, of the samples that fit and of those ``judging``, bool [n]."""
    labels, judging = shard.labels.cpu().numpy(), judging.copy()
    owned, batches_done = np.unique(labels), 0

    def batch(done: int, total: int) -> None:
        nonlocal batches_done
        batches_done = done
        progress(done, total + len(owned))

    features = extract_features(model, shard, facts, precision, progress=batch)
    parts = []
    for number, label in enumerate(owned, batches_done + 1):
        own = labels == label
        if judging[own].all():  # possible where images are drawn
            judging[own] = False
        for judges in (False, True):
            mine = own & (judging == judges)
            if mine.any():  # P2: the first are sent, in arbitrary order
                vectors, sizes = (part[: config.cap or None] for part in centroids(features[mine], config.k))
                labelled, sent = np.full(len(sizes), label, np.int64), np.full(len(sizes), client_id, np.int64)
                marks = np.full(len(sizes), judges) if config.judging else None
                parts.append(Prototypes(vectors, labelled, sizes, sent, marks))
        progress(number, batches_done + len(owned))
    return parts


def feature_sets(shard: Shard, facts: DataFacts, sets: str) -> list[torch.Tensor | None]:
    """Return the sets of modalities, bool [M], under which a client's features are taken, or None: samples as they are.

    ``sets``: as ``prototypes.subsets``; ``all``: each of ``records.subsets`` of the modalities that the client holds,
    if one of its samples has all of the set.
    """
    if sets != "all" or not facts.modalities:
        return [None]
    count = len(facts.modalities)
    present = shard.images[:, 0, 0, -count:] > 0
    held = present.any(0).nonzero()[:, 0]
    found: list[torch.Tensor | None] = []
    for chosen in subsets(len(held)):
        kept = torch.zeros(count, dtype=torch.bool, device=present.device)
        kept[held[list(chosen)]] = True
        if bool(present[:, kept].all(1).any()):
            found.append(kept)
    return found


def seen_with(shard: Shard, kept: torch.Tensor | None) -> tuple[np.ndarray, Shard]:
    """Return the rows int64 [n] of samples that have all of a set of modalities, and these without their others."""
    if kept is None:
        return np.arange(len(shard)), shard
    present = shard.images[:, 0, 0, -len(kept) :] > 0
    rows = present[:, kept].all(1).nonzero()[:, 0]
    images = shard.images[rows].clone()
    images[:, 0, 0, -len(kept) :] = kept.to(images.dtype)
    return rows.cpu().numpy(), Shard(images, shard.labels[rows])


def judging_images(labels: np.ndarray, share: float, seed: int, client_id: int) -> np.ndarray:
    """Return which of a client's images, by their ``labels`` [n], it keeps for choices: bool [n]."""
    draws, judging = numpy_stream(seed, "prototypes/judging", client_id), np.zeros(len(labels), bool)
    for label in np.unique(labels) if share else ():
        rows = np.flatnonzero(labels == label)
        judging[draws.permutation(rows)[: num_judging(len(rows), share)]] = True
    return judging


def split_held_out(prototypes: Prototypes, fraction: float, seed: int) -> tuple[Prototypes, Prototypes]:
    """Return (kept, held out): those that judge are held out, or a share of all where clients marked none.

    The share is floor(fraction * n_c) of the n_c prototypes of each class. ``fraction`` in [0, 1), so every class keeps
    one. Prototypes of empty clusters (size 0) are dropped.
    """
    draws = numpy_stream(seed, "prototypes", "held-out")
    prototypes = prototypes.take(np.flatnonzero(prototypes.sizes > 0))
    held = prototypes.judges if fraction and prototypes.judges is not None else np.zeros(len(prototypes), bool)
    prototypes = replace(prototypes, judges=None)
    for label in np.unique(prototypes.labels) if not held.any() else ():
        rows = np.flatnonzero(prototypes.labels == label)
        held[draws.permutation(rows)[: int(fraction * len(rows))]] = True
    return prototypes.take(np.flatnonzero(~held)), prototypes.take(np.flatnonzero(held))


def prototype_weights(prototypes: Prototypes, weighting: str) -> np.ndarray:
    """Return training weights float32 [P] with mean 1: by cluster size if ``weighting`` is ``size``, else equal."""
    sizes = prototypes.sizes if weighting == "size" else np.ones(len(prototypes), np.float32)
    return np.asarray(sizes / sizes.mean(), np.float32)
