"""List data sets with their state on the disk, download one, and import one: the work of ``mosaic data``."""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

from ..config.registry import DATASETS
from ..config.schema import DataConfig
from ..core.errors import RequestError, neighbours
from . import hub
from .download import download
from .image_cache import FACTS, read_facts
from .image_cache_build import import_as
from .paths import DECODED, IMPORTED, data_root, imported_names, lock_folder, may_be_imported
from .specs import is_plugin, spec_of


def overview(config: DataConfig) -> dict[str, str]:
    """Return a line of text for every data set: shipped, imported, or decoded from another folder.

    Opens no file but the facts of decoded copies.
    """
    root = data_root(config)
    copies: dict[str, list[str]] = {}
    for path in sorted((root / DECODED).glob(f"*/{FACTS}")):
        if facts := read_facts(path.parent):
            copies.setdefault(facts["name"], []).append(_copy(path.parent))
    rows = {}
    for name, entry in DATASETS.items():
        spec = spec_of(name)
        gives = [root / given for resource in spec.resources for given in resource.gives]
        there = [path for path in gives if path.exists()]
        if there:
            folder = root / spec.folder
            state = size_on_disk([folder] if folder.is_dir() else there) + f" in {spec.folder}" * folder.is_dir()
            state += "" if len(there) == len(gives) else ", incomplete"
        else:
            state = "not there" if gives else "at hand"
        rows[name] = "; ".join([entry.summary, state, *copies.pop(name, [])])
    for name in imported_names(root):
        rows[name] = f"imported; {_copy(root / IMPORTED / name)}"
    return rows | {name: "; ".join(found) for name, found in copies.items()}


def _copy(folder: Path) -> str:
    facts = read_facts(folder)
    if facts is None:
        return f"damaged: {folder}"
    (train, channels, height, width), (test, *_) = (facts["parts"][f"{p}_images"]["shape"] for p in ("train", "test"))
    images = f"{train:,} + {test:,} images of {height}x{width}, {'colour' if channels == 3 else 'grey'}"
    return f"decoded: {images}, {len(facts['class_names'])} classes, {size_on_disk([folder])}"


def size_on_disk(places: list[Path]) -> str:
    """Return the total size of files and folders as text."""
    total = 0
    for place in places:
        inside = (os.path.join(folder, name) for folder, _, names in os.walk(place) for name in names)
        total += sum(os.stat(path).st_size for path in [str(place), *inside] if os.path.isfile(path))
    return f"{total / 1e9:.1f} GB" if total >= 1e9 else f"{total / 1e6:.1f} MB"


def fetch_dataset(name: str, config: DataConfig) -> str:
    """Download the data set ``name`` and return a message. Raise ``RequestError`` for an unknown name."""
    root = data_root(config)
    if name.startswith("hf:"):
        return f"{name}: {'brought to' if hub.fetch(name, root, renew=True) else 'unchanged in'} {root}"
    if name not in DATASETS and not is_plugin(name):
        raise RequestError(f"{name}: no data set to fetch; {neighbours(name, DATASETS)}")
    if not spec_of(name).resources:
        return f"{name} is bundled; there is nothing to fetch"
    came = download(name, root)
    return f"{name}: {', '.join(came)} in {root}" if came else f"{name} is in {root} already"


def clean(config: DataConfig, seconds: float, dry_run: bool = False) -> list[str]:
    """Remove decoded copies that were not read for ``seconds``; return a line about each, and the sum."""
    parent, word = data_root(config) / DECODED, "would remove" if dry_run else "removed"
    if not parent.is_dir():
        return [f"{parent}: no decoded copies"]
    old, lines = [], []
    with lock_folder(parent):
        for folder in sorted(path for path in parent.iterdir() if path.is_dir() and not path.is_symlink()):
            facts = folder / FACTS  # its time is that of the last reading
            if time.time() - (facts if facts.is_file() else folder).stat().st_mtime >= seconds:
                old.append(folder)
                lines.append(f"{word} {folder.name}: {size_on_disk([folder])}")
        lines.append(f"{word} {size_on_disk(old)} in {parent}")
        for folder in [] if dry_run else old:
            shutil.rmtree(folder, ignore_errors=True)
    return lines


def import_dataset(source: str, name: str, config: DataConfig) -> str:
    """Decode ``source``, a folder of images or parquet files, into the data set ``name``; return a message."""
    if name in DATASETS:
        raise RequestError(f"{name}: a data set of its own has that name; take another")
    if not may_be_imported(name):
        raise RequestError(f"{name}: a name has letters, digits, dots, - and _, at most 100 of them")
    base = Path(source).expanduser().resolve()
    kind = "parquet" if any(base.glob("train*.parquet")) else "folder" if (base / "train").is_dir() else None
    if kind is None:
        raise RequestError(
            f"--from {source}: it takes a folder that holds train/<class>/* and test/<class>/*, or train*.parquet and "
            "test*.parquet"
        )
    folder = import_as(name, replace(config, name=f"{kind}:{base}"))
    return f"{name}: {_copy(folder)} in {folder}; --dataset {name} finds it"
