"""Read decoded copies of encoded images: uint8 arrays below the data root, mapped into memory.

A copy is a folder of four ``.npy`` files and ``facts.json``, which holds a checksum of itself, each file's size and
modification time, and a CRC-32 for every few megabytes (a cryptographic hash would take an eighth of the time of
decoding a small JPEG). Reading gigabytes at each opening would take seconds, so an opening checks the facts, sizes and
times, and ``SPOT_BYTES`` of blocks spread over the array, different ones each time. A copy no larger than that is
checked whole every time; so is one with changed file times. A damaged copy is decoded again. These checksums
make the data set's identity.

A copy is also decoded again when its images have changed: when one of their folders was written to (a file was added,
removed or renamed), or, for up to ``EACH`` images, when any image itself was.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from ..core.machine import num_cpus
from ..core.types import DataFacts, Dataset, ImageSet
from ..core.untrusted import open_regular, parse_json, read_regular
from .formats import brief
from .image_decode import CHANGES
from .progress import warn

SPOT_BYTES = 12 << 20
EACH = 10_000
FACTS = "facts.json"
PARTS = ("train_images", "train_labels", "test_images", "test_labels")


class Damaged(Exception):
    """The files of a copy are not as they were written."""


def read_facts(folder: Path) -> dict[str, Any] | None:
    """Return the content of ``facts.json``; None if it is missing or damaged."""
    try:
        content = parse_json(read_regular(folder / FACTS))
        facts = content["facts"]
        return facts if content["sha256"] == _seal(facts) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def read(folder: Path, fixed: DataFacts | None, places: Sequence[Path] | None = None) -> Dataset | None:
    """Map the copy in ``folder``; None if there is none, or if the images at ``places`` have changed since.

    ``fixed``: the data set's constants, or None. A warning counts the images that were left out. Raises ``Damaged``.
    """
    if not folder.is_dir():
        return None
    facts = read_facts(folder)
    if facts is None:
        raise Damaged(f"{folder / FACTS} is damaged")
    if places is not None and facts["stamp"] != stamp(places, facts["listed"]):
        return None
    with contextlib.suppress(OSError):
        os.utime(folder / FACTS)  # when it was last read, for `mosaic data clean`
    arrays = [_mapped(folder, part, facts["parts"][part]) for part in PARTS]
    if any(_stat(folder, part) != facts["parts"][part]["stat"] for part in PARTS):
        with contextlib.suppress(OSError):  # so that the next opening does not check all blocks
            write_facts(folder, facts)
    if facts["left_out"]:
        others = ", ..." if facts["left_out"] > len(facts["left_out_first"]) else ""
        warn(
            f"{facts['name']}: {facts['left_out']} of {facts['listed']} images do not decode and are left out "
            f"(data.skip_bad): {', '.join(facts['left_out_first'])}{others}"
        )
    for change, number in facts.get("changes", {}).items():
        if number:
            warn(f"{facts['name']}: {number} {CHANGES[change]}")
    mean, std = (facts["mean"], facts["std"]) if "mean" in facts or fixed is None else (fixed.mean, fixed.std)
    colour = fixed.augmentations if fixed else ("crop", "flip") if facts["coloured"] else ()
    content = [[facts["parts"][part][key] for key in ("shape", "blocks")] for part in PARTS]
    names, (_, channels, size, _) = tuple(facts["class_names"]), arrays[0].shape
    return Dataset(
        DataFacts(facts["name"], len(names), channels, size, tuple(mean), tuple(std), colour),
        ImageSet(*arrays[:2]), ImageSet(*arrays[2:]), names, hashlib.sha256(json.dumps(content).encode()).hexdigest(),
        str(folder),
    )  # fmt: skip


def _stat(folder: Path, name: str) -> list[int]:
    stat = (folder / f"{name}.npy").stat()
    return [stat.st_size, stat.st_mtime_ns]


def _mapped(folder: Path, name: str, part: dict[str, Any]) -> np.ndarray:
    """Map an array of the copy; ``Damaged`` if its file or one of the checked blocks is damaged."""
    path = folder / f"{name}.npy"
    try:
        open_regular(path).close()
        # copy on write: the array is writable, as in other data sets, and the file does not change
        array = np.asarray(np.load(path, mmap_mode="c", allow_pickle=False))
        touched = _stat(folder, name) != part["stat"]
    except (OSError, EOFError, ValueError) as error:
        raise Damaged(f"{path} is damaged ({brief(error)})") from error
    dtype = np.uint8 if array.ndim == 4 else np.int64
    if list(array.shape) != part["shape"] or array.dtype != dtype:
        raise Damaged(f"{path} is damaged (its head)")
    ends = np.cumsum([count for count, _ in part["blocks"]])
    step = 1 if touched else min(len(ends), max(1, -(-array.nbytes // SPOT_BYTES)))
    checked = range(time.time_ns() // 1000 % step, len(ends), step)

    def sound(number: int) -> bool:
        count, checksum = part["blocks"][number]
        return zlib.crc32(array[ends[number] - count : ends[number]].data) == checksum

    with ThreadPoolExecutor(num_cpus()) as pool:
        if not all(pool.map(sound, checked)):
            raise Damaged(f"{path} is damaged (a checksum differs)")
    return array


def write_facts(folder: Path, facts: dict[str, Any]) -> None:
    """Write ``facts`` with the files' sizes and times and a checksum, atomically."""
    from ..storage.filesystem import write_whole  # here: `mosaic data` reads without pyarrow

    for part in PARTS:
        facts["parts"][part]["stat"] = _stat(folder, part)
    write_whole(folder / FACTS, json.dumps({"sha256": _seal(facts), "facts": facts}).encode())


def _seal(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def stamp(places: Sequence[Path], listed: int) -> str:
    """Return a digest that changes with the images, as the module's docstring describes."""
    rows: list[list[Any]] = []
    for place in places:
        try:
            stat = place.stat()
            rows.append([str(place), stat.st_mtime_ns])
            if not place.is_dir():
                rows[-1].append(stat.st_size)
            elif listed <= EACH:
                found = ((entry.name, entry.stat()) for entry in os.scandir(place))
                rows += sorted([name, stat.st_mtime_ns, stat.st_size] for name, stat in found)
        except OSError:
            rows.append([str(place), None])
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def flush(path: Path) -> None:
    """Wait until ``path`` is on the disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
