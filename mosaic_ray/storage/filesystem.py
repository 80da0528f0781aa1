"""The few file operations a store needs, on a local disk or on any other storage that ``pyarrow.fs`` opens.

Each is tried again while its error is one that may pass: a network that stumbles, a cloud that is busy. Pauses grow and
jitter; the jitter has no address as other draws have, for it shows in no result.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import random
import re
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, TypeVar

from pyarrow import ArrowException, fs

from .uri import is_transient, reason

#: A temporary file that nobody has written to for so long was left by a writer that was killed.
ABANDONED_SECONDS = 3600.0
#: How long one operation is tried again; storage that has failed for so long is down.
PATIENCE_SECONDS = 120.0
#: The same before anything has started: what is wrong then is more often the request.
OPENING_SECONDS = 4.0
#: An operation that has been tried for so long is worth a word to the user.
TROUBLE_SECONDS = 5.0
_PAUSES = (0.1, 5.0)  # seconds: the first, the longest
_jitter = random.Random()
_CHUNK = 4 << 20
_MAX_LISTINGS = 10  # so often is a listing made again that neighbours confuse
_TEMPORARY = re.compile(r"\.\d+-[0-9a-f]{8}\.tmp$")

T = TypeVar("T")


class Stored(NamedTuple):
    """A file as a listing has it: bytes, and seconds since 1970 by the storage's clock."""

    size: int
    modified: float


