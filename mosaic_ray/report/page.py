"""The report: one HTML file that holds all it shows. It loads nothing, runs no script, and opens from a disk.

The same files give the same bytes: nothing of it depends on when or where it is made.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from .. import __version__
from ..errors import RequestError
from ..runtime.files import reason, write_whole
from .drawing import PALETTE, inline_svg
from .exhibits import Exhibit
from .loading import Absent, find, load_run, load_sweep

#: A table below a figure is cut after so many rows.
MOST_ROWS = 200

#: A figure of more inches is not put beside another.
BROAD = 5.5

#: The file's name in the folder of a run or sweep.
FILE = "report.html"


@dataclass(frozen=True)
class Card:
    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Table:
    """``rows`` hold words; ``best``: the first row is the best."""

    title: str
    heads: Sequence[str]
    rows: Sequence[Sequence[Any]]
    caption: str = ""
    best: bool = False

    def wordy(self, column: int) -> bool:
        """Whether a column holds words, not numbers."""
        return any(re.search("[^\\W\\d_]{2}", str(row[column])) for row in self.rows)


@dataclass(frozen=True)
class Shown:
    """An exhibit, drawn; a ``broad`` one has a row of its own."""

    name: str
    title: str
    svg: Markup
    words: str
    table: Table
    wide: bool
    broad: bool


@dataclass(frozen=True)
class Picture:
    uri: str
    width: int
    height: int
    alt: str
    caption: str


@dataclass(frozen=True)
class Gallery:
    title: str
    words: str
    pictures: Sequence[Picture]


@dataclass(frozen=True)
class Text:
    """Something to copy; ``folded``: shown when asked for."""

    title: str
    body: str
    folded: bool = False


@dataclass
class Section:
    title: str
    lead: str = ""
    findings: list[dict[str, Any]] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    exhibits: list[Shown] = field(default_factory=list)
    galleries: list[Gallery] = field(default_factory=list)
    texts: list[Text] = field(default_factory=list)
    absent: list[tuple[str, str]] = field(default_factory=list)

    @property
    def id(self) -> str:
        return self.title.lower().replace(" ", "-")

    def show(self, exhibits: Iterable[Exhibit], report: Any) -> Section:
        """Draw ``exhibits``; those that ``report`` cannot fill are named with the reason."""
        for exhibit in exhibits:
            try:
                words, table = exhibit.words(report), _table(exhibit.title, exhibit.table(report))
                figure = exhibit.draw(report)
                svg = Markup(inline_svg(figure, exhibit.name, exhibit.wide))
            except Absent as absent:
                self.absent.append((exhibit.title, str(absent)))
                continue
            broad = figure.get_figwidth() > BROAD
            self.exhibits.append(Shown(exhibit.name, exhibit.title, svg, words, table, exhibit.wide, broad))
        return self


@dataclass(frozen=True)
class Page:
    """What the template shows. ``failure``: a headline and what went wrong."""

    title: str
    about: str
    verdict: str
    cards: Sequence[Card]
    sections: Sequence[Section]
    failure: tuple[str, str] | None = None


def write_report(path: str | Path, out: str | Path | None = None) -> Path:
    """The report of the run, trial or sweep that ``path`` means, beside it or in the file ``out``; returns where."""
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
    """The same as HTML. ``beside``: the folder that links are relative to; the run's or sweep's own where None."""
    from .run_page import run_page
    from .sweep_page import sweep_page

    kind, folder = find(path)
    page = run_page(load_run(folder)) if kind == "run" else sweep_page(load_sweep(folder), beside or folder)
    house = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    house.filters["whole"] = lambda words: words.replace(" %", "\N{NO-BREAK SPACE}%")
    template = house.from_string(package_files(__package__).joinpath("page.html.j2").read_text(encoding="utf-8"))
    return template.render(page=page, palette=PALETTE, version=__version__) + "\n"


def _table(title: str, frame: pd.DataFrame) -> Table:
    """A frame's first rows; its index, where that has a name, is the first column."""
    whole = frame.reset_index() if frame.index.name else frame
    rows = [[_cell(value) for value in row] for row in whole.head(MOST_ROWS).itertuples(index=False)]
    caption = f"the first {MOST_ROWS} of {len(whole)} rows" if len(whole) > MOST_ROWS else ""
    return Table(title, [str(name).replace("_", " ") for name in whole.columns], rows, caption)


def _cell(value: Any) -> str:
    if isinstance(value, str):
        return value
    if value is None or value != value:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}"


def link(target: Path, beside: Path) -> Markup | None:
    """A link to ``target``, relative to ``beside``; None where there is no such file."""
    if not target.is_file():
        return None
    where = Path(os.path.relpath(target, beside)).as_posix()
    return Markup('<a href="{}">{}</a>').format(where, "report")
