"""Data sets by name, whole and in memory: uint8 NCHW images, int64 labels, and the facts that clients need.

Files are read as torchvision lays them out, or as Hugging Face lays out image parquet (``formats``).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..config import DataConfig
from ..errors import RequestError, neighbours
from ..records import DataFacts, Dataset, ImageSet
from ..seeding import numpy_stream
from .formats import brief, read_idx, read_parquet, read_pickle
from .partition import held_out_mask


@dataclass(frozen=True)
class _Raw:
    """A data set in its own size and channels; ``mean`` and ``std`` as in ``DataFacts``."""

    train: ImageSet
    test: ImageSet
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]


def data_root(config: DataConfig) -> Path:
    """Where data sets lie: ``data.root``, else ``$MOSAIC_DATA``, else ``~/.cache/mosaic_ray``."""
    return Path(config.root or os.environ.get("MOSAIC_DATA") or "~/.cache/mosaic_ray").expanduser()


def load_dataset(config: DataConfig) -> Dataset:
    """The data set that ``config`` names, in the size and channels that it asks for."""
    loader = _parquet if config.name.startswith("parquet:") else LOADERS.get(config.name)
    if loader is None:
        known = neighbours(config.name, [*LOADERS, "parquet:PATH"])
        raise RequestError(f"data.name = {config.name}: unknown data set; {known}")
    raw = loader(config)
    _, native, height, width = raw.train.images.shape
    if not config.image_size and height != width:
        raise RequestError(f"data.name = {config.name}: its images are {height}x{width}; set data.image_size to a side")
    augmentations = ("crop", "flip") if native == 3 else ()
    facts = DataFacts(config.name, len(raw.class_names), native, height, raw.mean, raw.std, augmentations)
    facts = _asked(config, facts)
    size, channels = facts.image_size, facts.channels
    train, test = (_channels(images, min(channels, native)) for images in (raw.train.images, raw.test.images))
    if channels < native:  # luma mixes channels that vary together: its spread does not follow from theirs
        mean, std = _moments(train)
        facts = replace(facts, mean=mean, std=std)
    train, test = (_channels(_resized(images, size), channels) for images in (train, test))
    train_set, test_set = ImageSet(train, raw.train.labels), ImageSet(test, raw.test.labels)
    digest = hashlib.sha256(json.dumps(astuple(replace(facts, name=""))).encode())
    for array in (train_set.images, train_set.labels, test_set.images, test_set.labels):
        digest.update(str(array.shape).encode())
        digest.update(array.data)
    return Dataset(facts, train_set, test_set, raw.class_names, digest.hexdigest()[:16])


def known_facts(config: DataConfig) -> DataFacts | None:
    """The facts of a data set whose files need not be there; None where they must be measured or counted."""
    known = _KNOWN.get(config.name)
    if known is None or 0 < config.channels < known.channels:
        return None
    return _asked(config, known)


def _asked(config: DataConfig, native: DataFacts) -> DataFacts:
    """``native`` in the size and channels that ``config`` asks for; where they are more, they repeat the one."""
    channels, size = config.channels or native.channels, config.image_size or native.image_size
    times = channels if channels > native.channels else 1
    return replace(native, channels=channels, image_size=size, mean=native.mean * times, std=native.std * times)


# ---------------------------------------------------------------- size and channels


def _chunks(images: np.ndarray, size: int = 1024) -> Iterator[np.ndarray]:
    """``images`` in stretches small enough to be widened without being felt."""
    return (images[start : start + size] for start in range(0, len(images), size))


def _channels(images: np.ndarray, channels: int) -> np.ndarray:
    """uint8 [N, 1 or 3, H, W] in ``channels``: replicated upwards, luma (ITU-R 601, as Pillow rounds it) downwards."""
    if images.shape[1] == channels:
        return images
    if channels == 3:
        return np.repeat(images, 3, axis=1)
    weights = np.array([19595, 38470, 7471], np.uint32)
    grey = np.empty((len(images), 1, *images.shape[2:]), np.uint8)
    for chunk, target in zip(_chunks(images), _chunks(grey), strict=True):
        target[:, 0] = np.einsum("nchw,c->nhw", chunk, weights, dtype=np.uint32) + 0x8000 >> 16
    return grey


def _resized(images: np.ndarray, size: int) -> np.ndarray:
    """uint8 [N, C, H, W] to [N, C, size, size]: bilinear, antialiased when it shrinks."""
    if images.shape[2:] == (size, size):
        return np.ascontiguousarray(images)
    import torch
    from torch.nn.functional import interpolate

    out = np.empty((*images.shape[:2], size, size), np.uint8)
    for chunk, target in zip(_chunks(images), _chunks(out), strict=True):
        wide = torch.tensor(chunk, dtype=torch.float32)
        wide = interpolate(wide, size=(size, size), mode="bilinear", antialias=True)
        target[:] = wide.round_().clamp_(0, 255).to(torch.uint8).numpy()
    return out


def _moments(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel in units of [0, 1] intensity, to four digits; exact sums."""
    tally = np.zeros((images.shape[1], 256), np.int64)
    for chunk in _chunks(images):
        for channel, counts in enumerate(tally):
            counts += np.bincount(chunk[:, channel].ravel(), minlength=256)
    levels, shares = np.arange(256) / 255, tally / tally.sum(axis=1, keepdims=True)
    mean = shares @ levels
    std = np.sqrt(shares @ levels**2 - mean**2)
    # a channel of one single value has no spread to divide by
    return tuple(round(float(m), 4) for m in mean), tuple(round(float(s), 4) or 1.0 for s in std)


