"""Prototypes (O28), their split, and the head refitted on them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from helpers import FACTS, TINY, shard_of, stripes
from hypothesis import given, settings
from hypothesis import strategies as st

from mosaic_ray.core.types import Prototypes
from mosaic_ray.data.transforms import normalise
from mosaic_ray.distillation.linear_head import fit_head, scores
from mosaic_ray.distillation.prototypes import (
    centroids,
    client_prototypes,
    extract_features,
    prototype_weights,
    split_held_out,
)
from mosaic_ray.federated.client import ClientContext, initial_weights

CONTEXT = ClientContext(TINY, FACTS, torch.device("cpu"))


def cloud(per_class: int = 12, dim: int = 5, classes: int = 3, seed: int = 0) -> Prototypes:
    draws = np.random.default_rng(seed)
    labels = np.repeat(np.arange(classes), per_class)
    vectors = draws.normal(size=(len(labels), dim)) + 3 * np.eye(classes, dim)[labels]
    sizes = draws.integers(1, 50, len(labels))
    return Prototypes(vectors.astype(np.float32), labels, sizes.astype(np.float32), np.zeros(len(labels), np.int64))


@settings(max_examples=25)
@given(st.integers(1, 60), st.integers(1, 8), st.integers(0, 99))
def test_o28_weighted_mean_of_the_centres_is_the_class_mean(count, k, seed):
    features = np.random.default_rng(seed).normal(size=(count, 4)).astype(np.float32)
    centres, sizes = centroids(features, k)
    assert len(centres) == (k if count >= k else 1)
    assert sizes.sum() == count
    np.testing.assert_allclose(np.average(centres, axis=0, weights=sizes), features.mean(0), atol=1e-5)


def test_o28_identical_features_give_equal_centres():
    centres, sizes = centroids(np.ones((9, 4), np.float32), 3)
    assert len(centres) == 3
    assert np.array_equal(centres, np.ones((3, 4), np.float32))
    assert sizes.sum() == 9


def test_o28_head_on_features_is_the_full_forward():
    model, shard = CONTEXT.classifier(initial_weights(CONTEXT)).eval(), shard_of(stripes(30))
    features = torch.tensor(extract_features(model, shard, FACTS, "fp32", chunk=7))
    with torch.no_grad():
        full = model(normalise(shard.images, FACTS.mean, FACTS.std))
        torch.testing.assert_close(model.head(features), full)


def test_a_class_with_fewer_samples_than_k_sends_its_mean():
    data = stripes(30)
    rows = np.concatenate([np.flatnonzero(data.labels == 0)[:2], np.flatnonzero(data.labels == 1)])
    model = CONTEXT.classifier(initial_weights(CONTEXT))
    found = client_prototypes(model, shard_of(data.take(rows)), TINY.prototypes, FACTS, (0, 0, 7), "fp32")
    assert found.labels.tolist() == [0, 1, 1, 1, 1]
    assert found.sizes.sum() == len(rows)
    assert set(found.clients) == {7}


def test_p2_the_authors_cap_sends_the_first_centres_alone():
    model, knobs = CONTEXT.classifier(initial_weights(CONTEXT)), TINY.prototypes
    shard = shard_of(stripes(60))
    every = client_prototypes(model, shard, knobs, FACTS, (0, 0, 0), "fp32")
    capped = client_prototypes(model, shard, dataclasses.replace(knobs, cap=2), FACTS, (0, 0, 0), "fp32")
    assert len(every) == 12
    assert len(capped) == 6
    assert np.array_equal(capped.vectors[:2], every.vectors[:2])


@given(st.floats(0, 0.9), st.integers(0, 20))
@settings(max_examples=30)
def test_the_split_keeps_every_class_and_loses_nothing(fraction, seed):
    prototypes = cloud(per_class=5)
    kept, held = split_held_out(prototypes, fraction, seed)
    assert len(kept) + len(held) == len(prototypes)
    assert set(kept.labels) == {0, 1, 2}
    assert len(held) == 3 * int(fraction * 5)
    rows = {tuple(v) for v in kept.vectors} | {tuple(v) for v in held.vectors}
    assert len(rows) == len(prototypes)


def test_p4_size_weights_have_mean_one_and_follow_the_sizes():
    prototypes = cloud()
    weights = prototype_weights(prototypes, "size")
    assert weights.mean() == pytest.approx(1, abs=1e-5)
    np.testing.assert_allclose(weights / prototypes.sizes, weights[0] / prototypes.sizes[0], rtol=1e-5)
    assert (prototype_weights(prototypes, "uniform") == 1).all()


def test_a_refitted_head_is_never_worse_on_held_out_prototypes_than_its_start():
    kept, held = split_held_out(cloud(), 0.25, 0)
    start = (np.zeros((3, 5), np.float32), np.zeros(3, np.float32))
    matrix, bias, figures = fit_head(kept, held, start, "size")
    logits = torch.tensor(held.vectors) @ torch.tensor(matrix).T + torch.tensor(bias)
    assert scores(logits, held) == (figures["held_out_accuracy"], pytest.approx(figures["held_out_loss"]))
    assert figures["held_out_loss"] < scores(torch.zeros(len(held), 3), held)[1]
    assert figures["held_out_accuracy"] > 0.8


def test_a_head_that_cannot_be_bettered_is_handed_back():
    """Held-out prototypes that contradict the others: every step away from the start is worse on them."""
    kept = cloud()
    held = dataclasses.replace(cloud(seed=1), labels=np.roll(cloud().labels, 12))
    start = (np.zeros((3, 5), np.float32), np.zeros(3, np.float32))
    matrix, _, figures = fit_head(kept, held, start, "uniform")
    assert figures["steps"] == 0
    assert not matrix.any()
