"""The record of a data set: its constants, its loader, and the files that it is read from.

A data set that ships is a ``DatasetSpec`` beside its loader, and a line in ``config.registry.DATASETS``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..config.presets import Shape
from ..config.registry import DATASET_PREFIXES, DATASETS
from ..config.schema import DataConfig
from ..config.user_code import load_object
from ..core.errors import RequestError, neighbours
from ..core.types import DataFacts, Dataset, ImageSet

#: Mean and standard deviation of CIFAR-100, which Food-101 uses too.
CIFAR100_MEAN_STD = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)


@dataclass(frozen=True)
class Part:
    """Encoded images in tasks for ``image_decode.run``, and their labels int64 [N]."""

    tasks: list[dict[str, Any]]
    labels: np.ndarray


@dataclass(frozen=True)
class Listing:
    """All encoded images of a data set. ``tables``: the training images' parquet files, for their further columns."""

    train: Part
    test: Part
    class_names: tuple[str, ...]
    tables: tuple[Path, ...] = ()


@dataclass(frozen=True)
class ImageFiles:
    """A data set of encoded images, which are listed only when no decoded copy of ``where`` is up to date.

    ``places``: files and folders; a time of one changes when an image is added, removed or changed. ``size``: the
    side in pixels that images are resized to if none is requested; 0: they share one.
    """

    where: Path
    places: Sequence[Path]
    listing: Callable[[], Listing]
    size: int = 0


@dataclass(frozen=True)
class Samples:
    """A data set of several modalities, which is read when it is asked for: whole, or only its shape."""

    read: Callable[[], Dataset]
    shape: Callable[[], Shape]


@dataclass(frozen=True)
class Resource:
    """A file to download: its addresses, its MD5, its path below the data root, and the paths that unpacking gives.

    ``by_hand``: without addresses, what the user has to put at the path.
    """

    urls: tuple[str, ...]
    md5: str
    path: str
    gives: tuple[str, ...]
    by_hand: str = ""


@dataclass(frozen=True)
class DatasetSpec:
    """A data set.

    ``load(config)`` returns the images, in any size and channels: a ``Dataset`` of arrays, or the ``ImageFiles`` to
    decode; or ``Samples`` of several modalities. ``facts``: the constants, in the images' own size and channels; None:
    they are measured. ``resources``: the files to download, in the order in which the loader reads them.
    ``num_train``: the training images, from which a schedule is chosen together with ``facts``; 0: unknown
    (``config.presets.SHAPES`` has those of the data sets that ship).
    """

    load: Callable[[DataConfig], Dataset | ImageFiles | Samples]
    facts: DataFacts | None = None
    resources: tuple[Resource, ...] = ()
    num_train: int = 0

    @property
    def folder(self) -> str:
        """The folder of the first file below the data root; the file if it lies in the root; "" without files."""
        first = next((resource.gives[0] for resource in self.resources), "")
        return first.rpartition("/")[0] or first


def spec_of(name: str) -> DatasetSpec:
    """Return the record of the data set ``name`` (``data.name``): one that ships, PREFIX:PATH, or a plug-in.

    A plug-in, ``module:name`` or ``FILE.py:name``, is a ``DatasetSpec`` or a function ``load(data: DataConfig)``.
    Raises ``RequestError`` for any other name.
    """
    prefix, colon, _ = name.partition(":")
    if not colon and name not in DATASETS:
        known = neighbours(name, [*DATASETS, *(f"{prefix}:PATH" for prefix in DATASET_PREFIXES)])
        raise RequestError(f"data.name = {name}: unknown data set; {known}")
    found = load_object(f"data.name = {name}", DATASET_PREFIXES.get(prefix, name) if colon else DATASETS[name].target)
    if not (callable(found) or isinstance(found, DatasetSpec)):
        raise RequestError(
            f"data.name = {name}: it has the type {type(found).__name__}, neither a function nor a DatasetSpec"
        )
    return DatasetSpec(found) if callable(found) else found


def is_plugin(name: str) -> bool:
    """Return whether the data set ``name`` is loaded by the user's own code."""
    return ":" in name and name.partition(":")[0] not in DATASET_PREFIXES


def folders() -> dict[str, str]:
    """Return the folder, or the first file, of each data set that has files, below the data root."""
    return {name: folder for name in DATASETS if (folder := spec_of(name).folder)}


def with_facts(config: DataConfig, train: ImageSet, test: ImageSet, class_names: tuple[str, ...]) -> Dataset:
    """Return a ``Dataset`` with the constants of ``config.name``'s record."""
    facts = spec_of(config.name).facts
    assert facts is not None
    return Dataset(facts, train, test, class_names, "")


def idx_files(folder: str, mirrors: tuple[str, ...], *md5s: str) -> tuple[Resource, ...]:
    """Return the four files of an MNIST, gzipped at each of ``mirrors``: training images, their labels, the test's."""
    names = (f"{split}-{what}-ubyte" for split in ("train", "t10k") for what in ("images-idx3", "labels-idx1"))
    return tuple(
        Resource(tuple(f"{mirror}{name}.gz" for mirror in mirrors), md5, f"{folder}/{name}.gz", (f"{folder}/{name}",))
        for name, md5 in zip(names, md5s, strict=True)
    )


def archive(url: str, md5: str, folder: str, *names: str) -> tuple[Resource, ...]:
    """Return the one archive at ``url``, which holds ``folder``; the loader reads the files ``names`` in it."""
    return (Resource((url,), md5, url.rpartition("/")[2], tuple(f"{folder}/{name}" for name in names)),)


def plain_file(url: str, md5: str) -> Resource:
    """Return a file that lies below the data root as it is downloaded."""
    name = url.rpartition("/")[2]
    return Resource((url,), md5, name, (name,))
