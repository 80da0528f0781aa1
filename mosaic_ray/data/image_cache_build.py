"""Decoded copies, made: the arrays of a data set of encoded images, put where ``copies`` reads them from then on."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
import os
import shutil
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..config.schema import DataConfig
from ..core.errors import RequestError, neighbours
from ..core.types import DataFacts, Dataset
from . import image_decode
from .image_cache import Damaged, flush, read, stamp, write_facts
from .image_ops import moments
from .image_sources import check_classes
from .paths import DECODED, IMPORTED, alone, data_root, imported_names
from .progress import bar, warn
from .specs import ImageFiles, Listing, Part, spec_of

#: Goes into the copies' names: another one when what is written, or how images are decoded, changes.
VERSION = 1
_UNFINISHED = ".unfinished-"
#: Tasks between two flushes to the disk, which then has less to do at the end.
_FLUSH = 16


@dataclass(frozen=True)
class Form:
    """The form of a copy: side and channels in pixels (0: the images' own), whether images that do not decode are left
    out, and the data set's constants (None: mean and standard deviation are measured)."""

    size: int
    channels: int
    skip_bad: bool
    known: DataFacts | None = None


def decoded(config: DataConfig, pictures: ImageFiles) -> Dataset:
    """``pictures`` in the size and channels that ``config`` asks for, from their copy; it is made where there is none.

    Of several processes that miss the same copy, one makes it and the others wait. Where nothing can be written below
    the data root, the arrays last as long as this process.
    """
    fixed = spec_of(config.name).facts
    channels = config.channels or (fixed.channels if fixed else 0)
    form = Form(config.image_size or pictures.size, channels, config.skip_bad, fixed)
    key = [VERSION, str(pictures.where), config.name.partition(":")[0], form.size, form.channels, form.skip_bad]
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    label = "".join(c if c.isalnum() or c in "-_." else "_" for c in pictures.where.name)[:80]
    folder = data_root(config) / DECODED / f"{label}-{digest}"
    with contextlib.suppress(Damaged):
        if (found := read(folder, fixed, pictures.places)) is not None:
            return found
    with contextlib.ExitStack() as stack:
        if not _writable(folder.parent):
            warn(f"{data_root(config)} cannot be written to, so decoded images are not kept; see data.root")
            return _read_back(make(config.name, pictures, form, stack, None), fixed)
        locked = stack.enter_context(alone(folder.parent))
        try:
            if (found := read(folder, fixed, pictures.places)) is not None:
                return found  # made by the process that was waited for
        except Damaged as error:
            warn(f"{error}; its images are decoded afresh")
        if locked:
            _tidy(folder.parent)
        return _read_back(_put(make(config.name, pictures, form, stack, folder.parent), folder), fixed)


def imported(config: DataConfig) -> Dataset:
    """``imported:NAME``: what ``mosaic data import`` has put under that name."""
    root, name = data_root(config), config.name.partition(":")[2]
    if name not in (names := imported_names(root)):
        there = neighbours(name, names) if names else "nothing was"
        raise RequestError(f"data.name = {config.name}: not imported to {root}; {there}")
    try:
        return read(root / IMPORTED / name, None)
    except Damaged as error:
        raise RequestError(f"data.name = {config.name}: {error}; remove that and import it again") from error


def import_as(name: str, config: DataConfig) -> Path:
    """Puts a decoded copy of ``config`` (``folder:`` or ``parquet:``) where ``imported:name`` looks for it."""
    folder = data_root(config) / IMPORTED / name
    if not _writable(folder.parent):
        raise RequestError(f"data.root = {data_root(config)}: {folder.parent} cannot be written to")
    with contextlib.ExitStack() as stack:
        if stack.enter_context(alone(folder.parent)):
            _tidy(folder.parent)
        if folder.exists():
            raise RequestError(f"{name}: imported already; remove {folder} first, or take another name")
        pictures = spec_of(config.name).load(config)
        form = Form(config.image_size, config.channels, config.skip_bad)
        make(config.name, pictures, form, stack, folder.parent).rename(folder)
    return folder


def _read_back(folder: Path, fixed: DataFacts | None) -> Dataset:
    try:
        return read(folder, fixed)
    except Damaged as error:
        raise RequestError(f"{error} as soon as written; is the disk sound?") from error


def _writable(folder: Path) -> bool:
    """Whether ``folder`` may be written to; it is made. What is marked read-only is left alone by root too."""
    try:
        there = next(path for path in (folder, *folder.parents) if path.exists())
        if not os.access(there, os.W_OK) or not there.stat().st_mode & 0o222:
            return False
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return True


def _tidy(parent: Path) -> None:
    """Removes what processes left that were killed; the lock says that no living one is at work."""
    for left in parent.glob(f"{_UNFINISHED}*"):
        shutil.rmtree(left, ignore_errors=True)


def _put(made: Path, folder: Path) -> Path:
    """``made`` in the place of ``folder``, or what another process has put there meanwhile."""
    shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):
        made.rename(folder)
        return folder
    return folder if folder.exists() else made


