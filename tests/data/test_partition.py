"""The partition: the authors' stream bit for bit, and the properties of every sampler."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import pytest
from dealing import counts_of, labels_of
from hypothesis import given, settings
from hypothesis import strategies as st

from mosaic_ray.config.schema import PartitionConfig
from mosaic_ray.core.errors import RequestError
from mosaic_ray.data.partition import SAMPLERS, label_counts, partition, skew, split_validation


def textbook(labels: np.ndarray, num_clients: int, omega: float, seed: int, num_classes: int, min_size: int):
    """docs/algorithm.md 1.2 written out with lists, as in the authors' code; returns (lists, draws taken)."""
    rng, smallest, draws = np.random.RandomState(seed + 5363), 0, 0
    while smallest < min_size:
        draws += 1
        lists: list[list[int]] = [[] for _ in range(num_clients)]
        for c in range(num_classes):
            indices = np.where(labels == c)[0]
            rng.shuffle(indices)
            shares = rng.dirichlet(np.repeat(omega, num_clients))
            quota = len(labels) / num_clients
            shares = np.array([share * (len(held) < quota) for share, held in zip(shares, lists, strict=True)])
            shares = shares / shares.sum()
            cuts = (np.cumsum(shares) * len(indices)).astype(int)[:-1]
            lists = [held + new.tolist() for held, new in zip(lists, np.split(indices, cuts), strict=True)]
        smallest = min(map(len, lists))
    for held in lists:
        rng.shuffle(held)
    return lists, draws


@pytest.mark.parametrize("policy", ["reject", "repair"])
@pytest.mark.parametrize("order_seed", [None, 1])
def test_o1_the_published_table(policy, order_seed):
    counts = counts_of([5000] * 10, order_seed=order_seed, omega=0.01, policy=policy)
    assert counts.sum(axis=1).tolist() == [72, 689, 1065, 9999, 782, 5442, 5048, 9860, 9273, 7770]
    assert hashlib.sha256(counts.astype("<i8").tobytes()).hexdigest().startswith("ed0e50d0ddfdb453")


@pytest.mark.parametrize(
    "class_sizes, num_clients, omega, seed",
    [
        ([5000] * 10, 10, 0.01, 657),
        ([500] * 10, 5, 0.05, 1),
        ([50] * 100, 10, 0.1, 2),
        ([300, 1, 700, 45, 1200, 80], 7, 0.5, 3),
        ([200] * 10, 20, 1.0, 4),
        ([90, 110, 100], 1, 0.1, 5),
        ([400] * 5, 4, 100.0, 6),
        ([500] * 10, 12, 0.02, 7),  # takes several draws
    ],
)
def test_o2_every_list_equals_the_textbook_sampler(class_sizes, num_clients, omega, seed):
    labels = labels_of(class_sizes, order_seed=seed)
    wanted, draws = textbook(labels, num_clients, omega, seed, len(class_sizes), min_size=10)
    config = PartitionConfig(num_clients=num_clients, omega=omega, max_tries=draws, policy="reject")
    got = partition(labels, config, seed, len(class_sizes))
    assert [shard.tolist() for shard in got] == wanted
    assert all(shard.dtype == np.int64 for shard in got)


def test_o2_a_rejected_draw_is_drawn_again_from_where_the_stream_stands():
    labels = labels_of([500] * 10)
    _, draws = textbook(labels, 12, 0.02, 7, 10, min_size=10)
    assert draws > 1
    with pytest.raises(RequestError, match=r"partition\.omega = 0\.02.*max_tries.*num_clients.*min_size.*repair"):
        partition(labels, PartitionConfig(num_clients=12, omega=0.02, max_tries=draws - 1, policy="reject"), 7, 10)


@settings(max_examples=150)
@given(
    class_sizes=st.lists(st.integers(0, 120), min_size=1, max_size=12),
    num_clients=st.integers(1, 15),
    omega=st.sampled_from([1e-300, 1e-6, 1e-3, 0.01, 0.1, 1.0, 1e4]),
    sampler=st.sampled_from(sorted(SAMPLERS)),
    min_size=st.integers(1, 12),
    seed=st.integers(0, 2**31 - 6000),
)
def test_o4_everything_dealt_once_and_nobody_left_short(class_sizes, num_clients, omega, sampler, min_size, seed):
    labels = labels_of(class_sizes, order_seed=0)
    config = PartitionConfig(
        num_clients, omega, sampler, classes_per_client=12, min_size=min_size, policy="repair", max_tries=3
    )
    if len(labels) < num_clients * min_size:
        with pytest.raises(RequestError, match=r"partition\.num_clients"):
            partition(labels, config, seed, len(class_sizes))
        return
    shards = partition(labels, config, seed, len(class_sizes))
    assert len(shards) == num_clients
    assert sorted(np.concatenate(shards).tolist()) == list(range(len(labels)))
    assert min(map(len, shards)) >= min_size
    counts = label_counts(labels, shards, len(class_sizes))
    assert counts.sum(axis=0).tolist() == class_sizes
    assert counts.sum(axis=1).tolist() == [len(shard) for shard in shards]
    again = partition(labels, config, seed, len(class_sizes))
    assert all(np.array_equal(a, b) for a, b in zip(shards, again, strict=True))
    assert np.array_equal(counts, counts_of(class_sizes, seed, 1, **vars(config))), "label order does not show"


@pytest.mark.parametrize("num_clients, omega, class_sizes", [(100, 0.01, [5000] * 10), (1000, 0.1, [500] * 100)])
@pytest.mark.parametrize("sampler", ["reference", "dirichlet", "quantity"])
def test_o4_repair_serves_many_clients_at_small_omega(sampler, num_clients, omega, class_sizes):
    counts = counts_of(class_sizes, sampler=sampler, num_clients=num_clients, omega=omega, max_tries=5)
    assert counts.sum(axis=1).min() >= 10
    assert counts.sum(axis=0).tolist() == class_sizes


