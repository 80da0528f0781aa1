"""Generators (O15, O30, O32), shares of a synthetic batch, and findings of bad generators."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from helpers import FACTS, TINY, assert_same, generate, shard_of, stripes
from hypothesis import given, settings
from hypothesis import strategies as st

from mosaic_ray.config.resolve import override
from mosaic_ray.core.health import generator_findings
from mosaic_ray.data.transforms import normalise
from mosaic_ray.distillation.generator_training import (
    allocate,
    classifier_view,
    num_steps,
    real_batches,
    sampling_shares,
    to_pixels,
    train_generator,
)
from mosaic_ray.federated.client import ClientContext, initial_weights
from mosaic_ray.models.state_dict import to_weights

CONTEXT = ClientContext(TINY, FACTS, torch.device("cpu"))
START = initial_weights(CONTEXT)


def make(knobs: dict, data=None, client_id: int = 1):
    config = override(TINY, knobs)
    context = ClientContext(config, FACTS, CONTEXT.device)
    return generate(context, shard_of(data or stripes(60)), client_id, START, START)


def test_o31_a_generator_is_a_function_of_its_address():
    first, again, other = make({}), make({}), make({}, client_id=2)
    assert_same(first.weights, again.weights)
    assert np.array_equal(first.samples, again.samples)
    assert not np.array_equal(first.samples, other.samples)


@pytest.mark.parametrize("tau, active", [(60, False), (61, True)])
def test_o15_inversion_speaks_only_below_tau(tau, active):
    """60 images: with tau = 60 the term is off for any weight; with 61 it changes the generator."""
    without = make({"generator.tau": tau, "generator.lambda_i": 0.0})
    with_it = make({"generator.tau": tau, "generator.lambda_i": 10.0, "generator.inversion_scale": 1.0})
    same = all(np.array_equal(without.weights[n], with_it.weights[n]) for n in without.weights)
    assert same is not active


@pytest.mark.parametrize("knob", ["generator.lambda_e", "generator.lambda_d"])
def test_each_lambda_reaches_the_generator(knob):
    low, high = make({knob: 0.0}), make({knob: 5.0})
    assert not np.array_equal(low.samples, high.samples)


@pytest.mark.parametrize("discriminator", ["dcgan", "shared_trunk"])
@pytest.mark.parametrize("gan_range", ["pm1_then_renorm", "model_norm"])
@pytest.mark.parametrize("source", ["client", "fresh"])
def test_every_variant_trains_and_leaves_finite_weights(discriminator, gan_range, source):
    made = make({
        "generator.discriminator": discriminator, "generator.gan_range": gan_range,
        "generator.classifier_source": source, "generator.classifier_epochs": 1, "generator.div_support": "all",
    })  # fmt: skip
    assert all(np.isfinite(v).all() for v in made.weights.values())
    assert made.samples.shape == (64, 1, 8, 8)
    assert 0 <= made.figures["coverage"] <= 1


def test_g6_the_classifier_is_left_as_it_was_in_eval_and_polluted_in_train():
    for mode, same in (("eval", True), ("train", False)):
        config = override(TINY, {"generator.classifier_mode": mode, "generator.tau": 0}).generator
        model = CONTEXT.classifier(START)
        train_generator(model, START, shard_of(stripes(60)), config, FACTS, (0, 0), "fp32")
        after = to_weights(model)
        assert all(np.array_equal(after[n], START[n]) for n in START) is same
        assert all(p.grad is None for p in model.parameters())


def test_o30_a_client_of_class_0_alone_trains_on_class_0():
    data = stripes(90)
    zeros = data.take(np.flatnonzero(data.labels == 0))
    shard = shard_of(zeros)
    real = list(real_batches(shard, TINY.generator, FACTS, (0, 0), 3))
    assert len(real) == 3
    wanted = {tuple(x.flatten().tolist()) for x in shard.images.float() / 127.5 - 1}
    assert all(tuple(x.flatten().tolist()) in wanted for batch, _ in real for x in batch)
    assert make({}, zeros).curve


def test_o30_the_authors_bug_keeps_class_0_out_and_does_not_crash_on_it_alone():
    data = stripes(90)
    config = dataclasses.replace(TINY.generator, drop_class0_bug=True)
    seen = torch.cat([real for real, _ in real_batches(shard_of(data), config, FACTS, (0, 0), 12)])
    zeros = {tuple(x.flatten().tolist()) for x in shard_of(data).images[data.labels == 0].float() / 127.5 - 1}
    assert not any(tuple(x.flatten().tolist()) in zeros for x in seen)
    assert make({"generator.drop_class0_bug": True}, data.take(np.flatnonzero(data.labels == 0))).curve == []


def test_o32_the_range_of_the_game_and_the_classifiers_view_of_it():
    shard = shard_of(stripes(32))
    order = dataclasses.replace(TINY.generator, batch_size=32)
    real, _ = next(real_batches(shard, order, FACTS, (0, 0), 1))
    assert real.min() >= -1 and real.max() <= 1
    raw, _ = next(real_batches(shard, dataclasses.replace(order, gan_range="model_norm"), FACTS, (0, 0), 1))
    torch.testing.assert_close(classifier_view(real, "pm1_then_renorm", FACTS), raw, atol=1e-5, rtol=1e-5)
    assert classifier_view(raw, "model_norm", FACTS) is raw
    pixels = to_pixels(real, "pm1_then_renorm", FACTS)
    assert np.array_equal(pixels, to_pixels(raw, "model_norm", FACTS))
    torch.testing.assert_close(normalise(torch.tensor(pixels), FACTS.mean, FACTS.std), raw, atol=1e-5, rtol=1e-5)


def test_epochs_count_passes_and_steps_count_steps():
    assert num_steps(override(TINY, {"generator.steps": 7}).generator, 1000) == 7
    assert num_steps(override(TINY, {"generator.epochs": 2}).generator, 33) == 6


@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=12), st.integers(0, 500))
@settings(max_examples=60)
def test_allocation_sums_to_the_total_and_is_within_one_of_exact(weights, total):
    shares = np.array(weights) / sum(weights)
    counts = allocate(shares, total)
    assert counts.sum() == total
    assert (np.abs(counts - shares * total) < 1 + 1e-9).all()


def test_k4_shares_of_each_rule():
    figures = [{"coverage": 1.0, "owned_mass": 1.0}, {"coverage": 0.5, "owned_mass": 0.5}]
    sizes = np.array([100, 400])
    np.testing.assert_allclose(sampling_shares("uniform", sizes, figures), [0.5, 0.5])
    np.testing.assert_allclose(sampling_shares("proportional", sizes, figures), [0.2, 0.8])
    np.testing.assert_allclose(sampling_shares("quality", sizes, figures), [10 / 15, 5 / 15])


def test_s5_one_image_of_a_class_that_is_not_shown_costs_a_covered_client_next_to_nothing():
    """One client shows its class of 396 images and none of four classes of one image, the other all of both classes."""
    one = {"coverage": 0.2, "image_coverage": 0.99, "owned_mass": 1.0}
    both = {"coverage": 1.0, "image_coverage": 1.0, "owned_mass": 1.0}
    sizes = np.array([400, 400])
    np.testing.assert_allclose(sampling_shares("quality", sizes, [one, both]), [0.2 / 1.2, 1 / 1.2])
    np.testing.assert_allclose(sampling_shares("covered", sizes, [one, both]), [0.99 / 1.99, 1 / 1.99])


def test_collapse_and_low_coverage_are_reported_and_a_sound_generator_is_not():
    sound = {"owned_classes": 4.0, "marginal_entropy": 0.9, "coverage": 1.0}
    assert generator_findings(0, sound) == []
    assert generator_findings(3, sound | {"marginal_entropy": 0.1})[0].code == "generator.mode_collapse"
    assert generator_findings(3, sound | {"coverage": 0.25})[0].code == "generator.low_coverage"
    assert generator_findings(3, {"owned_classes": 1.0, "marginal_entropy": 0.0, "coverage": 1.0}) == []


def test_s13_the_inversion_loss_can_be_read_on_the_global_network():
    """Where it is and no other loss reads the client's network, that network changes nothing."""
    knobs = {
        "generator.steps": 3, "generator.discriminator": "dcgan", "generator.lambda_e": 0.0, "generator.lambda_d": 0.0,
        "generator.lambda_i": 10.0, "generator.inversion_scale": 1.0, "generator.tau": 1000,
    }  # fmt: skip
    moved = {name: value * 1.5 if value.ndim == 4 else value for name, value in START.items()}
    for network, reads_own in (("client", True), ("global", False)):
        config = override(TINY, knobs | {"generator.inversion_network": network})
        context = ClientContext(config, FACTS, CONTEXT.device)
        one, other = (generate(context, shard_of(stripes(60)), 1, START, own).weights for own in (START, moved))
        same = all(np.array_equal(one[name], other[name]) for name in one)
        assert same is not reads_own
    at_start = [make(knobs | {"generator.inversion_network": network}).weights for network in ("client", "global")]
    assert_same(*at_start)  # the client's network is the global one
