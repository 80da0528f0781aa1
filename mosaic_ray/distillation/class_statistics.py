"""Statistics of classes in feature space, summed over clients, and two heads made of them without any image.

LDA is the Bayes classifier of Gaussian classes with one covariance (Fisher 1936; its federated use: FedCGS, AAAI 2025,
with the within-class covariance in place of the total one). CCVR (Luo et al., NeurIPS 2021) draws features from one
Gaussian a class and trains the head on them. docs/algorithm.md 3.11, 3.12.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
import torch
from torch import nn

from ..core.seeding import numpy_stream, stream
from ..core.types import Weights
from ..federated.client import ClientContext, Task
from ..federated.client_models import Models
from ..federated.local_training import Shard, batches
from ..models.optimizers import SGD
from .prototypes import extract_features, feature_sets, part_done, seen_with


@dataclass(frozen=True)
class ClassStatistics:
    """One client's message: for each of the H classes that it holds, how its features are distributed.

    labels int64 [H]; counts int64 [H]; means float32 [H, d]; scatter float32 [1 or H, d (d + 1) / 2]: the upper
    triangle of the sum of (x - mean)(x - mean)^T over the images of all its classes together, or of each.
    """

    labels: np.ndarray
    counts: np.ndarray
    means: np.ndarray
    scatter: np.ndarray

    def arrays(self) -> Weights:
        """Return the fields as arrays by name."""
        return {"labels": self.labels, "counts": self.counts, "means": self.means, "scatter": self.scatter}


@dataclass(frozen=True)
class ModalityStatistics:
    """One client's message where every modality has a head: its statistics in the features of each that it has."""

    parts: Mapping[str, ClassStatistics]

    def arrays(self) -> Weights:
        """Return the fields of all parts by modality and name."""
        return {f"{m}/{name}": array for m, part in self.parts.items() for name, array in part.arrays().items()}


@dataclass(frozen=True)
class PooledStatistics:
    """The statistics of all clients' images: counts int64 [C], means float64 [C, d], covariance float64.

    ``covariance``: within-class, [d, d], or one for each class, [C, d, d]. Classes without images have the mean of all
    features, and no scatter of their own.
    """

    counts: np.ndarray
    means: np.ndarray
    covariance: np.ndarray

    def arrays(self) -> Weights:
        """Return the fields as arrays by name."""
        return dict(vars(self))


@dataclass(frozen=True)
class PooledModalities:
    """The statistics of all clients' samples in the features of each modality."""

    parts: Mapping[str, PooledStatistics]

    def arrays(self) -> Weights:
        """Return the fields of all parts by modality and name."""
        return {f"{m}/{name}": array for m, part in self.parts.items() for name, array in part.arrays().items()}


Pooled = PooledStatistics | PooledModalities


def read_pooled(arrays: Weights) -> Pooled:
    """Return the statistics that ``arrays`` made these arrays of."""
    names = dict.fromkeys(name.partition("/")[0] for name in arrays if "/" in name)
    if not names:
        return PooledStatistics(**arrays)
    parts = {m: {n.removeprefix(f"{m}/"): a for n, a in arrays.items() if n.startswith(f"{m}/")} for m in names}
    return PooledModalities({modality: PooledStatistics(**fields) for modality, fields in parts.items()})


