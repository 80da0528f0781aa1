"""File operations of a store, on a local disk or any storage that ``pyarrow.fs`` opens, with retries.

Each operation is retried while its error is transient, such as a network failure or a busy cloud. Pauses grow and have
random jitter, drawn from no seeded stream because it affects no result.

What lies in a local storage is not trusted: only regular files are read, and no symbolic link below the root is
followed, neither to read nor to write nor to delete.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import random
import re
import shutil
import stat
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pyarrow import ArrowException, fs

from ..core.untrusted import MAX_JSON, kind_of, open_regular
from .uri import is_transient, reason

#: Seconds without a write after which a temporary file counts as left by a killed writer.
ABANDONED_SECONDS = 3600.0
#: Seconds for which one operation is retried; storage that fails for longer counts as down.
PATIENCE_SECONDS = 120.0
#: The same while storage is opened, when an error is more often a wrong request.
OPENING_SECONDS = 4.0
#: Seconds after which storage that is opened counts as silent. Clouds' clients have longer timeouts of their own.
ANSWER_SECONDS = 30.0
#: Seconds of retries after which the user gets a message.
TROUBLE_SECONDS = 5.0
_PAUSES = (0.1, 5.0)  # seconds: first and longest pause
_jitter = random.Random()
_CHUNK = 4 << 20
_MAX_LISTINGS = 10  # attempts at a listing that concurrent writers disturb
_MAX_TIME = 250e9  # seconds since 1970 that a date can hold, in any time zone
#: End of the name of a temporary file of ``write_whole``.
TEMPORARY = re.compile(r"\.\d+-[0-9a-f]{8}\.tmp$")

T = TypeVar("T")


class Stored(NamedTuple):
    """A listed file: size in bytes, and time of the last change in seconds since 1970 by the storage's clock."""

    size: int
    modified: float


