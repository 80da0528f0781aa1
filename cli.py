"""The ``mosaic`` command for a bare checkout and for ``ray job submit``: ``python cli.py run``."""

from mosaic_ray.cli.commands import main, mosaic

__all__ = ["main", "mosaic"]

if __name__ == "__main__":
    main()