@dataclass(frozen=True)
class ClassStatisticsTask(Task[Models, None, ClassStatistics | ModalityStatistics]):
    """Compute a client's class statistics under its architecture's global model, which runs forward only.

    Where every modality has a head (``model.fusion = late``) they are those of each modality's features, unless
    ``per_class``. With ``prototypes.subsets = all`` a sample counts once for each set of its modalities.
    """

    per_class: bool
    unit: ClassVar[str] = "batch"

    def run(
        self, context: ClientContext, shard: Shard, client_id: int, broadcast: Models, own: None
    ) -> ClassStatistics | ModalityStatistics:
        name = context.federation.classifiers[client_id]
        model = context.classifier(broadcast[name], name)
        precision = context.config.runtime.precision
        late = context.config.model.fusion == "late"
        columns = context.federation.head_columns(name) if late and not self.per_class else {}
        sets = "held" if columns else context.config.prototypes.subsets  # the statistics of a modality suit every set
        kept = feature_sets(shard, context.facts, sets)
        found, classes = [], []
        for number, these in enumerate(kept):
            (_, seen), report = seen_with(shard, these), partial(part_done, context.progress, number, len(kept))
            found.append(extract_features(model, seen, context.facts, precision, progress=report))
            classes.append(seen.labels.cpu().numpy())
        features, labels = np.concatenate(found), np.concatenate(classes)
        if not columns:
            return class_statistics(features, labels, per_class=self.per_class)
        parts = {}
        for modality, block in columns.items():
            values, shares = features[:, block][:, :-1], features[:, block][:, -1:]
            if len(rows := np.flatnonzero(shares)):
                parts[modality] = class_statistics(values[rows] / shares[rows], labels[rows], per_class=False)
        return ModalityStatistics(parts)


def class_statistics(features: np.ndarray, labels: np.ndarray, *, per_class: bool) -> ClassStatistics:
    """Return the statistics of features float32 [n, d] with labels int64 [n]."""
    held, counts = np.unique(labels, return_counts=True)
    triangle = np.triu_indices(features.shape[1])
    means, scatters = [], []
    for label in held:
        rows = features[labels == label].astype(np.float64)
        means.append(rows.mean(0))
        rows -= means[-1]
        scatters.append((rows.T @ rows)[triangle])
    scatter = np.stack(scatters) if per_class else np.sum(scatters, axis=0)[None]
    return ClassStatistics(held, counts.astype(np.int64), np.asarray(means, np.float32), scatter.astype(np.float32))


def pool_all(parts: Sequence[ClassStatistics | ModalityStatistics], num_classes: int, *, per_class: bool) -> Pooled:
    """Return the statistics of all clients' images together, of each modality where clients sent those."""
    whole = [part for part in parts if isinstance(part, ClassStatistics)]
    if whole:
        return pool(whole, num_classes, per_class=per_class)
    sent: dict[str, list[ClassStatistics]] = {}
    for part in parts:
        assert isinstance(part, ModalityStatistics)
        for modality, own in part.parts.items():
            sent.setdefault(modality, []).append(own)
    return PooledModalities({modality: pool(own, num_classes, per_class=False) for modality, own in sent.items()})


def pool(parts: Sequence[ClassStatistics], num_classes: int, *, per_class: bool) -> PooledStatistics:
    """Return the statistics of all clients' images together, exact but for the messages' float32.

    A class's scatter is the sum over clients of S_kc + n_kc (m_kc - m_c)(m_kc - m_c)^T, where m_c is the mean of all.
    """
    feature_dim = parts[0].means.shape[1]
    counts, sums = np.zeros(num_classes, np.int64), np.zeros((num_classes, feature_dim))
    for part in parts:
        counts[part.labels] += part.counts
        sums[part.labels] += part.counts[:, None] * part.means.astype(np.float64)
    means = np.where(counts[:, None] > 0, sums / np.maximum(counts, 1)[:, None], sums.sum(0) / counts.sum())
    scatter = np.zeros((num_classes if per_class else 1, feature_dim, feature_dim))
    upper = np.triu_indices(feature_dim)
    for part in parts:
        offsets = part.means.astype(np.float64) - means[part.labels]
        places = part.labels if per_class else np.zeros_like(part.labels)
        for place, count, offset in zip(places, part.counts, offsets, strict=True):
            scatter[place] += count * np.outer(offset, offset)
        for place, triangle in zip(places[: len(part.scatter)], part.scatter, strict=True):
            own = np.zeros((feature_dim, feature_dim))
            own[upper] = triangle
            scatter[place] += own + np.triu(own, 1).T
    if per_class:
        return PooledStatistics(counts, means, scatter / np.maximum(counts - 1, 1)[:, None, None])
    return PooledStatistics(counts, means, scatter[0] / max(1, int(counts.sum() - (counts > 0).sum())))