# ---------------------------------------------------------------- making


def make(name: str, pictures: ImageFiles, form: Form, stack: contextlib.ExitStack, parent: Path | None) -> Path:
    """A copy in a folder below ``parent`` (None: where temporary files go) that ``stack`` removes at its end."""
    stack.callback(image_decode.row_group.cache_clear)  # as large as a file, perhaps
    listing = pictures.listing()
    check_classes(name, listing.train.labels, listing.test.labels, listing.class_names)
    listed = len(listing.train.labels) + len(listing.test.labels)
    images_stamp = stamp(pictures.places, listed)
    shape = _shape(name, listing, form)
    try:
        beside = tempfile.TemporaryDirectory(prefix=_UNFINISHED, dir=parent, ignore_cleanup_errors=True)
        folder = Path(stack.enter_context(beside)) / "copy"
        folder.mkdir()
        facts = _decode(name, folder, listing, form, shape)
        if facts is None:
            facts = _decode(name, folder, listing, form, (3, *shape[1:]))
        assert facts is not None
        facts |= {"name": name, "stamp": images_stamp, "listed": listed, "class_names": listing.class_names}
        write_facts(folder, facts)
    except OSError as error:
        raise RequestError(
            f"data.name = {name}: its decoded images cannot be written to {parent or tempfile.gettempdir()} "
            f"({error.strerror or error}); they take {listed * math.prod(shape) / 1e9:.1f} GB"
        ) from error
    return folder


def _shape(name: str, listing: Listing, form: Form) -> tuple[int, int, int]:
    """[C, H, W] of the arrays: as ``form`` asks, else as the first image that opens has it."""
    if form.size and form.channels:
        return form.channels, form.size, form.size
    for task in (*listing.train.tasks, *listing.test.tasks):
        for source in image_decode.encoded(task):
            try:
                height, width, coloured = image_decode.form(source)
            except Exception:  # Pillow raises nearly anything; then another image must say
                continue
            if not form.size and height != width:
                raise RequestError(f"data.name = {name}: images are {height}x{width}; set data.image_size to a side")
            return form.channels or (3 if coloured else 1), form.size or height, form.size or width
    raise RequestError(f"data.name = {name}: none of its images decodes, such as {image_decode.place(task, 0)}")


