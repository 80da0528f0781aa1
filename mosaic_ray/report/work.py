"""What a sweep would compute, for ``--dry-run``."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import RenderableType
from rich.text import Text

from ..stages.work import StageWork
from .tables import _table


def work_table(rows: Sequence[StageWork]) -> RenderableType:
    """Per stage: the results that trials ask for, the distinct ones that are computed, and what they take."""
    table = _table("stage", "asked for", "computed", "work")
    for row in rows:
        amounts = ", ".join(f"{amount:,} {unit}" for unit, amount in row.work.items())
        table.add_row(Text(row.stage), f"{row.asked:,}", f"{row.unique:,}", amounts)
    return table
