"""The ``mosaic`` command; ``main`` is the console script."""

from .commands import main, mosaic

__all__ = ["main", "mosaic"]
