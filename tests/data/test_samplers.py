"""The properties of each sampler; properties of all samplers are in test_partition."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from dealing import counts_of, labels_of
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import digamma

from mosaic_ray.config.resolve import KNOBS
from mosaic_ray.config.schema import PartitionConfig
from mosaic_ray.core.errors import RequestError
from mosaic_ray.data.partition import SAMPLERS, partition, skew

CIFAR10 = [5000] * 10
#: SVHN's training labels: the most frequent class has three times the samples of the rarest.
SVHN = [4948, 13861, 10585, 8497, 7458, 6882, 5727, 5595, 5045, 4659]


def mean_skew(seeds: int = 6, **knobs) -> float:
    return float(np.mean([skew(counts_of([1000] * 10, seed, **knobs)) for seed in range(seeds)]))


def test_every_choice_has_its_sampler():
    assert tuple(SAMPLERS) == KNOBS["partition.sampler"].metadata["choices"]


@pytest.mark.parametrize("sampler", ["dirichlet", "balanced"])
def test_o5_skew_grows_as_omega_falls(sampler):
    skews = [mean_skew(sampler=sampler, omega=omega, max_tries=1) for omega in (1e6, 10.0, 1.0, 0.1, 0.01, 1e-5)]
    assert skews == sorted(skews)
    assert skews[0] < 0.01
    assert math.log(10) - 0.3 < skews[-1] <= math.log(10) + 1e-9


@pytest.mark.parametrize("sampler", ["dirichlet", "quantity", "pathological"])
def test_d3_reject_draws_so_often_and_then_names_the_knobs(sampler):
    knobs = {"sampler": sampler, "num_clients": 12, "omega": 0.02, "classes_per_client": 1, "policy": "reject"}
    # 12 clients of one class each: five of the ten classes' pieces must be halved, and 300 is then too many
    knobs["min_size"] = 300 if sampler == "pathological" else 10
    head = r"partition\.classes_per_client = 1: " if sampler == "pathological" else r"partition\.omega = 0\.02: "
    with pytest.raises(RequestError, match=head + r".*max_tries = 7.*num_clients = 12.*min_size = .*repair"):
        partition(labels_of([500] * 10), PartitionConfig(**knobs, max_tries=7), 0, 10)


@pytest.mark.parametrize("sampler", ["dirichlet", "quantity"])
def test_d3_a_small_client_makes_all_be_drawn_again(sampler):
    knobs = {"sampler": sampler, "num_clients": 6, "omega": 0.3}
    for seed in range(20):
        counts = counts_of([500] * 10, seed, **knobs, policy="reject", max_tries=1000)
        assert np.array_equal(counts, counts_of([500] * 10, seed, **knobs, policy="repair", max_tries=1000))
        assert counts.sum(axis=1).min() >= 10


# --- dirichlet -------------------------------------------------------------------------------------------------------


def test_dirichlet_shares_have_the_law_of_the_concentration():
    clients, omega = 5, 0.5
    shares = np.concatenate(
        [
            counts_of([2000] * 100, seed, sampler="dirichlet", num_clients=clients, omega=omega) / 2000
            for seed in range(12)
        ],
        axis=1,
    )
    assert shares.mean(axis=1) == pytest.approx(1 / clients, abs=0.02)
    assert shares.var(axis=1).mean() == pytest.approx(
        (1 / clients) * (1 - 1 / clients) / (clients * omega + 1), rel=0.08
    )


def test_dirichlet_knows_no_quota():
    largest = {
        sampler: max(counts_of(CIFAR10, seed, sampler=sampler, omega=0.05).sum(axis=1).max() for seed in range(10))
        for sampler in ("reference", "dirichlet")
    }
    assert largest["reference"] < 10_000 < largest["dirichlet"]


def test_dirichlet_favours_nobody_by_rounding():
    held = sum(
        (counts_of([500] * 100, seed, sampler="dirichlet", num_clients=50, omega=0.05) > 0).sum(axis=1)
        for seed in range(5)
    )
    assert held.max() < 1.5 * np.median(held)


def test_d4_what_underflows_goes_to_one_client_and_any_may_be_it():
    owners = []
    for seed in range(30):
        counts = counts_of([300] * 10, seed, sampler="dirichlet", omega=1e-300, min_size=1, max_tries=1)
        drawn = counts == counts.max(axis=0)
        owners += drawn.argmax(axis=0).tolist()
        assert (counts.max(axis=0) >= 290).all(), "but for the repair"
    assert np.bincount(owners, minlength=10).min() > 15


# --- balanced --------------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(
    class_sizes=st.lists(st.integers(0, 300), min_size=1, max_size=12),
    num_clients=st.integers(1, 30),
    omega=st.sampled_from([1e-300, 1e-3, 0.1, 1.0, 1e6]),
    seed=st.integers(0, 1000),
)
def test_d5_balanced_sizes_are_equal_and_nobody_is_left_with_the_leftovers(class_sizes, num_clients, omega, seed):
    if sum(class_sizes) < num_clients:
        return
    counts = counts_of(class_sizes, seed, sampler="balanced", num_clients=num_clients, omega=omega, min_size=1)
    assert np.ptp(counts.sum(axis=1)) <= 1
    assert counts.sum(axis=0).tolist() == class_sizes


@pytest.mark.parametrize("omega", [0.1, 1.0])
def test_balanced_shares_have_the_law_of_the_concentration(omega):
    """Mean entropy of Dir(omega * 1_C), in closed form; classes are plentiful and samples of a client many."""
    skews = [skew(counts_of(CIFAR10, seed, sampler="balanced", num_clients=50, omega=omega)) for seed in range(4)]
    assert np.mean(skews) == pytest.approx(math.log(10) - (digamma(10 * omega + 1) - digamma(omega + 1)), abs=0.08)


def test_balanced_shares_are_of_what_there_is():
    """With shares nearly even, every client has the class shares of the whole, also the last client."""
    counts = counts_of(SVHN, sampler="balanced", num_clients=20, omega=1e5)
    assert np.abs(counts / counts.sum(axis=1, keepdims=True) - np.array(SVHN) / sum(SVHN)).max() < 0.03


def test_balanced_clients_choose_in_random_order():
    """The client that draws last takes the rest, and is more skewed: it is not always the same client."""
    skews = np.zeros(10)
    for seed in range(100):
        counts = counts_of([1000] * 10, seed, sampler="balanced", omega=1.0)
        skews += [skew(row[None]) for row in counts]
    assert skews[-2:].sum() < 1.15 * 2 * np.median(skews)


# --- pathological ----------------------------------------------------------------------------------------------------


@settings(max_examples=100)
@given(
    class_sizes=st.lists(st.integers(40, 200) | st.just(0), min_size=2, max_size=12).filter(any),
    num_clients=st.integers(1, 8),
    most=st.integers(1, 14),
    min_size=st.integers(1, 10),
    seed=st.integers(0, 1000),
)
def test_pathological_clients_hold_so_many_classes_at_most(class_sizes, num_clients, most, min_size, seed):
    knobs = {"num_clients": num_clients, "classes_per_client": most, "min_size": min_size, "sampler": "pathological"}
    num_held = np.count_nonzero(class_sizes)
    if num_clients * most < num_held:
        with pytest.raises(RequestError, match=rf"partition\.classes_per_client = {most}: .*num_clients"):
            counts_of(class_sizes, seed, **knobs)
        return
    if num_held == 1 or most == 1:
        num_clients = knobs["num_clients"] = min(num_clients, 4 * num_held)
    counts = counts_of(class_sizes, seed, **knobs, policy="reject", max_tries=1)
    assert ((counts > 0).sum(axis=1) == min(most, num_held)).all()
    assert counts.sum(axis=0).tolist() == class_sizes
    assert counts.sum(axis=1).min() >= min_size


def test_pathological_deals_as_the_paper_does_where_pieces_are_whole():
    counts = counts_of([6000] * 10, sampler="pathological", num_clients=100)
    assert ((counts > 0).sum(axis=1) == 2).all()
    assert set(counts[counts > 0].tolist()) == {300}
    pairs = {tuple(np.flatnonzero(row)) for row in counts}
    assert len(pairs) > 20, "of 45 pairs of classes: partners are drawn, not fixed"
    assert pairs != {tuple(np.flatnonzero(row)) for row in counts_of([6000] * 10, 1, sampler="pathological")}


def test_pathological_cuts_a_class_as_often_as_its_size_earns():
    counts = counts_of([1000, 3000, 2000], sampler="pathological", num_clients=6, classes_per_client=1)
    assert (counts > 0).sum(axis=0).tolist() == [1, 3, 2]
    assert (counts.sum(axis=1) == 1000).all()
    seven = (counts_of([100] * 10, seed, sampler="pathological", num_clients=7) for seed in range(9))
    assert len({tuple((counts > 0).sum(axis=0)) for counts in seven}) > 3, "which of equals is cut once more is drawn"


def test_pathological_repair_keeps_to_the_classes_held():
    """The client of class 0, of 2 samples, is short: with a part of class 2 or 3 too, it has a donor."""
    knobs = {"sampler": "pathological", "num_clients": 3, "classes_per_client": 2, "min_size": 40, "max_tries": 1}
    refused = []
    for seed in range(40):
        try:
            counts = counts_of([2, 20, 60, 60], seed, **knobs)
        except RequestError as error:
            refused.append(str(error))
            continue
        assert counts.sum(axis=1).min() == 40
        assert ((counts > 0).sum(axis=1) == 2).all()
    assert 0 < len(refused) < 20
    assert all("holds 22 samples" in line for line in refused), "of classes 0 and 1, which nobody else has"


def test_pathological_refuses_counts_that_no_repair_can_fix():
    knobs = {"sampler": "pathological", "num_clients": 3, "classes_per_client": 1, "max_tries": 2}
    with pytest.raises(RequestError, match=r"partition\.classes_per_client = 1: .* 5 samples.*min_size = 10"):
        counts_of([5, 500, 500], **knobs)
    assert counts_of([5, 500, 500], **knobs | {"classes_per_client": 2}).sum(axis=1).min() >= 10


@pytest.mark.parametrize("num_clients, most, least", [(4, 2, "at least 3, or 5 clients"), (1, 9, "at least 10")])
def test_pathological_needs_a_place_for_every_class(num_clients, most, least):
    with pytest.raises(RequestError, match=rf"classes_per_client = {most}: .*num_clients = {num_clients} .*{least}"):
        counts_of(CIFAR10, sampler="pathological", num_clients=num_clients, classes_per_client=most)


# --- quantity --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("class_sizes", [CIFAR10, SVHN, [900, 1, 40]])
@pytest.mark.parametrize("omega", [0.05, 1.0])
def test_quantity_skews_sizes_and_leaves_classes_in_proportion(class_sizes, omega):
    for seed in range(5):
        counts = counts_of(class_sizes, seed, sampler="quantity", num_clients=8, omega=omega, max_tries=500)
        share = counts.sum(axis=1, keepdims=True) * np.array(class_sizes) / sum(class_sizes)
        assert np.abs(counts - share).max() < 4


def test_quantity_sizes_spread_as_omega_falls():
    spreads = [
        np.mean(
            [
                counts_of(CIFAR10, seed, sampler="quantity", omega=omega, max_tries=1).sum(axis=1).std()
                for seed in range(10)
            ]
        )
        for omega in (1e6, 10.0, 1.0, 0.1, 0.01)
    ]
    assert spreads == sorted(spreads)
    assert spreads[0] < 10
    assert spreads[-1] > 10_000


def test_quantity_sizes_have_the_law_of_the_concentration():
    sizes = [counts_of([5000], seed, sampler="quantity", num_clients=4, omega=2.0).sum(axis=1) for seed in range(600)]
    shares = np.array(sizes) / 5000
    assert shares.mean(axis=0) == pytest.approx(0.25, abs=0.02)
    assert shares.var(axis=0) == pytest.approx(0.25 * 0.75 / 9, rel=0.2)


@pytest.mark.parametrize("first, second", [*itertools.combinations(SAMPLERS, 2)])
def test_no_two_samplers_deal_alike(first, second):
    one, two = (counts_of(SVHN, sampler=sampler, omega=0.5) for sampler in (first, second))
    assert not np.array_equal(one, two)
