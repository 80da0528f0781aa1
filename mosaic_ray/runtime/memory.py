"""Memory that was freed, given back to the machine: many processes share one."""

from __future__ import annotations

import ctypes


def give_back() -> None:
    """Ask the C library to return freed pages, some milliseconds' work; glibc keeps hundreds of MB of them otherwise.

    Nothing where the C library has no ``malloc_trim`` (macOS, musl).
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