def lda_head(pooled: PooledStatistics, shrinkage: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the head of linear discriminant analysis: weights float32 [C, d], biases float32 [C].

    w_c = S^-1 m_c and b_c = -m_c^T S^-1 m_c / 2 + log pi_c, where S = (1 - g) W + g tr(W) / d I for the within-class
    covariance W and the ``shrinkage`` g in (0, 1], and pi_c = (n_c + 1) / (n + C).
    """
    from threadpoolctl import threadpool_limits

    within = pooled.covariance
    dim = len(within)
    target = float(np.trace(within)) / dim or 1.0  # 1 where all features are constant
    with threadpool_limits(1):  # the last bit does not depend on the machine's number of cores
        matrix = np.linalg.solve((1 - shrinkage) * within + shrinkage * target * np.eye(dim), pooled.means.T).T
    priors = (pooled.counts + 1) / (pooled.counts.sum() + len(pooled.counts))
    bias = np.log(priors) - 0.5 * (matrix * pooled.means).sum(1)
    return matrix.astype(np.float32), bias.astype(np.float32)


def lda_by_modality(
    pooled: PooledModalities, shrinkage: float, columns: Mapping[str, slice], counts: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return a head with LDA of each modality: weights float32 [C, M (d + 1)], biases float32 [C].

    The logits are the mean over the modalities that are there of log p(g_m | c), up to a constant: naive Bayes, in
    which they are independent given the class. The bias log(pi_c) / M is that of a sample that has them all.

    Args:
        pooled: the statistics of every modality.
        shrinkage: as for ``lda_head``.
        columns: each modality's columns of the head, the last of them its bias.
        counts: the samples of each class, int64 [C].
    """
    weights = np.zeros((len(counts), max(block.stop for block in columns.values())), np.float32)
    for modality, part in pooled.parts.items():
        matrix, bias = lda_head(part, shrinkage)
        own = np.log((part.counts + 1) / (part.counts.sum() + len(part.counts)))
        weights[:, columns[modality]] = np.concatenate([matrix, (bias - own)[:, None]], 1)
    priors = (counts + 1) / (counts.sum() + len(counts))
    return weights, (np.log(priors) / len(columns)).astype(np.float32)


def draw_features(pooled: PooledStatistics, per_class: int, clip: bool, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw ``per_class`` features of every class that has images from N(m_c, S_c), by class: float32 [n, d], int64 [n].

    ``clip``: values below zero become zero, for features behind a ReLU.
    """
    from threadpoolctl import threadpool_limits

    drawn, held = [], np.flatnonzero(pooled.counts)
    for label in held:
        with threadpool_limits(1):
            values, vectors = np.linalg.eigh(pooled.covariance[label])
            noise = numpy_stream(seed, "ccvr", int(label)).standard_normal((per_class, len(values)))
            found = pooled.means[label] + noise @ (vectors * np.sqrt(np.maximum(values, 0))).T
        drawn.append(np.maximum(found, 0) if clip else found)
    return np.concatenate(drawn).astype(np.float32), np.repeat(held, per_class).astype(np.int64)


def calibrate_head(
    head: tuple[np.ndarray, np.ndarray],
    features: np.ndarray,
    labels: np.ndarray,
    *,
    epochs: int,
    batch_size: int,
    lr: float,
    momentum: float,
    seed: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Train the ``head`` (weights [C, d], biases [C]) on features [n, d] by SGD on the cross-entropy; returns it."""
    x, y = torch.from_numpy(features), torch.from_numpy(labels)
    weights = [torch.tensor(part, requires_grad=True) for part in head]
    optimizer = SGD(weights, lr=lr, momentum=momentum)
    steps = epochs * -(-len(y) // batch_size)
    for rows in batches(len(y), batch_size, steps, generator=stream(seed, "ccvr", "batches")):
        optimizer.zero_grad()
        nn.functional.cross_entropy(x[rows] @ weights[0].T + weights[1], y[rows]).backward()
        optimizer.step()
    return weights[0].detach().numpy(), weights[1].detach().numpy()
