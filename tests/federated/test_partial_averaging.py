"""Averages over the clients that hold a coordinate (docs/algorithm.md 3.5), and experts of partial-width clients."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from helpers import assert_same
from hypothesis import given, settings
from hypothesis import strategies as st

from mosaic_ray.core.types import Weights
from mosaic_ray.distillation.experts import form_experts
from mosaic_ray.federated.aggregation import PartialAverage, RunningAverage
from mosaic_ray.models.submodel import ChannelIndices, ChannelLayout, extract

#: Two spaces; the head reads blocks of two neighbours for each channel of the second, as of flattened maps.
CHANNELS = ChannelLayout(
    (4, 3),
    ("first", "second"),
    {
        "first.weight": ((0, 1), None, None),
        "second.weight": ((1, 1), (0, 1), None),
        "norm.bias": ((1, 1),),
        "norm.num_batches_tracked": (),
        "head.weight": (None, (1, 2)),
        "head.bias": (None,),
    },
    ("head.weight", "head.bias"),
)
SHAPES = {
    "first.weight": (4, 2, 3), "second.weight": (3, 4, 2), "norm.bias": (3,), "norm.num_batches_tracked": (),
    "head.weight": (5, 6), "head.bias": (5,),
}  # fmt: skip


def whole(seed: int) -> Weights:
    """Weights with zeros of both signs in them, and a counter."""
    draws = np.random.default_rng(seed)
    weights: Weights = {}
    for name, shape in SHAPES.items():
        if not shape:
            weights[name] = np.array(draws.integers(1, 1000), np.int64)
            continue
        values = draws.normal(size=shape)
        values[draws.random(shape) < 0.2] = 0.0
        weights[name] = np.copysign(values, draws.normal(size=shape)).astype(np.float32)
    return weights


def client(seed: int, sets: ChannelIndices | None) -> Weights:
    return whole(seed) if sets is None else extract(whole(seed), CHANNELS, sets)


def by_hand(previous: Weights, parts: list[tuple]) -> Weights:
    """Coordinate by coordinate, in Python's own numbers. ``parts`` of (seed, weight, sets, classes)."""
    models = [whole(seed) for seed, *_ in parts]
    expected = {name: array.copy() for name, array in previous.items()}
    for name, shape in SHAPES.items():
        for place in itertools.product(*map(range, shape)):
            total, held = -0.0, 0.0
            for model, (_, weight, sets, classes) in zip(models, parts, strict=True):
                holds = all(
                    sets is None or axis is None or index // axis[1] in sets[axis[0]]
                    for index, axis in zip(place, CHANNELS.entries[name], strict=True)
                )
                if name.startswith("head") and classes is not None:
                    holds = holds and bool(classes[place[0]])
                if holds and weight:
                    total, held = total + float(model[name][place]) * weight, held + weight
            if held:
                mean = total / held
                expected[name][place] = mean if shape else math.floor(mean + 1e-9 * abs(mean))
    return expected


subsets = st.tuples(
    *[st.sets(st.integers(0, size - 1), min_size=1).map(lambda s: np.array(sorted(s))) for size in CHANNELS.sizes]
)
weights_of_clients = st.one_of(st.integers(0, 5000), st.floats(1e-3, 1e3))
parts_of_clients = st.lists(
    st.tuples(
        st.integers(0, 50),
        weights_of_clients,
        st.none() | subsets,
        st.none() | st.lists(st.booleans(), min_size=5, max_size=5).map(np.array),
    ),
    max_size=5,
)


def averaged(previous: Weights, parts: list[tuple]) -> Weights:
    average = PartialAverage(previous, CHANNELS)
    for seed, weight, sets, classes in parts:
        average.add(client(seed, sets), weight, sets, classes)
    return average.result()


@given(parts_of_clients)
@settings(max_examples=80)
def test_each_coordinate_is_the_weighted_mean_over_the_clients_that_hold_it(parts):
    previous = whole(99)
    result = averaged(previous, parts)
    assert_same(result, by_hand(previous, parts))
    signs = {name: np.signbit(array) for name, array in by_hand(previous, parts).items()}
    assert_same({name: np.signbit(array) for name, array in result.items()}, signs)


