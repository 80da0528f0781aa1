"""Laws of weighted averages: FedAvg and class experts (O7, O8, O20)."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mosaic_ray.core.types import Weights
from mosaic_ray.federated.aggregation import RunningAverage


def average(pairs: Iterable[tuple[Weights, float]]) -> Weights:
    running = RunningAverage()
    for weights, weight in pairs:
        running.add(weights, weight)
    return running.result()


def client(seed: int) -> Weights:
    rng = np.random.default_rng(seed)
    return {
        "conv": rng.normal(size=(4, 3, 3)).astype(np.float32),
        "zeros": np.array([0.0, -0.0, 1e-42, 3e38], np.float32),
        "norm.running_var": rng.uniform(1e-9, 1e9, size=4).astype(np.float32),
        "norm.num_batches_tracked": np.array(rng.integers(1, 2**40), np.int64),
    }


def bits(weights: Weights) -> dict[str, tuple[tuple[int, ...], str, bytes]]:
    return {name: (a.shape, a.dtype.str, a.tobytes()) for name, a in weights.items()}


def close(a: Weights, b: Weights) -> None:
    assert a.keys() == b.keys()
    for name in a:
        if a[name].dtype.kind == "f":
            np.testing.assert_allclose(a[name], b[name], rtol=1e-5, atol=1e-6)


def label_counts(num_clients: int, num_classes: int, seed: int) -> np.ndarray:
    counts = np.random.default_rng(seed).integers(0, 6000, size=(num_clients, num_classes))
    counts[:, 0] = 0
    counts[1, 0] = 4999  # class 0 has a single owner
    return counts


weight = st.floats(1e-6, 1e6)


@given(weight)
def test_o7_o20_one_client_is_bit_equal(w):
    assert bits(average([(client(0), w)])) == bits(client(0))


def test_o7_single_owner_among_others_is_bit_equal():
    counts = label_counts(4, 3, 0)
    expert = average((client(k), counts[k, 0]) for k in range(4))
    assert bits(expert) == bits(client(1))


def test_o7_clients_without_weight_leave_no_trace():
    diverged = {n: a * np.nan if a.dtype.kind == "f" else a for n, a in client(2).items()}
    assert bits(average([(diverged, 0), (client(1), 3), (diverged, 0)])) == bits(client(1))


def test_o7_expert_is_the_weighted_sum():
    counts = label_counts(4, 3, 0)
    for c in (1, 2):
        shares = counts[:, c] / counts[:, c].sum()
        assert shares.sum() == pytest.approx(1)
        by_hand = {n: sum(shares[k] * client(k)[n].astype(np.float64) for k in range(4)) for n in client(0)}
        expert = average((client(k), counts[k, c]) for k in range(4))
        close(expert, {n: a.astype(client(0)[n].dtype) for n, a in by_hand.items()})


@given(st.lists(weight, min_size=1, max_size=40))
@settings(max_examples=60)
def test_o8_equal_clients_average_to_themselves(weights):
    assert bits(average((client(3), w) for w in weights)) == bits(client(3))


def test_o8_proportional_counts_make_every_expert_fedavg():
    sizes, priors = np.array([30, 10, 60, 100]), np.array([1, 4, 2])
    counts = np.outer(sizes, priors)
    fedavg = average((client(k), counts[k].sum()) for k in range(4))
    for c in range(3):
        close(average((client(k), counts[k, c]) for k in range(4)), fedavg)


@given(st.integers(0, 10_000))
@settings(max_examples=30)
def test_o8_class_weighted_experts_sum_to_fedavg(seed):
    counts = label_counts(5, 4, seed)
    experts = [average((client(k), counts[k, c]) for k in range(5)) for c in range(4)]
    close(average(zip(experts, counts.sum(0), strict=True)), average((client(k), counts[k].sum()) for k in range(5)))


def test_counters_are_rounded_down():
    pairs = [({"n": np.array(n)}, w) for n, w in ((10, 1), (11, 1), (11, 1))]
    result = average(pairs)["n"]
    assert result == 10 and result.dtype == np.int64 and result.shape == ()


@pytest.mark.parametrize("w", [1e-3, 0.1, 1 / 3, 7.0])
def test_equal_counters_survive_fractional_weights(w):
    assert average([({"n": np.array(9_999_999)}, w * (k + 1)) for k in range(100)])["n"] == 9_999_999


def test_low_weights_are_not_lost_in_float32():
    """A float32 sum would drop the small terms: 2^24 + 1 = 2^24 there."""
    pairs = [({"x": np.array([2.0**24], np.float32)}, 1.0)] + [({"x": np.ones(1, np.float32)}, 1.0)] * 64
    assert average(pairs)["x"] == np.float32((2**24 + 64) / 65)


def test_inputs_are_neither_changed_nor_shared():
    a, b = client(0), client(1)
    running = RunningAverage()
    running.add(a, 2)
    early = running.result()
    running.add(b, 1)
    late = running.result()
    assert bits(a) == bits(client(0)) and bits(b) == bits(client(1))
    assert bits(early) == bits(client(0)) != bits(late)
    arrays = [*a.values(), *b.values(), *running._sums.values()]
    assert not any(np.shares_memory(r, x) for r in [*early.values(), *late.values()] for x in arrays)


def test_read_only_arrays_are_welcome():
    weights = client(0)
    for array in weights.values():
        array.setflags(write=False)
    assert bits(average([(weights, 1), (weights, 2)])) == bits(weights)


@pytest.mark.parametrize("pairs", [[], [(client(0), 0)], [(client(0), 0), (client(1), 0.0)]])
def test_zero_total_is_refused(pairs):
    with pytest.raises(ValueError, match="sum to zero"):
        average(pairs)


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
def test_impossible_weights_are_refused(bad):
    with pytest.raises(ValueError, match="finite and not negative"):
        average([(client(0), bad)])


@pytest.mark.parametrize("w", [0, 1])
def test_different_names_or_shapes_are_refused_at_any_weight(w):
    running = RunningAverage()
    running.add(client(0), 1)
    fewer = {n: a for n, a in client(1).items() if n != "conv"}
    for bad in (fewer, client(1) | {"more": np.zeros(1)}, client(1) | {"conv": np.zeros((4, 3, 1), np.float32)}):
        with pytest.raises(ValueError, match=r"cannot average: .*(conv|more)"):
            running.add(bad, w)
    assert bits(running.result()) == bits(client(0))
