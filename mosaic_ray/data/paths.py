"""Where data sets lie on the disk. Light enough for the command line: nothing here loads numpy."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
from collections.abc import Iterator
from pathlib import Path

from ..config.schema import DataConfig
from .progress import warn

#: What is made here, below the data root: decoded copies of encoded images, and data sets under names of the user's.
DECODED, IMPORTED = "decoded", "imported"


def data_root(config: DataConfig) -> Path:
    """Where data sets lie: ``data.root``, else ``$MOSAIC_DATA``, else ``~/.cache/mosaic_ray``."""
    return Path(config.root or os.environ.get("MOSAIC_DATA") or "~/.cache/mosaic_ray").expanduser()


def imported_names(root: Path) -> list[str]:
    """What ``mosaic data import`` has put under ``root``."""
    return sorted(path.name for path in (root / IMPORTED).glob("*") if may_be_imported(path.name))


def may_be_imported(name: str) -> bool:
    """Whether ``name`` can name a folder and no PATH or option."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]{0,99}", name) is not None


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[bool]:
    """The right to change what lies in ``folder``, for one process at a time; the others wait.

    False where the file system has no locks: then two may be at work, and neither may tidy up after the other.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            locked = True
        except BlockingIOError:
            warn(f"another process is at work in {folder}; waiting for it")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            locked = True
        except OSError:
            locked = False
        yield locked
    finally:
        os.close(descriptor)
