"""What a person sees of long work on data: a bar on a terminal, warnings anywhere."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator


def warn(message: str) -> None:
    """One line on standard error."""
    sys.stderr.write(f"mosaic: warning: {message}\n")


@contextlib.contextmanager
def bar(title: str, total: int, *, done: int = 0, size: bool = False) -> Iterator[Callable[[int], None]]:
    """A bar on standard error for as long as the block lasts, quiet where that is no terminal.

    Yields ``advance(n)``. ``size``: the numbers are bytes. ``total`` 0: unknown.
    """
    if not sys.stderr.isatty():
        yield lambda n: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )  # fmt: skip

    counts = (DownloadColumn(), TransferSpeedColumn()) if size else (MofNCompleteColumn(),)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), *counts, TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(title, total=total or None, completed=done)
        yield lambda n: progress.advance(task, n)
