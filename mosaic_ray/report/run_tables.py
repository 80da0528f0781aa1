"""Build the output of `mosaic runs` and `mosaic diff`: tables for a terminal, CSV, and the same as JSON."""

from __future__ import annotations

import csv
import io
import json
import time
from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from ..core.text import csv_cell, visible
from ..core.types import ROLES
from ..runs.listing import RunRow
from .tables import _table
from .text import counted, points

if TYPE_CHECKING:
    from ..runs.difference import Difference

_STYLES = {"running": "bold", "failed": "red", "damaged": "red", "interrupted": "yellow", "stopped": "dim"}


def _unbroken(table: Table) -> Table:
    """Give ``table`` the width that it needs, so that a narrow terminal or a pipe breaks no cell."""
    table.width = Console(width=10_000).measure(table).maximum
    return table


def run_list(
    rows: Sequence[RunRow], shown: int, sweeps: Sequence[str], noun: str = "run"
) -> list[RenderableType | str]:
    """List the first ``shown`` runs; a line counts them, and one names the ``sweeps`` beside them."""
    parts: list[RenderableType | str] = []
    if rows:
        columns = "status", "data", "method", "omega", "seed", "final", "control", "hours", "age"
        table, now = _table(noun, *columns), time.time()
        for column in table.columns[1:4]:
            column.justify = "left"
        for row in rows[:shown]:
            words = row.name, row.status, row.data or "-", row.label or "-"
            numbers = [f"{value:g}" if value is not None else "-" for value in (row.omega, row.seed)]
            numbers += [_percent(row.reached(role)) for role in ("final", "control")]
            numbers += ["-" if row.hours is None else f"{row.hours:.3g}", _age(now - row.modified)]
            style = _STYLES.get(row.status, "")
            table.add_row(*(Text(visible(word, ""), style=style) for word in words), *numbers)
        parts += [_unbroken(table), ""]
    more = f"; the first {shown:,} are shown, --limit N shows more" if len(rows) > shown else ""
    parts.append(f"{counted(len(rows), noun)}{more}" if rows else f"no {noun}s")
    if sweeps:
        names = ", ".join(sweeps[:3]) + (f" and {len(sweeps) - 3} more" if len(sweeps) > 3 else "")
        parts.append(f"{counted(len(sweeps), 'sweep')} beside them: {names}; --sweep NAME lists the trials of one")
    return parts


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def _age(seconds: float) -> str:
    """Format a time that passed as its largest unit: ``5 min``, ``3 h``, ``12 d``."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


def run_facts(row: RunRow) -> dict[str, Any]:
    """Return the entry of a run in the output of ``--json``."""
    when = datetime.fromtimestamp(row.modified).astimezone().isoformat(timespec="seconds")
    return vars(row) | {"accuracy": row.accuracy or {}, "modified": when}


def run_csv(rows: Sequence[RunRow]) -> str:
    """Return the runs as CSV, with a column for each role's accuracy."""
    out = io.StringIO()
    names = [name for name in RunRow.__dataclass_fields__ if name != "accuracy"]
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*names, *(f"accuracy_{role}" for role in ROLES)])
    for row in rows:
        cells = [run_facts(row)[name] for name in names] + [row.reached(role) for role in ROLES]
        writer.writerow([csv_cell(cell) if isinstance(cell, str) else cell for cell in cells])
    return out.getvalue()


def difference_parts(found: Difference) -> list[RenderableType | str]:
    """Show the knobs that differ, the first stage with another result and why, and the accuracies side by side."""
    left, right = found.left, found.right
    parts: list[RenderableType | str] = [f"A  {left.place}: {left.status}", f"B  {right.place}: {right.status}", ""]
    if found.knobs:
        table = _table("knob", "A", "B")
        for name, pair in found.knobs.items():
            table.add_row(Text(visible(name, "")), *(Text(visible(_word(value), "")) for value in pair))
        parts += [_unbroken(table), ""]
    else:
        parts += ["all knobs are the same", ""]
    parts += [*found.lines(), ""]
    if found.accuracy:
        table = _table("test accuracy", "A", "B", "B − A")
        for role, (a, b) in found.accuracy.items():
            table.add_row(role, _percent(a), _percent(b), points(None if a is None or b is None else b - a))
        parts.append(_unbroken(table))
    else:
        parts.append("neither has accuracies yet")
    return parts


def _word(value: Any) -> str:
    return "-" if value is None else value if isinstance(value, str) and value else json.dumps(value)


def difference_facts(found: Difference) -> dict[str, Any]:
    """Return the output of ``--json``."""
    sides = {
        name: {"place": side.place, "status": side.status} for name, side in (("a", found.left), ("b", found.right))
    }
    accuracy = {
        role: {"a": a, "b": b, "difference": None if a is None or b is None else b - a}
        for role, (a, b) in found.accuracy.items()
    }
    knobs, because = ({n: list(pair) for n, pair in some.items()} for some in (found.knobs, found.because))
    return {
        **sides, "knobs": knobs, "shared_stages": list(found.shared), "stage": found.stage, "because": because,
        "why": found.why, "accuracy": accuracy,
    }  # fmt: skip
