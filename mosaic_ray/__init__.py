"""Experiments in heterogeneous federated learning, built around Mosaic (arXiv 2505.19699).

From Python (``api``): ``run``, ``sweep``, ``compare``, ``configure``, ``Callback``; for what is stored ``load_run``,
``load_sweep`` and ``load_model``. Each is loaded when it is asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
__all__ = [
    "Callback", "Config", "RequestError", "Run", "RunError", "Sweep", "compare", "configure", "load_model", "load_run",
    "load_sweep", "run", "sweep",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module(f"{__name__}.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