# ---------------------------------------------------------------- scikit-learn's digits


def _digits(config: DataConfig) -> _Raw:
    """1,797 images of 8x8, 1,437 to train on and 360 to test, by class; the split is the same under every seed."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = ((bunch.images.astype(np.int64) * 255 + 8) // 16).astype(np.uint8)[:, None]  # intensities are 0..16
    whole = ImageSet(images, bunch.target.astype(np.int64))
    test = held_out_mask(whole.labels, 360, numpy_stream(0, "digits"))
    known = _KNOWN["digits"]
    return _Raw(whole.take(~test), whole.take(test), _DIGIT_NAMES, known.mean, known.std)


# ---------------------------------------------------------------- torchvision's layouts


def _files(config: DataConfig, folder: str, names: tuple[str, ...], fetch: Callable[[Path], None]) -> list[Path]:
    """Paths of ``names`` under ``folder``; missing ones are fetched where ``data.download`` says so."""
    root = data_root(config)
    paths = [root / folder / name for name in names]
    missing = [path.name for path in paths if not path.is_file()]
    if missing and config.download:
        try:
            fetch(root)
        except Exception as error:  # urllib's, torchvision's and the file system's errors share no base but this
            raise RequestError(f"data.name = {config.name}: download to {root} failed: {brief(error)}") from error
        missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise RequestError(
            f"data.name = {config.name}: no {missing[0]} in {root / folder}; fetch it by --set data.download=true, or "
            "say where the data lie by --set data.root=FOLDER or MOSAIC_DATA"
        )
    return paths


def _idx_set(images_path: Path, labels_path: Path, num_classes: int) -> ImageSet:
    images, labels = read_idx(images_path, 3)[:, None], read_idx(labels_path, 1).astype(np.int64)
    _check_labels(labels, len(images), num_classes, labels_path)
    return ImageSet(np.ascontiguousarray(images), labels)


def _check_labels(labels: np.ndarray, num_images: int, num_classes: int, path: Path) -> None:
    if len(labels) != num_images or not num_images:
        raise RequestError(f"{path}: {len(labels)} labels for {num_images} images; remove it and fetch it again")
    if not 0 <= labels.min() <= labels.max() < num_classes:
        raise RequestError(f"{path}: labels run from {labels.min()} to {labels.max()}; there are {num_classes} classes")


def _mnist_like(source: str, class_names: tuple[str, ...]) -> Callable[[DataConfig], _Raw]:
    """Loader of an MNIST-shaped set in torchvision's folder ``source``."""

    def fetch(root: Path) -> None:
        # not torchvision's constructor: it would unpickle a `processed` folder that it finds beside `raw`
        from torchvision import datasets

        cls = getattr(datasets, source)
        for filename, md5 in cls.resources:
            _first_mirror([mirror + filename for mirror in cls.mirrors], root / source / "raw", filename, md5)

    def load(config: DataConfig) -> _Raw:
        names = tuple(f"{split}-{what}-ubyte" for split in ("train", "t10k") for what in ("images-idx3", "labels-idx1"))
        paths = _files(config, f"{source}/raw", names, fetch)
        train, test = (_idx_set(paths[i], paths[i + 1], len(class_names)) for i in (0, 2))
        known = _KNOWN[config.name]
        return _Raw(train, test, class_names, known.mean, known.std)

    return load


