"""Experiments in heterogeneous federated learning, built around Mosaic (arXiv 2505.19699).

For a notebook: ``load_run(path)`` and ``load_sweep(path)`` (``report.api``), loaded when they are asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
__all__ = ["load_run", "load_sweep"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module(f"{__name__}.report.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
