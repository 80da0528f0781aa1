"""Decode images into one array on the disk, over all cores. Decoding processes load only numpy and Pillow.

The work is cut into tasks, plain values that are sent as JSON. Each process writes its images straight into the file of
the array, so that no image passes through a pipe; it also computes the checksums, while the block is in its cache. The
processes are plain children that end with their input, so that none outlives a killed parent, and none loads the
parent's program (as ``multiprocessing`` would), which may lack an ``if __name__ == "__main__"``.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import math
import os
import queue
import subprocess
import sys
import warnings
import zlib
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageOps

from ..core.errors import RequestError
from ..core.machine import num_cpus
from ..core.untrusted import open_regular
from .formats import brief
from .image_ops import tally

#: Images that are written and checked together, at most: 256 of 64x64 in colour.
BLOCK_BYTES = 3 << 20

#: Below so many images, other processes would take longer to start than to help.
_FEW = 512

#: Named formats only: some of Pillow's others start programs.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "PPM")
_GREY = ("1", "L", "LA", "La", "I", "F")
#: The tag of a photograph's orientation, and its values that lay the image on its side.
_ORIENTATION, _SIDEWAYS = 0x0112, (5, 6, 7, 8)

#: What ``plain`` changes in an image beyond its colours, by a word for the report.
CHANGES = {
    "deep": "16-bit grey images are scaled to 8 bits",
    "transparent": "transparent images are drawn on white",
    "turned": "images are turned as their orientation tag says",
}

#: ``{"files": [...]}``, or ``{"parquet": path, "group": row group, "column": name, "start": first row of it, "rows":
#: how many, "row": the first one's number in the file}``; ``run`` adds further inputs of ``work``.
Task = dict[str, Any]


def count(task: Task) -> int:
    """Return the number of images in ``task``."""
    return len(task["files"]) if "files" in task else task["rows"]


def place(task: Task, index: int) -> str:
    """Return the name of image ``index`` of ``task`` for messages."""
    return task["files"][index] if "files" in task else f"{task['parquet']}: image {task['row'] + index}"


def encoded(task: Task) -> Iterator[str | io.BytesIO]:
    """Yield the images of ``task`` as paths or buffers that Pillow opens."""
    if "files" in task:
        yield from task["files"]
        return
    column = row_group(task["parquet"], task["group"], task["column"])
    for content in column.slice(task["start"], task["rows"]):
        yield io.BytesIO(content.as_py() or b"")


@functools.lru_cache(maxsize=1)  # the tasks of one row group follow each other
def row_group(path: str, group: int, column: str) -> Any:
    """Return the encoded images of a row group, pyarrow's binary; cached until the next one or ``cache_clear``."""
    import pyarrow as pa
    from pyarrow import compute, parquet

    try:
        with parquet.ParquetFile(path) as file:
            return compute.struct_field(file.read_row_group(group, columns=[column]).column(0), "bytes")
    except (pa.ArrowException, OSError) as error:
        raise not_parquet(path, error) from error


def not_parquet(path: str | Path, error: Exception) -> RequestError:
    """Return the error for a file that pyarrow cannot read."""
    return RequestError(f"{path} cannot be read as parquet ({brief(error)})")