def _decode(
    name: str, folder: Path, listing: Listing, form: Form, shape: tuple[int, int, int]
) -> dict[str, Any] | None:
    """Writes the arrays; what ``facts.json`` says of them. None where only the first images were grey, and the
    channels are to be the images' own."""
    measured = form.known is None or shape[0] < form.known.channels
    parts = {"train": listing.train, "test": listing.test}
    common = {"shape": shape, "square": bool(form.size), "tally": measured}
    tasks = [task | common for part, images in parts.items() for task in _placed(folder, part, images, shape)]
    blocks: dict[str, list[list[Any]]] = {part: [] for part in parts}
    kept = {part: np.ones(len(images.labels), bool) for part, images in parts.items()}
    bad: list[str] = []
    reasons: list[str] = []
    coloured = False
    total = sum(map(len, kept.values()))
    with bar(f"decoding {name}", total) as advance, contextlib.closing(image_decode.run(tasks)) as answers:
        for number, (task, answer) in enumerate(zip(tasks, answers, strict=True)):
            if answer["wrong_size"]:
                index, height, width = answer["wrong_size"]
                where = image_decode.place(task, index)
                raise RequestError(
                    f"data.name = {name}: the first image is {shape[1]}x{shape[2]}, {where} is "
                    f"{height}x{width}; set data.image_size to the side that all are to have"
                )
            coloured |= answer["coloured"]
            if coloured and shape[0] == 1 and not form.channels:
                return None
            for index, reason in answer["bad"]:
                bad.append(image_decode.place(task, index))
                reasons.append(reason)
                kept[task["part"]][task["first"] + index] = False
            at = task["first"]
            for block in answer["blocks"]:
                blocks[task["part"]].append([at, *block])
                at += image_decode.block_rows(shape)
            advance(image_decode.count(task))
            if number % _FLUSH == _FLUSH - 1:
                flush(Path(task["target"]))
    if bad and not form.skip_bad:
        others = f", and {len(bad) - 1} other{'s' * (len(bad) > 2)} likewise" if len(bad) > 1 else ""
        raise RequestError(
            f"data.name = {name}: {bad[0]} does not decode ({reasons[0]}){others}; "
            "--skip-bad (data.skip_bad=true) leaves such images out"
        )
    labels = {part: images.labels[kept[part]] for part, images in parts.items()}
    check_classes(name, *labels.values(), listing.class_names)
    facts: dict[str, Any] = {"coloured": coloured, "left_out": len(bad), "left_out_first": bad[:3], "parts": {}}
    for part in parts:
        good = [[count, checksum] for _, count, checksum, _ in blocks[part] if count]
        _close_gaps(folder / f"{part}_images.npy", shape, blocks[part])
        np.save(folder / f"{part}_labels.npy", labels[part])
        flush(folder / f"{part}_labels.npy")
        facts["parts"] |= {
            f"{part}_images": {"shape": [len(labels[part]), *shape], "blocks": good},
            f"{part}_labels": {"shape": [len(labels[part])], "blocks": [[len(labels[part]), zlib.crc32(labels[part])]]},
        }
    if measured:
        facts["mean"], facts["std"] = moments(tally for _, count, _, tally in blocks["train"] if count)
    return facts


def _placed(folder: Path, part: str, images: Part, shape: tuple[int, int, int]) -> list[image_decode.Task]:
    """The tasks of ``images``, each with its place in the file of the array, which is begun."""
    target = folder / f"{part}_images.npy"
    offset = _write_head(target, (len(images.labels), *shape))
    firsts = itertools.accumulate(map(image_decode.count, images.tasks), initial=0)
    return [
        task | {"part": part, "first": first, "target": str(target), "offset": offset}
        for task, first in zip(images.tasks, firsts, strict=False)  # the last sum is the end
    ]


def _write_head(path: Path, shape: tuple[int, ...]) -> int:
    """The head of a ``.npy`` file of uint8; how long it is, which does not depend on the first axis."""
    with open(path, "r+b" if path.exists() else "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        return file.tell()


def _close_gaps(path: Path, shape: tuple[int, int, int], blocks: list[list[Any]]) -> None:
    """Moves blocks up to where images were left out before them."""
    total = sum(count for _, count, *_ in blocks)
    offset, row = _write_head(path, (total, *shape)), math.prod(shape)
    with open(path, "r+b") as file:
        place = 0
        for first, count, *_ in blocks:
            if first != place:
                file.seek(offset + first * row)
                content = file.read(count * row)
                file.seek(offset + place * row)
                file.write(content)
            place += count
        file.truncate(offset + total * row)
    flush(path)