def _first_mirror(urls: list[str], folder: Path, filename: str, md5: str) -> None:
    """Downloads and unpacks from the first of ``urls`` that answers with the right checksum."""
    from torchvision.datasets.utils import download_and_extract_archive

    for url in urls:
        try:
            download_and_extract_archive(url, str(folder), filename=filename, md5=md5)
            return
        except (OSError, RuntimeError):
            if url == urls[-1]:
                raise


@dataclass(frozen=True)
class _Cifar:
    """Loader of a CIFAR in torchvision's folder: pickled dicts of ``data`` [n, 3072] and labels."""

    source: str
    folder: str
    train: tuple[str, ...]
    test: str
    meta: str
    label_key: str
    names_key: str

    def __call__(self, config: DataConfig) -> _Raw:
        paths = _files(config, self.folder, (*self.train, self.test), self._fetch)
        known = _KNOWN[config.name]
        *parts, test = (self._batch(path, known.num_classes) for path in paths)
        train = ImageSet(np.concatenate([p.images for p in parts]), np.concatenate([p.labels for p in parts]))
        meta = paths[-1].with_name(self.meta)
        names = read_pickle(meta).get(self.names_key) if meta.is_file() else None
        if not isinstance(names, list) or len(names) != known.num_classes:
            names = range(known.num_classes)
        return _Raw(train, test, tuple(map(str, names)), known.mean, known.std)

    def _fetch(self, root: Path) -> None:
        # not torchvision's constructor: it would go on to unpickle
        from torchvision import datasets

        cls = getattr(datasets, self.source)
        _first_mirror([cls.url], root, cls.filename, cls.tgz_md5)

    def _batch(self, path: Path, num_classes: int) -> ImageSet:
        batch = read_pickle(path)
        data, labels = batch.get("data"), batch.get(self.label_key)
        if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != 3072:
            raise RequestError(f'{path} holds no "data" of bytes [n, 3072]; remove it and fetch it again')
        if not isinstance(labels, list | np.ndarray) or not all(isinstance(x, int | np.integer) for x in labels):
            raise RequestError(f'{path} holds no whole numbers "{self.label_key}"; remove it and fetch it again')
        labels = np.array(labels, np.int64)
        _check_labels(labels, len(data), num_classes, path)
        return ImageSet(data.reshape(-1, 3, 32, 32), labels)


# ---------------------------------------------------------------- Hugging Face's image parquet


def _parquet(config: DataConfig) -> _Raw:
    """``parquet:PATH``: a folder of train*.parquet and test*.parquet; decoded once, then kept as arrays."""
    given = Path(config.name.removeprefix("parquet:")).expanduser()
    folder = next((path for path in (given, data_root(config) / given) if path.is_dir()), None)
    if folder is None:
        raise RequestError(f"data.name = {config.name}: no folder {given}, nor {data_root(config) / given}")
    files = {split: sorted(folder.glob(f"{split}*.parquet")) for split in ("train", "test")}
    for split, paths in files.items():
        if not paths:
            raise RequestError(f"data.name = {config.name}: no {split}*.parquet in {folder}")
    sources = [[str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns] for paths in files.values() for p in paths]
    cache = data_root(config) / "decoded" / hashlib.sha256(json.dumps(sources).encode()).hexdigest()[:16]
    raw = _read_cache(cache)
    if raw is None:
        raw = _decoded(config, files["train"], files["test"])
        _write_cache(cache, raw, sources)
    return raw


