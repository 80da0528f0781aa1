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
from mosaic_ray.distillation.linear_head import FIT_LR, fit_head, fit_heads, scores, surely_lower
from mosaic_ray.distillation.prototypes import (
    centroids,
    client_prototypes,
    extract_features,
    judging_images,
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
    assert found.labels.tolist() == [0, 1, 1, 1, 1, 1]
    assert found.judges.tolist() == [False] * 5 + [True]
    assert found.sizes.sum() == len(rows)
    assert set(found.clients) == {7}


def test_p2_the_authors_cap_sends_the_first_centres_alone():
    model, knobs = CONTEXT.classifier(initial_weights(CONTEXT)), TINY.prototypes
    shard = shard_of(stripes(60))
    knobs = dataclasses.replace(knobs, held_out=0.0)
    every = client_prototypes(model, shard, knobs, FACTS, (0, 0, 0), "fp32")
    capped = client_prototypes(model, shard, dataclasses.replace(knobs, cap=2), FACTS, (0, 0, 0), "fp32")
    assert every.judges is None
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


# --- centroids of their own for images that are held out (docs/algorithm.md, S9) -------------------------------------


@given(st.lists(st.integers(0, 9), min_size=1, max_size=60), st.sampled_from([0.0, 0.25, 0.5, 0.9]))
@settings(max_examples=40)
def test_a_share_of_each_class_judges_and_never_all_of_it(labels, share):
    labels = np.array(labels)
    judging = judging_images(labels, share, 3, 5)
    for label in np.unique(labels):
        own = labels == label
        assert judging[own].sum() == int(share * own.sum()) < own.sum()
    assert np.array_equal(judging, judging_images(labels, share, 3, 5))


def test_s9_each_half_sends_centroids_of_its_own_images_alone():
    model, knobs = CONTEXT.classifier(initial_weights(CONTEXT)), dataclasses.replace(TINY.prototypes, held_out=0.4)
    data = stripes(60)
    shard = shard_of(data.take(np.flatnonzero((data.labels > 0) | (np.arange(60) == 0))))  # one image of class 0
    found = client_prototypes(model, shard, knobs, FACTS, (0, 0, 7), "fp32")
    features, labels = extract_features(model, shard, FACTS, "fp32"), shard.labels.numpy()
    judging = judging_images(labels, 0.4, 0, 7)
    for label in (0, 1, 2):
        for judges in (False, True):
            rows = (labels == label) & (judging == judges)
            mine = found.take(np.flatnonzero((found.labels == label) & (found.judges == judges)))
            assert mine.sizes.sum() == rows.sum() == {0: (1, 0), 1: (12, 8), 2: (12, 8)}[label][judges]
            if rows.any():
                np.testing.assert_allclose(
                    np.average(mine.vectors, axis=0, weights=mine.sizes), features[rows].mean(0), atol=1e-5
                )
    kept, held_out = split_held_out(found, 0.4, 0)
    assert np.array_equal(kept.vectors, found.vectors[~found.judges]) and kept.judges is None
    assert np.array_equal(held_out.vectors, found.vectors[found.judges]) and set(held_out.labels) == {1, 2}
    other_round = client_prototypes(model, shard, knobs, FACTS, (0, 9, 7), "fp32")
    assert np.array_equal(other_round.vectors, found.vectors)  # no image judges in one round and is fitted in another


def test_a_class_of_which_only_judging_images_are_drawn_is_fitted_all_the_same():
    model, shard = CONTEXT.classifier(initial_weights(CONTEXT)), shard_of(stripes(90))
    for client in range(8):
        knobs = dataclasses.replace(TINY.prototypes, held_out=0.9, samples=6)
        found = client_prototypes(model, shard, knobs, FACTS, (0, 0, client), "fp32")
        assert set(found.labels) == set(found.labels[~found.judges])
        assert found.sizes.sum() == 6


def test_s9_the_head_is_fitted_again_to_all_prototypes_for_the_steps_that_were_chosen():
    kept, held = split_held_out(cloud(), 0.25, 0)
    start = {"head.weight": np.zeros((3, 5), np.float32), "head.bias": np.zeros(3, np.float32)}
    trial, whole, figures = fit_heads(kept, held, start, "size")
    assert np.array_equal(trial["head.weight"], fit_head(kept, held, tuple(start.values()), "size")[0])
    every = Prototypes.concatenate([kept, held])
    weights, labels = torch.tensor(prototype_weights(every, "size")), torch.tensor(every.labels)
    layer = torch.nn.Linear(5, 3)
    torch.nn.init.zeros_(layer.weight), torch.nn.init.zeros_(layer.bias)
    optimiser = torch.optim.Adam(layer.parameters(), lr=FIT_LR)
    assert 0 < figures["steps"] < 1000
    for _ in range(figures["steps"]):
        optimiser.zero_grad()
        logits = layer(torch.tensor(every.vectors))
        (weights * torch.nn.functional.cross_entropy(logits, labels, reduction="none")).mean().backward()
        optimiser.step()
    np.testing.assert_allclose(whole["head.weight"], layer.weight.detach().numpy(), atol=1e-3)
    np.testing.assert_allclose(whole["head.bias"], layer.bias.detach().numpy(), atol=1e-3)
    alone, again, _ = fit_heads(every, held.take(np.arange(0)), start, "size")
    assert alone is again


def test_a_loss_is_surely_lower_if_chance_would_hardly_make_it_so():
    """Two standard errors of the paired differences: with equal sizes those of the textbook, by hand."""
    start = torch.tensor([1.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    falls = torch.tensor([0.1, 0.3, 0.1, 0.3], dtype=torch.float64)  # mean 0.2, error 0.1 / sqrt(4) = 0.05
    assert surely_lower(start - falls, start, np.ones(4))
    assert not surely_lower(start - falls + 0.101, start, np.ones(4))
    assert surely_lower(start - falls + 0.099, start, np.ones(4))
    assert not surely_lower(start, start, np.ones(4))
    assert not surely_lower(start * np.nan, start, np.ones(4))
    twice = np.array([2.0, 1.0]), torch.tensor([0.3, -0.1], dtype=torch.float64)
    shares, mean = twice[0] / 3, float(twice[0] @ twice[1].numpy()) / 3
    error = np.sqrt((shares**2 * (twice[1].numpy() - mean) ** 2).sum())
    assert surely_lower(-twice[1], torch.zeros(2, dtype=torch.float64), twice[0]) == (mean > 2 * error)


@given(st.integers(0, 200))
@settings(max_examples=5)
def test_chance_alone_is_seldom_taken_for_a_lower_loss(seed):
    """Of 400 pairs of losses without a difference about 2.3 per cent pass, one side of two standard errors."""
    draws = np.random.default_rng(seed)
    start, now = torch.tensor(draws.exponential(size=(2, 400, 60)))
    passed = sum(surely_lower(b, a, np.ones(60)) for a, b in zip(start, now, strict=True))
    assert passed / 400 < 0.06
