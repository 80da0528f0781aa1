"""The few file operations a store needs, on a local disk or on any other storage that ``pyarrow.fs`` opens."""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from pyarrow import fs

#: A temporary file that nobody has written to for so long was left by a writer that was killed.
ABANDONED_SECONDS = 3600.0
_CHUNK = 4 << 20


def reason(error: OSError) -> str:
    """One line for an operating system's or a cloud's error."""
    return os.strerror(error.errno) if error.errno else str(error).splitlines()[0]


def open_uri(uri: str) -> tuple[fs.FileSystem, str]:
    """The file system and the path that ``uri`` means."""
    if "://" in uri:
        filesystem, root = fs.FileSystem.from_uri(uri)
        return filesystem, root
    return fs.LocalFileSystem(), str(Path(uri).expanduser().absolute())


class Files:
    """Files below a root; names are relative to it."""

    def __init__(self, filesystem: fs.FileSystem, root: str) -> None:
        self.filesystem, self.root = filesystem, root.rstrip("/") or "/"
        self.local = isinstance(filesystem, fs.LocalFileSystem)

    def path(self, name: str) -> str:
        return f"{self.root}/{name}"

    def chunks(self, name: str) -> Iterator[bytes]:
        with self.filesystem.open_input_stream(self.path(name)) as source:
            while chunk := source.read(_CHUNK):
                yield chunk

    def read(self, name: str) -> bytes:
        return b"".join(self.chunks(name))

    def put(self, name: str, data: bytes) -> None:
        """``data`` under ``name``: whole or, after an error or a kill, not at all (locally) or known by its hash."""
        target = self.path(name)
        if not self.local:
            self.filesystem.create_dir(target.rpartition("/")[0], recursive=True)
            with self.filesystem.open_output_stream(target) as sink:
                sink.write(data)
            return
        for attempt in (1, 2):
            try:
                write_whole(target, data)
                return
            except FileNotFoundError:  # a neighbour dropped this checkpoint folder in between
                if attempt == 2:
                    raise

    def delete(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.filesystem.delete_file(self.path(name))

    def delete_folder(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.filesystem.delete_dir(self.path(name))

    def names(self, folder: str) -> list[str]:
        try:
            found = self.filesystem.get_file_info(fs.FileSelector(self.path(folder), allow_not_found=True))
        except FileNotFoundError:  # a neighbour made the folder at this very moment, which confuses pyarrow
            return []
        return [info.base_name for info in found]

    def tidy(self, folder: str) -> None:
        """Remove the temporary files that killed writers left in a local ``folder``; a living writer's are younger."""
        if not self.local:
            return  # there nothing is written beside
        for path in Path(self.path(folder)).glob("*.tmp"):
            with contextlib.suppress(OSError):  # gone already, or nothing that can be mended here
                if time.time() - path.stat().st_mtime > ABANDONED_SECONDS:
                    path.unlink()


def write_whole(target: str | Path, data: bytes) -> None:
    """Make the folder, write beside, flush to the disk, rename into place."""
    folder = os.path.dirname(target)
    os.makedirs(folder, exist_ok=True)
    beside = f"{target}.{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp"
    try:
        descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(descriptor, view) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(beside, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(beside)
        raise
    descriptor = os.open(folder, os.O_RDONLY)  # the rename itself must outlive a power cut
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
