"""Decode a data set of encoded images into the arrays that ``image_cache`` reads."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
import tempfile
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from ..config.schema import DataConfig
from ..core.errors import RequestError, neighbours
from ..core.types import DataFacts, Dataset
from . import image_decode
from .groups import write_columns
from .image_cache import Damaged, flush, read, stamp, write_facts
from .image_ops import mean_std
from .image_sources import check_classes
from .paths import DECODED, IMPORTED, data_root, imported_names, lock_folder
from .progress import bar, warn
from .specs import ImageFiles, Listing, spec_of

#: Part of the copies' names; raise it when the format of copies or the decoding changes.
VERSION = 3
_UNFINISHED = ".unfinished-"
#: Tasks between two flushes to the disk, which shorten the last one.
_FLUSH = 16


def decoded(config: DataConfig, images: ImageFiles) -> Dataset:
    """Return ``images`` in the size and channels of ``config``, from their decoded copy, which is made if needed.

    If several processes need the same copy, one makes it and the others wait. If the data root is not writable, the
    arrays last as long as this process.
    """
    fixed = spec_of(config.name).facts
    channels = config.channels or (fixed.channels if fixed else 0)
    config = replace(config, image_size=config.image_size or images.size, channels=channels)
    key = [VERSION, str(images.where), config.name.partition(":")[0], config.image_size, channels, config.skip_bad]
    key += [config.image_column, config.label_column]
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    label = "".join(c if c.isalnum() or c in "-_." else "_" for c in images.where.name)[:80]
    folder = data_root(config) / DECODED / f"{label}-{digest}"
    with contextlib.suppress(Damaged):
        if (found := read(folder, fixed, images.places)) is not None:
            return found
    with contextlib.ExitStack() as stack:
        if _writable(folder.parent):
            _lock(folder.parent, stack)
            try:
                if (found := read(folder, fixed, images.places)) is not None:
                    return found  # another process has made it meanwhile
            except Damaged as error:
                warn(f"{error}; its images are decoded afresh")
            made = build_cache(config, images, fixed, stack, folder.parent)
            shutil.rmtree(folder, ignore_errors=True)
            with contextlib.suppress(OSError):
                made.rename(folder)
            made = folder if folder.exists() else made  # another process may have put it there meanwhile
        else:
            warn(f"{data_root(config)} cannot be written to, so decoded images are not kept; see data.root")
            made = build_cache(config, images, fixed, stack, None)
        try:
            found = cast(Dataset, read(made, fixed))
            return found if made == folder else replace(found, copy="")  # the temporary folder goes
        except Damaged as error:
            raise RequestError(f"{error} as soon as written; is the disk sound?") from error


def imported(config: DataConfig) -> Dataset:
    """Return ``imported:NAME``, a data set of ``mosaic data import``; ``RequestError`` if it is missing or damaged."""
    root, name = data_root(config), config.name.partition(":")[2]
    if name not in (names := imported_names(root)):
        there = neighbours(name, names) if names else "nothing was"
        raise RequestError(f"data.name = {config.name}: not imported to {root}; {there}")
    try:
        return cast(Dataset, read(root / IMPORTED / name, None))  # None only if it is compared with other files
    except Damaged as error:
        raise RequestError(f"data.name = {config.name}: {error}; remove that and import it again") from error


def import_as(name: str, config: DataConfig) -> Path:
    """Decode ``config`` (``folder:`` or ``parquet:``) into the copy that ``imported:name`` reads; return its folder."""
    folder = data_root(config) / IMPORTED / name
    if not _writable(folder.parent):
        raise RequestError(f"data.root = {data_root(config)}: {folder.parent} cannot be written to")
    with contextlib.ExitStack() as stack:
        _lock(folder.parent, stack)
        if folder.exists():
            raise RequestError(f"{name}: imported already; remove {folder} first, or take another name")
        images = cast(ImageFiles, spec_of(config.name).load(config))
        build_cache(config, images, None, stack, folder.parent).rename(folder)
    return folder


def _writable(folder: Path) -> bool:
    """Make ``folder`` and return whether it is writable. root too respects a read-only mark."""
    try:
        there = next(path for path in (folder, *folder.parents) if path.exists())
        if not os.access(there, os.W_OK) or not there.stat().st_mode & 0o222:
            return False
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return True


def _lock(parent: Path, stack: contextlib.ExitStack) -> None:
    """Lock ``parent`` until ``stack`` closes; remove the unfinished copies of killed processes."""
    if stack.enter_context(lock_folder(parent)):  # excludes living ones
        for left in parent.glob(f"{_UNFINISHED}*"):
            shutil.rmtree(left, ignore_errors=True)


def build_cache(
    config: DataConfig, images: ImageFiles, known: DataFacts | None, stack: contextlib.ExitStack, parent: Path | None
) -> Path:
    """Decode ``images`` into a new folder below ``parent`` (None: the temporary folder), which ``stack`` removes.

    Size or channels 0 in ``config``: the images' own. ``known``: the data set's constants; None: they are measured.
    """
    name = config.name
    stack.callback(image_decode.row_group.cache_clear)  # it may be as large as a file
    listing = images.listing()
    check_classes(name, listing.train.labels, listing.test.labels, listing.class_names)
    listed = len(listing.train.labels) + len(listing.test.labels)
    images_stamp = stamp(images.places, listed)
    shape = _shape(config, listing)
    try:
        beside = tempfile.TemporaryDirectory(prefix=_UNFINISHED, dir=parent, ignore_cleanup_errors=True)
        folder = Path(stack.enter_context(beside)) / "copy"
        folder.mkdir()
        facts = _decode(config, folder, listing, known, shape)
        if facts is None:
            facts = _decode(config, folder, listing, known, (3, *shape[1:]))
        assert facts is not None
        kept = facts.pop("kept")
        if listing.tables:
            facts["columns"] = write_columns(folder, listing.tables, kept)
        facts |= {"name": name, "stamp": images_stamp, "listed": listed, "class_names": listing.class_names}
        write_facts(folder, facts)
    except OSError as error:
        raise RequestError(
            f"data.name = {name}: its decoded images cannot be written to {parent or tempfile.gettempdir()} "
            f"({error.strerror or error}); they take {listed * math.prod(shape) / 1e9:.1f} GB"
        ) from error
    return folder


def _shape(config: DataConfig, listing: Listing) -> tuple[int, int, int]:
    """Return the arrays' [C, H, W]: from ``config``, or from the first image that opens."""
    name, size, channels = config.name, config.image_size, config.channels
    if size and channels:
        return channels, size, size
    height, width, coloured = first_form(name, listing)
    if not size and height != width:
        raise RequestError(f"data.name = {name}: images are {height}x{width}; set data.image_size to a side")
    return channels or (3 if coloured else 1), size or height, size or width


