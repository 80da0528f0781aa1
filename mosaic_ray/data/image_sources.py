"""Data sets of encoded images: their files in order, and the class of each. Loaders and records."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..config.schema import DataConfig
from ..core.errors import RequestError
from ..core.types import DataFacts
from ..core.untrusted import open_regular
from .download import needed
from .formats import image_columns
from .image_decode import Task, not_parquet
from .paths import data_root
from .specs import CIFAR100_MEAN_STD, DatasetSpec, ImageFiles, Listing, Part, archive

#: Images in one task of a decoding process.
_TASK = 512
_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".ppm", ".pgm")


def _of_files(paths: list[Path], labels: Sequence[int]) -> Part:
    starts = range(0, len(paths), _TASK)
    return Part([{"files": [*map(str, paths[at : at + _TASK])]} for at in starts], np.array(labels, np.int64))


def _of_folders(folders: Iterable[Path]) -> Part:
    """Return the images of ``folders``, sorted by name; each folder is a class. ``RequestError`` if one has none."""
    paths: list[Path] = []
    labels: list[int] = []
    for number, folder in enumerate(folders):
        try:
            entries = [*os.scandir(folder)]
            names = [entry.name for entry in entries]
            strange = next((e.path for e in entries if not (e.is_file() or e.is_dir() or e.is_symlink())), None)
        except OSError as error:
            raise RequestError(f"{folder} cannot be read ({error.strerror})") from error
        found = sorted(n for n in names if n.lower().endswith(_SUFFIXES) and not n.startswith("."))
        if strange:
            raise RequestError(f"{strange} is a pipe or a device, not an image; remove it")
        if not found:
            raise RequestError(f"{folder} holds no images; it takes files of {', '.join(_SUFFIXES)}")
        paths += [folder / name for name in found]
        labels += [number] * len(found)
    return _of_files(paths, labels)


def _lines(path: Path) -> list[str]:
    try:
        with open_regular(path, follow=True) as file:
            return file.read().decode().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{path} cannot be read ({error})") from error


def _label(classes: dict[str, int], name: str, path: Path) -> int:
    if name not in classes:
        raise RequestError(f'{path} names the class "{name}", which the training images have not')
    return classes[name]


def check_classes(name: str, train: np.ndarray, test: np.ndarray, class_names: Sequence[str]) -> None:
    """Raise ``RequestError`` if a part is empty, if train has one class, or if test has classes that train lacks."""
    for part, labels in (("train", train), ("test", test)):
        if not len(labels):
            raise RequestError(f"data.name = {name}: {part} holds no images")
    there = np.unique(train)
    if len(there) < 2:
        raise RequestError(f"data.name = {name}: train holds one class, {class_names[there[0]]}; it takes two or more")
    strange = sorted({*test.tolist()} - {*there.tolist()})
    if strange:
        words = ", ".join(class_names[c] if c < len(class_names) else str(c) for c in strange[:10])
        raise RequestError(f"data.name = {name}: test holds classes that train has not: {words}")


def tiny_imagenet(config: DataConfig) -> ImageFiles:
    """List ``wnids.txt``, ``words.txt``, ``train/<wnid>/images``, ``val/val_annotations.txt`` and ``val/images``.

    Classes are in the order of their wnids. The test set is ``val``: the labels of ``test`` were never published.
    """
    wnids_path, annotations = needed(config)
    base = wnids_path.parent
    wnids = sorted({line.strip() for line in _lines(wnids_path)} - {""})
    folders = [base / "train" / wnid / "images" for wnid in wnids]

    def listing() -> Listing:
        classes = {wnid: c for c, wnid in enumerate(wnids)}
        rows = [line.split("\t") for line in _lines(annotations) if line.strip()]
        if any(len(row) < 2 for row in rows):
            raise RequestError(f"{annotations}: a line has no class; it takes FILE, a tab, WNID; fetch it again")
        labels = [_label(classes, row[1].strip(), annotations) for row in rows]
        test = _of_files([base / "val" / "images" / row[0] for row in rows], labels)
        words_path = base / "words.txt"
        words = dict(line.split("\t", 1) for line in _lines(words_path) if "\t" in line) if words_path.exists() else {}
        names = tuple(words.get(wnid, wnid).split(",")[0].strip() for wnid in wnids)
        return Listing(_of_folders(folders), test, names)

    return ImageFiles(
        base, (wnids_path, base / "words.txt", annotations, base / "val" / "images", *folders), listing, 64
    )


def food101(config: DataConfig) -> ImageFiles:
    """List ``images/<class>/*.jpg`` by ``meta/{train,test}.json`` or ``.txt``; classes in order of their names."""
    meta, images = needed(config)
    both = ([p for p in (meta / f"{s}.json", meta / f"{s}.txt") if p.exists()] for s in ("train", "test"))
    lists = [found[0] for found in both if found]
    if len(lists) < 2:
        raise RequestError(f"data.name = {config.name}: no lists train and test (.json or .txt) in {meta}")

    def names_in(path: Path) -> list[str]:
        """Entries such as ``apple_pie/1005649``."""
        lines = _lines(path)
        try:
            found = lines if path.suffix == ".txt" else [*itertools.chain(*json.loads("".join(lines)).values())]
            if all(name.partition("/")[2] for name in found):
                return found
        except (ValueError, AttributeError, TypeError):  # no JSON, or some of another form
            pass
        raise RequestError(f"{path} is no list of CLASS/IMAGE; fetch it again")

    def listing() -> Listing:
        train, test = ([(name.partition("/")[0], name) for name in names_in(path)] for path in lists)
        classes = {word: c for c, word in enumerate(sorted({word for word, _ in train}))}
        parts = []
        for path, rows in zip(lists, (train, test), strict=True):
            labels = [_label(classes, word, path) for word, _ in rows]
            parts.append(_of_files([images / f"{name}.jpg" for _, name in rows], labels))
        return Listing(parts[0], parts[1], tuple(classes))

    folders = sorted(path for path in images.iterdir() if path.is_dir())
    return ImageFiles(meta.parent, (*lists, *folders), listing, 64)


def given_folder(config: DataConfig) -> Path:
    """Return the folder of ``folder:PATH`` or ``parquet:PATH``, below the working directory or the data root."""
    given = Path(config.name.partition(":")[2]).expanduser()
    folder = next((path for path in (given, data_root(config) / given) if path.is_dir()), None)
    if folder is None:
        raise RequestError(f"data.name = {config.name}: no folder {given}, nor {data_root(config) / given}")
    return folder.resolve()


def folder(config: DataConfig) -> ImageFiles:
    """List ``folder:PATH``: ``train/<class>/*`` and ``test/<class>/*``. Classes are in order of their names."""
    base = given_folder(config)

    def classes_of(split: str) -> dict[str, Path]:
        if not (base / split).is_dir():
            raise RequestError(f"data.name = {config.name}: no folder {base / split}; it takes {split}/<class>/*")
        folders = [path for path in (base / split).iterdir() if path.is_dir() and not path.name.startswith(".")]
        if not folders:
            raise RequestError(f"data.name = {config.name}: no images in {base / split}; it takes <class>/* there")
        return {path.name: path for path in sorted(folders)}

    train, test = classes_of("train"), classes_of("test")

    def listing() -> Listing:
        names = [*train, *(name for name in test if name not in train)]
        numbers = np.array([names.index(name) for name in test])  # as in train, where there may be more
        check_classes(config.name, np.arange(len(train)), numbers, names)
        asked = _of_folders(test.values())
        return Listing(_of_folders(train.values()), Part(asked.tasks, numbers[asked.labels]), (*train,))

    return ImageFiles(base, (*train.values(), *test.values()), listing)


def parquet_files(config: DataConfig, base: Path) -> ImageFiles:
    """List ``train*.parquet`` and ``test*.parquet`` in the folder ``base``."""
    files = parquet_splits(config, base)

    def listing() -> Listing:
        (train, names), (test, _) = (_of_parquet(paths, config) for paths in files.values())
        return Listing(train, test, classes_named(config.name, train.labels, names), tuple(files["train"]))

    return ImageFiles(base, [path for paths in files.values() for path in paths], listing)


def parquet_splits(config: DataConfig, base: Path) -> dict[str, list[Path]]:
    """Return the parquet files of train and test in the folder ``base``; ``RequestError`` without one of each."""
    files = {split: sorted(base.glob(f"{split}*.parquet")) for split in ("train", "test")}
    for split, paths in files.items():
        if not paths:
            raise RequestError(f"data.name = {config.name}: no {split}*.parquet in {base}")
    return files


def classes_named(name: str, labels: np.ndarray, names: tuple[str, ...]) -> tuple[str, ...]:
    """Return the class names of the training ``labels``: ``names``, the file's, or numbers where it names too few.

    ``RequestError`` where most numbers below the highest label have no image, unless the file names them.
    """
    highest, there = int(labels.max()), len(np.unique(labels))
    if highest >= max(len(names), 2 * there):
        raise RequestError(
            f"data.name = {name}: labels go up to {highest}, and only {there} of these numbers occur; number the "
            f"classes from 0 to {there - 1}"
        )
    return names if len(names) > highest else tuple(map(str, range(highest + 1)))


def _of_parquet(paths: list[Path], config: DataConfig) -> tuple[Part, tuple[str, ...]]:
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile

    tasks: list[Task] = []
    labels: list[np.ndarray] = [np.zeros(0, np.int64)]
    names: tuple[str, ...] = ()
    for path in paths:
        try:
            with open_regular(path, follow=True) as opened, ParquetFile(opened) as file:
                image, label, names = image_columns(file.schema_arrow, path, config.image_column, config.label_column)
                column, row = file.read(columns=[label]).column(0), 0
                for group in range(file.num_row_groups):
                    size = file.metadata.row_group(group).num_rows
                    of_group = {"parquet": str(path), "group": group, "column": image}
                    tasks += [
                        of_group | {"start": start, "rows": min(_TASK, size - start), "row": row + start}
                        for start in range(0, size, _TASK)
                    ]
                    row += size
        except (pa.ArrowException, OSError) as error:
            raise not_parquet(path, error) from error
        labels.append(whole_labels(path, label, column))
    return Part(tasks, joined_labels(paths[0], labels)), names


def whole_labels(path: Path, name: str, column: Any) -> np.ndarray:
    """Return a pyarrow ``column`` of labels as int64 [n]; ``RequestError`` where it has empty places."""
    if column.null_count:
        raise RequestError(f'{path}: column "{name}" has empty places')
    found: np.ndarray = np.asarray(column).astype(np.int64)
    return found


def joined_labels(path: Path, labels: Sequence[np.ndarray]) -> np.ndarray:
    """Return the labels of a split in one array; ``RequestError`` where there is none, or one is below 0."""
    flat = np.concatenate(labels)
    if not len(flat):
        raise RequestError(f"{path} holds no images")
    if flat.min() < 0:
        raise RequestError(f"{path}: a label is {flat.min()}; labels must be 0 or above")
    return flat


# The constants are the authors': ImageNet's for Tiny-ImageNet, CIFAR-100's for Food-101.
TINY_IMAGENET = DatasetSpec(
    tiny_imagenet,
    DataFacts("tiny_imagenet", 200, 3, 64, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), ("crop", "flip")),
    archive(
        "http://cs231n.stanford.edu/tiny-imagenet-200.zip", "90528d7ca1a48142e341f4ef8d21d0de",
        "tiny-imagenet-200", "wnids.txt", "val/val_annotations.txt",
    ),
)  # fmt: skip

FOOD101 = DatasetSpec(
    food101, DataFacts("food101", 101, 3, 64, *CIFAR100_MEAN_STD, ("crop", "flip")),
    archive(
        "http://data.vision.ee.ethz.ch/cvl/food-101.tar.gz", "85eeb15f3717b99a5da872d97d918f87",
        "food-101", "meta", "images",
    ),
)  # fmt: skip
