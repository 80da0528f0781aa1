"""k-means: Lloyd's iteration from a k-means++ start.

It gives the clusters of scikit-learn's ``KMeans(k, random_state=seed, n_init=1)`` (a test compares them). Importing
scikit-learn takes a client's process seconds, more than all of its clusters.
"""

from __future__ import annotations

import math

import numpy as np

#: Iterations at most, and the squared shift of all centres, in units of the mean variance, at which they end.
MAX_ITERATIONS, TOLERANCE = 300, 1e-4


def kmeans(points: np.ndarray, k: int, seed: int) -> np.ndarray:
    """Return the cluster in [0, k) of each of ``points`` [n, d], int64 [n]. Needs n >= k.

    A cluster that loses all its points gets the point that is farthest from its own centre, if any is off its centre.
    ``ValueError`` where a point is not finite.
    """
    points = points.astype(np.float64)
    if not np.isfinite(points).all():
        raise ValueError("k-means takes finite points; these have NaN or infinity")
    points -= points.mean(0)
    centres = spread_centres(points, k, np.random.RandomState(seed))
    tolerance, labels = TOLERANCE * points.var(0).mean(), np.full(len(points), -1)
    distances: np.ndarray = squared_distances(points, centres)
    for _ in range(MAX_ITERATIONS):
        before, labels = labels, distances.argmin(1)
        if np.array_equal(labels, before):
            break
        moved = _means(points, labels, distances.min(1), k)
        shift, centres = np.square(moved - centres).sum(), moved
        distances = squared_distances(points, centres)
        if shift <= tolerance:
            break
    return np.asarray(distances.argmin(1))


def spread_centres(points: np.ndarray, k: int, draws: np.random.RandomState) -> np.ndarray:
    """Draw ``k`` of ``points`` [n, d] as first centres [k, d] (Arthur and Vassilvitskii 2007, greedy k-means++).

    Each is the best of 2 + floor(log k) candidates, which are drawn in proportion to their squared distance to the
    centres so far: the one with the least sum of squared distances.
    """
    n, trials = len(points), 2 + int(math.log(k))
    centres: np.ndarray = points[[draws.choice(n, p=np.full(n, 1 / n))]]
    nearest = squared_distances(points, centres)[:, 0]
    while len(centres) < k:
        places = np.searchsorted(nearest.cumsum(), draws.uniform(size=trials) * nearest.sum())
        candidates = points[np.minimum(places, n - 1)]
        found = np.minimum(nearest[:, None], squared_distances(points, candidates))
        best = found.sum(0).argmin()
        centres, nearest = np.concatenate([centres, candidates[[best]]]), found[:, best]
    return centres


def squared_distances(points: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Return the squared Euclidean distances [n, k] of ``points`` [n, d] to ``centres`` [k, d]."""
    found = np.square(points).sum(1)[:, None] - 2 * points @ centres.T + np.square(centres).sum(1)
    return np.asarray(np.maximum(found, 0.0))


def _means(points: np.ndarray, labels: np.ndarray, distances: np.ndarray, k: int) -> np.ndarray:
    """Return the mean of each cluster [k, d]; ``distances`` [n] of points to their centres choose for empty ones."""
    members = (labels == np.arange(k)[:, None]).astype(np.float64)
    sizes, sums = members.sum(1), members @ points
    empty = np.flatnonzero(sizes == 0)
    if len(empty) and distances.max() > 0:
        for cluster, row in zip(empty, np.argsort(-distances, kind="stable"), strict=False):
            sums[labels[row]] -= points[row]
            sizes[labels[row]] -= 1
            sums[cluster], sizes[cluster] = points[row], 1
    means: np.ndarray = sums / np.maximum(sizes, 1)[:, None]
    return means
