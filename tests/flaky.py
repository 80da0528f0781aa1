"""Storage that fails: a file system in front of a local folder, for tests."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
from pyarrow import fs

from mosaic_ray.storage.filesystem import write_whole

T = TypeVar("T")


class Flaky(fs.FileSystemHandler):
    """A seeded ``share`` of all calls fails, those that ``fails(call, path)`` names do, and all while ``down``, which
    ``goes_down(call, path)`` may begin.

    Like object storage it shows a file once its stream is closed without a failure, whole. Half of what fails has been
    done all the same: only the answer is lost. Some errors have numbers, some have the text of pyarrow's S3 errors.
    """

    def __init__(self, folder: Path, share: float = 0.0, seed: int = 0) -> None:
        self.folder, self.share, self.down = folder, share, False
        self.fails: Callable[[str, str], bool] = lambda call, path: False
        self.goes_down: Callable[[str, str], bool] = lambda call, path: False
        self.calls, self.failures = 0, 0
        self._draws = random.Random(seed)
        folder.mkdir(parents=True, exist_ok=True)
        self._behind = fs.SubTreeFileSystem(str(folder), fs.LocalFileSystem())

    def fix(self) -> None:
        """Stop failing."""
        self.share, self.down = 0.0, False
        self.fails = self.goes_down = lambda call, path: False

    def filesystem(self) -> fs.FileSystem:
        return fs.PyFileSystem(self)

    def call(self, name: str, path: str, work: Callable[[], T]) -> T:
        """``work``, or a failure before or after it."""
        self.calls += 1
        self.down = self.down or self.goes_down(name, path)
        lost = self._draws.random() < self.share
        if not (lost or self.down or self.fails(name, path)):
            return work()
        self.failures += 1
        if lost and not self.down and self._draws.random() < 0.5:
            work()
        if self._draws.random() < 0.5:
            raise OSError(errno.ECONNRESET, os.strerror(errno.ECONNRESET), path)
        raise OSError(f"When calling {name} for key '{path}': AWS Error NETWORK_CONNECTION during {name} operation: x")

    def get_type_name(self) -> str:
        return "flaky"

    def normalize_path(self, path: str) -> str:
        return path

    def get_file_info(self, paths: list[str]) -> list[fs.FileInfo]:
        return self.call("HeadObject", paths[0], lambda: self._behind.get_file_info(paths))

    def get_file_info_selector(self, selector: fs.FileSelector) -> list[fs.FileInfo]:
        return self.call("ListObjects", selector.base_dir, lambda: self._behind.get_file_info(selector))

    def create_dir(self, path: str, recursive: bool) -> None:
        self.call("create_dir", path, lambda: self._behind.create_dir(path, recursive=recursive))

    def delete_dir(self, path: str) -> None:
        self.call("delete_dir", path, lambda: self._behind.delete_dir(path))

    def delete_dir_contents(self, path: str, missing_dir_ok: bool) -> None:
        raise NotImplementedError

    delete_root_dir_contents = copy_file = open_input_file = open_append_stream = delete_dir_contents

    def delete_file(self, path: str) -> None:
        self.call("DeleteObject", path, lambda: self._behind.delete_file(path))

    def move(self, source: str, target: str) -> None:
        self.call("move", source, lambda: self._behind.move(source, target))

    def open_input_stream(self, path: str) -> pa.NativeFile:
        data = self.call("open", path, lambda: self._behind.open_input_stream(path).read())
        return pa.PythonFile(_Reader(self, path, data), mode="r")

    def open_output_stream(self, path: str, metadata: Any) -> pa.NativeFile:
        return pa.PythonFile(self.call("CreateMultipartUpload", path, lambda: _Writer(self, path)), mode="w")


class _Reader(io.BytesIO):
    def __init__(self, flaky: Flaky, path: str, data: bytes) -> None:
        super().__init__(data)
        self._flaky, self._path = flaky, path

    def read(self, size: int | None = -1) -> bytes:
        return self._flaky.call("read", self._path, lambda: super(_Reader, self).read(size))


class _Writer(io.RawIOBase):
    def __init__(self, flaky: Flaky, path: str) -> None:
        self._flaky, self._path, self._data, self._broken = flaky, path, bytearray(), False

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        try:
            self._flaky.call("UploadPart", self._path, lambda: self._data.extend(data))
        except OSError:
            self._broken = True
            raise
        return len(data)

    def close(self) -> None:
        if self.closed:
            return
        super().close()
        if self._broken:
            raise OSError("AWS Error NETWORK_CONNECTION: a part could not be uploaded")
        data = bytes(self._data)
        self._flaky.call(
            "CompleteMultipartUpload", self._path, lambda: write_whole(self._flaky.folder / self._path, data)
        )

    def __del__(self) -> None:
        """Close what was left open, as Arrow does. An error is dropped; Python 3.13 would warn of it."""
        with contextlib.suppress(OSError):
            self.close()