class Files:
    """Files below a root; names are relative to it. Errors are ``OSError``.

    ``log`` gets one message for every operation that is retried for longer than ``TROUBLE_SECONDS``. ``recovered`` is
    the time at which the last such operation succeeded (``time.monotonic``).
    """

    def __init__(self, filesystem: fs.FileSystem, root: str, patience: float | None = None) -> None:
        """``patience``: seconds for which an operation is retried, by default ``PATIENCE_SECONDS``."""
        self.filesystem, self.root = filesystem, root.rstrip("/") or "/"
        self.local = isinstance(filesystem, fs.LocalFileSystem)
        self.log: Callable[[str], None] = lambda text: None
        self.recovered = -math.inf
        self._patience = patience
        self._down = False

    def path(self, name: str) -> str:
        return f"{self.root}/{name}" if name else self.root

    def retry(self, work: Callable[[], T]) -> T:
        """Return the result of ``work``; retry transient errors until the patience is used up, then raise the last.

        After that storage counts as down: until an operation succeeds again, each is tried only once, so that a run
        can end when its storage is gone.
        """
        patience = PATIENCE_SECONDS if self._patience is None else self._patience
        started, (pause, longest), reported = time.monotonic(), _PAUSES, False
        while True:
            try:
                found = work()
            except OSError as error:
                spent = time.monotonic() - started
                if not self.is_transient(error):
                    self._down = False  # the storage did answer
                    raise
                if self._down or spent + pause > patience:
                    self._down = True
                    raise
                if spent > TROUBLE_SECONDS and not reported:
                    reported = True
                    self.log(f"storage fails ({reason(error)}); trying again for up to {patience:.0f} s")
            except ArrowException as error:  # a file error that pyarrow raises as another type
                raise OSError(str(error)) from error
            else:
                self._down = False
                if reported:
                    self.recovered = time.monotonic()
                return found
            time.sleep(pause * _jitter.uniform(0.5, 1.0))
            pause = min(2 * pause, longest)

    def is_transient(self, error: OSError) -> bool:
        """Check whether a retry may succeed. Transient errors of a local disk always have numbers."""
        return bool(error.errno or not self.local) and is_transient(error)

    def read(self, name: str, limit: float = MAX_JSON) -> bytes:
        """Return the content of a file of up to ``limit`` bytes; a failed read starts over."""
        return self.retry(lambda: b"".join(self._chunks(name, limit)))

    def digest(self, name: str, limit: float) -> tuple[int, str]:
        """Return size and SHA-256 of a file of up to ``limit`` bytes, without holding it; a failed read starts over."""

        def scan() -> tuple[int, str]:
            digest, size = hashlib.sha256(), 0
            for chunk in self._chunks(name, limit):
                digest.update(chunk)
                size += len(chunk)
            return size, digest.hexdigest()

        return self.retry(scan)

    def put(self, name: str, data: bytes) -> None:
        """Write ``data`` to ``name`` atomically: an error or a kill leaves no partial file (disk or object storage)."""
        self.retry(lambda: self._put(name, data))

    def delete(self, name: str) -> None:
        """Remove a file; a folder that has its name is moved aside."""
        work = (lambda: self._make_way(name)) if self.local else lambda: self.filesystem.delete_file(self.path(name))
        with contextlib.suppress(FileNotFoundError):
            self.retry(work)

    def delete_folder(self, name: str) -> None:
        def work() -> None:
            if not self.local:
                self.filesystem.delete_dir(self.path(name))
            elif kind_of(os.lstat(path := self._inside(name)).st_mode) == "a folder":
                shutil.rmtree(path)
            else:
                os.unlink(path)

        with contextlib.suppress(FileNotFoundError):
            self.retry(work)

    def move(self, folder: str, to: str) -> None:
        try:
            self.retry(lambda: self.filesystem.move(self.path(folder), self.path(to)))
        except FileNotFoundError:  # an earlier attempt moved it although it returned an error
            if not self.names(to):
                raise

    def names(self, folder: str) -> list[str]:
        """Return the names in a folder; none where there is no such folder."""
        if self.local:
            return [entry.name for entry in self._entries(folder)]
        return [info.base_name for info in self._list(folder, recursive=False)]

    def regular(self, folder: str) -> list[str]:
        """Return the names of the files in a folder; on a local disk without links, pipes and devices."""
        if self.local:
            return [entry.name for entry in self._entries(folder) if entry.is_file(follow_symlinks=False)]
        return self.names(folder)

    def tree(self, folder: str) -> dict[str, Stored]:
        """Return every regular file below ``folder`` by its name relative to the root."""
        if self.local:
            infos = ((name, info) for name, info in self._walk(folder) if stat.S_ISREG(info.st_mode))
            return {name: Stored(info.st_size, min(info.st_mtime, _MAX_TIME)) for name, info in infos}
        files = [info for info in self._list(folder, recursive=True) if info.type == fs.FileType.File]
        start = 0 if self.root == "/" else len(self.root) + 1
        return {info.path[start:]: Stored(info.size, (info.mtime_ns or 0) / 1e9) for info in files}

    def strange(self, folder: str, levels: float = math.inf) -> dict[str, str]:
        """Return what is neither a folder nor a regular file below a local ``folder``, by name, in words.

        ``levels`` of folders are allowed below it.
        """
        there = ((name, kind_of(info.st_mode)) for name, info in self._walk(folder)) if self.local else ()
        depth = levels + folder.count("/")
        return {n: f"it is {kind}" for n, kind in there if kind and (kind != "a folder" or n.count("/") > depth)}

    def exists(self) -> bool:
        """Check whether the root exists."""
        return self.retry(lambda: self.filesystem.get_file_info(self.root)).type != fs.FileType.NotFound

    def remove_abandoned(self, folder: str) -> None:
        """Remove temporary files older than ``ABANDONED_SECONDS`` from a local ``folder``."""
        if not self.local:
            return  # other storage has no temporary files
        with contextlib.suppress(OSError):  # removed already, or not removable
            for path in Path(self._inside(f"{folder}/")).glob("*.tmp"):
                if time.time() - path.lstat().st_mtime > ABANDONED_SECONDS:
                    path.unlink()

    def _chunks(self, name: str, limit: float) -> Iterator[bytes]:
        source: Any = (
            open_regular(self._inside(name), limit) if self.local
            else self.filesystem.open_input_stream(self.path(name))
        )  # fmt: skip
        size = 0
        with source:
            while chunk := source.read(_CHUNK):
                size += len(chunk)
                if size > limit:
                    raise OSError(f"more than {limit:,} bytes are too many")
                yield chunk

    def _put(self, name: str, data: bytes) -> None:
        target, write = self.path(name), write_whole if self.local else self._write_elsewhere
        if self.local:
            self._make_way(name, replaced=True)
        try:
            write(target, data)
        except FileNotFoundError:  # the folder was removed meanwhile, or does not exist yet
            if not self.local:
                self.filesystem.create_dir(target.rpartition("/")[0], recursive=True)
            write(target, data)

    def _inside(self, name: str) -> str:
        """Return the path of ``name`` in a local storage; ``OSError`` where a folder above it is a symbolic link."""
        for above in self._above(name):
            if os.path.islink(above):
                raise OSError(f"{os.path.relpath(above, self.root)} is a symbolic link")
        return self.path(name)

    def _above(self, name: str) -> list[str]:
        parts = name.split("/")
        return [self.path("/".join(parts[:count])) for count in range(1, len(parts)) if parts[0]]

    def _make_way(self, name: str, replaced: bool = False) -> None:
        """Set anything aside that stands in the place of the file ``name`` or of a folder above it.

        A regular file ``name`` is removed, unless it will be ``replaced``.
        """
        for above in self._above(name):
            with contextlib.suppress(FileNotFoundError):
                if kind_of(os.lstat(above).st_mode) != "a folder":
                    set_aside(above)
        path = self.path(name)
        with contextlib.suppress(FileNotFoundError):
            if kind_of(os.lstat(path).st_mode):
                set_aside(path)
            elif not replaced:
                os.unlink(path)

    def _entries(self, folder: str) -> list[os.DirEntry[str]]:
        def scan() -> list[os.DirEntry[str]]:
            try:
                with os.scandir(self._inside(f"{folder}/")) as entries:
                    return list(entries)
            except FileNotFoundError:
                return []

        return self.retry(scan)

    def _walk(self, folder: str) -> Iterator[tuple[str, os.stat_result]]:
        """Yield everything below a local folder, by name relative to the root."""
        left = [folder]
        while left:
            name = left.pop()
            try:
                entries = self._entries(name)
            except NotADirectoryError:  # a concurrent writer replaced it
                continue
            for entry in entries:
                below = f"{name}/{entry.name}" if name else entry.name
                if entry.is_dir(follow_symlinks=False):
                    left.append(below)
                with contextlib.suppress(FileNotFoundError):  # a concurrent writer removed it
                    yield below, entry.stat(follow_symlinks=False)

    def _write_elsewhere(self, target: str, data: bytes) -> None:
        # An object appears when its stream is closed, and pyarrow also closes it after an exception. So there is one
        # write between opening and closing; if that fails, closing fails too.
        with self.filesystem.open_output_stream(target) as sink:
            sink.write(data)

    def _list(self, folder: str, recursive: bool) -> list[fs.FileInfo]:
        wanted = fs.FileSelector(self.path(folder), allow_not_found=True, recursive=recursive)
        for _ in range(_MAX_LISTINGS):
            try:
                return self.retry(lambda: self.filesystem.get_file_info(wanted))
            except FileNotFoundError:  # a concurrent writer added or removed a folder
                continue
        return []


def answer_of(work: Callable[[], T]) -> T:
    """Return the result of ``work``; ``OSError`` where it has none after ``ANSWER_SECONDS``. It then works on in vain.

    A thread does the work, since nothing can interrupt the client of a cloud.
    """
    results: list[T] = []
    errors: list[Exception] = []

    def try_it() -> None:
        try:
            results.append(work())
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=try_it, daemon=True)
    thread.start()
    thread.join(ANSWER_SECONDS)
    if errors:
        raise errors[0]
    if not results:
        raise OSError(f"no answer within {ANSWER_SECONDS:g} s")
    return results[0]


def set_aside(path: str | Path) -> None:
    """Remove a link, a pipe or a device; rename anything that may have a content."""
    if kind_of(os.lstat(path).st_mode) in ("", "a folder"):
        os.rename(path, f"{path}.damaged-{uuid.uuid4().hex[:8]}")
    else:
        os.unlink(path)


def write_whole(target: str | Path, data: bytes) -> None:
    """Write a local file atomically: create the folder, write and sync a temporary file, rename it into place."""
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
    descriptor = os.open(folder, os.O_RDONLY)  # sync the rename too, against a power cut
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
