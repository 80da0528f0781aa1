"""Show progress in the output of a notebook's cell: one piece of HTML that is replaced. No widgets are needed."""

from __future__ import annotations

import importlib
import io
import math
import sys
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType

#: Characters of a line, and seconds between two pictures.
WIDTH, PAUSE_SECONDS = 100, 0.25

#: The element around the text.
_PRE = '<pre style="white-space: pre; overflow-x: auto; line-height: 1.3">{code}</pre>'


def in_notebook() -> bool:
    """Return whether this process is a notebook's kernel."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return getattr(shell, "kernel", None) is not None


class Cell:
    """The output of the cell that runs: ``show`` replaces what it showed before."""

    def __init__(self) -> None:
        self._handle: Any = None
        self._shown = -math.inf

    def show(self, *parts: RenderableType, at_once: bool = False) -> None:
        """Show ``parts`` below each other; without ``at_once`` a few times a second at most."""
        from rich.console import Console

        if not at_once and time.monotonic() - self._shown < PAUSE_SECONDS:
            return
        self._shown = time.monotonic()
        console = Console(file=io.StringIO(), record=True, width=WIDTH, force_jupyter=False)
        for part in parts:
            console.print(part)
        plain = console.export_text(clear=False)
        data = {"text/html": console.export_html(code_format=_PRE, inline_styles=True), "text/plain": plain}
        if self._handle is None:
            display = importlib.import_module("IPython.display").display  # there is one: see ``in_notebook``
            self._handle = display(data, raw=True, display_id=True)
        else:
            self._handle.update(data, raw=True)
