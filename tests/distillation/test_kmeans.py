"""k-means: scikit-learn's clusters, and laws where points coincide."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.cluster import KMeans

from mosaic_ray.distillation.kmeans import kmeans, spread_centres, squared_distances


def test_it_gives_scikit_learns_clusters():
    """Features as after a ReLU. scikit-learn computes in float32, so a point between two centres may go either way."""
    equal = 0
    for draw in range(100):
        draws = np.random.default_rng(draw)
        n, d, k, seed = draws.integers(10, 300), draws.choice([2, 8, 64]), draws.integers(2, 11), draws.choice([7, 42])
        points = np.maximum(draws.normal(draws.normal(size=d), size=(n, d)), 0).astype(np.float32)
        points += np.float32(1e-3) * draws.random((n, d), np.float32)
        expected = KMeans(k, random_state=int(seed), n_init=1).fit_predict(points)
        equal += np.array_equal(kmeans(points, int(k), int(seed)), expected)
    assert equal >= 98


@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(1, 40), st.integers(1, 8))
def test_every_point_is_in_its_nearest_cluster_where_points_coincide(draw, distinct, n, k):
    draws = np.random.default_rng(draw)
    points = draws.integers(0, 3, (distinct, 2))[draws.integers(0, distinct, max(n, k))].astype(np.float32)
    labels = kmeans(points, k, 42)
    assert labels.shape == (max(n, k),) and labels.min() >= 0 and labels.max() < k
    for place in np.unique(points, axis=0):  # equal points are in one cluster
        assert len(set(labels[(points == place).all(1)])) == 1
    means = np.stack([points[labels == label].mean(0) for label in np.unique(labels)])
    own = np.square(points - means[np.searchsorted(np.unique(labels), labels)]).sum(1)
    # Lloyd's iteration ends when centres move by less than the tolerance, so labels may lag behind by that much
    assert (own <= squared_distances(points.astype(np.float64), means).min(1) + 0.05).all()


def test_as_many_clusters_as_points():
    points = np.random.default_rng(0).normal(size=(7, 3)).astype(np.float32)
    assert sorted(kmeans(points, 7, 42)) == list(range(7))
    assert set(kmeans(points, 1, 42)) == {0}


def test_first_centres_are_points_and_spread():
    """Three heaps far apart: each gets a centre, whatever is drawn."""
    heaps = np.repeat([[0.0, 0.0], [100.0, 0.0], [0.0, 100.0]], 20, 0)
    points = heaps + np.random.default_rng(0).normal(size=heaps.shape)
    for seed in range(20):
        centres = spread_centres(points, 3, np.random.RandomState(seed))
        assert all(any(np.array_equal(centre, point) for point in points) for centre in centres)
        assert sorted(squared_distances(heaps[[0, 20, 40]], centres).argmin(1)) == [0, 1, 2]


def test_squared_distances_by_brute_force():
    draws = np.random.default_rng(0)
    points, centres = draws.normal(size=(6, 4)), draws.normal(size=(3, 4))
    expected = [[sum((p - c) ** 2) for c in centres] for p in points]
    np.testing.assert_allclose(squared_distances(points, centres), expected)
    assert squared_distances(points + 1e6, points + 1e6).min() >= 0


def test_points_that_are_not_finite_are_refused():
    points = np.ones((20, 2), np.float32)
    points[3, 1] = np.nan
    with pytest.raises(ValueError, match="k-means takes finite points"):
        kmeans(points, 2, 42)
