"""Print the closing table of a sweep, with its best configurations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions, RenderableType
from rich.table import Table
from rich.text import Text

from ..config.fields import short_names, shown
from ..core.types import STAGES
from ..sweeps.results import Point, Row, TrialResult, _rows
from .tables import MOST_FINDINGS, _places, _seconds, _table
from .text import address

#: Most configurations in a section of the closing table; results.csv has all.
MOST_POINTS = 10


# --- the closing table -----------------------------------------------------------------------------------------------


def sweep_table(
    results: Iterable[TrialResult], conditions: Sequence[str], swept: Sequence[str], folder: str | None = None
) -> RenderableType:
    """Show the best configurations under each condition, the shared stages, the failures and the places of the files.

    ``swept``: dotted names of the knobs that differ; ``conditions`` (such as omega) are those among them that define
    the problem: the others are compared within each of their values. ``folder``: the sweep's, for TensorBoard.
    Print it with ``crop=False``: paths are never broken.
    """
    return _SweepTable(_rows(results), tuple(conditions), tuple(name for name in swept if name != "seed"), folder)


def best_sections(
    rows: list[Row], conditions: Sequence[str], swept: Sequence[str]
) -> list[tuple[str, list[str], list[Point]]]:
    """Return for each set of conditions: title, knobs to show, finished configurations with the best first."""
    finished: dict[int, Point] = {}
    for row in rows:
        if row["status"] == "done":
            finished.setdefault(row["point"], []).append(row)
    table = _SweepTable(rows, tuple(conditions), tuple(name for name in swept if name != "seed"), None)
    return list(table._sections(list(finished.values())))


def mean_and_sd(point: Point, column: str, sign: str = "") -> str:
    """Format mean and sample standard deviation of ``column`` over a configuration's trials, in percent."""
    return _Layout(len(point), "± ", 0)._spread(point, column, sign)


@dataclass(frozen=True)
class _SweepTable:
    """The table, laid out when it is printed, since only then the width and the character set are known."""

    rows: list[Row]
    conditions: tuple[str, ...]
    swept: tuple[str, ...]
    folder: str | None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        finished: dict[int, Point] = {row["point"]: [] for row in self.rows}
        for row in self.rows:
            finished[row["point"]] += [row] if row["status"] == "done" else []
        ends = Counter(row["status"] for row in self.rows)
        words = {"done": "done", "stopped": "stopped early", "failed": "failed"}
        counts = ", ".join(f"{ends[status]} {word}" for status, word in words.items() if ends[status]) or "none ended"
        yield Text(f"configurations {len(finished)}, trials {len(self.rows)}: {counts}")
        if points := [point for point in finished.values() if point]:
            sign = "+-" if options.ascii_only else "±"
            layout = _Layout(max(map(len, points)), sign, options.max_width)
            spread = f", mean {sign} sd of {layout.seeds} seeds" if layout.seeds > 1 else ""
            yield Text(f"percent{spread}; gain = final - control, all three on test images")
            for title, columns, section in self._sections(points):
                yield from ("", Text(title, style="bold"), *layout.section(section, columns))
        if shared := shared_stages(self.rows):
            table = _table(*SHARED)
            for stage, computed, found, spent, saved in shared:
                table.add_row(stage, str(computed), str(found), _seconds(spent), _seconds(saved))
            yield from ("", table)
        if failed := [row for row in self.rows if row["status"] == "failed"]:
            yield from ("", *_failures(failed))
        if self.folder is not None:
            yield from ("", *_places({"run": self.folder, "tensorboard": self.folder}))

    def _sections(self, points: list[Point]) -> Iterator[tuple[str, list[str], list[Point]]]:
        """Yield title, knobs to show and points, best first, for each set of conditions."""
        if set(self.swept) <= set(self.conditions):
            yield "in order: under each condition there is one configuration", list(self.swept), points
            return
        sections: dict[tuple[Any, ...], list[Point]] = {}
        for point in points:
            sections.setdefault(tuple(point[0][name] for name in self.conditions), []).append(point)
        columns = [name for name in self.swept if name not in self.conditions]
        for values, section in sections.items():
            ordered, choice = _ordered(section)
            under = [f"{name} = {shown(value)}" for name, value in zip(self.conditions, values, strict=True)]
            yield ", ".join([*under, choice]), columns, ordered


