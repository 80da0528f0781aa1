"""Prototypes: class centroids in feature space (ALGORITHM stage Q; Tan et al. 2022 for the idea)."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from torch import nn

from ..config.schema import PrototypesConfig
from ..core.seeding import numpy_stream, stream
from ..core.types import DataFacts, Prototypes
from ..data.transforms import augment, normalise
from ..federated.local_training import Shard, batches
from ..models.state_dict import use_precision

KMEANS_SEED = 42  # the authors' own; the clustering needs no address of its own, it is a function of the features


def centroids(features: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """``k`` k-means centres of features [n, d] and their cluster sizes; the single mean where n < k.

    Each centre is the mean of its cluster, so the size-weighted mean of the centres is the class mean. Where points
    coincide there may be clusters of size 0; their centre is a copy of the nearest real one.
    """
    if len(features) < k or k == 1:
        return features.mean(0, keepdims=True, dtype=np.float64).astype(np.float32), np.array(
            [len(features)], np.float32
        )
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    # one thread: the reduction order, and so the last bit, must not depend on the host
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        labels = KMeans(k, random_state=KMEANS_SEED, n_init=1).fit_predict(features)
    sizes = np.bincount(labels, minlength=k)
    sums = np.zeros((k, features.shape[1]))
    np.add.at(sums, labels, features.astype(np.float64))
    centres = sums / np.maximum(sizes, 1)[:, None]
    centres[sizes == 0] = centres[np.flatnonzero(sizes)[0]]
    return centres.astype(np.float32), sizes.astype(np.float32)


@torch.no_grad()
def extract_features(model: nn.Module, shard: Shard, facts: DataFacts, precision: str, chunk: int = 500) -> np.ndarray:
    """Penultimate features float32 [n, d] of a shard, without augmentation, ``model`` in eval mode."""
    model.eval()
    parts = []
    for rows in torch.arange(len(shard)).split(chunk):
        with use_precision(precision, shard.images.device):
            parts.append(model.features(normalise(shard.images[rows], facts.mean, facts.std)).float().cpu())
    return torch.cat(parts).numpy()


def client_prototypes(
    model: nn.Module,
    shard: Shard,
    config: PrototypesConfig,
    facts: DataFacts,
    address: tuple[int, int, int],
    precision: str,
) -> Prototypes:
    """One client's prototypes under ``model``; ``address`` is (seed, round, client)."""
    seed, round_num, client_id = address
    if config.samples:
        draws = stream(seed, "prototypes", round_num, client_id)
        rows = torch.cat(list(batches(len(shard), 64, -(-config.samples // 64), generator=draws)))[: config.samples]
        shard = Shard(shard.images[rows], shard.labels[rows])
    if config.augment:
        draws = stream(seed, "prototypes/augment", round_num, client_id)
        shard = Shard(augment(shard.images, facts.augmentations, draws), shard.labels)
    features, labels = extract_features(model, shard, facts, precision), shard.labels.cpu().numpy()
    vectors, classes, sizes = [], [], []
    for label in np.unique(labels):
        centres, counts = centroids(features[labels == label], config.k)
        sent = min(config.cap, len(centres)) if config.cap else len(centres)  # P2: the first few, whichever they are
        vectors.append(centres[:sent])
        sizes.append(counts[:sent])
        classes.append(np.full(sent, label, np.int64))
    labels = np.concatenate(classes)
    return Prototypes(np.concatenate(vectors), labels, np.concatenate(sizes), np.full(len(labels), client_id, np.int64))


def split_held_out(prototypes: Prototypes, fraction: float, seed: int) -> tuple[Prototypes, Prototypes]:
    """(kept, held out): floor(fraction * n_c) prototypes of every class are held out, never a class's last one.

    Empty clusters (size 0) are nobody's prototype and are dropped.
    """
    draws = numpy_stream(seed, "prototypes", "held-out")
    prototypes = prototypes.take(np.flatnonzero(prototypes.sizes > 0))
    held = np.zeros(len(prototypes), bool)
    for label in np.unique(prototypes.labels):
        rows = np.flatnonzero(prototypes.labels == label)
        held[draws.permutation(rows)[: int(fraction * len(rows))]] = True
    return prototypes.take(np.flatnonzero(~held)), prototypes.take(np.flatnonzero(held))


def prototype_weights(prototypes: Prototypes, weighting: str) -> np.ndarray:
    """Training weights float32 [P] of mean 1: cluster sizes, or all alike."""
    sizes = prototypes.sizes if weighting == "size" else np.ones(len(prototypes), np.float32)
    return (sizes / sizes.mean()).astype(np.float32)
