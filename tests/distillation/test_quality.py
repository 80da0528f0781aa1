"""Classifier-FID and classifier-IS against their formulas, and the figures reported with them."""

from __future__ import annotations

import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from cli_runner import refused_by
from helpers import FACTS, TINY, stripes
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import sqrtm
from torch import nn

from mosaic_ray.core.seeding import seeded
from mosaic_ray.data.transforms import normalise
from mosaic_ray.distillation.image_quality import (
    INCEPTION_WEIGHTS,
    Network,
    class_shares,
    coverage,
    domain_auc,
    frechet_distance,
    inception_score,
    inception_weights,
    predicted,
)
from mosaic_ray.models.classifiers import build_classifier


class Projected(nn.Module):
    """uint8 images to fixed random projections of their pixels."""

    def __init__(self, num_features: int, pixels: int = 64) -> None:
        super().__init__()
        draws = torch.Generator().manual_seed(5)
        self.num_features = num_features
        self.matrix = torch.randn(pixels, num_features, generator=draws, dtype=torch.float64) / 255

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1).double() @ self.matrix


def frechet_by_hand(a: np.ndarray, b: np.ndarray) -> float:
    """Heusel et al. 2017, eq. 6, on features [N, d]."""
    first, second = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    between = sqrtm(first @ second).real
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(first + second - 2 * between))


def score_by_hand(logits: np.ndarray) -> float:
    """Salimans et al. 2016, on logits [N, C] in one part."""
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    return float(np.exp((p * (np.log(p) - np.log(p.mean(0)))).sum(1).mean()))


def tiny_classifier() -> nn.Module:
    with seeded(0, "test"):
        return build_classifier(TINY.model, 3, 1, 8)


@pytest.mark.parametrize("num_features", [2, 6])
def test_the_frechet_distance_is_the_formulas(num_features):
    network, first, second = Projected(num_features), stripes(300).images, stripes(200, 1).images // 2
    features = [network(torch.tensor(images)).numpy() for images in (first, second)]
    found = frechet_distance(network, first, second)
    assert found == pytest.approx(frechet_by_hand(*features), rel=1e-9)
    assert found > 1
    assert frechet_distance(network, second, first) == pytest.approx(found, rel=1e-9)


def test_more_images_than_a_chunk_are_one_set():
    network, first, second = Projected(3), stripes(1100).images, stripes(600, 1).images // 2
    features = [network(torch.tensor(images)).numpy() for images in (first, second)]
    assert frechet_distance(network, first, second) == pytest.approx(frechet_by_hand(*features), rel=1e-9)


def test_equal_sets_are_at_distance_zero_and_never_below():
    images = stripes(100).images
    assert 0 <= frechet_distance(Projected(6), images, images) < 1e-6


def test_read_only_images_will_do():
    images = stripes(60).images
    images.setflags(write=False)
    assert frechet_distance(Network(tiny_classifier(), FACTS), images, images) < 1e-6


def test_the_network_scores_test_images_as_the_classifier_does():
    classifier, images = tiny_classifier().train(), torch.tensor(stripes(20).images)
    features, logits = Network(classifier, FACTS), Network(classifier, FACTS, logits=True)
    seen = normalise(images, FACTS.mean, FACTS.std)
    classifier.eval()
    assert torch.equal(features(images), classifier.features(seen).double())
    assert torch.equal(logits(images), classifier(seen).double())
    assert (features.num_features, logits.num_features) == (classifier.feature_dim, 3)
    assert not logits(images).requires_grad


class Given(nn.Module):
    """Returns given logits; an image's first pixel is the row."""

    def __init__(self, logits: np.ndarray) -> None:
        super().__init__()
        self.logits, self.num_features = torch.tensor(logits), logits.shape[1]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.logits[images[:, 0, 0, 0].long()]


def rows(count: int) -> np.ndarray:
    return np.arange(count, dtype=np.uint8).reshape(-1, 1, 1, 1)


@given(st.integers(2, 6), st.integers(2, 30), st.floats(0, 8), st.integers(0, 100))
def test_the_inception_score_is_the_formulas_and_within_its_bounds(num_classes, count, scale, seed):
    logits = scale * np.random.default_rng(seed).normal(size=(count, num_classes))
    found, spread = inception_score(Given(logits), rows(count), seed)
    assert found == pytest.approx(score_by_hand(logits), rel=1e-9)
    assert 1 - 1e-9 <= found <= num_classes + 1e-9
    assert spread is None


def test_the_inception_scores_ends():
    sure = 1000.0 * np.eye(4)[np.arange(40) % 4]
    assert inception_score(Given(sure), rows(40), 0)[0] == pytest.approx(4)
    assert inception_score(Given(sure[:1].repeat(40, 0)), rows(40), 0)[0] == pytest.approx(1)


def test_many_images_fall_into_parts_that_the_seed_alone_decides():
    logits = 3 * np.random.default_rng(0).normal(size=(160, 2))
    before = torch.random.get_rng_state()
    found = [inception_score(Given(logits), rows(160), seed) for seed in (0, 0, 1)]
    assert torch.equal(before, torch.random.get_rng_state())
    assert found[0] == found[1] != found[2]
    assert found[0][1] > 0
    assert found[0][0] < score_by_hand(logits)  # fewer images a part: lower, which is why real ones stand beside


def test_predictions_shares_and_coverage():
    network = Network(tiny_classifier(), FACTS, logits=True)
    images = stripes(700).images
    seen = network(torch.tensor(images)).argmax(1).numpy()
    assert np.array_equal(predicted(network, images), seen)
    assert class_shares(np.array([0, 2, 2, 2]), 4).tolist() == [0.25, 0, 0.75, 0]
    assert coverage(np.array([0.5, 0.491, 0.009, 0.0])) == 0.5
    assert coverage(np.full(200, 1 / 200)) == 1


def test_domain_auc_is_half_for_equal_sets_and_one_for_separate_sets():
    draws = np.random.default_rng(0)
    real, other = draws.normal(size=(200, 5)), draws.normal(size=(150, 5))
    assert abs(domain_auc(real, other, 0) - 0.5) < 0.1
    assert domain_auc(real, other + 5, 0) > 0.99
    assert 0.6 < domain_auc(real, other + 0.5, 0) < 0.95
    assert domain_auc(real, other[::-1] + 5, 1) > 0.99
    assert domain_auc(real[:4], other + 5, 0) == 0.5
    assert domain_auc(real, other + 1, 0) == domain_auc(real, other + 1, 0) != domain_auc(real, other + 1, 1)


def test_inceptions_weights_are_never_fetched(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *_, **__: pytest.fail("it fetched"))
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    assert "pip install 'mosaic-ray[fid]'" in refused_by(inception_weights)
    there = ModuleType("torch_fidelity")
    there.__spec__ = sys.__spec__
    monkeypatch.setitem(sys.modules, "torch_fidelity", there)
    assert str(tmp_path / "checkpoints" / INCEPTION_WEIGHTS) in refused_by(inception_weights)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / INCEPTION_WEIGHTS).touch()
    assert inception_weights().name == INCEPTION_WEIGHTS
