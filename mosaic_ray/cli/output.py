"""Print the results of a command."""

from __future__ import annotations

import contextlib
import sys
from typing import Any


def print_parts(*parts: Any) -> None:
    """Print tables and lines of text through rich, without markup; long paths are never broken."""
    from rich.console import Console

    console = Console(markup=False, emoji=False, highlight=False)
    for part in parts:
        console.print(part, crop=False, soft_wrap=isinstance(part, str))


def stdout_for_json(as_json: bool) -> contextlib.AbstractContextManager[Any]:
    """Keep standard output for the JSON: with ``as_json`` all other output goes to standard error."""
    return contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext()