def test_o4_repair_moves_only_what_is_missing_and_only_from_clients_that_can_spare_it():
    knobs = {"num_clients": 30, "omega": 0.05, "max_tries": 1}
    drawn, repaired = (counts_of([400] * 10, min_size=least, **knobs) for least in (1, 25))
    before, after = drawn.sum(axis=1), repaired.sum(axis=1)
    short = before < 25
    assert short.any()
    assert drawn.sum(axis=1).min() >= 1, "the first draw stands, so both start alike"
    assert (after[short] == 25).all()
    assert (after[~short] >= 25).all()
    assert (after[~short] <= before[~short]).all()
    assert (repaired[short] >= drawn[short]).all()
    donors = after < before
    assert before[donors].min() > np.median(before), "the large give"


@pytest.mark.parametrize("spare", [0, 1, 7])
def test_o4_repair_never_pushes_a_donor_below_the_floor_when_there_is_hardly_any_spare(spare):
    for seed in range(20):
        counts = counts_of([45, 75 + spare], seed, num_clients=12, omega=0.3, min_size=10, max_tries=1)
        sizes = counts.sum(axis=1)
        assert sizes.min() == 10
        assert sizes.sum() == 120 + spare


@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
def test_o31_seeds_matter_and_the_global_stream_is_left_alone(sampler):
    before = np.random.get_state()[1:3]  # noqa: NPY002 - it must not move the legacy stream
    one, two = (partition(labels_of([200] * 10), PartitionConfig(sampler=sampler), seed, 10) for seed in (0, 1))
    after = np.random.get_state()[1:3]  # noqa: NPY002 - it must not move the legacy stream
    assert not all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))
    assert np.array_equal(before[0], after[0])
    assert before[1] == after[1]


def test_o5_skew_grows_as_omega_falls_between_even_and_one_class_each():
    omegas = (1e6, 10.0, 1.0, 0.1, 0.01, 1e-5)
    skews = [
        np.mean([skew(counts_of([1000] * 10, seed, omega=omega, max_tries=500)) for seed in range(6)])
        for omega in omegas
    ]
    assert skews == sorted(skews)
    assert skews[0] < 1e-4
    assert skews[-1] == pytest.approx(math.log(10))
    assert np.abs(counts_of([1000] * 10, omega=1e6) - 100).max() <= 5


def test_d4_a_draw_that_underflows_gives_the_class_to_one_client_below_its_quota():
    counts = counts_of([300] * 10, num_clients=10, omega=1e-6, policy="reject", max_tries=1)
    assert ((counts == 300).sum(axis=1) == 1).all()
    assert (counts > 0).sum() == 10


def test_d6_iid_deals_every_class_evenly_with_no_remainder_lost():
    counts = counts_of([103, 57, 260, 9], num_clients=7, sampler="iid")
    assert (np.ptp(counts, axis=0) <= 1).all()
    assert np.ptp(counts.sum(axis=1)) <= 1
    assert counts.sum(axis=0).tolist() == [103, 57, 260, 9]


def test_labels_beyond_the_classes_are_refused():
    with pytest.raises(ValueError, match="0 to 3"):
        partition(labels_of([30] * 4), PartitionConfig(num_clients=2), 0, 3)


def test_label_counts_by_hand():
    counts = label_counts(np.array([0, 2, 2, 1, 0]), [np.array([0, 1, 2]), np.array([3]), np.array([], int)], 4)
    assert counts.dtype == np.int64
    assert counts.tolist() == [[1, 0, 2, 0], [0, 1, 0, 0], [0, 0, 0, 0]]


def test_skew_by_hand():
    assert skew(np.array([[5, 5], [7, 7]])) == 0.0
    assert skew(np.array([[4, 0], [0, 9]])) == pytest.approx(math.log(2))
    one = math.log(2) + 0.25 * math.log(0.25) + 0.75 * math.log(0.75)
    assert skew(np.array([[1, 3], [2, 2], [0, 0]])) == pytest.approx(one / 2)


@settings(max_examples=40)
@given(sizes=st.lists(st.integers(0, 40), min_size=1, max_size=6), fraction=st.floats(0, 0.5), seed=st.integers(0, 99))
def test_validation_takes_its_floor_by_class_and_loses_nothing(sizes, fraction, seed):
    labels = np.random.default_rng(seed).integers(0, 3, sum(sizes))
    shards = np.split(np.random.default_rng(seed + 1).permutation(len(labels)), np.cumsum(sizes)[:-1])
    train, validation = split_validation(labels, shards, fraction, seed)
    for shard, kept, held in zip(shards, train, validation, strict=True):
        assert len(held) == math.floor(fraction * len(shard))
        assert sorted([*kept, *held]) == sorted(shard)
        share = len(held) / max(1, len(shard))
        assert (
            np.abs(np.bincount(labels[held], minlength=3) - share * np.bincount(labels[shard], minlength=3)).max() < 1
        )


def test_validation_of_nothing_leaves_the_shards_and_streams_are_per_client():
    labels = np.zeros(60, np.int64)
    shards = [np.arange(30), np.arange(30, 60)]
    train, validation = split_validation(labels, shards, 0.0, 0)
    assert [shard.tolist() for shard in train] == [shard.tolist() for shard in shards]
    assert [len(shard) for shard in validation] == [0, 0]
    _, both = split_validation(labels, shards, 0.2, 0)
    _, alone = split_validation(labels, shards[:1], 0.2, 0)
    assert both[0].tolist() == alone[0].tolist()
    assert both[0].tolist() != (both[1] - 30).tolist()
