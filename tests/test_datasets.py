"""Data sets: the true layouts written small, read back exactly, and refused in one line where they are damaged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from layouts import (
    load,
    refused,
    write_cifar10,
    write_cifar100,
    write_folder,
    write_idx,
    write_mnist,
)
from PIL import Image

from mosaic_ray.config import DataConfig
from mosaic_ray.data import datasets
from mosaic_ray.data.datasets import data_root as root_of
from mosaic_ray.data.datasets import load_dataset
from mosaic_ray.presets import DATASETS


@pytest.fixture(autouse=True)
def _no_root_of_the_user(monkeypatch, tmp_path):
    monkeypatch.delenv("MOSAIC_DATA", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


# ---------------------------------------------------------------- what every data set keeps


@pytest.fixture(scope="module")
def everywhere(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write_mnist(root)
    write_mnist(root, "FashionMNIST")
    write_cifar10(root)
    write_cifar100(root)
    write_folder(root / "pictures")
    return root


@pytest.mark.parametrize("name", [*DATASETS, "parquet:pictures"])
@pytest.mark.parametrize("shape", [(0, 0), (16, 1), (32, 3)])
def test_every_data_set_keeps_the_contract(everywhere, name, shape):
    size, channels = shape
    data = load(everywhere, name, image_size=size, channels=channels)
    facts = data.facts
    assert facts.name == name
    assert (size or facts.image_size, channels or facts.channels) == (facts.image_size, facts.channels)
    assert len(facts.mean) == len(facts.std) == facts.channels
    assert len(data.class_names) == facts.num_classes
    for part in (data.train, data.test):
        assert part.images.shape == (len(part), facts.channels, facts.image_size, facts.image_size)
        assert (part.images.dtype, part.labels.dtype) == (np.uint8, np.int64)
        assert part.images.flags.c_contiguous
        assert part.images.flags.writeable
        assert type(part.images) is np.ndarray
        assert 0 <= part.labels.min() <= part.labels.max() < facts.num_classes
    assert facts.augmentations == (("crop", "flip") if name.startswith(("cifar", "parquet")) else ())
    assert data.identity == load(everywhere, name, image_size=size, channels=channels).identity
    assert len(data.identity) == 16


def test_registry_holds_what_the_presets_name():
    assert set(datasets.LOADERS) == set(DATASETS)


def test_identity_changes_with_a_single_pixel_a_label_and_the_size(tmp_path):
    write_mnist(tmp_path)
    raw = tmp_path / "MNIST" / "raw"
    seen = {load(tmp_path, "mnist").identity, load(tmp_path, "mnist", image_size=32).identity}
    for file in ("train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"):
        content = bytearray((raw / file).read_bytes())
        content[-1] ^= 1
        (raw / file).write_bytes(content)
        seen.add(load(tmp_path, "mnist").identity)
    assert len(seen) == 4


def test_an_unknown_name_is_answered_with_its_neighbours(tmp_path):
    assert 'did you mean "cifar10"' in refused(tmp_path, "cifar-10")


def test_root_is_the_knob_then_the_environment_then_the_cache(monkeypatch, tmp_path):
    assert root_of(DataConfig()) == tmp_path / "home" / ".cache" / "mosaic_ray"
    monkeypatch.setenv("MOSAIC_DATA", "/of/environment")
    assert root_of(DataConfig()) == Path("/of/environment")
    assert root_of(DataConfig(root="~/mine")) == tmp_path / "home" / "mine"


# ---------------------------------------------------------------- digits


def test_o31_digits_are_split_by_class_and_the_constants_are_those_of_the_training_images():
    data = load_dataset(DataConfig(name="digits"))
    assert (len(data.train), len(data.test)) == (1437, 360)
    assert (data.train.images.min(), data.train.images.max()) == (0, 255)
    train, test = (np.bincount(part.labels) for part in (data.train, data.test))
    assert np.abs(test - (train + test) * 360 / 1797).max() < 1
    assert data.facts.mean[0] == pytest.approx(data.train.images.mean() / 255, abs=5e-5)
    assert data.facts.std[0] == pytest.approx(data.train.images.std() / 255, abs=5e-5)


# ---------------------------------------------------------------- idx


@pytest.mark.parametrize("name, folder", [("mnist", "MNIST"), ("fmnist", "FashionMNIST")])
def test_idx_files_are_read_as_written(tmp_path, name, folder):
    written = write_mnist(tmp_path, folder)
    data = load(tmp_path, name)
    for part, split in ((data.train, "train"), (data.test, "t10k")):
        assert np.array_equal(part.images[:, 0], written[split][0])
        assert np.array_equal(part.labels, written[split][1])
    assert (data.facts.mean, data.facts.std) == ((0.1307,), (0.3081,))


def test_missing_files_are_answered_with_the_folder_and_the_way_to_get_them(tmp_path):
    for name, folder in (("mnist", "MNIST/raw"), ("cifar10", "cifar-10-batches-py"), ("cifar100", "cifar-100-python")):
        message = refused(tmp_path, name)
        assert str(tmp_path / folder) in message
        assert all(way in message for way in ("data.download=true", "data.root", "MOSAIC_DATA"))


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-5],
        lambda content: content[:7],
        lambda content: b"",
        lambda content: b"\x1f\x8b" + content,
        lambda content: content[:4] + b"\xff" * 12 + content[16:],
    ],
)
def test_damaged_idx_files_are_named(tmp_path, damage):
    write_mnist(tmp_path)
    file = tmp_path / "MNIST" / "raw" / "t10k-images-idx3-ubyte"
    file.write_bytes(damage(file.read_bytes()))
    assert str(file) in refused(tmp_path, "mnist")


@pytest.mark.parametrize("labels", [np.full(12, 10, np.uint8), np.zeros(11, np.uint8)])
def test_labels_that_do_not_fit_are_named_with_their_file(tmp_path, labels):
    write_mnist(tmp_path)
    file = tmp_path / "MNIST" / "raw" / "t10k-labels-idx1-ubyte"
    write_idx(file, labels)
    assert str(file) in refused(tmp_path, "mnist")


def test_download_fetches_what_is_missing_and_says_why_it_could_not(tmp_path, monkeypatch):
    from torchvision.datasets import utils

    asked = []

    def offline(url, download_root, filename, md5):
        asked.append((url, download_root, md5))
        raise OSError("no route\nto host")

    monkeypatch.setattr(utils, "download_and_extract_archive", offline)
    for name in ("mnist", "cifar100"):
        assert "no route to host" in refused(tmp_path, name, download=True)
    assert [where for _, where, _ in asked] == [str(tmp_path / "MNIST" / "raw")] * 2 + [str(tmp_path)]
    assert all(url.startswith("http") and len(md5) == 32 for url, _, md5 in asked)

    def online(url, download_root, filename, md5):
        if "train-images" in filename:
            write_mnist(tmp_path)

    monkeypatch.setattr(utils, "download_and_extract_archive", online)
    assert len(load(tmp_path, "mnist", download=True).train) == 30
    monkeypatch.setattr(utils, "download_and_extract_archive", offline)
    assert len(load(tmp_path, "mnist", download=True).train) == 30, "what is there is not fetched again"


# ---------------------------------------------------------------- size and channels


def test_luma_is_pillows(everywhere):
    colour, grey = load(everywhere, "cifar10"), load(everywhere, "cifar10", channels=1)
    for image, luma in zip(colour.train.images[:30], grey.train.images[:30], strict=True):
        assert np.array_equal(luma[0], np.asarray(Image.fromarray(image.transpose(1, 2, 0)).convert("L")))
    assert grey.facts.mean[0] == pytest.approx(grey.train.images.mean() / 255, abs=5e-5)
    assert grey.facts.std[0] == pytest.approx(grey.train.images.std() / 255, abs=5e-5)
    assert grey.facts.augmentations == ("crop", "flip")


def test_grey_is_replicated_with_its_constants(everywhere):
    grey, colour = load(everywhere, "mnist"), load(everywhere, "mnist", channels=3)
    assert np.array_equal(colour.train.images, np.repeat(grey.train.images, 3, axis=1))
    assert (colour.facts.mean, colour.facts.std) == ((0.1307,) * 3, (0.3081,) * 3)


@pytest.mark.parametrize("name, size", [("cifar10", 16), ("cifar10", 64), ("mnist", 32), ("mnist", 8)])
def test_resizing_is_pillows_bilinear_to_a_level(everywhere, name, size):
    native, resized = load(everywhere, name), load(everywhere, name, image_size=size)
    for before, after in zip(native.test.images, resized.test.images, strict=True):
        for plane, got in zip(before, after, strict=True):
            wanted = np.asarray(Image.fromarray(plane).resize((size, size), Image.Resampling.BILINEAR))
            assert np.abs(got.astype(int) - wanted).max() <= 1


def test_chunks_do_not_show(tmp_path, monkeypatch):
    write_cifar10(tmp_path)
    whole = load(tmp_path, "cifar10", image_size=16, channels=1)
    chunks = datasets._chunks
    monkeypatch.setattr(datasets, "_chunks", lambda images: chunks(images, 7))
    assert load(tmp_path, "cifar10", image_size=16, channels=1).identity == whole.identity


# ---------------------------------------------------------------- the true files


@pytest.mark.realdata
@pytest.mark.parametrize("name, mean, std", [("mnist", 0.1307, 0.3081), ("fmnist", 0.2860, 0.3530)])
def test_true_idx_sets(data_root, name, mean, std):
    data = load(data_root, name)
    assert (data.train.images.shape, data.test.images.shape) == ((60000, 1, 28, 28), (10000, 1, 28, 28))
    assert data.train.images.mean() / 255 == pytest.approx(mean, abs=1e-4)
    assert data.train.images.std() / 255 == pytest.approx(std, abs=1e-4)
    assert np.bincount(data.test.labels).sum() == 10000
    assert {"mnist": [5, 0, 4, 1], "fmnist": [9, 0, 0, 3]}[name] == data.train.labels[:4].tolist()


@pytest.mark.realdata
def test_true_cifar10_as_parquet(data_root, tmp_path):
    source = data_root / "cifar10-jpeg" / "test-00000-of-00001.parquet"
    for split in ("train", "test"):
        (tmp_path / f"{split}.parquet").symlink_to(source)
    data = load(tmp_path, f"parquet:{tmp_path}")
    assert data.train.images.shape == (10000, 3, 32, 32)
    assert np.bincount(data.train.labels).tolist() == [1000] * 10
    assert np.array_equal(data.train.images, data.test.images)
    assert data.facts.mean == pytest.approx((0.494, 0.485, 0.450), abs=5e-3)
    assert data.facts.std == pytest.approx((0.247, 0.243, 0.261), abs=5e-3)
    assert data.facts.augmentations == ("crop", "flip")
    assert load(tmp_path, f"parquet:{tmp_path}").identity == data.identity
