"""Loaders of data sets that lie in a few files of arrays, in torchvision's layouts, and of scikit-learn's digits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from ..config.schema import DataConfig
from ..core.errors import RequestError
from ..core.seeding import numpy_stream
from ..core.types import ImageSet
from .download import needed
from .formats import read_idx, read_mat, read_pickle
from .partition import held_out_mask
from .specs import KNOWN, Raw, known

DIGIT_NAMES = tuple("0123456789")
CLOTHES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")


def digits(config: DataConfig) -> Raw:
    """1,797 images of 8x8, 1,437 to train on and 360 to test, by class; the split is the same under every seed."""
    rows = _digits_rows()
    intensities, labels = rows[:, :-1].reshape(-1, 1, 8, 8), rows[:, -1]  # intensities are 0..16
    whole = ImageSet(((intensities * 255 + 8) // 16).astype(np.uint8), labels)
    test = held_out_mask(whole.labels, 360, numpy_stream(0, "digits"))
    return known("digits", whole.take(~test), whole.take(test), DIGIT_NAMES)


def _digits_rows() -> np.ndarray:
    """int64 (1797, 65): intensities and label of each image, from scikit-learn's file, without importing it."""
    package = find_spec("sklearn")
    if package and package.origin:
        path = Path(package.origin).with_name("datasets") / "data" / "digits.csv.gz"
        if path.exists():
            return np.loadtxt(path, delimiter=",", dtype=np.int64)
    from sklearn.datasets import load_digits  # a release that keeps it elsewhere

    bunch = load_digits()
    return np.column_stack([bunch.data, bunch.target]).astype(np.int64)


def _check_labels(labels: np.ndarray, num_images: int, num_classes: int, path: Path) -> None:
    if len(labels) != num_images or not num_images:
        raise RequestError(f"{path}: {len(labels)} labels for {num_images} images; remove it and fetch it again")
    if not 0 <= labels.min() <= labels.max() < num_classes:
        raise RequestError(f"{path}: labels run from {labels.min()} to {labels.max()}; there are {num_classes} classes")


def mnist_like(class_names: tuple[str, ...]) -> Callable[[DataConfig], Raw]:
    """Loader of four idx files of 28x28 images."""

    def part(images_path: Path, labels_path: Path) -> ImageSet:
        images, labels = read_idx(images_path, 3)[:, None], read_idx(labels_path, 1).astype(np.int64)
        _check_labels(labels, len(images), len(class_names), labels_path)
        return ImageSet(np.ascontiguousarray(images), labels)

    def load(config: DataConfig) -> Raw:
        paths = needed(config)
        return known(config.name, part(*paths[:2]), part(*paths[2:]), class_names)

    return load


@dataclass(frozen=True)
class Cifar:
    """Loader of a CIFAR: pickled dicts of ``data`` [n, 3072] and labels; the last file is the test set."""

    meta: str
    label_key: str
    names_key: str

    def __call__(self, config: DataConfig) -> Raw:
        paths = needed(config)
        num_classes = KNOWN[config.name].num_classes
        *parts, test = (self._batch(path, num_classes) for path in paths)
        train = ImageSet(np.concatenate([p.images for p in parts]), np.concatenate([p.labels for p in parts]))
        meta = paths[-1].with_name(self.meta)
        names = read_pickle(meta).get(self.names_key) if meta.is_file() else None
        if not isinstance(names, list) or len(names) != num_classes:
            names = range(num_classes)
        return known(config.name, train, test, tuple(map(str, names)))

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


def svhn(config: DataConfig) -> Raw:
    """Two MATLAB files of ``X`` [32, 32, 3, n] and ``y`` [n, 1]; there 10 stands for the digit 0."""

    def part(path: Path) -> ImageSet:
        images, labels = read_mat(path, ("X", "y"))
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[:3] != (32, 32, 3):
            raise RequestError(f'{path} holds no "X" of bytes [32, 32, 3, n]; remove it and fetch it again')
        if labels.dtype.kind not in "iu" or labels.size != max(labels.shape, default=0):
            raise RequestError(f'{path} holds no whole numbers "y" [n, 1]; remove it and fetch it again')
        labels = labels.ravel().astype(np.int64)
        labels[labels == 10] = 0
        _check_labels(labels, images.shape[3], 10, path)
        return ImageSet(np.ascontiguousarray(images.transpose(3, 2, 0, 1)), labels)

    train, test = map(part, needed(config))
    return known("svhn", train, test, DIGIT_NAMES)