@given(parts_of_clients, st.randoms())
@settings(max_examples=40)
def test_the_order_of_adding_shows_in_the_last_bit_at_most(parts, random):
    mixed = random.sample(parts, len(parts))
    one, other = averaged(whole(99), parts), averaged(whole(99), mixed)
    for name, value in one.items():
        np.testing.assert_allclose(value, other[name], rtol=1e-6, atol=1e-6, err_msg=name)


@given(st.lists(st.tuples(st.integers(0, 50), st.floats(1e-3, 1e3)), min_size=1, max_size=6), st.booleans())
@settings(max_examples=60)
def test_whole_clients_average_as_ever_bit_for_bit(parts, spelled_out):
    everything = tuple(np.arange(size) for size in CHANNELS.sizes) if spelled_out else None
    running, partial = RunningAverage(), PartialAverage(whole(99), CHANNELS)
    for seed, weight in parts:
        running.add(whole(seed), weight)
        partial.add(whole(seed), weight, everything, np.ones(5, bool) if spelled_out else None)
    expected, result = running.result(), partial.result()
    assert_same(result, expected)
    assert {n: a.tobytes() for n, a in result.items()} == {n: a.tobytes() for n, a in expected.items()}
    assert not any(isinstance(held, np.ndarray) for held in partial._held.values()), "counts by coordinate, for nothing"


def test_coordinates_that_no_client_holds_keep_their_bits():
    previous = whole(99)
    previous["first.weight"][:] = np.array([np.nan, -0.0, 1e-42], np.float32)
    sets = (np.array([1]), np.array([0, 2]))
    result = averaged(previous, [(1, 3, sets, np.array([True, False, False, False, False]))])
    kept, bits = np.array([0, 2, 3]), np.uint32
    assert np.array_equal(result["first.weight"][kept].view(bits), previous["first.weight"][kept].view(bits))
    assert np.array_equal(result["head.bias"][1:], previous["head.bias"][1:])
    assert result["head.bias"][0] == whole(1)["head.bias"][0] != previous["head.bias"][0]
    assert np.array_equal(result["second.weight"][1], previous["second.weight"][1])
    assert result["second.weight"][2, 1, 0] == whole(1)["second.weight"][2, 1, 0]
    assert np.array_equal(result["head.weight"][0, 2:4], previous["head.weight"][0, 2:4])
    assert np.array_equal(result["head.weight"][0, 4:], whole(1)["head.weight"][0, 4:])


def test_without_clients_everything_stays():
    previous = whole(99)
    assert_same(averaged(previous, []), previous)
    assert_same(averaged(previous, [(1, 0, None, None)]), previous)
    assert not any(np.shares_memory(a, previous[n]) for n, a in averaged(previous, []).items())


def test_counts_by_coordinate_are_kept_where_clients_differ_alone():
    average = PartialAverage(whole(99), CHANNELS)
    sets = (np.array([1]), np.arange(3))
    average.add(client(1, sets), 2, sets)
    held = {name: np.shape(value) for name, value in average._held.items()}
    assert held.pop("first.weight") == (4, 1, 1)
    assert held.pop("second.weight") == (3, 4, 1)
    assert set(held.values()) == {()}


@pytest.mark.parametrize("weight", [1e-3, 0.1, 1 / 3, 7.0])
def test_equal_counters_survive_fractional_weights(weight):
    channels, counter = ChannelLayout((), (), {"n": ()}, ()), {"n": np.array(2**40 + 1)}
    average = PartialAverage(counter, channels)
    for client_id in range(1000):
        average.add(counter, weight * (client_id + 1))
    assert_same(average.result(), counter)


def test_inputs_are_neither_changed_nor_shared():
    previous, sets = whole(99), (np.array([1, 2]), np.array([0]))
    average = PartialAverage(previous, CHANNELS)
    part = client(1, sets)
    average.add(part, 2, sets)
    early = average.result()
    average.add(whole(2), 1)
    late = average.result()
    assert_same(previous, whole(99))
    assert_same(part, client(1, sets))
    assert_same(early, averaged(previous, [(1, 2, sets, None)]))
    arrays = [*previous.values(), *part.values(), *average._sums.values()]
    assert not any(np.shares_memory(r, x) for r in [*early.values(), *late.values()] for x in arrays)


