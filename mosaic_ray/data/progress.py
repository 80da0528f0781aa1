"""Show a progress bar on a terminal, and print warnings."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

from ..core.text import visible


def warn(message: str) -> None:
    """Print a warning of one line on standard error."""
    with contextlib.suppress(OSError):  # nobody reads it
        sys.stderr.write(f"mosaic: warning: {visible(message)}\n")


@contextlib.contextmanager
def bar(title: str, total: int, *, done: int = 0, size: bool = False) -> Iterator[Callable[[int], None]]:
    """Show a bar on standard error during the block, if that is a terminal; yield ``advance(n)``.

    ``size``: the numbers are bytes. ``total`` 0: unknown.
    """
    if not sys.stderr.isatty():
        yield lambda n: None
        return
    from rich import progress as rich
    from rich.console import Console

    counts = (rich.DownloadColumn(), rich.TransferSpeedColumn()) if size else (rich.MofNCompleteColumn(),)
    title_column = rich.TextColumn("{task.description}", markup=False)
    columns = (title_column, rich.BarColumn(), *counts, rich.TimeRemainingColumn())
    with rich.Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(title, total=total or None, completed=done)
        yield lambda n: progress.advance(task, n)
