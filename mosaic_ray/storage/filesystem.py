"""File operations of a store, on a local disk or any storage that ``pyarrow.fs`` opens, with retries.

Each operation is retried while its error is transient, such as a network failure or a busy cloud. Pauses grow and have
random jitter, drawn from no seeded stream because it affects no result.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import random
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, TypeVar

from pyarrow import ArrowException, fs

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

    def read(self, name: str) -> bytes:
        """Return the content of a file; a failed read starts over."""
        return self.retry(lambda: b"".join(self._chunks(name)))

    def digest(self, name: str) -> tuple[int, str]:
        """Return a file's size and SHA-256 without holding it in memory; a failed read starts over."""

        def scan() -> tuple[int, str]:
            digest, size = hashlib.sha256(), 0
            for chunk in self._chunks(name):
                digest.update(chunk)
                size += len(chunk)
            return size, digest.hexdigest()

        return self.retry(scan)

    def put(self, name: str, data: bytes) -> None:
        """Write ``data`` to ``name`` atomically: an error or a kill leaves no partial file (disk or object storage)."""
        self.retry(lambda: self._put(self.path(name), data))

    def delete(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.retry(lambda: self.filesystem.delete_file(self.path(name)))

    def delete_folder(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.retry(lambda: self.filesystem.delete_dir(self.path(name)))

    def move(self, folder: str, to: str) -> None:
        try:
            self.retry(lambda: self.filesystem.move(self.path(folder), self.path(to)))
        except FileNotFoundError:  # an earlier attempt moved it although it returned an error
            if not self.names(to):
                raise

    def names(self, folder: str) -> list[str]:
        return [info.base_name for info in self._list(folder, recursive=False)]

    def tree(self, folder: str) -> dict[str, Stored]:
        """Return every file below ``folder`` by its name relative to the root."""
        files = [info for info in self._list(folder, recursive=True) if info.type == fs.FileType.File]
        start = 0 if self.root == "/" else len(self.root) + 1
        return {info.path[start:]: Stored(info.size, (info.mtime_ns or 0) / 1e9) for info in files}

    def exists(self) -> bool:
        """Check whether the root exists."""
        return self.retry(lambda: self.filesystem.get_file_info(self.root)).type != fs.FileType.NotFound

    def remove_abandoned(self, folder: str) -> None:
        """Remove temporary files older than ``ABANDONED_SECONDS`` from a local ``folder``."""
        if not self.local:
            return  # other storage has no temporary files
        for path in Path(self.path(folder)).glob("*.tmp"):
            with contextlib.suppress(OSError):  # removed already, or not removable
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
        except FileNotFoundError:  # the folder was removed meanwhile, or does not exist yet
            if not self.local:
                self.filesystem.create_dir(target.rpartition("/")[0], recursive=True)
            write(target, data)

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
