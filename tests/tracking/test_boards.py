"""TensorBoard's pictures and texts: drawn from stored results, the same for a computed and a cached run."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import TINY, interrupted, stripes_dataset

from mosaic_ray.config.resolve import override
from mosaic_ray.config.validate import check
from mosaic_ray.runs import runner
from mosaic_ray.storage.store import Store
from mosaic_ray.tracking.tensorboard_images import (
    _DARK,
    CELL,
    GAP,
    LAYOUT,
    TensorBoardImages,
    confusion_picture,
    gates_picture,
    matrix,
    partition_picture,
)
from mosaic_ray.tracking.tracker import Tracker

QUICK = {"generator.steps": 4, "meta.updates": 5, "distill.steps": 5}


def shown(folder: Path | str) -> dict[str, dict[str, list]]:
    """Return what TensorBoard reads from a run's folder: kind -> tag -> content, without times."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    files = sorted(Path(folder, "tensorboard").iterdir())
    assert len(files) == 1
    events = EventAccumulator(
        str(files[0]), size_guidance=dict.fromkeys(("images", "scalars", "histograms", "tensors"), 0)
    )
    events.Reload()
    tags = events.Tags()
    return {
        "scalars": {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in tags["scalars"]},
        "images": {tag: [(e.step, e.encoded_image_string) for e in events.Images(tag)] for tag in tags["images"]},
        "histograms": {
            tag: [(e.step, e.histogram_value) for e in events.Histograms(tag)] for tag in tags["histograms"]
        },
        "texts": {tag: [e.tensor_proto.SerializeToString() for e in events.Tensors(tag)] for tag in tags["tensors"]},
    }


@pytest.fixture
def stripes_as_data(monkeypatch):
    monkeypatch.setattr("mosaic_ray.data.load.load_dataset", lambda config: stripes_dataset())


def go(storage: Path, knobs: dict | None = None) -> dict:
    config = check(override(TINY, QUICK | (knobs or {})))
    return runner.run(config, storage=str(storage), progress=False, command=["mosaic", "run"])


def decoded(data: bytes) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


# --- a run -----------------------------------------------------------------------------------------------------------


def test_a_run_shows_its_pictures_and_a_cached_run_shows_the_same(tmp_path, stripes_as_data):
    summary = go(tmp_path)
    first = shown(summary["paths"]["run"])
    assert {
        "partition/label_counts",
        "teacher/confusion",
        "student/confusion_initial",
        "student/confusion_final",
    } < set(first["images"])
    assert {f"synthetic/client_{k:03d}" for k in range(3)} < set(first["images"]), "no grid of each client's images"
    steps = [step for step, _ in first["images"]["synthetic/client_000"]]
    assert steps == sorted(set(steps))
    rounds = TINY.warmup.num_rounds + TINY.finetune.num_rounds
    losses = first["histograms"]["client/loss"]
    assert [step for step, _ in losses] == list(range(1, rounds + 1)) and all(h.num == 3 for _, h in losses)
    assert first["histograms"]["clients/generator_coverage"][0][1].num == 3
    assert [step for step, _ in first["scalars"]["student/accuracy"]] == [3, 3, rounds]
    assert [step for step, _ in first["scalars"]["teacher/accuracy"]] == [3]
    low, middle, high = (first["scalars"][f"warmup/client_loss_{what}"] for what in ("min", "median", "max"))
    assert all(a[1] <= b[1] <= c[1] for a, b, c in zip(low, middle, high, strict=True))
    assert {"run/config/text_summary", "run/command/text_summary"} <= set(first["texts"])

    again = go(tmp_path)
    assert all(stage["cached"] for stage in again["stages"].values())
    second = shown(again["paths"]["run"])
    for kind in ("images", "histograms", "texts"):
        assert second[kind] == first[kind], kind
    assert {tag: sorted(curve) for tag, curve in second["scalars"].items()} == {
        tag: sorted(curve) for tag, curve in first["scalars"].items()
    }


def test_every_chart_of_the_layout_finds_its_curves(tmp_path, stripes_as_data):
    found = shown(go(tmp_path, {"partition.validation_fraction": 0.2})["paths"]["run"])["scalars"]
    for charts in LAYOUT.values():
        for title, (kind, tags) in charts.items():
            assert kind in {"Multiline", "Margin"}
            for tag in tags:
                assert any(re.search(tag, name) for name in found), title


def test_the_losses_of_a_resumed_run_are_those_of_an_undisturbed_one(tmp_path, stripes_as_data):
    knobs = {"method": "fedavg", "warmup.checkpoint_rounds": 1, "federation.cohort_size": 2}
    whole = shown(go(tmp_path / "a", knobs)["paths"]["run"])
    with interrupted(in_round=2):
        go(tmp_path / "b", knobs)
    assert shown(go(tmp_path / "b", knobs)["paths"]["run"])["histograms"] == whole["histograms"]
    assert all(histogram.num == 2 for _, histogram in whole["histograms"]["client/loss"])


def test_without_tensorboard_nothing_is_read_or_drawn():
    class Shut:
        def load(self, part):
            raise AssertionError("the store was asked")

    with Tracker(None, progress=False) as tracker:
        boards = TensorBoardImages(tracker, TINY, stripes_dataset(), {"partition": Shut()}, {0: Shut()})
        boards.begin()
        boards.catch_up()


