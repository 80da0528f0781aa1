"""Averages of weights over the clients that have a modality, by brute force."""

from __future__ import annotations

import numpy as np
import pytest

from mosaic_ray.core.types import Weights
from mosaic_ray.federated.aggregation import ModalityAverage, RunningAverage
from mosaic_ray.models.multimodal import modality_of

A, B, HEAD = "trunk.encoders.a.encoder.0.weight", "trunk.encoders.b.encoder.0.weight", "head.weight"


def weights(seed: int) -> Weights:
    draws = np.random.default_rng(seed)
    return {name: draws.normal(size=(3, 4)).astype(np.float32) for name in (A, B, HEAD)}


def test_each_modality_is_averaged_over_the_clients_that_have_it() -> None:
    average = ModalityAverage(weights(9), modality_of)
    clients = [(weights(0), 10, {"a": 10.0, "b": 0.0}), (weights(1), 30, {"a": 20.0, "b": 30.0})]
    for own, number, samples in clients:
        average.add(own, number, samples)
    found = average.result()
    (one, _, _), (two, _, _) = clients
    np.testing.assert_allclose(found[A], (one[A] + 2 * two[A].astype(np.float64)) / 3, rtol=1e-6)
    np.testing.assert_array_equal(found[B], two[B])
    np.testing.assert_allclose(found[HEAD], (one[HEAD] + 3 * two[HEAD].astype(np.float64)) / 4, rtol=1e-6)


def test_a_modality_that_no_client_has_keeps_its_weights() -> None:
    before = weights(9)
    average = ModalityAverage(before, modality_of)
    average.add(weights(0), 10, {"a": 10.0, "b": 0.0})
    assert average.result()[B] is before[B]


def test_where_all_have_everything_it_is_the_plain_average() -> None:
    average, plain = ModalityAverage(weights(9), modality_of), RunningAverage()
    for seed, number in ((0, 5), (1, 8)):
        average.add(weights(seed), number, {"a": float(number), "b": float(number)})
        plain.add(weights(seed), number)
    found, wanted = average.result(), plain.result()
    assert found.keys() == wanted.keys()
    assert all(np.array_equal(found[name], wanted[name]) for name in wanted)


def test_columns_of_the_head_belong_to_modalities() -> None:
    average = ModalityAverage(weights(9), modality_of, {"a": slice(0, 2), "b": slice(2, 4)})
    one, two = weights(0), weights(1)
    average.add(one, 10, {"a": 10.0, "b": 0.0})
    average.add(two, 10, {"a": 10.0, "b": 10.0})
    head = average.result()[HEAD]
    np.testing.assert_allclose(head[:, :2], (one[HEAD][:, :2].astype(np.float64) + two[HEAD][:, :2]) / 2, rtol=1e-6)
    np.testing.assert_array_equal(head[:, 2:], two[HEAD][:, 2:])


def test_other_names_are_refused() -> None:
    with pytest.raises(ValueError, match="names differ"):
        ModalityAverage(weights(9), modality_of).add({A: weights(0)[A]}, 1, {"a": 1.0})
