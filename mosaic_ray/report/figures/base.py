"""``ReportFigure``: a figure, a sentence about it, and the numbers behind it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pandas as pd
from matplotlib.figure import Figure


@dataclass(frozen=True)
class ReportFigure:
    """A figure of a report.

    ``draw``, ``table`` and ``words`` take a run or a sweep, and raise ``load.NotAvailable`` where its data are missing.
    ``wide``: the figure may be wider than a phone, where it scrolls in its own box.
    """

    name: str
    title: str
    draw: Callable[[Any], Figure]
    table: Callable[[Any], pd.DataFrame]
    words: Callable[[Any], str]
    wide: bool = False
