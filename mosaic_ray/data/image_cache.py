"""Decoded copies of encoded images: uint8 arrays below the data root, made once and mapped into memory afterwards.

A copy is a folder of four ``.npy`` files and ``facts.json``, which carries a checksum of itself, each file's size and
time of writing, and a CRC-32 for every few megabytes (a cryptographic hash would be an eighth of the time that it takes
to decode a small JPEG). Reading gigabytes at each opening would take seconds, so an opening checks what is cheap: the
facts, sizes and times, and ``SPOT_BYTES`` of blocks spread over the array, other ones each time. A copy no larger than
that is checked whole every time; so is one whose files have other times than they were written at. Whatever is found
damaged is decoded afresh. The data set's identity is made of these checksums.

A copy is also made afresh when its images have changed: when a folder of theirs was written to (something came, went
or was renamed), or, where there are no more than ``EACH`` of them, any image itself.
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

from ..core.types import DataFacts, Dataset, ImageSet
from .formats import brief
from .progress import warn

SPOT_BYTES = 12 << 20
EACH = 10_000
FACTS = "facts.json"
PARTS = ("train_images", "train_labels", "test_images", "test_labels")


class Damaged(Exception):
    """What lies in a copy's folder is not what was written there."""


def read_facts(folder: Path) -> dict[str, Any] | None:
    """What ``facts.json`` says; None where there is none that is whole."""
    try:
        content = json.loads((folder / FACTS).read_text())
        facts = content["facts"]
        return facts if content["sha256"] == _seal(facts) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def read(folder: Path, fixed: DataFacts | None, places: Sequence[Path] | None = None) -> Dataset | None:
    """The copy in ``folder``, mapped; None where there is none, or where images at ``places`` have changed since.

    ``fixed``: the data set's constants, where it has some. Images that were left out are said on standard error.
    """
    if not folder.is_dir():
        return None
    facts = read_facts(folder)
    if facts is None:
        raise Damaged(f"{folder / FACTS} is damaged")
    if places is not None and facts["stamp"] != stamp(places, facts["listed"]):
        return None
    arrays = [_mapped(folder / f"{part}.npy", facts["parts"][part]) for part in PARTS]
    if any(_touched(folder, part, facts) for part in PARTS):
        with contextlib.suppress(OSError):  # so that they are not all checked again
            write_facts(folder, facts)
    if facts["left_out"]:
        others = ", ..." if facts["left_out"] > len(facts["left_out_first"]) else ""
        warn(
            f"{facts['name']}: {facts['left_out']} of {facts['listed']} images do not decode and are left out "
            f"(data.skip_bad): {', '.join(facts['left_out_first'])}{others}"
        )
    mean, std = (facts["mean"], facts["std"]) if "mean" in facts else (fixed.mean, fixed.std)
    colour = fixed.augmentations if fixed else ("crop", "flip") if facts["coloured"] else ()
    content = [[facts["parts"][part][key] for key in ("shape", "blocks")] for part in PARTS]
    names, (_, channels, size, _) = tuple(facts["class_names"]), arrays[0].shape
    return Dataset(
        DataFacts(facts["name"], len(names), channels, size, tuple(mean), tuple(std), colour),
        ImageSet(*arrays[:2]), ImageSet(*arrays[2:]), names, hashlib.sha256(json.dumps(content).encode()).hexdigest(),
    )  # fmt: skip


def _touched(folder: Path, part: str, facts: dict[str, Any]) -> bool:
    stat = (folder / f"{part}.npy").stat()
    return facts["parts"][part]["stat"] != [stat.st_size, stat.st_mtime_ns]


def _mapped(path: Path, part: dict[str, Any]) -> np.ndarray:
    """An array of the copy, mapped rather than read; ``Damaged`` where its file or a block that is looked at is."""
    try:
        # copy on write: as writable as every other data set's arrays, and the file stays as it is
        array = np.asarray(np.load(path, mmap_mode="c", allow_pickle=False))
        stat = path.stat()
    except (OSError, EOFError, ValueError) as error:
        raise Damaged(f"{path} is damaged ({brief(error)})") from error
    dtype = np.uint8 if array.ndim == 4 else np.int64
    if list(array.shape) != part["shape"] or array.dtype != dtype:
        raise Damaged(f"{path} is damaged (its head)")
    ends = np.cumsum([count for count, _ in part["blocks"]])
    step = 1
    if [stat.st_size, stat.st_mtime_ns] == part["stat"]:
        step = min(len(ends), max(1, -(-array.nbytes // SPOT_BYTES)))
    looked_at = range(time.time_ns() // 1000 % step, len(ends), step)

    def sound(number: int) -> bool:
        count, checksum = part["blocks"][number]
        return zlib.crc32(array[ends[number] - count : ends[number]]) == checksum

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        if not all(pool.map(sound, looked_at)):
            raise Damaged(f"{path} is damaged (a checksum differs)")
    return array


# ---------------------------------------------------------------- writing


def write_facts(folder: Path, facts: dict[str, Any]) -> None:
    """``facts`` and the files' sizes and times, sealed with a checksum; whole or not at all."""
    for part in PARTS:
        stat = (folder / f"{part}.npy").stat()
        facts["parts"][part]["stat"] = [stat.st_size, stat.st_mtime_ns]
    beside = folder / f"{FACTS}.{os.getpid()}.tmp"
    beside.write_text(json.dumps({"sha256": _seal(facts), "facts": facts}))
    flush(beside)
    beside.replace(folder / FACTS)


def _seal(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def stamp(places: Sequence[Path], listed: int) -> str:
    """Changes when the images do: see the module's head."""
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
    """Waits until ``path`` is on the disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
