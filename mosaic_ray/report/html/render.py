"""Write the report: one HTML file without scripts that loads no other file.

The same input files give the same bytes.
"""

from __future__ import annotations

from importlib.resources import files as package_files
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from ... import __version__
from ...core.errors import RequestError
from ...storage.filesystem import write_whole
from ...storage.uri import reason
from ..figures.style import PALETTE
from ..load import find, read_run, read_sweep
from .blocks import FILE


def write_report(path: str | Path, out: str | Path | None = None) -> Path:
    """Write the report of the run, trial or sweep at ``path`` into its folder or the file ``out``; return the file."""
    _, folder = find(path)
    target = folder / FILE if out is None else Path(out).expanduser().absolute()
    if target.is_dir():
        raise RequestError(f"--out {out}: it is a folder; name a file")
    made = render(folder, target.parent)
    try:
        write_whole(target, made.encode())
    except OSError as error:
        raise RequestError(f"--out {target}: {reason(error)}; name a file in a folder that can be written") from None
    return target


def render(path: str | Path, beside: Path | None = None) -> str:
    """Return the report as HTML. ``beside``: the folder that links are relative to; None: the run's or sweep's."""
    from .run import run_page
    from .sweep import sweep_page

    kind, folder = find(path)
    page = run_page(read_run(folder)) if kind == "run" else sweep_page(read_sweep(folder), beside or folder)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["whole"] = lambda words: words.replace(" %", "\N{NO-BREAK SPACE}%")
    template = environment.from_string(package_files(__package__).joinpath("page.html.j2").read_text(encoding="utf-8"))
    return template.render(page=page, palette=PALETTE, version=__version__) + "\n"
