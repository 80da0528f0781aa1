"""Read files and JSON that anybody may have changed: regular files only, with bounds on sizes, nesting and numbers."""

from __future__ import annotations

import json
import os
import re
import stat
from pathlib import Path
from typing import Any, BinaryIO

#: Bytes of the largest JSON text that is read. Manifests of ten thousand clients have 40 MB.
MAX_JSON = 256 << 20
#: Lists and objects that a JSON text may hold.
MAX_CONTAINERS = 4_000_000
_MAX_DIGITS = 100


def kind_of(mode: int) -> str:
    """Return what a file's ``st_mode`` says, in words; empty for a regular file."""
    if stat.S_ISREG(mode):
        return ""
    kinds = {stat.S_IFDIR: "folder", stat.S_IFLNK: "symbolic link", stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket"}
    return f"a {kinds.get(stat.S_IFMT(mode), 'device')}"


def open_regular(path: str | Path, limit: float = float("inf"), follow: bool = False) -> BinaryIO:
    """Open a regular file of up to ``limit`` bytes for reading; it never waits, as opening a pipe would.

    ``OSError`` without a number for anything else, such as a device, and for a symbolic link unless ``follow``.
    """
    kind = kind_of((os.stat if follow else os.lstat)(path).st_mode)
    if kind:
        raise OSError(f"it is {kind}, not a file")
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))  # noqa: SIM115
    if (size := os.fstat(file.fileno()).st_size) > limit:
        file.close()
        raise OSError(f"{size:,} bytes are too many")
    return file


def read_regular(path: str | Path, limit: float = MAX_JSON) -> bytes:
    """Return the content of a regular file; ``OSError`` as in ``open_regular``."""
    with open_regular(path, limit) as file:
        return file.read()


def parse_json(text: bytes | str) -> dict[str, Any]:
    """Return the object in a JSON text; ``ValueError`` with the reason where it holds none, or one without bounds."""
    data = text.encode() if isinstance(text, str) else text
    if len(data) > MAX_JSON or data.count(b"[") + data.count(b"{") > MAX_CONTAINERS:
        raise ValueError("it is too large")
    try:
        found = json.loads(data, parse_int=_whole)
        if re.search(rb"\\u[dD][89a-fA-F]", data):  # half a character cannot be printed
            json.dumps(found, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("it nests too deeply") from None
    if not isinstance(found, dict):
        raise ValueError("it is no object")
    return found


def _whole(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)
