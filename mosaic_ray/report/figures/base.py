"""``ReportFigure``: a figure, a sentence about it, and the numbers behind it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pandas as pd
from matplotlib.figure import Figure

from .style import style


class Drawing(NamedTuple):
    """A drawn figure, the numbers that it shows, and a sentence about it."""

    figure: Figure
    table: pd.DataFrame
    words: str


@dataclass(frozen=True)
class ReportFigure:
    """A figure of a report. Calling it with a run or a sweep draws it, or raises ``load.NotAvailable``.

    ``wide``: the figure may be wider than a phone, where it scrolls in its own box.
    """

    name: str
    title: str
    draw: Callable[..., Drawing]
    wide: bool = False

    def __call__(self, report: Any, **options: Any) -> Drawing:
        with style():
            return self.draw(report, **options)

    def plot(self, report: Any, **options: Any) -> Figure:
        return self(report, **options).figure
