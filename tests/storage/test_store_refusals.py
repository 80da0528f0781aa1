"""Storage that cannot be written, and storage that fills up."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import subprocess
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from storing import KEY, arrays, same

from mosaic_ray.core.errors import RequestError, RunError
from mosaic_ray.storage import filesystem
from mosaic_ray.storage.store import Store


def refused(uri: str) -> str:
    with pytest.raises(RequestError) as caught:
        Store(uri).check_writable()
    line = str(caught.value)
    assert line.startswith(f"--storage {uri}: ") and "\n" not in line
    return line


def test_storage_that_cannot_be_written_is_a_request_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "Not a directory" in refused(str(tmp_path / "file" / "below"))
    refused(str(tmp_path / "file"))
    if Path("/proc/self").exists():
        refused("/proc/mosaic_runs")
    assert "ftp9" in refused("ftp9://host/path")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_storage_without_permission_is_a_request_error(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert "Permission denied" in refused(str(tmp_path / "x"))


def test_check_writable_leaves_nothing(any_store: Store) -> None:
    any_store.check_writable()
    assert any_store.files.names("objects") == []


Usage = namedtuple("Usage", "total used free")


def test_a_nearly_full_disk_is_refused_before_the_run(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1 << 30, 1 << 30, 63 << 20))
    with pytest.raises(RequestError, match=r"full.*63 MiB"):
        store.check_writable()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1 << 30, 0, 65 << 20))
    store.check_writable()


@pytest.mark.parametrize(
    "code, word", [(errno.ENOSPC, "no space left"), (errno.EDQUOT, "no space left"), (errno.EIO, "")]
)
def test_a_disk_that_fills_up_is_a_run_error_and_shows_nothing(
    store: Store, logged: list[str], monkeypatch: pytest.MonkeyPatch, code: int, word: str
) -> None:
    def write(descriptor: int, data: bytes) -> int:
        raise OSError(code, os.strerror(code))

    store.put(KEY, {"n": 1}, {"p": arrays(1.0)})
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", write)
        patch.setattr(filesystem, "PATIENCE_SECONDS", 0.1)  # an error of the device may pass, so it is tried again
        with pytest.raises(RunError, match=f"storage {store.uri}: {word}.*{KEY}") as caught:
            store.put(KEY, {"n": 2}, {"p": arrays(2.0)})
    assert caught.value.stage == "warmup" and "\n" not in str(caught.value)
    got = store.get(KEY)
    assert got is not None and got.facts == {"n": 1} and not logged
    assert not list(Path(store.local_root or "").rglob("*.tmp")), "a full disk is not filled with remains"


def test_a_really_full_disk(tmp_path: Path, logged: list[str]) -> None:
    with small_disk(tmp_path / "disk", "1m") as disk:
        assert "full" in refused(str(disk))
        store = Store(str(disk), log=logged.append)
        store.put("small-1", {"n": 1}, {"p": arrays()})
        with pytest.raises(RunError, match="no space left"):
            store.put(KEY, {}, {"p": {"w": np.zeros(2 << 20, np.uint8)}})
        got = store.get("small-1")
        assert store.get(KEY) is None and got is not None and same(got.load("p"), arrays()) and not logged
        store.put(KEY, {}, {"p": {"w": np.zeros(1 << 19, np.uint8)}})
        assert store.get(KEY) is not None, "the failed attempt freed its space"


@contextlib.contextmanager
def small_disk(path: Path, size: str) -> Iterator[Path]:
    path.mkdir()
    try:
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)]
        mounted = subprocess.run(command, capture_output=True)
    except FileNotFoundError:
        pytest.skip("no mount command")
    if mounted.returncode:
        pytest.skip("may not mount")
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)
