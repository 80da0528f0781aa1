"""Class statistics over clients, and the heads made of them, against references and laws."""

import numpy as np
import pytest
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from mosaic_ray.distillation.class_statistics import (
    ModalityStatistics,
    PooledModalities,
    PooledStatistics,
    calibrate_head,
    class_statistics,
    draw_features,
    lda_by_modality,
    lda_head,
    pool,
    pool_all,
    read_pooled,
)


def made(num=600, dim=5, num_classes=4, seed=0):
    """Return features of classes with different means and covariances, their labels, and a client of each row."""
    draws = np.random.default_rng(seed)
    labels = draws.integers(num_classes, size=num)
    mixes = draws.normal(size=(num_classes, dim, dim))
    means = 3 * draws.normal(size=(num_classes, dim))
    features = means[labels] + np.einsum("nij,nj->ni", mixes[labels], draws.normal(size=(num, dim)))
    return features.astype(np.float32), labels.astype(np.int64), draws.integers(3, size=num)


@pytest.mark.parametrize("per_class", [False, True])
def test_statistics_of_clients_pool_to_those_of_all_images(per_class):
    features, labels, clients = made()
    parts = [class_statistics(features[clients == k], labels[clients == k], per_class=per_class) for k in range(3)]
    pooled = pool(parts, 5, per_class=per_class)
    assert pooled.counts.tolist() == np.bincount(labels, minlength=5).tolist()
    for label in range(4):
        rows = features[labels == label].astype(np.float64)
        np.testing.assert_allclose(pooled.means[label], rows.mean(0), rtol=1e-5, atol=1e-5)
        if per_class:
            np.testing.assert_allclose(pooled.covariance[label], np.cov(rows.T), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(pooled.means[4], features.astype(np.float64).mean(0), rtol=1e-5, atol=1e-5)
    if not per_class:
        centred = features - np.stack([features[labels == label].mean(0) for label in range(4)])[labels]
        np.testing.assert_allclose(pooled.covariance, centred.T @ centred / (len(labels) - 4), rtol=1e-4, atol=1e-4)


def test_a_class_with_one_image_has_no_scatter():
    found = class_statistics(np.ones((1, 3), np.float32), np.array([2]), per_class=True)
    assert found.counts.tolist() == [1] and not found.scatter.any()
    assert np.isfinite(pool([found], 3, per_class=True).covariance).all()


def test_lda_equals_scikit_learns():
    features, labels, _ = made()
    pooled = pool([class_statistics(features, labels, per_class=False)], 4, per_class=False)
    biased = PooledStatistics(pooled.counts, pooled.means, pooled.covariance * (len(labels) - 4) / len(labels))
    matrix, bias = lda_head(biased, 0.3)
    shared = sum(n / 600 * np.cov(features[labels == c].T, bias=True) for c, n in enumerate(pooled.counts))
    shrunk = 0.7 * shared + 0.3 * np.trace(shared) / 5 * np.eye(5)
    expected = np.linalg.solve(shrunk, pooled.means.T).T
    np.testing.assert_allclose(matrix, expected, rtol=1e-3, atol=1e-4)
    matrix, bias = lda_head(biased, 1e-9)
    twin = LinearDiscriminantAnalysis(solver="lsqr", priors=(pooled.counts + 1) / 604).fit(features, labels)
    ours = features @ matrix.T + bias
    theirs = twin.decision_function(features)
    np.testing.assert_allclose(ours - ours[:, :1], theirs - theirs[:, :1], rtol=2e-2, atol=2e-2)


def test_lda_of_a_class_that_nobody_holds_is_finite_and_rare():
    features, labels, _ = made(num_classes=4)
    pooled = pool([class_statistics(features, labels, per_class=False)], 6, per_class=False)
    matrix, bias = lda_head(pooled, 0.01)
    assert np.isfinite(matrix).all() and np.isfinite(bias).all()
    assert not np.isin((features @ matrix.T + bias).argmax(1), (4, 5)).any()


def test_lda_of_constant_features_is_finite():
    part = class_statistics(np.ones((4, 3), np.float32), np.array([0, 0, 1, 1]), per_class=False)
    pooled = pool([part], 2, per_class=False)
    assert all(np.isfinite(part).all() for part in lda_head(pooled, 0.01))


def test_drawn_features_have_the_statistics_of_their_class():
    features, labels, _ = made(num=3000)
    pooled = pool([class_statistics(features, labels, per_class=True)], 5, per_class=True)
    drawn, asked = draw_features(pooled, 40_000, False, seed=3)
    assert np.unique(asked).tolist() == [0, 1, 2, 3]  # none of class 4, which has no images
    for label in range(4):
        rows = drawn[asked == label]
        scale = np.sqrt(np.diag(pooled.covariance[label]))
        assert np.abs((rows.mean(0) - pooled.means[label]) / scale).max() < 0.03
        assert np.abs((np.cov(rows.T) - pooled.covariance[label]) / np.outer(scale, scale)).max() < 0.05
    again, _ = draw_features(pooled, 40_000, False, seed=3)
    assert (again == drawn).all()
    assert draw_features(pooled, 100, True, seed=3)[0].min() == 0


def test_ccvr_on_exactly_gaussian_features_recovers_the_bayes_head():
    draws = np.random.default_rng(1)
    means, spread = 2 * draws.normal(size=(3, 4)), draws.normal(size=(4, 4))
    shared = spread @ spread.T / 4 + 0.2 * np.eye(4)
    pooled = PooledStatistics(np.array([50, 50, 50]), means, np.stack([shared] * 3))
    features, labels = draw_features(pooled, 5_000, False, seed=0)
    start = np.zeros((3, 4), np.float32), np.zeros(3, np.float32)
    matrix, bias = calibrate_head(start, features, labels, epochs=5, batch_size=64, lr=0.02, momentum=0.9, seed=0)
    bayes = np.linalg.solve(shared, means.T).T
    offset = -0.5 * (bayes * means).sum(1)
    logits, best = features @ matrix.T + bias, features @ bayes.T + offset
    assert (logits.argmax(1) == best.argmax(1)).mean() > 0.98
    assert (best.argmax(1) == labels).mean() < 0.98  # the classes overlap, so the agreement says something


def test_lda_of_each_modality_is_naive_bayes() -> None:
    draws = np.random.default_rng(0)
    labels, columns = np.repeat([0, 1, 2], 40), {"a": slice(0, 4), "b": slice(4, 7)}
    values = {"a": draws.normal(size=(120, 3)) + labels[:, None], "b": draws.normal(size=(120, 2)) - labels[:, None]}
    clients = [
        ModalityStatistics({"a": class_statistics(values["a"][:50].astype(np.float32), labels[:50], per_class=False)}),
        ModalityStatistics(
            {m: class_statistics(values[m][50:].astype(np.float32), labels[50:], per_class=False) for m in ("a", "b")}
        ),
    ]
    pooled = pool_all(clients, 3, per_class=False)
    assert isinstance(pooled, PooledModalities)
    again = read_pooled(pooled.arrays())
    assert isinstance(again, PooledModalities) and again.parts.keys() == pooled.parts.keys()
    weights, bias = lda_by_modality(pooled, 0.01, columns, np.bincount(labels))
    x = {"a": draws.normal(size=3), "b": draws.normal(size=2)}
    for there in (("a",), ("b",), ("a", "b")):
        features, wanted = np.zeros(7), np.log(np.full(3, 1 / 3))
        for modality in there:
            block = columns[modality]
            features[block] = np.append(x[modality], 1.0) / len(there)
            part = pooled.parts[modality]
            dim, within = len(x[modality]), part.covariance
            shrunk = 0.99 * within + 0.01 * np.trace(within) / dim * np.eye(dim)
            apart = x[modality] - part.means
            wanted = wanted - 0.5 * np.einsum("ci,ij,cj->c", apart, np.linalg.inv(shrunk), apart)
        found = (weights @ features + bias) * len(there)
        np.testing.assert_allclose(found - found[0], wanted - wanted[0], rtol=1e-4, atol=1e-4)
