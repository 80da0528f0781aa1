"""Data sets: the true layouts written small, read back exactly, and refused in one line where they are damaged."""

from __future__ import annotations

import io
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mosaic_ray.config import DataConfig
from mosaic_ray.data import datasets
from mosaic_ray.data.datasets import data_root as root_of
from mosaic_ray.data.datasets import load_dataset
from mosaic_ray.errors import RequestError
from mosaic_ray.presets import DATASETS


@pytest.fixture(autouse=True)
def _no_root_of_the_user(monkeypatch, tmp_path):
    monkeypatch.delenv("MOSAIC_DATA", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def load(root: Path, name: str, **knobs):
    return load_dataset(DataConfig(name=name, root=str(root), **knobs))


def refused(root: Path, name: str, **knobs) -> str:
    with pytest.raises(RequestError) as caught:
        load(root, name, **knobs)
    message = str(caught.value)
    assert "\n" not in message
    return message


# ---------------------------------------------------------------- layouts written small


def write_idx(path: Path, array: np.ndarray) -> None:
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    path.write_bytes(header + array.tobytes())


def write_mnist(root: Path, folder: str = "MNIST", num_train: int = 30, num_test: int = 12):
    raw = root / folder / "raw"
    raw.mkdir(parents=True)
    written = {}
    for split, count in (("train", num_train), ("t10k", num_test)):
        written[split] = noise(count, 28, 28, seed=count), (np.arange(count) % 10).astype(np.uint8)
        write_idx(raw / f"{split}-images-idx3-ubyte", written[split][0])
        write_idx(raw / f"{split}-labels-idx1-ubyte", written[split][1])
    return written


def write_cifar10(root: Path, protocol: int = 4) -> dict[str, tuple[np.ndarray, list[int]]]:
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    written = {}
    for number, name in enumerate([*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]):
        data, labels = noise(20, 3072, seed=number), [(number + i) % 10 for i in range(20)]
        written[name] = data, labels
        batch = {"batch_label": name, "labels": labels, "data": data, "filenames": ["a.png"] * 20}
        (folder / name).write_bytes(pickle.dumps(batch, protocol))
    words = {"label_names": [f"word {c}" for c in range(10)], "num_vis": 3072}
    (folder / "batches.meta").write_bytes(pickle.dumps(words, protocol))
    return written


def write_cifar100(root: Path) -> np.ndarray:
    folder = root / "cifar-100-python"
    folder.mkdir(parents=True)
    data = noise(200, 3072)
    for name, part in (("train", data), ("test", data[:100])):
        fine = np.arange(len(part)) % 100
        batch = {"data": part, "fine_labels": fine.tolist(), "coarse_labels": (fine // 5).tolist()}
        (folder / name).write_bytes(pickle.dumps(batch))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": [f"fine {c}" for c in range(100)]}))
    return data


def encoded(array: np.ndarray, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, kind)
    return buffer.getvalue()


def write_parquet(path: Path, images: list[bytes | None], labels, columns=("img", "label"), names=None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    column = pa.array([{"bytes": content, "path": None} for content in images], kind)
    table = pa.table({"id": pa.array(range(len(images))), columns[0]: column, columns[1]: pa.array(labels)})
    if names:
        features = {"info": {"features": {columns[1]: {"names": names, "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
    pq.write_table(table, path)


def write_folder(folder: Path, size: int = 8, num_train: int = 20, **knobs) -> np.ndarray:
    images = noise(num_train, size, size, 3)
    contents, labels = [encoded(image) for image in images], [i % 4 for i in range(num_train)]
    half = num_train // 2
    write_parquet(folder / "train-00000-of-00002.parquet", contents[:half], labels[:half], **knobs)
    write_parquet(folder / "train-00001-of-00002.parquet", contents[half:], labels[half:], **knobs)
    write_parquet(folder / "test-00000-of-00001.parquet", contents[:4], labels[:4], **knobs)
    return images.transpose(0, 3, 1, 2)


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


# ---------------------------------------------------------------- CIFAR's pickles


@pytest.mark.parametrize("protocol", range(6))
def test_cifar10_batches_are_read_as_written_under_every_protocol(tmp_path, protocol):
    written = write_cifar10(tmp_path, protocol)
    data = load(tmp_path, "cifar10")
    wanted = np.concatenate([written[f"data_batch_{n}"][0] for n in range(1, 6)]).reshape(-1, 3, 32, 32)
    assert np.array_equal(data.train.images, wanted)
    assert data.train.labels.tolist() == [label for n in range(1, 6) for label in written[f"data_batch_{n}"][1]]
    assert np.array_equal(data.test.images.reshape(20, -1), written["test_batch"][0])
    assert data.class_names[3] == "word 3"
    assert data.facts.mean == (0.4914, 0.4822, 0.4465)
    assert data.facts.std == (0.2023, 0.1994, 0.2010)


def test_cifar100_takes_fine_labels(tmp_path):
    images = write_cifar100(tmp_path)
    data = load(tmp_path, "cifar100")
    assert np.array_equal(data.train.images.reshape(200, -1), images)
    assert data.test.labels.tolist() == list(range(100))
    assert data.facts.num_classes == 100
    assert data.class_names[7] == "fine 7"


def test_a_pickle_as_python_2_wrote_it_is_read(tmp_path):
    write_cifar10(tmp_path)
    pixels = noise(1, 3072)
    content = (
        b"\x80\x02}q\x01(U\x04datacnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85U\x01btR"
        b"(K\x01K\x01M\x00\x0c\x86cnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        b"\x89T" + np.array(pixels.size, "<i4").tobytes() + pixels.tobytes() + b"tbU\x06labels]K\x07au."
    )
    (tmp_path / "cifar-10-batches-py" / "test_batch").write_bytes(content)
    data = load(tmp_path, "cifar10")
    assert np.array_equal(data.test.images.reshape(1, -1), pixels)
    assert data.test.labels.tolist() == [7]


def test_labels_may_be_arrays_or_numpy_numbers_and_the_meta_file_may_be_missing(tmp_path):
    written = write_cifar10(tmp_path)
    folder = tmp_path / "cifar-10-batches-py"
    (folder / "batches.meta").unlink()
    pixels, labels = written["test_batch"]
    for kind in (np.array(labels), np.array(labels, ">i2"), list(np.array(labels))):
        (folder / "test_batch").write_bytes(pickle.dumps({"data": np.asfortranarray(pixels), "labels": kind}, 2))
        data = load(tmp_path, "cifar10")
        assert np.array_equal(data.test.images.reshape(20, -1), pixels)
        assert data.test.labels.tolist() == labels
    assert data.class_names == tuple("0123456789")


class Harmful:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("function", [os.mkdir, eval, np.load, getattr])
def test_nothing_in_a_pickle_runs(tmp_path, function, protocol):
    write_cifar10(tmp_path)
    trace = tmp_path / "ran"
    argument = f"__import__('os').mkdir({str(trace)!r})" if function is eval else str(trace)
    file = tmp_path / "cifar-10-batches-py" / "test_batch"
    file.write_bytes(pickle.dumps({"data": Harmful(function, argument), "labels": [0]}, protocol))
    message = refused(tmp_path, "cifar10")
    assert str(file) in message
    assert "has no place" in message
    assert not trace.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not a pickle",
        pickle.dumps([1, 2]),
        pickle.dumps({"labels": [0]}),
        pickle.dumps({"data": noise(2, 3072), "labels": [0]}),
        pickle.dumps({"data": noise(2, 3071), "labels": [0, 1]}),
        pickle.dumps({"data": noise(2, 3072), "labels": [0, 10]}),
        pickle.dumps({"data": noise(2, 3072), "labels": ["a", "b"]}),
        pickle.dumps({"data": noise(2, 3072).astype(float), "labels": [0, 1]}),
        pickle.dumps({"data": noise(2, 3072).astype(object), "labels": [0, 1]}),
        pickle.dumps({"data": noise(2, 3072), "labels": [0, 1]})[:-40],
        pickle.dumps({"data": noise(2, 3072), "labels": [0, 1]}, 2)[:3000],
    ],
)
def test_damaged_cifar_batches_are_named(tmp_path, content):
    write_cifar10(tmp_path)
    file = tmp_path / "cifar-10-batches-py" / "data_batch_3"
    file.write_bytes(content)
    assert str(file) in refused(tmp_path, "cifar10")


# ---------------------------------------------------------------- parquet


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
    assert json.loads((kept / "facts.json").read_text())["sources"][0][1] > 0

    decoded = []
    genuine = datasets.read_parquet
    monkeypatch.setattr(datasets, "read_parquet", lambda paths: decoded.append(paths) or genuine(paths))
    again = load(tmp_path, "parquet:pictures")
    assert (again.identity, again.facts, again.class_names) == (first.identity, first.facts, first.class_names)
    assert not decoded

    again.train.images[:] = 0
    assert load(tmp_path, "parquet:pictures").identity == first.identity, "writing to the arrays leaves the file alone"

    write_parquet(folder / "test-00000-of-00001.parquet", [encoded(noise(8, 8, 3, seed=9))], [0])
    assert load(tmp_path, "parquet:pictures").identity != first.identity
    assert len(decoded) == 2


@pytest.mark.parametrize("damage", [lambda content: content[:-9], lambda content: b"", lambda content: b"\x93NUMPY"])
def test_a_damaged_copy_is_decoded_afresh(tmp_path, damage):
    write_folder(tmp_path / "pictures")
    first = load(tmp_path, "parquet:pictures")
    [kept] = (tmp_path / "decoded").iterdir()
    for name in ("train_images.npy", "facts.json"):
        (kept / name).write_bytes(damage((kept / name).read_bytes()))
        assert load(tmp_path, "parquet:pictures").identity == first.identity
        assert np.load(kept / "train_images.npy").shape == (20, 3, 8, 8), "and kept again"


def test_a_root_that_cannot_be_written_keeps_nothing_and_still_loads(tmp_path):
    images = write_folder(tmp_path / "pictures")
    (tmp_path / "file").write_text("not a folder")
    data = load(tmp_path / "file", f"parquet:{tmp_path}/pictures")
    assert np.array_equal(data.train.images, images)


def test_grey_pictures_stay_grey_and_spread_among_coloured_ones(tmp_path):
    grey, colour = noise(8, 8), noise(8, 8, 3)
    for split in ("train", "test"):
        write_parquet(tmp_path / "grey" / f"{split}.parquet", [encoded(grey)], [0])
        write_parquet(tmp_path / "mixed" / f"{split}.parquet", [encoded(grey), encoded(colour)], [0, 1])
    data = load(tmp_path, "parquet:grey")
    assert np.array_equal(data.train.images, grey[None, None])
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
        "sizes differ": (both, {"images": [good, small]}, ["8x8 and 4x8"]),
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
    assert "[5]" in refused(tmp_path, "parquet:p")


def test_a_truncated_parquet_file_is_named(tmp_path):
    write_folder(tmp_path / "pictures")
    file = tmp_path / "pictures" / "train-00001-of-00002.parquet"
    file.write_bytes(file.read_bytes()[:-20])
    assert str(file) in refused(tmp_path, "parquet:pictures")


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