class Files:
    """Files below a root; names are relative to it. Errors are ``OSError``.

    ``log`` is told once of every operation that has been tried again for a while. ``recovered`` is when the last such
    one succeeded (``time.monotonic``).
    """

    def __init__(self, filesystem: fs.FileSystem, root: str, patience: float | None = None) -> None:
        """``patience``: seconds for which an operation is tried again, instead of ``PATIENCE_SECONDS``."""
        self.filesystem, self.root = filesystem, root.rstrip("/") or "/"
        self.local = isinstance(filesystem, fs.LocalFileSystem)
        self.log: Callable[[str], None] = lambda text: None
        self.recovered = -math.inf
        self._patience = patience
        self._down = False

    def path(self, name: str) -> str:
        return f"{self.root}/{name}" if name else self.root

    def retry(self, work: Callable[[], T]) -> T:
        """What ``work`` answers, tried again while its error may pass, for as long as there is patience.

        Once that is used up storage counts as down: until something succeeds again, everything is tried once only, so
        that a run whose storage is gone can end.
        """
        patience = PATIENCE_SECONDS if self._patience is None else self._patience
        started, (pause, longest), reported = time.monotonic(), _PAUSES, False
        while True:
            try:
                found = work()
            except OSError as error:
                spent = time.monotonic() - started
                if not self.is_transient(error):
                    self._down = False  # an answer, if not the one that was wished for
                    raise
                if self._down or spent + pause > patience:
                    self._down = True
                    raise
                if spent > TROUBLE_SECONDS and not reported:
                    reported = True
                    self.log(f"storage fails ({reason(error)}); trying again for up to {patience:.0f} s")
            except ArrowException as error:  # one that pyarrow takes for no file's
                raise OSError(str(error)) from error
            else:
                self._down = False
                if reported:
                    self.recovered = time.monotonic()
                return found
            time.sleep(pause * _jitter.uniform(0.5, 1.0))
            pause = min(2 * pause, longest)

    def is_transient(self, error: OSError) -> bool:
        """Whether the same may succeed in a moment. A disk's passing errors have numbers."""
        return bool(error.errno or not self.local) and is_transient(error)

    def read(self, name: str) -> bytes:
        """All of a file; what fails half way begins again."""
        return self.retry(lambda: b"".join(self._chunks(name)))

    def digest(self, name: str) -> tuple[int, str]:
        """A file's size and SHA-256, without holding it in memory; what fails half way begins again."""

        def scan() -> tuple[int, str]:
            digest, size = hashlib.sha256(), 0
            for chunk in self._chunks(name):
                digest.update(chunk)
                size += len(chunk)
            return size, digest.hexdigest()

        return self.retry(scan)

    def put(self, name: str, data: bytes) -> None:
        """``data`` under ``name``: whole or, after an error or a kill, not at all (locally and in object storage)."""
        self.retry(lambda: self._put(self.path(name), data))

    def delete(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.retry(lambda: self.filesystem.delete_file(self.path(name)))

    def delete_folder(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.retry(lambda: self.filesystem.delete_dir(self.path(name)))

    def move(self, folder: str, to: str) -> None:
        """Rename a folder."""
        try:
            self.retry(lambda: self.filesystem.move(self.path(folder), self.path(to)))
        except FileNotFoundError:  # it was done, though an error came back
            if not self.names(to):
                raise

    def names(self, folder: str) -> list[str]:
        return [info.base_name for info in self._list(folder, recursive=False)]

    def tree(self, folder: str) -> dict[str, Stored]:
        """Every file below ``folder``, by its name relative to the root."""
        files = [info for info in self._list(folder, recursive=True) if info.type == fs.FileType.File]
        start = 0 if self.root == "/" else len(self.root) + 1
        return {info.path[start:]: Stored(info.size, (info.mtime_ns or 0) / 1e9) for info in files}

    def exists(self) -> bool:
        """Whether there is anything at the root."""
        return self.retry(lambda: self.filesystem.get_file_info(self.root)).type != fs.FileType.NotFound

    def remove_abandoned(self, folder: str) -> None:
        """Remove the temporary files that killed writers left in a local ``folder``; a living writer's are younger."""
        if not self.local:
            return  # there nothing is written beside a file
        for path in Path(self.path(folder)).glob("*.tmp"):
            with contextlib.suppress(OSError):  # gone already, or nothing that can be mended here
                if time.time() - path.stat().st_mtime > ABANDONED_SECONDS:
                    path.unlink()

    def _chunks(self, name: str) -> Iterator[bytes]:
        with self.filesystem.open_input_stream(self.path(name)) as source:
            while chunk := source.read(_CHUNK):
                yield chunk

    def _put(self, target: str, data: bytes) -> None:
        write = write_whole if self.local else self._write_elsewhere
        try:
            write(target, data)
        except FileNotFoundError:  # a neighbour dropped this checkpoint folder in between; elsewhere, there is none yet
            if not self.local:
                self.filesystem.create_dir(target.rpartition("/")[0], recursive=True)
            write(target, data)

    def _write_elsewhere(self, target: str, data: bytes) -> None:
        # Object storage shows an object when its stream is closed, and pyarrow closes it after an exception too. So
        # nothing stands between opening and closing but one write of all; where that fails, closing fails as well.
        with self.filesystem.open_output_stream(target) as sink:
            sink.write(data)

    def _list(self, folder: str, recursive: bool) -> list[fs.FileInfo]:
        wanted = fs.FileSelector(self.path(folder), allow_not_found=True, recursive=recursive)
        for _ in range(_MAX_LISTINGS):
            try:
                return self.retry(lambda: self.filesystem.get_file_info(wanted))
            except FileNotFoundError:  # a neighbour made or removed a folder meanwhile, which confuses pyarrow
                continue
        return []


def is_temporary(name: str) -> bool:
    """Whether a file of this name is written beside another, to take its place once it is whole."""
    return bool(_TEMPORARY.search(name))


def write_whole(target: str | Path, data: bytes) -> None:
    """Make the folder, write a temporary file, flush to the disk, rename into place."""
    folder = os.path.dirname(target)
    os.makedirs(folder, exist_ok=True)
    temporary = f"{target}.{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp"
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(descriptor, view) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    descriptor = os.open(folder, os.O_RDONLY)  # the rename itself must outlive a power cut
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
