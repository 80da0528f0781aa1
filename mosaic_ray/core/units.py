"""Format amounts of bytes."""

from __future__ import annotations

GIB = 2**30

_UNITS = {"GiB": GIB, "MiB": 2**20, "KiB": 2**10}


def size(num_bytes: float, unit: str | None = None) -> str:
    """Format bytes in the largest binary unit that they fill, or in ``unit`` (GiB, MiB, KiB): ``18.6 MiB``."""
    unit = unit or next((name for name, scale in _UNITS.items() if num_bytes >= scale), None)
    return f"{num_bytes / _UNITS[unit]:,.1f} {unit}" if unit else f"{num_bytes:,.0f} B"