def _decoded(config: DataConfig, train_paths: list[Path], test_paths: list[Path]) -> _Raw:
    (train_images, train_labels, names), (test_images, test_labels, _) = map(read_parquet, (train_paths, test_paths))
    if train_images.shape[2:] != test_images.shape[2:]:
        sizes = " and ".join("x".join(map(str, images.shape[2:])) for images in (train_images, test_images))
        raise RequestError(f"data.name = {config.name}: train and test images are {sizes}; they must be of one size")
    strange = set(test_labels.tolist()) - set(train_labels.tolist())
    if strange:
        raise RequestError(f"data.name = {config.name}: test holds labels that train has not: {sorted(strange)[:10]}")
    num_classes = int(train_labels.max()) + 1
    if len(names) < num_classes:
        names = tuple(map(str, range(num_classes)))
    channels = max(train_images.shape[1], test_images.shape[1])
    train = ImageSet(_channels(train_images, channels), train_labels)
    return _Raw(train, ImageSet(_channels(test_images, channels), test_labels), names, *_moments(train.images))


def _read_cache(folder: Path) -> _Raw | None:
    """What ``_write_cache`` left, its images mapped rather than read; None where nothing usable lies."""
    try:
        facts = json.loads((folder / "facts.json").read_text())
        # copy on write: as writable as every other data set's arrays, and the file stays as it is
        arrays = [np.asarray(np.load(folder / f"{part}.npy", mmap_mode="c", allow_pickle=False)) for part in _PARTS]
        train, test = ImageSet(*arrays[:2]), ImageSet(*arrays[2:])
        return _Raw(train, test, *(tuple(facts[key]) for key in ("class_names", "mean", "std")))
    except (OSError, EOFError, ValueError, KeyError, AssertionError):
        shutil.rmtree(folder, ignore_errors=True)
        return None


def _write_cache(folder: Path, raw: _Raw, sources: list[list[Any]]) -> None:
    """Keeps ``raw`` under ``folder``, whole or not at all; where that cannot be written, nothing is kept."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, ignore_cleanup_errors=True) as beside:
            made = Path(beside, folder.name)
            made.mkdir()
            arrays = (raw.train.images, raw.train.labels, raw.test.images, raw.test.labels)
            for part, array in zip(_PARTS, arrays, strict=True):
                np.save(made / f"{part}.npy", array)
            facts = {"sources": sources, "class_names": raw.class_names, "mean": raw.mean, "std": raw.std}
            (made / "facts.json").write_text(json.dumps(facts))
            made.rename(folder)
    except OSError:
        return


_PARTS = ("train_images", "train_labels", "test_images", "test_labels")

_DIGIT_NAMES = tuple("0123456789")

#: What is fixed of a data set, in its own size and channels, whether or not its files are there. Digits' moments were
#: measured on the 1,437 training images; the authors use MNIST's for Fashion-MNIST too.
_KNOWN = {
    facts.name: facts
    for facts in (
        DataFacts("digits", 10, 1, 8, (0.3051,), (0.3759,)),
        DataFacts("mnist", 10, 1, 28, (0.1307,), (0.3081,)),
        DataFacts("fmnist", 10, 1, 28, (0.1307,), (0.3081,)),
        DataFacts("cifar10", 10, 3, 32, (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010), ("crop", "flip")),
        DataFacts("cifar100", 100, 3, 32, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), ("crop", "flip")),
    )
}

LOADERS: dict[str, Callable[[DataConfig], _Raw]] = {
    "digits": _digits,
    "mnist": _mnist_like("MNIST", _DIGIT_NAMES),
    "fmnist": _mnist_like(
        "FashionMNIST",
        ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
    ),
    "cifar10": _Cifar(
        source="CIFAR10",
        folder="cifar-10-batches-py",
        train=tuple(f"data_batch_{number}" for number in range(1, 6)),
        test="test_batch",
        meta="batches.meta",
        label_key="labels",
        names_key="label_names",
    ),
    "cifar100": _Cifar(
        source="CIFAR100",
        folder="cifar-100-python",
        train=("train",),
        test="test",
        meta="meta",
        label_key="fine_labels",
        names_key="fine_label_names",
    ),
}
