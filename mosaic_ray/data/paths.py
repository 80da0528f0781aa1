"""Find data sets on the disk. The command line imports this module, so it loads no numpy."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
from collections.abc import Iterator
from pathlib import Path

from ..config.schema import DataConfig
from .progress import warn

#: Folders below the data root: decoded copies of encoded images, and imported data sets.
DECODED, IMPORTED = "decoded", "imported"


def data_root(config: DataConfig) -> Path:
    """Return the folder of all data sets: ``data.root``, else ``$MOSAIC_DATA``, else ``~/.cache/mosaic_ray``."""
    return Path(config.root or os.environ.get("MOSAIC_DATA") or "~/.cache/mosaic_ray").expanduser()


def imported_names(root: Path) -> list[str]:
    """Return the names of the data sets that ``mosaic data import`` has put below ``root``."""
    return sorted(path.name for path in (root / IMPORTED).glob("*") if may_be_imported(path.name))


def may_be_imported(name: str) -> bool:
    """Return whether ``name`` can be a folder's name, and neither a path nor an option."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]{0,99}", name) is not None


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[bool]:
    """Lock ``folder`` against other processes; wait until it is free.

    Yields False if the file system has no locks: then another process may be writing, so do not delete its files.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        locked = True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            warn(f"another process is at work in {folder}; waiting for it")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError:
            locked = False
        yield locked
    finally:
        os.close(descriptor)