def block_rows(shape: Sequence[int]) -> int:
    """Return the number of images [C, H, W] in a block."""
    return max(1, BLOCK_BYTES // math.prod(shape))


class WrongSize(Exception):
    """An image has another size than the array's; arguments: its height and width."""


def _opened(source: str | io.BytesIO) -> BinaryIO:
    return open_regular(source, follow=True) if isinstance(source, str) else source


def form(source: str | io.BytesIO) -> tuple[int, int, bool]:
    """Return height, width and whether the image has colours, from its header."""
    with _opened(source) as file, Image.open(file, formats=_FORMATS) as image:
        size = image.size[::-1] if image.getexif().get(_ORIENTATION) in _SIDEWAYS else image.size
        return size[1], size[0], _coloured(image)


def _coloured(image: Image.Image) -> bool:
    return image.mode not in _GREY and not image.mode.startswith("I;16")


def plain(image: Image.Image) -> tuple[Image.Image, list[str]]:
    """Return ``image`` upright, with 8 bits a channel and without transparency, and the ``CHANGES`` that this took.

    16-bit grey values v become round(v / 257), so that 65,535 becomes 255 (Pillow's own conversion saturates at 255).
    Transparent pixels show white. ``ValueError`` for grey values of 32 bits or with a fraction, which have no known
    range.
    """
    changes = []
    if image.getexif().get(_ORIENTATION, 1) != 1:
        image, changes = ImageOps.exif_transpose(image), ["turned"]
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image, np.int64)
        if values.min() < 0 or values.max() > 65_535:
            raise ValueError("grey values of 32 bits have no known range")
        return Image.fromarray(((values + 128) // 257).astype(np.uint8)), [*changes, "deep"]
    if image.mode == "F":
        raise ValueError("grey values with a fraction have no known range")
    if image.has_transparency_data:
        whole = image.convert("RGBA")
        if np.asarray(whole.getchannel("A")).min() < 255:
            grey = not _coloured(image)
            drawn = Image.alpha_composite(Image.new("RGBA", whole.size, "white"), whole).convert("RGB")
            return drawn.convert("L") if grey else drawn, [*changes, "transparent"]
    return image, changes


def draw(source: str | io.BytesIO, shape: Sequence[int], square: bool) -> tuple[bytes, bool, list[str]]:
    """Decode ``source`` to ``shape`` [C, H, W]; return bytes [H, W, C], whether it has colours, and its ``CHANGES``.

    ``square``: the largest square in its middle is resized to that size (bilinear, antialiased); otherwise it must be
    of that size. Grey is replicated, colours become luma (ITU-R 601). Raises nearly anything where it is damaged.
    """
    channels, height, width = shape
    with _opened(source) as file, Image.open(file, formats=_FORMATS) as image:
        coloured, mode = _coloured(image), "RGB" if channels == 3 else "L"
        if square and image.size != (width, height):
            # from the coarsest of a JPEG's own scales that is at least twice the size, as Pillow makes thumbnails
            image.draft(None, (2 * width, 2 * height))
        drawn, changes = plain(image)
        if drawn.size != (width, height) and not square:
            raise WrongSize(drawn.height, drawn.width)
        drawn = drawn if drawn.mode == mode else drawn.convert(mode)
        if drawn.size != (width, height):
            side = min(drawn.size)
            left, top = (drawn.width - side) / 2, (drawn.height - side) / 2
            box = (left, top, left + side, top + side)
            drawn = drawn.resize((width, height), Image.Resampling.BILINEAR, box)
        return drawn.tobytes(), coloured, changes  # half the time of np.asarray


def work(task: Task) -> dict[str, Any]:
    """Decode the images of ``task`` into their rows of its array, and return a summary for the parent.

    ``blocks``, of ``block_rows`` images: the number of decoded images (they lie first), their CRC-32 and, if requested,
    their ``tally``; ``bad``: indices and reasons of images that do not decode; ``wrong_size``: the first other size;
    ``changes``: how many images each of ``CHANGES`` was made to.
    """
    channels, height, width = shape = task["shape"]
    size, rows = math.prod(shape), min(block_rows(shape), count(task))
    found: dict[str, Any] = {"blocks": [], "bad": [], "coloured": False, "wrong_size": None, "changes": {}}
    images = np.empty((rows, height, width, channels), np.uint8)
    buffer, good = images.reshape(-1).data, 0
    with open(task["target"], "r+b") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, about metadata: the user cannot fix them
        for index, source in enumerate(encoded(task)):
            try:
                content, coloured, changes = draw(source, shape, task["square"])
                buffer[good * size : (good + 1) * size] = content
                found["coloured"] |= coloured
                found["changes"] |= {change: found["changes"].get(change, 0) + 1 for change in changes}
                good += 1
            except WrongSize as error:
                found["wrong_size"] = [index, *error.args]
                return found
            except Exception as error:  # Pillow's decoders raise nearly anything on damaged input
                found["bad"].append([index, brief(error).removesuffix(f" {source!r}")])
            if (index + 1) % rows == 0 or index + 1 == count(task):
                block = np.ascontiguousarray(images[:good].transpose(0, 3, 1, 2))
                file.seek(task["offset"] + (task["first"] + index // rows * rows) * size)
                file.write(block.data)
                found["blocks"].append([good, zlib.crc32(block.data), tally(block) if task["tally"] and good else []])
                good = 0
    return found


def run(tasks: list[Task]) -> Generator[dict[str, Any], None, None]:
    """Yield ``work`` of each task in order, over all cores if there are enough images."""
    total = sum(map(count, tasks))
    workers = min(num_cpus(), len(tasks))
    if total < _FEW or workers < 2:
        yield from map(work, tasks)
        return
    with contextlib.ExitStack() as stack:
        free: queue.SimpleQueue[subprocess.Popen[str]] = queue.SimpleQueue()
        for _ in range(workers):
            process = _process()
            stack.callback(_end, process)
            free.put(process)
        threads = stack.enter_context(ThreadPoolExecutor(workers))
        stack.callback(threads.shutdown, cancel_futures=True)
        yield from threads.map(functools.partial(_ask, free), tasks)


def _ask(free: queue.SimpleQueue[subprocess.Popen[str]], task: Task) -> dict[str, Any]:
    """Return ``work`` of ``task`` from one of the ``free`` processes."""
    process = free.get()
    try:
        assert process.stdin and process.stdout
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(json.dumps(task) + "\n")
            process.stdin.flush()
        line = process.stdout.readline()
        if not line:
            images = f"{place(task, 0)} to {place(task, count(task) - 1)}"
            raise RequestError(f"{images}: the process that decodes them ended with status {process.wait()}")
    finally:
        free.put(process)
    answer = json.loads(line)
    if "refused" in answer:
        raise RequestError(answer["refused"])
    if "error" in answer:
        raise OSError(*answer["error"])
    return answer


def _end(process: subprocess.Popen[str]) -> None:
    assert process.stdin and process.stdout
    with contextlib.suppress(BrokenPipeError):  # the process has ended
        process.stdin.close()
    process.stdout.close()
    process.wait()


def _process() -> subprocess.Popen[str]:
    code = f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import serve; serve()"
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        start_new_session=True,  # the parent handles interrupts
    )


def serve() -> None:
    """Run a decoding process: read a task from each line of input, and write an answer on a line."""
    for line in sys.stdin:
        try:
            answer = work(json.loads(line))
        except RequestError as error:
            answer = {"refused": str(error)}
        except OSError as error:  # the array cannot be written
            answer = {"error": [error.errno, error.strerror, error.filename]}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
