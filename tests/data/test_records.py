"""Records of several modalities: bytes, masks, subsets, standardisation, and a classifier's input."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from mosaic_ray.core.types import DataFacts, Modality
from mosaic_ray.data.records import (
    MOST_IN_ALL_SUBSETS,
    in_subsets,
    pack,
    present_in,
    record_size,
    restrict,
    standardise,
    subsets,
    sums_of,
    unpack,
)
from mosaic_ray.data.transforms import to_input

PARTS = (
    Modality("photo", "image", (3, 4, 4)),
    Modality("sensor", "vector", (5,)),
    Modality("note", "text", (7,), 257),
    Modality("depth", "vector", (2,)),
)
COUNT = 12


@pytest.fixture
def made() -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Values of ``PARTS`` and the mask bool [12, 4], in which no row is empty."""
    draws = np.random.default_rng(0)
    values = {
        "photo": draws.integers(0, 256, (COUNT, 3, 4, 4), dtype=np.uint8),
        "sensor": draws.normal(2, 3, (COUNT, 5)).astype(np.float32),
        "note": draws.integers(0, 257, (COUNT, 7), dtype=np.int32),
        "depth": draws.normal(-1, 9, (COUNT, 2)).astype(np.float32),
    }
    present = draws.random((COUNT, 4)) < 0.6
    present[np.arange(COUNT), np.arange(COUNT) % 4] = True
    return values, present


def masked(values: np.ndarray, present: np.ndarray) -> np.ndarray:
    return np.where(present.reshape(-1, *[1] * (values.ndim - 1)), values, 0).astype(values.dtype)


def test_unpack_gives_what_was_packed_and_zeros_for_what_is_absent(made):
    values, present = made
    records = pack(PARTS, values, present)
    assert records.dtype == np.uint8 and records.shape == (COUNT, 1, 1, 48 + 20 + 28 + 8 + 4)
    assert record_size(PARTS) == records.shape[-1]
    assert np.array_equal(present_in(PARTS, records), present)
    for number, part in enumerate(PARTS):
        found = unpack(PARTS, records)[part.name]
        assert found.dtype == values[part.name].dtype
        assert np.array_equal(found, masked(values[part.name], present[:, number]))


def test_bytes_stand_in_order_little_endian_and_the_mask_last(made):
    values, _ = made
    record = pack(PARTS, values, np.ones((COUNT, 4), bool))[3].ravel().tobytes()
    parts = (values["photo"][3], values["sensor"][3], values["note"][3], values["depth"][3])
    assert record == b"".join(x.astype(x.dtype.newbyteorder("<")).tobytes() for x in parts) + b"\1\1\1\1"


@pytest.mark.parametrize("by_row", [False, True])
def test_restrict_keeps_the_rest_as_it_was(made, by_row):
    values, present = made
    kept = np.random.default_rng(1).random((COUNT, 4) if by_row else 4) < 0.5
    found = restrict(PARTS, pack(PARTS, values, present), kept)
    assert np.array_equal(found, pack(PARTS, values, present & kept))


def test_subsets_are_all_sets_of_few_modalities_and_the_smallest_and_largest_of_many():
    for count in range(1, MOST_IN_ALL_SUBSETS + 1):
        every = {frozenset(s) for n in range(1, count + 1) for s in itertools.combinations(range(count), n)}
        assert len(subsets(count)) == 2**count - 1 and {*map(frozenset, subsets(count))} == every
        assert subsets(count)[-1] == tuple(range(count))
    many = subsets(9)
    assert len(many) == 9 + 36 + 1 and many[-1] == tuple(range(9)) and {len(s) for s in many} == {1, 2, 9}


def test_in_subsets_holds_each_set_of_modalities_in_turn(made):
    records = pack(PARTS, *made)
    found = in_subsets(PARTS, records).reshape(15, COUNT, 1, 1, -1)
    for part, chosen in zip(found, subsets(4), strict=True):
        assert np.array_equal(part, restrict(PARTS, records, np.isin(np.arange(4), chosen)))


def test_standardisation_by_clients_sums_is_that_of_all_their_rows(made):
    values, present = made
    values["depth"][:, 1] = 7.25  # never varies
    present[:, 3] = True
    records = pack(PARTS, values, present)
    clients = np.split(np.random.default_rng(2).permutation(COUNT)[:10], [3, 4])
    sums = {}
    for number, part in enumerate(PARTS):
        if part.kind == "vector":
            rows = [own[present[own, number]] for own in clients]
            sums[part.name] = np.sum([sums_of(part, values[part.name][own]) for own in rows], 0)
            own = values[part.name][np.concatenate(rows)].astype(np.float64)
            spread = own.std(0)
            assert np.array_equal(sums[part.name][0], np.full(part.size, len(own)))
            exact = np.where(spread > 1e-9, (values[part.name] - own.mean(0)) / np.where(spread > 1e-9, spread, 1), 0)
            expected = masked(exact, present[:, number])
            values[part.name] = expected
    found = unpack(PARTS, standardise(PARTS, records, sums))
    for part in PARTS:
        if part.kind == "vector":
            np.testing.assert_allclose(found[part.name], values[part.name], rtol=1e-5, atol=1e-5)
        else:
            assert np.array_equal(found[part.name], unpack(PARTS, records)[part.name])
    assert not found["depth"][:, 1].any()


def test_to_input_lays_values_side_by_side(made):
    values, present = made
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    facts = DataFacts("made", 2, 3, 4, mean, std, (), PARTS)
    found = to_input(torch.from_numpy(pack(PARTS, values, present)), facts).numpy()
    assert found.dtype == np.float32 and found.shape == (COUNT, *facts.input_shape)
    photo = (values["photo"] / 255 - np.reshape(mean, (3, 1, 1))) / np.reshape(std, (3, 1, 1))
    parts = [photo, values["sensor"], values["note"], values["depth"]]
    flat = [masked(x.astype(np.float64), present[:, n]).reshape(COUNT, -1) for n, x in enumerate(parts)]
    np.testing.assert_allclose(found, np.concatenate([*flat, present], 1), rtol=1e-5, atol=1e-5)
