"""An exhibit: a figure, what it shows in a sentence, and the numbers behind it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pandas as pd
from matplotlib.figure import Figure


@dataclass(frozen=True)
class ReportFigure:
    """All three take a run or a sweep, and raise ``loading.NotAvailable`` where it has not what they show.

    ``wide``: it may be wider than a phone, and scrolls in its own box there.
    """

    name: str
    title: str
    draw: Callable[[Any], Figure]
    table: Callable[[Any], pd.DataFrame]
    words: Callable[[Any], str]
    wide: bool = False