def first_form(name: str, listing: Listing) -> tuple[int, int, bool]:
    """Return height, width and whether it has colours, from the header of the first image that opens."""
    tasks = (*listing.train.tasks, *listing.test.tasks)
    for task in tasks:
        for source in image_decode.encoded(task):
            with contextlib.suppress(Exception):  # Pillow raises nearly anything; try the next image
                return image_decode.form(source)
    raise RequestError(f"data.name = {name}: none of its images decodes, such as {image_decode.place(tasks[-1], 0)}")


def _decode(
    config: DataConfig, folder: Path, listing: Listing, known: DataFacts | None, shape: tuple[int, int, int]
) -> dict[str, Any] | None:
    """Write the arrays and return their facts; None if channels are the images' own and only the first are grey."""
    name, measured = config.name, known is None or shape[0] < known.channels
    parts = {"train": listing.train, "test": listing.test}
    tasks: list[image_decode.Task] = []
    for part, images in parts.items():
        target, first = folder / f"{part}_images.npy", 0
        offset = _write_head(target, (len(images.labels), *shape))
        common = {"shape": shape, "square": bool(config.image_size), "tally": measured}
        for task in images.tasks:
            tasks.append(task | common | {"part": part, "first": first, "target": str(target), "offset": offset})
            first += image_decode.count(task)
    blocks: dict[str, list[list[Any]]] = {part: [] for part in parts}
    kept = {part: np.ones(len(images.labels), bool) for part, images in parts.items()}
    bad: list[tuple[str, str]] = []  # name and reason
    coloured, changes = False, dict.fromkeys(image_decode.CHANGES, 0)
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
            if coloured and shape[0] == 1 and not config.channels:
                return None
            for change, number_of in answer["changes"].items():
                changes[change] += number_of
            for index, reason in answer["bad"]:
                bad.append((image_decode.place(task, index), reason))
                kept[task["part"]][task["first"] + index] = False
            at = task["first"]
            for block in answer["blocks"]:
                blocks[task["part"]].append([at, *block])
                at += image_decode.block_rows(shape)
            advance(image_decode.count(task))
            if number % _FLUSH == _FLUSH - 1:
                flush(Path(task["target"]))
    if bad and not config.skip_bad:
        others = f", and {len(bad) - 1} other{'s' * (len(bad) > 2)} likewise" if len(bad) > 1 else ""
        raise RequestError(
            f"data.name = {name}: {bad[0][0]} does not decode ({bad[0][1]}){others}; "
            "--skip-bad (data.skip_bad=true) leaves such images out"
        )
    labels = {part: images.labels[kept[part]] for part, images in parts.items()}
    check_classes(name, labels["train"], labels["test"], listing.class_names)
    shown = [name for name, _ in bad[:3]]
    facts: dict[str, Any] = {"coloured": coloured, "left_out": len(bad), "left_out_first": shown, "parts": {}}
    facts |= {"changes": changes, "kept": kept["train"]}
    for part in parts:
        good = [[count, checksum] for _, count, checksum, _ in blocks[part] if count]
        _close_gaps(folder / f"{part}_images.npy", shape, blocks[part])
        np.save(folder / f"{part}_labels.npy", labels[part])
        flush(folder / f"{part}_labels.npy")
        rows, checksum = len(labels[part]), zlib.crc32(labels[part].data)
        facts["parts"] |= {
            f"{part}_images": {"shape": [rows, *shape], "blocks": good},
            f"{part}_labels": {"shape": [rows], "blocks": [[rows, checksum]]},
        }
    if measured:
        facts["mean"], facts["std"] = mean_std(tally for _, count, _, tally in blocks["train"] if count)
    return facts


def _write_head(path: Path, shape: tuple[int, ...]) -> int:
    """Write the header of a ``.npy`` file of uint8; return its length, which does not depend on the first axis."""
    with open(path, "r+b" if path.exists() else "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        return file.tell()


def _close_gaps(path: Path, shape: tuple[int, int, int], blocks: list[list[Any]]) -> None:
    """Move blocks forward to close the gaps of images that were left out."""
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
