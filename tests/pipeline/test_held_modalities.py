"""What clients hold of samples of several modalities: masks, standardisation, test sets, bytes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers import TINY, stripes_dataset
from layouts import write_mfeat

from mosaic_ray.config.client_layout import client_modalities
from mosaic_ray.config.resolve import override
from mosaic_ray.config.schema import ExperimentConfig
from mosaic_ray.core.errors import RequestError
from mosaic_ray.core.types import DataFacts, Dataset, ImageSet, Modality
from mosaic_ray.data.groups import with_groups
from mosaic_ray.data.records import pack, present_in, subsets, unpack
from mosaic_ray.execution.placement import Placement
from mosaic_ray.federated.client_models import Federation
from mosaic_ray.federated.communication import Tally, size_of
from mosaic_ray.pipeline.context import RunContext
from mosaic_ray.pipeline.partition import SUMS, deal, statistics_messages
from mosaic_ray.pipeline.stored import check_part
from mosaic_ray.report.figures.data import partition
from mosaic_ray.report.load import read_run
from mosaic_ray.runs import runner
from mosaic_ray.runs.communication import measured
from mosaic_ray.storage.store import CorruptResult, Store
from mosaic_ray.tracking.tracker import Tracker

PARTS = (
    Modality("photo", "image", (1, 8, 8)),
    Modality("sensor", "vector", (5,)),
    Modality("note", "text", (6,), 257),
    Modality("depth", "vector", (2,)),
)
NAMES = tuple(part.name for part in PARTS)
CLIENTS = {"partition.num_clients": 3, "partition.omega": 0.5, "data.name": "made:samples"}
DEALT = CLIENTS | {"partition.modalities": ("photo+sensor", "note+sensor+depth", "photo")}


def samples(count: int, seed: int) -> tuple[ImageSet, dict[str, np.ndarray], np.ndarray]:
    draws = np.random.default_rng(seed)
    values = {
        "photo": draws.integers(0, 256, (count, 1, 8, 8), dtype=np.uint8),
        "sensor": draws.normal(50, 7, (count, 5)).astype(np.float32),
        "note": draws.integers(1, 257, (count, 6), dtype=np.int32),
        "depth": draws.normal(-3, 0.1, (count, 2)).astype(np.float32),
    }
    present = draws.random((count, 4)) < 0.9
    present[:, 0] = True
    return ImageSet(pack(PARTS, values, present), np.arange(count) % 3), values, present


TRAIN, VALUES, PRESENT = samples(150, 0)
TEST, TEST_VALUES, TEST_PRESENT = samples(30, 1)
FACTS = DataFacts("made", 3, 1, 8, (0.5,), (0.3,), (), PARTS)
DATA = Dataset(FACTS, TRAIN, TEST, ("a", "b", "c"), "made")


@contextlib.contextmanager
def opened(config: ExperimentConfig, store: Path, data: Dataset = DATA) -> Iterator[RunContext]:
    with (
        Tracker(None, progress=False) as tracker,
        runner.open_run(config, data, Store(str(store)), tracker, Placement("local")) as ctx,
    ):
        yield ctx


def asked(**knobs) -> ExperimentConfig:
    return override(TINY, DEALT | {name.replace("__", "."): value for name, value in knobs.items()})


def by_hand(values: np.ndarray, rows: np.ndarray, spread_of: np.ndarray) -> np.ndarray:
    wide = spread_of[rows].astype(np.float64)
    return (values - wide.mean(0)) / wide.std(0)


def test_samples_have_what_their_client_holds_and_vectors_are_standardised_by_its_training_rows(tmp_path):
    with opened(asked(partition__validation_fraction=0.2), tmp_path) as ctx:
        shards = deal(ctx)
        data = ctx.dataset
    held = [[0, 1], [1, 2, 3], [0]]
    expected = np.zeros_like(PRESENT)
    for own, train, validation in zip(held, shards.train, shards.validation, strict=True):
        assert len(train) and len(validation)
        for row in (*train, *validation):
            expected[row, own] = PRESENT[row, own]
    assert np.array_equal(present_in(PARTS, data.train.images), expected)
    assert np.array_equal(data.train.labels, TRAIN.labels)

    found = unpack(PARTS, data.train.images)
    tests = {name: array.reshape(15, 30, -1) for name, array in unpack(PARTS, data.test.images).items()}
    for number, part in enumerate(PARTS):
        there, there_in_test = expected[:, number], TEST_PRESENT[:, number]
        known, test = VALUES[part.name], TEST_VALUES[part.name]
        if part.kind == "vector":
            training = np.concatenate([rows for rows, own in zip(shards.train, held, strict=True) if number in own])
            training = training[PRESENT[training, number]]
            known, test = (by_hand(values, training, VALUES[part.name]) for values in (known, test))
        np.testing.assert_allclose(found[part.name][there], known[there], rtol=1e-4, atol=1e-4)
        assert not found[part.name][~there].any()
        for place, chosen in enumerate(subsets(4)):
            shown = there_in_test & (number in chosen)
            flat = test.reshape(30, -1)
            np.testing.assert_allclose(tests[part.name][place][shown], flat[shown], rtol=1e-4, atol=1e-4)
            assert not tests[part.name][place][~shown].any()
    assert np.array_equal(data.test.labels.reshape(15, 30), np.tile(TEST.labels, (15, 1)))
    assert data.identity == "made" and data.facts == FACTS


def test_rows_of_no_client_keep_all_modalities(tmp_path):
    rows = np.arange(0, 150, 2)
    lines = [f"{k % 3},{row}" for k, row in enumerate(rows)]
    (tmp_path / "split.csv").write_text("client,row\n" + "\n".join(lines))
    config = asked(partition__sampler=f"file:{tmp_path / 'split.csv'}")
    with opened(config, tmp_path / "store", with_groups(DATA, [config.partition])) as ctx:
        deal(ctx)
        present = present_in(PARTS, ctx.dataset.train.images)
    assert np.array_equal(present[1::2], PRESENT[1::2])
    assert not np.array_equal(present[::2], PRESENT[::2])


def test_the_stored_partition_gives_the_same_samples(tmp_path):
    made = []
    for _ in range(2):
        with opened(asked(), tmp_path) as ctx:
            deal(ctx)
            made.append((ctx.dataset, ctx.log["partition"], measured(ctx).arrays(), ctx.traffic["partition"]))
    (first, log, sent, traffic), (second, again, sent_again, traffic_again) = made
    assert (log["cached"], again["cached"]) == (False, True) and traffic == traffic_again
    for part in ("train", "test"):
        assert np.array_equal(getattr(first, part).images, getattr(second, part).images)
    assert {name: array.tolist() for name, array in sent.items()} == {n: a.tolist() for n, a in sent_again.items()}


def test_modalities_are_dealt_beside_the_classes(tmp_path):
    found = []
    for rule in ((), "p:0.7", DEALT["partition.modalities"]):
        with opened(override(TINY, CLIENTS | {"partition.modalities": rule, "seed": 3}), tmp_path) as ctx:
            shards = deal(ctx)
            found.append(([rows.tolist() for rows in shards.train], ctx.dataset.train.images))
    assert found[0][0] == found[1][0] == found[2][0]
    assert np.array_equal(present_in(PARTS, found[0][1]), PRESENT)
    assert not np.array_equal(found[0][1], found[2][1])


def test_the_sums_are_counted_as_they_are_sent_and_foreseen(tmp_path):
    config = asked()
    with opened(config, tmp_path) as ctx:
        shards = deal(ctx)
        sent = measured(ctx)
    foreseen = Tally(1, 3)
    statistics_messages(Federation(config, FACTS), shards.counts, foreseen)
    assert sent.totals() == foreseen.totals() == ctx.traffic["partition"]
    assert sent.totals()["uplink"]["statistics"] == 3 * 8 * (5 + 5 + 2)
    one, both = {"sensor": np.zeros((3, 5))}, {"sensor": np.zeros((3, 5)), "depth": np.zeros((3, 2))}
    sizes = [size_of(one), size_of(both)]
    assert sent.by_client("uplink").tolist() == [size.payload + size.frame for size in sizes] + [0]
    assert sent.by_client("downlink").tolist() == foreseen.by_client("downlink").tolist() == [0, 0, 0]


def test_without_vectors_nothing_is_sent(tmp_path):
    parts = (PARTS[0], PARTS[2])
    facts = replace(FACTS, modalities=parts)
    sets = [
        ImageSet(pack(parts, values, np.ones((len(part), 2), bool)), part.labels)
        for part, values in ((TRAIN, VALUES), (TEST, TEST_VALUES))
    ]
    config = override(TINY, CLIENTS | {"partition.modalities": ("photo", "note")})
    with opened(config, tmp_path, Dataset(facts, *sets, DATA.class_names, "two")) as ctx:
        deal(ctx)
        assert ctx.results["partition"].parts == ("shards",) and not measured(ctx).arrays()
        assert len(ctx.dataset.test) == 3 * 30


def test_samples_of_one_image_are_dealt_as_ever(tmp_path):
    data = stripes_dataset()
    with opened(TINY, tmp_path, data) as ctx:
        deal(ctx)
        assert ctx.dataset is data
        assert ctx.results["partition"].parts == ("shards",) and "communication" not in ctx.results["partition"].facts


def sums() -> dict[str, np.ndarray]:
    vectors = (("sensor", 5), ("depth", 2))
    return {name: np.stack([np.full(size, 4.0), np.ones(size), np.ones(size)]) for name, size in vectors}


DAMAGE = {
    "a name": lambda found: found.pop("depth"),
    "another name": lambda found: found.update(note=found["depth"]),
    "a shape": lambda found: found.update(depth=found["depth"][:2]),
    "a type": lambda found: found.update(depth=found["depth"].astype(np.float32)),
    "a value": lambda found: found["depth"].fill(np.nan),
    "counts that differ": lambda found: found["sensor"].__setitem__((0, 1), 3),
    "a part of a sample": lambda found: found["sensor"].__setitem__(0, 2.5),
    "more samples than there are": lambda found: found["sensor"].__setitem__(0, 151),
    "squares below 0": lambda found: found["sensor"].__setitem__((2, 0), -1),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_stored_sums_of_another_form_are_damage(name):
    federation, found = Federation(asked(), FACTS), sums()
    check_part(federation, DATA, SUMS, found, True)
    DAMAGE[name](found)
    with pytest.raises(ValueError, match="unlike what the stage writes"):
        check_part(federation, DATA, SUMS, found, True)


def test_damaged_sums_are_found_while_they_are_read(tmp_path):
    with opened(asked(), tmp_path) as ctx:
        deal(ctx)
        key = ctx.keys["partition"]
        writer, found = ctx.store.writer(key), ctx.results["partition"]
        writer.add("shards", found.load("shards"))
        writer.add(SUMS, sums() | {"sensor": np.ones((3, 4))})
        writer.add("communication", found.load("communication"))
        writer.commit(found.facts)
    with opened(asked(), tmp_path) as ctx, pytest.raises(CorruptResult, match=SUMS):
        deal(ctx)


@pytest.fixture
def mfeat(tmp_path, monkeypatch) -> ExperimentConfig:
    monkeypatch.chdir(tmp_path)
    write_mfeat(tmp_path, train=90)
    knobs = {
        "data.name": "mfeat", "data.root": str(tmp_path), "data.modalities": ("mor", "zer", "kar"),
        "partition.modalities": ("mor+zer", "kar"), "partition.omega": 5.0, "method": "fedavg",
    }  # fmt: skip
    return override(TINY, knobs)


def test_a_run_tells_what_clients_held_and_sent(mfeat):
    summary = runner.run(mfeat, storage="store", progress=False, name="r")
    assert summary["modalities"] == [["mor", "zer"], ["kar"], ["mor", "zer"]]
    assert [*map(tuple, summary["modalities"])] == [*client_modalities(mfeat, mfeat.data.modalities)]
    assert summary["communication_bytes"]["uplink"]["statistics"] == 3 * 8 * (2 * 53 + 64)
    assert summary["communication"]["measured_over_predicted"] == 1
    drawing = partition(read_run("store/runs/r"))
    assert drawing.table["modalities"].tolist() == ["mor+zer", "kar", "mor+zer"]


def test_unknown_modalities_are_refused_before_data_are_read(mfeat, tmp_path):
    (tmp_path / "mfeat" / "train-00000.parquet").unlink()
    with pytest.raises(RequestError, match='has no modality "pix"'):
        runner.run(override(mfeat, {"partition.modalities": ("pix",)}), storage="store", progress=False)