def test_what_a_stage_stored_is_shown_when_the_next_begins_and_only_once(tmp_path, monkeypatch):
    import torch.utils.tensorboard as board

    writer = board.SummaryWriter  # it would bring the file up to date by itself on a slow machine
    monkeypatch.setattr(board, "SummaryWriter", lambda place, flush_secs: writer(place, flush_secs=100_000))
    store = Store(str(tmp_path / "store"))
    counts = np.array([[5, 0, 1], [0, 2, 2]])
    result = store.put("partition-1", {}, {"shards": {"counts": counts}})
    results = {}
    with Tracker(tmp_path, progress=False) as tracker:
        boards = TensorBoardImages(tracker, TINY, stripes_dataset(), results, {})
        boards.begin()
        tracker.before_stage = boards.catch_up
        tracker.replay("partition", [])
        assert "partition/label_counts" not in shown(tmp_path)["images"]
        results["partition"] = result
        with tracker.stage("warmup", 2):
            ((step, picture),) = shown(tmp_path)["images"]["partition/label_counts"]  # the file is up to date
            assert step == 0
        with tracker.stage("finetune", 2):
            assert len(shown(tmp_path)["images"]["partition/label_counts"]) == 1
    drawn = partition_picture(counts, "training images by client and class", ("top", "middle", "bottom"))
    assert (decoded(picture).transpose(2, 0, 1) == drawn).all()


# --- pictures --------------------------------------------------------------------------------------------------------


def cells(picture: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """The upper left corner of every cell, uint8 [rows, columns, 3]: inside the frame, beside the numbers."""
    top, left = 4 * GAP, left_of(picture)
    return np.stack(
        [[picture[:, top + r * CELL + 1, left + c * CELL + 1] for c in range(columns)] for r in range(rows)]
    )


def left_of(picture: np.ndarray) -> int:
    """The column after the frame's left line: the first that is dark over the first cell's whole height."""
    band = picture[:, 4 * GAP : 4 * GAP + 3].max((0, 1))
    return int(np.flatnonzero(band < 100)[0]) + 1


@pytest.mark.parametrize("rows, columns", [(1, 1), (1, 6), (6, 1), (3, 5)])
def test_cells_are_white_for_nothing_and_darker_for_more(rows, columns):
    values = np.random.default_rng(rows * 7 + columns).permutation(rows * columns).reshape(rows, columns) / 40
    found = (
        cells(matrix(values, "t", ("r", "c"), (), (), np.zeros((rows, columns), int), top=1.0), rows, columns)
        .astype(int)
        .sum(-1)
    )
    order = np.argsort(values.ravel())
    assert found.ravel()[order[0]] == 3 * 255
    assert (np.diff(found.ravel()[order]) < 0).all()


def test_the_largest_is_darkest_where_no_top_is_given():
    picture = matrix(np.array([[0.1, 0.4]]), "t", ("r", "c"), (), (), np.zeros((1, 2), int))
    assert (cells(picture, 1, 2)[0, 1] == _DARK).all()


def test_a_confusion_picture_shows_shares_of_the_true_class_and_names():
    table = np.array([[90, 10], [1, 1]])
    picture = confusion_picture(table, "teacher", ("cat", "dog"))
    found = cells(picture, 2, 2).astype(int).sum(-1)
    assert found[0, 0] < found[1, 0] == found[1, 1] < found[0, 1]
    assert not np.array_equal(picture, confusion_picture(table, "teacher", ("cat", "cow")))
    assert not np.array_equal(picture, confusion_picture(table + 1, "teacher", ("cat", "dog")))


@pytest.mark.parametrize("shape", [(1, 1), (10, 10), (200, 200), (1500, 10), (3, 200)])
def test_pictures_of_many_classes_and_clients_stay_small(shape):
    counts = np.random.default_rng(0).integers(0, 1000, shape)
    picture = partition_picture(
        counts, "a title that is longer than the picture is wide", ["a class's name"] * shape[1]
    )
    assert picture.dtype == np.uint8 and picture.shape[0] == 3
    assert max(picture.shape[1:]) < max(1200, shape[0] + 250)


def test_experts_are_compared_within_a_class():
    found = cells(gates_picture(np.array([[3e-4, 1.0], [1e-4, 3.0]], np.float32), ("a", "b")), 2, 2)
    assert (found[0, 0] == found[1, 1]).all() and (found[0, 1] == found[1, 0]).all()
    assert (found[0, 0] == _DARK).all() and (found[0, 1] != _DARK).all()


def test_a_meta_model_that_diverged_is_drawn_white():
    found = cells(gates_picture(np.array([[np.nan, 0.0], [0.5, 0.0]], np.float32), ("a", "b")), 2, 2)
    assert (found[0] == 255).all() and (found[1, 0] == _DARK).all() and (found[1, 1] == 255).all()


def test_no_plotting_library_is_loaded():
    code = "import sys, mosaic_ray.tracking.tensorboard_images; print('matplotlib' in sys.modules)"
    root = Path(runner.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout == "False\n"


def test_a_histogram_leaves_out_what_tensorboard_has_no_bin_for(tmp_path):
    with Tracker(tmp_path, progress=False) as tracker, tracker.stage("warmup", total=1, unit="round"):
        tracker.histogram("client/loss", 1, np.array([1.0, 1e30, -np.inf, np.nan, 2.0]))
        tracker.histogram("client/loss", 2, np.array([1e30]))
    [(step, histogram)] = shown(tmp_path)["histograms"]["client/loss"]
    assert (step, histogram.num, histogram.max) == (1, 2, 2.0)
