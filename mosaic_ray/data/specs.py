"""What is fixed of each data set, and the form in which loaders hand one over."""

from __future__ import annotations

from dataclasses import dataclass

from ..core.types import DataFacts, ImageSet

_COLOUR = ("crop", "flip")
_CIFAR100 = ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))

#: In its own size and channels, whether or not its files are there. Digits' moments were measured on the 1,437 training
#: images; the others' are the authors' (ALGORITHM §1.2): MNIST's for Fashion-MNIST too, CIFAR-100's for Food-101,
#: ImageNet's for Tiny-ImageNet. A mirrored digit is another sign or none, so digits are not flipped, SVHN's neither
#: (D10).
KNOWN = {
    facts.name: facts
    for facts in (
        DataFacts("digits", 10, 1, 8, (0.3051,), (0.3759,)),
        DataFacts("mnist", 10, 1, 28, (0.1307,), (0.3081,)),
        DataFacts("fmnist", 10, 1, 28, (0.1307,), (0.3081,)),
        DataFacts("svhn", 10, 3, 32, (0.5,) * 3, (0.5,) * 3, ("crop",)),
        DataFacts("cifar10", 10, 3, 32, (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010), _COLOUR),
        DataFacts("cifar100", 100, 3, 32, *_CIFAR100, _COLOUR),
        DataFacts("tiny_imagenet", 200, 3, 64, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), _COLOUR),
        DataFacts("food101", 101, 3, 64, *_CIFAR100, _COLOUR),
    )
}


@dataclass(frozen=True)
class Raw:
    """A data set as its loader has it; the size and the channels that were asked for may still be other ones.

    ``mean`` and ``std`` as in ``DataFacts``. ``content`` is a digest of both parts where the loader has one already.
    """

    train: ImageSet
    test: ImageSet
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augmentations: tuple[str, ...]
    content: str = ""


def known(name: str, train: ImageSet, test: ImageSet, class_names: tuple[str, ...]) -> Raw:
    """``Raw`` with the constants of the data set ``name``."""
    facts = KNOWN[name]
    return Raw(train, test, class_names, facts.mean, facts.std, facts.augmentations)


#: Each data set's folder (or first file) below the data root: torchvision's layouts, and Tiny-ImageNet's own.
FOLDERS = {
    "mnist": "MNIST/raw",
    "fmnist": "FashionMNIST/raw",
    "cifar10": "cifar-10-batches-py",
    "cifar100": "cifar-100-python",
    "svhn": "train_32x32.mat",
    "tiny_imagenet": "tiny-imagenet-200",
    "food101": "food-101",
}


@dataclass(frozen=True)
class Resource:
    """A file on the net: where it may be had, its MD5, its place below the data root, and what unpacking it gives."""

    urls: tuple[str, ...]
    md5: str
    path: str
    gives: tuple[str, ...]


def _idx(folder: str, mirrors: tuple[str, ...], *md5s: str) -> tuple[Resource, ...]:
    names = (f"{split}-{what}-ubyte" for split in ("train", "t10k") for what in ("images-idx3", "labels-idx1"))
    return tuple(
        Resource(tuple(f"{mirror}{name}.gz" for mirror in mirrors), md5, f"{folder}/{name}.gz", (f"{folder}/{name}",))
        for name, md5 in zip(names, md5s, strict=True)
    )


def _archive(url: str, md5: str, folder: str, *names: str) -> tuple[Resource, ...]:
    return (Resource((url,), md5, url.rpartition("/")[2], tuple(f"{folder}/{name}" for name in names)),)


def _plain(url: str, md5: str) -> Resource:
    name = url.rpartition("/")[2]
    return Resource((url,), md5, name, (name,))


#: By data set, in the order in which its loader reads them. MNIST and Fashion-MNIST: training images, labels, test's.
RESOURCES = {
    "digits": (),
    "mnist": _idx(
        "MNIST/raw",
        ("https://ossci-datasets.s3.amazonaws.com/mnist/", "http://yann.lecun.com/exdb/mnist/"),
        "f68b3c2dcbeaaa9fbdd348bbdeb94873",
        "d53e105ee54ea40749a09fcbcd1e9432",
        "9fb629c4189551a2d022fa330f9573f3",
        "ec29112dd5afa0611ce80d1b7f02629c",
    ),
    "fmnist": _idx(
        "FashionMNIST/raw",
        ("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",),
        "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "25c81989df183df01b3e8a0aad5dffbe",
        "bef4ecab320f06d8554ea6380940ec79",
        "bb300cfdad3c16e7a12a480ee83cd310",
    ),
    "svhn": (
        _plain("http://ufldl.stanford.edu/housenumbers/train_32x32.mat", "e26dedcc434d2e4c54c9b2d4a06d8373"),
        _plain("http://ufldl.stanford.edu/housenumbers/test_32x32.mat", "eb5a983be6a315427106f1b164d9cef3"),
    ),
    "cifar10": _archive(
        "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
        "c58f30108f718f92721af3b95e74349a",
        "cifar-10-batches-py",
        *(f"data_batch_{number}" for number in range(1, 6)),
        "test_batch",
    ),
    "cifar100": _archive(
        "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
        "eb9058c3a382ffc7106e4002c42a8d85",
        "cifar-100-python",
        "train",
        "test",
    ),
    "tiny_imagenet": _archive(
        "http://cs231n.stanford.edu/tiny-imagenet-200.zip",
        "90528d7ca1a48142e341f4ef8d21d0de",
        "tiny-imagenet-200",
        "wnids.txt",
        "val/val_annotations.txt",
    ),
    "food101": _archive(
        "http://data.vision.ee.ethz.ch/cvl/food-101.tar.gz",
        "85eeb15f3717b99a5da872d97d918f87",
        "food-101",
        "meta",
        "images",
    ),
}
