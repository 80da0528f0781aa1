"""Write the report: one HTML file without scripts that loads no other file.

The same input files give the same bytes.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any, BinaryIO

from jinja2 import Environment, StrictUndefined

from ... import __version__
from ...core.errors import RequestError
from ...core.text import visible
from ...runs.listing import lease_of, living
from ...storage.filesystem import write_whole
from ...storage.store import OBJECTS, Store
from ...storage.uri import reason
from ..figures.style import PALETTE
from ..load import find, read_run, read_sweep
from .blocks import FILE


def write_report(path: str | Path, out: str | Path | None = None, refresh: int = 0) -> Path:
    """Write the report of the run, trial or sweep at ``path`` into its folder or the file ``out``; return the file.

    ``refresh``: seconds after which the page loads itself again; 0: never.
    """
    _, folder = find(path)
    target = folder / FILE if out is None else Path(out).expanduser().absolute()
    if target.is_dir():
        raise RequestError(f"--out {out}: it is a folder; name a file")
    made = render(folder, target.parent, refresh)
    try:
        _write(target, made.encode())
    except OSError as error:
        raise RequestError(f"--out {target}: {reason(error)}; name a file in a folder that can be written") from None
    return target


def watch(path: str | Path, out: str | Path | None, seconds: int, begun: Callable[[Path], None]) -> None:
    """Write the report again each time that something new is stored, until the run or sweep ends, or Ctrl-C.

    ``seconds`` pass between two looks, and in the page until it loads itself again; the last page does not.
    ``begun`` gets the file when it is first there.
    """
    _, folder = find(path)
    before: list[tuple[int, int]] | None = None
    with contextlib.suppress(KeyboardInterrupt):
        while _at_work(folder):
            if (now := _stamps(folder)) != before:
                target = write_report(folder, out, seconds)
                if before is None:
                    begun(target)
                before = now
            time.sleep(seconds)
    target = write_report(folder, out)
    if before is None:
        begun(target)


def _at_work(folder: Path) -> bool:
    """Return whether a process holds the lease of the run or sweep in ``folder``, or of a trial's sweep."""
    root = next((above for above in list(folder.parents)[:4] if (above / OBJECTS).is_dir()), None)
    return root is not None and lease_of(folder.relative_to(root).as_posix()) in living(Store(root, create=False))


def _stamps(folder: Path) -> list[tuple[int, int]]:
    """Return times and sizes of the files that a page is made of."""
    found = []
    for name in ("config.toml", "metrics.jsonl", "label_counts.json", "summary.json", "plan.json", "results.parquet"):
        with contextlib.suppress(OSError):
            info = (folder / name).lstat()
            found.append((info.st_mtime_ns, info.st_size))
    return found


def _write(target: Path, page: bytes) -> None:
    """Write ``page`` into a file, a new one in place of an old one; into a link, a device or a pipe itself."""
    if not target.is_symlink() and (target.is_file() or not target.exists()):
        write_whole(target, page)
    elif (stdout := stdout_at(target)) is not None:  # a second descriptor of a file would begin at its start
        stdout.write(page)
        stdout.flush()
    else:
        target.write_bytes(page)


def stdout_at(target: Path) -> BinaryIO | None:
    """Return standard output if ``target`` is that."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        if os.path.samestat(target.stat(), os.fstat(sys.stdout.fileno())):
            return sys.stdout.buffer
    return None


def render(path: str | Path, beside: Path | None = None, refresh: int = 0) -> str:
    """Return the report as HTML. ``beside``: the folder that links are relative to; None: the run's or sweep's.

    ``refresh``: see ``write_report``.
    """
    from .run import run_page
    from .sweep import sweep_page

    kind, folder = find(path)
    page = run_page(read_run(folder)) if kind == "run" else sweep_page(read_sweep(folder), beside or folder)

    def shown(value: Any) -> Any:
        return visible(value) if type(value) is str else value  # not markup

    environment = Environment(
        autoescape=True, finalize=shown, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["whole"] = lambda words: words.replace(" %", "\N{NO-BREAK SPACE}%")
    template = environment.from_string(package_files(__package__).joinpath("page.html.j2").read_text(encoding="utf-8"))
    return template.render(page=page, palette=PALETTE, version=__version__, refresh=refresh) + "\n"
