"""``python -m mosaic_ray`` is the ``mosaic`` command."""

from __future__ import annotations

from .cli.commands import main

if __name__ == "__main__":
    main()
