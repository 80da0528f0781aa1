"""Rows of measurements: made by checks that run in processes of their own, and printed as a table."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import click


@dataclass
class Row:
    """One line of the table. ``ratio``: of the figure to that of ``against``, or as its text says."""

    check: str
    what: str
    figure: float | None = None
    unit: str = ""
    ratio: float | None = None
    against: str = ""
    status: str = "passed"
    note: str = ""


def watched(name: str, command: list[str], seconds: float) -> list[Row]:
    """Run a check's ``command`` in a process group of its own for at most ``seconds``.

    It writes rows to the file that its last argument, added here, names. Returns them, and one more where it failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        rows, log, note = Path(folder) / "rows", Path(folder) / "log", ""
        rows.touch()
        with open(log, "w") as stream:
            process = subprocess.Popen([*command, str(rows)], stdout=stream, stderr=stream, start_new_session=True)
            try:
                if process.wait(seconds):
                    note = f"exit status {process.returncode}"
            except subprocess.TimeoutExpired:
                note = f"stopped after {seconds:.0f} s"
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        found = [Row(**json.loads(line)) for line in rows.read_text().splitlines() if line.endswith("}")]
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        if note:
            found.append(Row(name, f"{name}: the rest", status="failed", note=": ".join([note, *lines[-1:]])[:300]))
        if any(row.status == "failed" for row in found):
            click.echo("\n".join(lines[-40:]), err=True)
    return found


def as_table(rows: list[Row]) -> str:
    """Return the rows as lines of aligned columns; notes follow the table."""
    cells = [("what", "figure", "unit", "ratio", "against", "result")]
    for row in rows:
        figure = "" if row.figure is None else f"{row.figure:,.4g}" if row.figure < 1000 else f"{row.figure:,.0f}"
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        cells.append((row.what, figure, row.unit, ratio, row.against, row.status))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    sides = (str.ljust, str.rjust, str.ljust, str.rjust, str.ljust, str.ljust)
    aligned = [
        "  ".join(side(text, width) for side, text, width in zip(sides, line, widths, strict=True)) for line in cells
    ]
    notes = [f"{row.what}: {row.note}" for row in rows if row.note]
    return "\n".join([*(line.rstrip() for line in aligned), *([""] if notes else []), *notes])