def _ordered(points: list[Point]) -> tuple[list[Point], str]:
    """Sort by mean selection, best first, and return the metric; keep the order where values cannot be compared."""
    rows = [row for point in points for row in point]
    metrics = {row["selection_metric"] for row in rows}
    if any(row["selection"] is None for row in rows):
        return points, "nothing was chosen: selection values are missing"
    if len(metrics) > 1:
        return points, "nothing was chosen: selection metrics differ"
    best = sorted(points, key=lambda point: -fmean(row["selection"] for row in point))
    return best, f"best by {metrics.pop()} (selection)"


@dataclass(frozen=True)
class _Layout:
    """``seeds``: most finished trials of a point; ``deviation``: sign before a deviation; ``width`` [characters]."""

    seeds: int
    deviation: str
    width: int

    def section(self, points: list[Point], knobs: list[str]) -> Iterator[RenderableType]:
        """Yield a table of the first ``points``: a column for each of the ``knobs`` where they fit, else one column."""
        first = points[:MOST_POINTS]
        names = [point[0]["trial"].rpartition("s")[0] for point in first]
        fewer = [f"{name} {len(point)}" for name, point in zip(names, first, strict=True) if len(point) < self.seeds]
        names = [name if len(point) == self.seeds else f"{name}*" for name, point in zip(names, first, strict=True)]
        reached = {
            "selection": [self._spread(point, "selection") for point in first],
            "final": [self._spread(point, "accuracy_final") for point in first],
            "control": [self._spread(point, "accuracy_control") for point in first],
            "gain": [self._spread(point, "gain", "+") for point in first],
        }
        short = short_names(knobs)
        columns = {short[knob]: [shown(point[0][knob]) for point in first] for knob in knobs} | reached
        widths = [max(map(len, [head, *cells])) for head, cells in [("point", names), *columns.items()]]
        if sum(widths) + 2 * len(columns) > self.width:
            common = _common(points, knobs)
            values = [{k: point[0][k] for k in knobs if point[0][k] != common.get(k, ...)} for point in first]
            columns = reached | {"configuration": [_knobs(row, short) or "-" for row in values]}
            if common:
                yield Text(f"unless noted otherwise: {_knobs(common, short)}")
        table = _table("point", *columns)
        if "configuration" in columns:
            table.columns[-1].justify = "left"
        for name, *cells in zip(names, *columns.values(), strict=True):
            table.add_row(Text(name), *map(Text, cells))
        yield table
        if fewer:
            yield Text(f"* seeds finished: {', '.join(fewer)} of {self.seeds}")
        if len(points) > MOST_POINTS:
            yield Text(f"and {len(points) - MOST_POINTS} more in results.csv")

    def _spread(self, point: Point, column: str, sign: str = "") -> str:
        """Format mean and sample standard deviation over the point's seeds, in percent."""
        values = [100 * row[column] for row in point if row[column] is not None]
        if not values:
            return "-"
        return f"{fmean(values):{sign}.1f}" + (f" {self.deviation}{stdev(values):.1f}" if len(values) > 1 else "")


def _knobs(values: Mapping[str, Any], short: Mapping[str, str]) -> str:
    return ", ".join(f"{short[knob]}={shown(value)}" for knob, value in values.items())


def _common(points: list[Point], knobs: Sequence[str]) -> dict[str, Any]:
    """Return the values that more than three quarters of the points share, as in an ablation."""
    most = {knob: Counter(point[0][knob] for point in points).most_common(1)[0] for knob in knobs}
    return {knob: value for knob, (value, count) in most.items() if 4 * count > 3 * len(points)}


SHARED = ("stage", "computed", "found", "seconds spent", "seconds saved")


def shared_stages(rows: list[Row]) -> list[tuple[str, int, int, float, float]]:
    """Return by stage (``SHARED``) the trials that computed it and that found it, and the seconds spent and saved."""
    shared = []
    for stage in STAGES:
        cost: dict[bool, list[float]] = {False: [], True: []}
        for row in rows:
            if (cached := row[f"cached_{stage}"]) is not None:
                cost[cached].append(row[f"seconds_{stage}"] or 0.0)
        if cost[False] or cost[True]:
            shared.append((stage, len(cost[False]), len(cost[True]), sum(cost[False]), sum(cost[True])))
    return shared


def _failures(rows: list[Row]) -> list[RenderableType]:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("failed", no_wrap=True)
    table.add_column("where")
    table.add_column("", overflow="fold")
    for row in rows[:MOST_FINDINGS]:
        where = address(row["error_stage"], row["error_round"], row["error_client"])
        message = " ".join((row["error"] or "").removeprefix(f"{where}: ").split())
        table.add_row(Text(row["trial"]), Text(where or "-"), Text(message))
    left = len(rows) - MOST_FINDINGS
    return [table, Text(f"and {left} more in results.csv")] if left > 0 else [table]