def test_parts_of_another_shape_and_impossible_weights_are_refused():
    average, sets = PartialAverage(whole(99), CHANNELS), (np.array([1, 2]), np.array([0]))
    with pytest.raises(ValueError, match="cannot average: first"):
        average.add(whole(1), 0, sets)
    with pytest.raises(ValueError, match="cannot average: first"):
        average.add(client(1, sets), 1)
    with pytest.raises(ValueError, match="names differ"):
        average.add({"first.weight": whole(1)["first.weight"]}, 1)
    with pytest.raises(ValueError, match="finite and not negative"):
        average.add(whole(1), float("nan"))
    assert_same(average.result(), whole(99))


# --- class experts ---------------------------------------------------------------------------------------------------


@given(
    st.lists(
        st.tuples(st.lists(st.integers(0, 30), min_size=3, max_size=3), st.none() | subsets), min_size=1, max_size=4
    )
)
@settings(max_examples=40)
def test_an_expert_is_averaged_over_the_clients_that_hold_class_and_coordinate(clients):
    counts = np.array([row for row, _ in clients])
    theta_g, fallback = whole(99), whole(98)
    models = [(k, client(k, sets), sets) for k, (_, sets) in enumerate(clients)]
    experts, index = form_experts(iter(models), counts, fallback, channels=CHANNELS, whole=theta_g)
    for label in range(3):
        parts = [(k, int(counts[k, label]), sets, None) for k, (_, sets) in enumerate(clients)]
        owned = counts[:, label].any()
        for name, value in (by_hand(theta_g, parts) if owned else fallback).items():  # equal columns share the first's
            np.testing.assert_allclose(experts[index[label]][name], value, rtol=1e-6, atol=1e-7, err_msg=name)


def test_a_lone_narrow_owner_is_its_expert_where_it_reaches_and_theta_g_elsewhere():
    sets, theta_g = (np.array([0, 3]), np.array([1])), whole(99)
    models = [(0, whole(0), None), (1, client(1, sets), sets)]
    experts, index = form_experts(models, np.array([[4, 0], [0, 9]]), None, channels=CHANNELS, whole=theta_g)
    assert_same(experts[index[0]], whole(0))
    assert_same(extract(experts[index[1]], CHANNELS, sets), client(1, sets))
    assert_same(experts[index[1]], by_hand(theta_g, [(1, 9, sets, None)]))


def test_a_class_without_owner_falls_back_or_says_so():
    sets = (np.array([0, 3]), np.array([1]))
    models = [(0, client(0, sets), sets)]
    counts = np.array([[4, 0]])
    experts, index = form_experts(models, counts, whole(98), channels=CHANNELS, whole=whole(99))
    assert_same(experts[index[1]], whole(98))
    with pytest.raises(ValueError, match="class 1"):
        form_experts(models, counts, None, channels=CHANNELS, whole=whole(99))


def test_experts_of_heads_alone():
    sets = (np.array([0, 3]), np.array([1]))
    heads = {name: whole(99)[name] for name in CHANNELS.heads}
    part = {name: client(0, sets)[name] for name in CHANNELS.heads}
    experts, _ = form_experts([(0, part, sets)], np.array([[4]]), heads, channels=CHANNELS, whole=heads)
    expected = by_hand(whole(99), [(0, 4, sets, None)])
    assert_same(experts[0], {name: expected[name] for name in CHANNELS.heads})


@given(st.lists(st.lists(st.integers(0, 30), min_size=3, max_size=3), min_size=1, max_size=4))
@settings(max_examples=40)
def test_experts_of_whole_clients_are_as_ever_bit_for_bit(rows):
    counts = np.array(rows)
    plain = form_experts([(k, whole(k)) for k in range(len(rows))], counts, whole(98))
    partial = form_experts(
        [(k, whole(k), None) for k in range(len(rows))], counts, whole(98), channels=CHANNELS, whole=whole(99)
    )
    assert np.array_equal(plain[1], partial[1])
    for one, other in zip(plain[0], partial[0], strict=True):
        assert_same(one, other)
