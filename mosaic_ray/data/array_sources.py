"""Data sets in files of arrays, in torchvision's layouts, and scikit-learn's digits: their loaders and records."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from ..config.schema import DataConfig
from ..core.errors import RequestError
from ..core.seeding import numpy_stream
from ..core.types import DataFacts, Dataset, ImageSet
from .download import needed
from .formats import read_pickle, reading
from .partition import held_out_mask
from .specs import CIFAR100_MEAN_STD, DatasetSpec, archive, idx_files, plain_file, spec_of, with_facts

DIGIT_NAMES = tuple("0123456789")
CLOTHES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")


def digits(config: DataConfig) -> Dataset:
    """Load 1,437 training and 360 test images of 8x8, split by class; the split is the same under every seed."""
    package = find_spec("sklearn")  # its file is read without importing scikit-learn
    assert package is not None and package.origin is not None
    path = Path(package.origin).with_name("datasets") / "data" / "digits.csv.gz"
    rows = np.loadtxt(path, delimiter=",", dtype=np.int64)  # [1797, 65]: 64 intensities and a label each
    intensities, labels = rows[:, :-1].reshape(-1, 1, 8, 8), rows[:, -1]  # intensities are 0..16
    whole = ImageSet(((intensities * 255 + 8) // 16).astype(np.uint8), labels)
    test = held_out_mask(whole.labels, 360, numpy_stream(0, "digits"))
    return with_facts(config, whole.take(~test), whole.take(test), DIGIT_NAMES)


def _check_labels(labels: np.ndarray, num_images: int, num_classes: int, path: Path) -> None:
    if len(labels) != num_images or not num_images:
        raise RequestError(f"{path}: {len(labels)} labels for {num_images} images; remove it and fetch it again")
    if not 0 <= labels.min() <= labels.max() < num_classes:
        raise RequestError(f"{path}: labels run from {labels.min()} to {labels.max()}; there are {num_classes} classes")


def mnist_like(class_names: tuple[str, ...]) -> Callable[[DataConfig], Dataset]:
    """Return a loader of the four idx files of an MNIST."""

    def part(images_path: Path, labels_path: Path) -> ImageSet:
        from torchvision.datasets.mnist import read_image_file, read_label_file  # client actors load no torchvision

        with reading(images_path):
            images = read_image_file(str(images_path)).numpy()[:, None]
        with reading(labels_path):
            labels = read_label_file(str(labels_path)).numpy()
        _check_labels(labels, len(images), len(class_names), labels_path)
        return ImageSet(images, labels)

    def load(config: DataConfig) -> Dataset:
        paths = needed(config)
        return with_facts(config, part(*paths[:2]), part(*paths[2:]), class_names)

    return load


def cifar(meta: str, label_key: str, names_key: str) -> Callable[[DataConfig], Dataset]:
    """Return a loader of a CIFAR: pickled dicts of ``data`` uint8 [n, 3072] and labels, the test set last."""

    def part(path: Path, num_classes: int) -> ImageSet:
        batch = read_pickle(path)
        data, labels = batch.get("data"), batch.get(label_key)
        if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != 3072:
            raise RequestError(f'{path} holds no "data" of bytes [n, 3072]; remove it and fetch it again')
        if not isinstance(labels, list | np.ndarray) or not all(isinstance(x, int | np.integer) for x in labels):
            raise RequestError(f'{path} holds no whole numbers "{label_key}"; remove it and fetch it again')
        labels = np.array(labels, np.int64)
        _check_labels(labels, len(data), num_classes, path)
        return ImageSet(data.reshape(-1, 3, 32, 32), labels)

    def load(config: DataConfig) -> Dataset:
        paths = needed(config)
        facts = spec_of(config.name).facts
        num_classes = facts.num_classes if facts else 0
        *parts, test = (part(path, num_classes) for path in paths)
        train = ImageSet(np.concatenate([p.images for p in parts]), np.concatenate([p.labels for p in parts]))
        path = paths[-1].with_name(meta)
        names = read_pickle(path).get(names_key) if path.is_file() else None
        if not isinstance(names, list) or len(names) != num_classes:
            names = range(num_classes)
        return with_facts(config, train, test, tuple(map(str, names)))

    return load


def svhn(config: DataConfig) -> Dataset:
    """Load two MATLAB files of ``X`` uint8 [32, 32, 3, n] and ``y`` [n, 1], in which 10 stands for the digit 0."""
    from scipy.io import loadmat

    def part(path: Path) -> ImageSet:
        with reading(path):
            content = loadmat(path, appendmat=False, variable_names=("X", "y"))
            images, labels = content["X"], content["y"]
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[:3] != (32, 32, 3):
            raise RequestError(f'{path} holds no "X" of bytes [32, 32, 3, n]; remove it and fetch it again')
        if labels.dtype.kind not in "iu" or labels.size != max(labels.shape, default=0):
            raise RequestError(f'{path} holds no whole numbers "y" [n, 1]; remove it and fetch it again')
        labels = labels.ravel().astype(np.int64)
        labels[labels == 10] = 0
        _check_labels(labels, images.shape[3], 10, path)
        return ImageSet(np.ascontiguousarray(images.transpose(3, 2, 0, 1)), labels)

    train, test = map(part, needed(config))
    return with_facts(config, train, test, DIGIT_NAMES)


# The constants are the authors' (MNIST's for Fashion-MNIST too); the digits' were measured on the training images. A
# mirrored digit is another sign or none, so neither the digits nor SVHN's are flipped.
DIGITS = DatasetSpec(digits, DataFacts("digits", 10, 1, 8, (0.3051,), (0.3759,)))

MNIST = DatasetSpec(
    mnist_like(DIGIT_NAMES), DataFacts("mnist", 10, 1, 28, (0.1307,), (0.3081,)),
    idx_files(
        "MNIST/raw",
        ("https://ossci-datasets.s3.amazonaws.com/mnist/", "http://yann.lecun.com/exdb/mnist/"),
        "f68b3c2dcbeaaa9fbdd348bbdeb94873", "d53e105ee54ea40749a09fcbcd1e9432",
        "9fb629c4189551a2d022fa330f9573f3", "ec29112dd5afa0611ce80d1b7f02629c",
    ),
)  # fmt: skip

FASHION_MNIST = DatasetSpec(
    mnist_like(CLOTHES), DataFacts("fmnist", 10, 1, 28, (0.1307,), (0.3081,)),
    idx_files(
        "FashionMNIST/raw",
        ("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",),
        "8d4fb7e6c68d591d4c3dfef9ec88bf0d", "25c81989df183df01b3e8a0aad5dffbe",
        "bef4ecab320f06d8554ea6380940ec79", "bb300cfdad3c16e7a12a480ee83cd310",
    ),
)  # fmt: skip

SVHN = DatasetSpec(
    svhn, DataFacts("svhn", 10, 3, 32, (0.5,) * 3, (0.5,) * 3, ("crop",)),
    (
        plain_file("http://ufldl.stanford.edu/housenumbers/train_32x32.mat", "e26dedcc434d2e4c54c9b2d4a06d8373"),
        plain_file("http://ufldl.stanford.edu/housenumbers/test_32x32.mat", "eb5a983be6a315427106f1b164d9cef3"),
    ),
)  # fmt: skip

CIFAR10 = DatasetSpec(
    cifar(meta="batches.meta", label_key="labels", names_key="label_names"),
    DataFacts("cifar10", 10, 3, 32, (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010), ("crop", "flip")),
    archive(
        "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a",
        "cifar-10-batches-py", *(f"data_batch_{number}" for number in range(1, 6)), "test_batch",
    ),
)  # fmt: skip

CIFAR100 = DatasetSpec(
    cifar(meta="meta", label_key="fine_labels", names_key="fine_label_names"),
    DataFacts("cifar100", 100, 3, 32, *CIFAR100_MEAN_STD, ("crop", "flip")),
    archive(
        "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85",
        "cifar-100-python", "train", "test",
    ),
)  # fmt: skip
