"""The ``mosaic`` command; ``main`` is the console script."""

import sys

try:
    from .commands import main, mosaic
except KeyboardInterrupt:  # Ctrl-C while modules are read
    sys.stderr.write("mosaic: interrupted\n")
    raise SystemExit(130) from None

__all__ = ["main", "mosaic"]
