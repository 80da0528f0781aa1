"""Parquet data sets: decoded once, in order, and refused with the columns found."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from layouts import (
    encoded,
    load,
    noise,
    refused,
    write_folder,
    write_parquet,
)

from mosaic_ray.data import image_decode


@pytest.fixture(autouse=True)
def _no_root_of_the_user(monkeypatch, tmp_path):
    monkeypatch.delenv("MOSAIC_DATA", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


@pytest.mark.parametrize("columns", [("img", "label"), ("image", "labels"), ("img", "fine_label")])
def test_parquet_pictures_are_decoded_in_order_over_several_files(tmp_path, columns):
    images = write_folder(tmp_path / "pictures", columns=columns, names=["cat", "dog", "elk", "fox"])
    data = load(tmp_path, f"parquet:{tmp_path}/pictures")
    assert np.array_equal(data.train.images, images)
    assert np.array_equal(data.test.images, images[:4])
    assert data.train.labels.tolist() == [i % 4 for i in range(20)]
    assert data.class_names == ("cat", "dog", "elk", "fox")
    assert data.facts.mean == pytest.approx(images.mean(axis=(0, 2, 3)) / 255, abs=5.1e-5)
    assert data.facts.std == pytest.approx(images.std(axis=(0, 2, 3)) / 255, abs=5.1e-5)


def test_parquet_is_decoded_once_and_again_when_a_file_changes(tmp_path, monkeypatch):
    folder = tmp_path / "pictures"
    write_folder(folder)
    first = load(tmp_path, "parquet:pictures")
    [kept] = (tmp_path / "decoded").iterdir()
    decoded = []
    genuine = image_decode.run
    monkeypatch.setattr(image_decode, "run", lambda tasks: decoded.append(tasks) or genuine(tasks))
    again = load(tmp_path, "parquet:pictures")
    assert (again.identity, again.facts, again.class_names) == (first.identity, first.facts, first.class_names)
    assert not decoded

    again.train.images[:] = 0
    assert load(tmp_path, "parquet:pictures").identity == first.identity, "writing to the arrays leaves the file alone"

    write_parquet(folder / "test-00000-of-00001.parquet", [encoded(noise(8, 8, 3, seed=9))], [0])
    assert load(tmp_path, "parquet:pictures").identity != first.identity
    assert len(decoded) == 1
    assert [*(tmp_path / "decoded").iterdir()] == [kept], "the new copy takes the old one's place"


def test_a_root_that_cannot_be_written_keeps_nothing_and_still_loads(tmp_path):
    images = write_folder(tmp_path / "pictures")
    (tmp_path / "file").write_text("not a folder")
    data = load(tmp_path / "file", f"parquet:{tmp_path}/pictures")
    assert np.array_equal(data.train.images, images)


def test_grey_pictures_stay_grey_and_spread_among_coloured_ones(tmp_path):
    grey, colour = noise(8, 8), noise(8, 8, 3)
    for split in ("train", "test"):
        write_parquet(tmp_path / "grey" / f"{split}.parquet", [encoded(grey)] * 2, [0, 1])
        write_parquet(tmp_path / "mixed" / f"{split}.parquet", [encoded(grey), encoded(colour)], [0, 1])
    data = load(tmp_path, "parquet:grey")
    assert np.array_equal(data.train.images, np.stack([grey[None]] * 2))
    assert data.facts.augmentations == ()
    mixed = load(tmp_path, "parquet:mixed").train.images
    assert np.array_equal(mixed, np.stack([np.stack([grey] * 3), colour.transpose(2, 0, 1)]))


def parquet_refusals():
    good, small = encoded(noise(8, 8, 3)), encoded(noise(4, 8, 3))
    both = ["train", "test"]
    return {
        "no such folder": ([], {}, ["nowhere", "no folder"]),
        "no test file": (["train"], {}, ["test*.parquet"]),
        "no image column": (both, {"columns": ("picture", "label")}, ["picture (struct", '"img" or "image"']),
        "no label column": (both, {"columns": ("img", "class")}, ["class (int64)", '"label"']),
        "labels are words": (both, {"labels": ["a", "b"]}, ["label (string)"]),
        "label below 0": (both, {"labels": [0, -1]}, ["-1"]),
        "label missing": (both, {"labels": [0, None]}, ["empty places"]),
        "not an image": (both, {"images": [good, b"\x89PNG nonsense"]}, ["train.parquet: image 1 does not decode"]),
        "cut image": (both, {"images": [good, good[:-30]]}, ["train.parquet: image 1 does not decode"]),
        "empty image": (both, {"images": [None, good]}, ["train.parquet: image 0 does not decode"]),
        "sizes differ": (both, {"images": [good, small]}, ["8x8", "image 1 is 4x8", "data.image_size"]),
        "one class": (both, {"labels": [0, 0]}, ["one class"]),
        "not square": (both, {"images": [small, small]}, ["4x8", "data.image_size"]),
        "no rows": (both, {"images": [], "labels": pa.array([], pa.int64())}, ["no images"]),
    }


@pytest.mark.parametrize("case", parquet_refusals())
def test_wrong_parquet_is_refused_with_what_is_there(tmp_path, case):
    splits, knobs, words = parquet_refusals()[case]
    default = {"images": [encoded(noise(8, 8, 3))] * 2, "labels": [0, 1]}
    for split in splits:
        write_parquet(tmp_path / "pictures" / f"{split}.parquet", **(default | knobs))
    message = refused(tmp_path, "parquet:pictures" if splits else "parquet:nowhere")
    assert all(word in message for word in words), message


def test_a_class_that_only_the_test_file_knows_is_refused(tmp_path):
    picture = encoded(noise(8, 8, 3))
    write_parquet(tmp_path / "p" / "train.parquet", [picture] * 2, [0, 1])
    write_parquet(tmp_path / "p" / "test.parquet", [picture] * 2, [0, 5])
    assert "train has not: 5" in refused(tmp_path, "parquet:p")


def test_images_of_a_file_that_was_rewritten_are_read_again(tmp_path):
    for seed in range(2):
        images = noise(4, 8, 8, 3, seed=seed)
        for split in ("train", "test"):
            write_parquet(tmp_path / "p" / f"{split}.parquet", [encoded(image) for image in images], [0, 1, 0, 1])
        (tmp_path / "p" / "test.parquet").unlink()
        (tmp_path / "p" / "test.parquet").symlink_to(tmp_path / "p" / "train.parquet")
        assert np.array_equal(load(tmp_path, "parquet:p").test.images, images.transpose(0, 3, 1, 2))
        assert image_decode.row_group.cache_info().currsize == 0


def test_a_truncated_parquet_file_is_named(tmp_path):
    write_folder(tmp_path / "pictures")
    file = tmp_path / "pictures" / "train-00001-of-00002.parquet"
    file.write_bytes(file.read_bytes()[:-20])
    assert str(file) in refused(tmp_path, "parquet:pictures")
