"""Keep freed memory in a process that trains, which needs it again at once; return it when the process is idle."""

from __future__ import annotations

import ctypes


def keep_freed(one_heap: bool = False) -> None:
    """Make this process keep up to 256 MB that it freed.

    A training step frees and asks for the same buffers; glibc gives them to the kernel, which zeroes them in between:
    up to a fifth of a small network's time. Nothing where the C library has no ``mallopt`` (macOS).
    ``one_heap``: threads that start from now on use the heap that this concerns, and none of their own.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-3, 32 << 20)  # malloc.h's M_MMAP_THRESHOLD, at its largest: smaller blocks come from the heap
        mallopt(-1, 256 << 20)  # M_TRIM_THRESHOLD: up to so much may stay free at the heap's end
        if one_heap:
            mallopt(-8, 1)  # M_ARENA_MAX


def give_back() -> None:
    """Ask the C library to return freed pages, some milliseconds' work; glibc keeps hundreds of MB of them otherwise.

    Nothing where the C library has no ``malloc_trim`` (macOS, musl).
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
