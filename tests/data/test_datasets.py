"""Data sets: small files in the true layouts are read back exactly; damaged ones are refused in one line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from layouts import (
    load,
    noise,
    refused,
    write_cifar10,
    write_cifar100,
    write_classes,
    write_folder,
    write_food,
    write_idx,
    write_mnist,
    write_svhn,
    write_tiny,
)
from PIL import Image
from scipy.io import savemat

from mosaic_ray.config.registry import DATASETS, MULTIMODAL
from mosaic_ray.config.schema import DataConfig
from mosaic_ray.data import image_ops
from mosaic_ray.data import load as datasets
from mosaic_ray.data.image_cache_build import import_as
from mosaic_ray.data.load import known_facts, load_dataset
from mosaic_ray.data.paths import data_root as root_of
from mosaic_ray.data.specs import DatasetSpec, folders, spec_of


@pytest.fixture(autouse=True)
def _no_root_of_the_user(monkeypatch, tmp_path):
    monkeypatch.delenv("MOSAIC_DATA", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


# ---------------------------------------------------------------- the contract of every data set


@pytest.fixture(scope="module")
def everywhere(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write_mnist(root)
    write_mnist(root, "FashionMNIST")
    write_cifar10(root)
    write_cifar100(root)
    write_folder(root / "pictures")
    write_svhn(root)
    write_tiny(root)
    write_food(root)
    write_classes(root / "insects")
    import_as("mine", DataConfig(name="folder:insects", root=str(root)))
    return root


#: Colour images are cropped and mirrored; digits are never mirrored (D10), and grey ones are left as they are.
AUGMENTED = {
    "svhn": ("crop",), **dict.fromkeys(
        ("cifar10", "cifar100", "tiny_imagenet", "food101", "parquet:pictures", "folder:insects", "imported:mine"),
        ("crop", "flip"),
    )
}  # fmt: skip


@pytest.mark.parametrize(
    "name", [*sorted({*DATASETS} - {*MULTIMODAL}), "parquet:pictures", "folder:insects", "imported:mine"]
)
@pytest.mark.parametrize("shape", [(0, 0), (16, 1), (28, 1), (32, 3), (64, 3), (64, 1)])
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
    assert facts.augmentations == AUGMENTED.get(name, ())
    assert data.identity == load(everywhere, name, image_size=size, channels=channels).identity
    assert len(data.identity) == 16


@pytest.mark.parametrize("name", DATASETS)
def test_each_name_of_the_registry_has_a_record_with_that_name(name):
    assert isinstance(spec_of(name), DatasetSpec) and spec_of(name).facts.name == name


@pytest.mark.parametrize(
    "name, mean, std",
    [
        ("svhn", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        ("tiny_imagenet", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ("food101", (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    ],
)
def test_constants_are_the_papers_and_those_of_grey_are_measured(everywhere, name, mean, std):
    facts = load(everywhere, name).facts
    assert (facts.mean, facts.std) == (mean, std)
    known = known_facts(DataConfig(name=name))
    assert (known.mean, known.std, known.image_size, known.augmentations) == (
        mean, std, facts.image_size, facts.augmentations
    )  # fmt: skip
    grey = load(everywhere, name, channels=1)
    assert grey.facts.mean[0] == pytest.approx(grey.train.images.mean() / 255, abs=5.1e-5)
    assert grey.facts.std[0] == pytest.approx(grey.train.images.std() / 255, abs=5.1e-5)


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


def test_digits_are_scikit_learns(monkeypatch):
    from sklearn.datasets import load_digits

    monkeypatch.setattr("sklearn.datasets.load_digits", lambda: pytest.fail("all of scikit-learn was imported"))
    data, bunch = load_dataset(DataConfig(name="digits")), load_digits()
    together = [(np.round(image * (16 / 255)), label) for part in (data.train, data.test)
                for image, label in zip(part.images[:, 0], part.labels, strict=True)]  # fmt: skip
    ours = sorted((image.astype(int).ravel().tolist(), int(label)) for image, label in together)
    assert ours == sorted(
        (row, label) for row, label in zip(bunch.data.astype(int).tolist(), bunch.target.tolist(), strict=True)
    )


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
    for name, folder in folders().items():
        message = refused(tmp_path, name)
        assert str(tmp_path / folder) in message
        ways = (f"mosaic data fetch {name}", "data.download=true", "data.root", "MOSAIC_DATA")
        ways = ways[2:] if name in MULTIMODAL else ways
        assert all(way in message for way in ways)
    assert set(folders()) == set(DATASETS) - {"digits"}


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


# ---------------------------------------------------------------- MATLAB


def test_svhn_is_read_as_written_and_its_tens_are_zeros(tmp_path):
    written = write_svhn(tmp_path)
    data = load(tmp_path, "svhn")
    for part, split in ((data.train, "train"), (data.test, "test")):
        assert np.array_equal(part.images, written[split][0])
        assert part.labels.tolist() == [label % 10 for label in written[split][1]]
    assert data.class_names == tuple("0123456789")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no matlab",
        {"X": noise(32, 32, 3, 5)},
        {"X": noise(32, 32, 3, 5), "y": noise(4, 1)},
        {"X": noise(32, 32, 3, 5), "y": np.full((5, 1), 11, np.uint8)},
        {"X": noise(32, 32, 3, 5), "y": np.full((5, 1), "a", object)},
        {"X": noise(32, 32, 3, 5), "y": np.ones((5, 1))},
        {"X": noise(3, 32, 32, 5), "y": np.ones((5, 1), np.uint8)},
        {"X": noise(32, 32, 3, 5).astype(float), "y": np.ones((5, 1), np.uint8)},
    ],
)
def test_damaged_matlab_files_are_named(tmp_path, content):
    write_svhn(tmp_path)
    file = tmp_path / "test_32x32.mat"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        savemat(file, content)
    assert str(file) in refused(tmp_path, "svhn")


def test_a_truncated_matlab_file_is_named(tmp_path):
    write_svhn(tmp_path)
    file = tmp_path / "train_32x32.mat"
    file.write_bytes(file.read_bytes()[:-1000])
    assert str(file) in refused(tmp_path, "svhn")


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
    chunks = image_ops.chunks
    for module in (image_ops, datasets):
        monkeypatch.setattr(module, "chunks", lambda images: chunks(images, 7))
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
