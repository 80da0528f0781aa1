"""The parts of a report page: cards, tables, pictures, galleries and text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pandas as pd
from markupsafe import Markup

from ..figures.base import ReportFigure
from ..load import NotAvailable
from .svg import inline_svg

#: Most rows of a table below a figure.
MOST_ROWS = 200

#: Name of the page in the folder of a run or sweep.
FILE = "report.html"


class Card(NamedTuple):
    label: str
    value: str
    note: str = ""


class Table(NamedTuple):
    """``rows`` hold texts; ``best``: the first row is the best."""

    title: str
    heads: Sequence[str]
    rows: Sequence[Sequence[Any]]
    caption: str = ""
    best: bool = False

    def wordy(self, column: int) -> bool:
        """Return whether a column holds words, not numbers."""
        return any(re.search("[^\\W\\d_]{2}", str(row[column])) for row in self.rows)


class RenderedFigure(NamedTuple):
    """A figure as SVG, with its sentence and its numbers; a ``broad`` one, over 5.5 inches, has a row of its own."""

    figure: ReportFigure
    svg: Markup
    words: str
    table: Table
    broad: bool


class Picture(NamedTuple):
    uri: str
    width: int
    height: int
    alt: str
    caption: str


class Gallery(NamedTuple):
    title: str
    words: str
    pictures: Sequence[Picture]


class Text(NamedTuple):
    """Text to copy; ``folded``: collapsed until it is clicked."""

    title: str
    body: str
    folded: bool = False


@dataclass
class Section:
    title: str
    lead: str = ""
    findings: list[dict[str, Any]] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    figures: list[RenderedFigure] = field(default_factory=list)
    galleries: list[Gallery] = field(default_factory=list)
    texts: list[Text] = field(default_factory=list)
    absent: list[tuple[str, str]] = field(default_factory=list)

    @property
    def id(self) -> str:
        return self.title.lower().replace(" ", "-")

    def show(self, figures: Iterable[ReportFigure], report: Any) -> Section:
        """Add ``figures``; those for which ``report`` lacks data are listed with the reason."""
        for figure in figures:
            try:
                drawing, table, words = figure(report)
            except NotAvailable as absent:
                self.absent.append((figure.title, str(absent)))
                continue
            svg, broad = Markup(inline_svg(drawing, figure.name, figure.wide)), drawing.get_figwidth() > 5.5
            self.figures.append(RenderedFigure(figure, svg, words, _table(figure.title, table), broad))
        return self


class Page(NamedTuple):
    """The content of a page. ``failure``: a headline and the error."""

    title: str
    about: str
    verdict: str
    cards: Sequence[Card]
    sections: Sequence[Section]
    failure: tuple[str, str] | None = None


def _table(title: str, frame: pd.DataFrame) -> Table:
    """Return a frame's first rows; a named index is the first column."""
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
