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
from ..sweeps.results import Point, Row, TrialResult, result_rows
from .tables import CEILING, MOST_FINDINGS, _places, _seconds, _table
from .text import address

#: Most configurations in a section of the closing table; results.csv has all.
MOST_POINTS = 10


def sweep_table(
    results: Iterable[TrialResult], conditions: Sequence[str], swept: Sequence[str], folder: str | None = None,
    instead: RenderableType | None = None,
) -> RenderableType:  # fmt: skip
    """Show the best configurations under each condition, the shared stages, the failures and the places of the files.

    ``swept``: dotted names of the knobs that differ; ``conditions`` (such as omega) are those among them that define
    the problem: the others are compared within each of their values. ``folder``: the sweep's, for TensorBoard.
    ``instead``: what to show in place of the best configurations.
    Print it with ``crop=False``: paths are never broken.
    """
    return _SweepTable(result_rows(results), conditions, swept, folder, instead)


def best_sections(
    rows: list[Row], conditions: Sequence[str], swept: Sequence[str]
) -> list[tuple[str, list[str], list[Point]]]:
    """Return for each set of conditions: title, knobs to show, finished configurations with the best first."""
    finished: dict[int, Point] = {}
    for row in rows:
        if row["status"] == "done":
            finished.setdefault(row["point"], []).append(row)
    points, knobs = list(finished.values()), [name for name in swept if name != "seed"]
    if not points:
        return []
    if set(knobs) <= set(conditions):
        return [("in order: under each condition there is one configuration", knobs, points)]
    sections: dict[tuple[Any, ...], list[Point]] = {}
    for point in points:
        sections.setdefault(tuple(point[0][name] for name in conditions), []).append(point)
    found, knobs = [], [name for name in knobs if name not in conditions]
    for values, section in sections.items():
        ordered, choice = _ordered(section)
        under = [f"{name} = {shown(value)}" for name, value in zip(conditions, values, strict=True)]
        found.append((", ".join([*under, choice]), knobs, ordered))
    return found


def ended(rows: list[Row]) -> str:
    """Return how trials ended: ``39 done, 1 stopped early, 2 failed``."""
    ends = Counter(row["status"] for row in rows)
    words = {"done": "done", "stopped": "stopped early", "failed": "failed"}
    return ", ".join(f"{ends[status]} {word}" for status, word in words.items() if ends[status])


def mean_and_sd(point: Point, column: str, sign: str = "", deviation: str = "± ") -> str:
    """Format mean and sample standard deviation of ``column`` over a configuration's trials, in percent."""
    values = [100 * row[column] for row in point if row.get(column) is not None]
    if not values:
        return "-"
    return f"{fmean(values):{sign}.1f}" + (f" {deviation}{stdev(values):.1f}" if len(values) > 1 else "")


@dataclass(frozen=True)
class _SweepTable:
    """The table, laid out when it is printed, since only then the width and the character set are known."""

    rows: list[Row]
    conditions: Sequence[str]
    swept: Sequence[str]
    folder: str | None
    instead: RenderableType | None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        counts = ended(self.rows) or "none ended"
        yield Text(f"configurations {len({row['point'] for row in self.rows})}, trials {len(self.rows)}: {counts}")
        if self.instead is not None:
            yield self.instead
        elif sections := best_sections(self.rows, self.conditions, self.swept):
            sign = "+-" if options.ascii_only else "±"
            seeds = max(len(point) for *_, points in sections for point in points)
            spread = f", mean {sign} sd of {seeds} seeds" if seeds > 1 else ""
            yield Text(f"percent{spread}; gain = final - control, all three on test images")
            if any(row["accuracy_ceiling"] is not None for row in self.rows):
                yield Text(CEILING)
            for title, knobs, points in sections:
                yield from ("", Text(title, style="bold"), *_section(points, knobs, seeds, sign, options.max_width))
        if shared := shared_stages(self.rows):
            table = _table(*SHARED)
            for stage, computed, found, spent, saved in shared:
                table.add_row(stage, str(computed), str(found), _seconds(spent), _seconds(saved))
            yield from (Text(), table)
        if failed := [row for row in self.rows if row["status"] == "failed"]:
            yield from ("", *_failures(failed))
        if self.folder is not None:
            yield from ("", *_places({"run": self.folder, "tensorboard": self.folder}))


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


def _section(points: list[Point], knobs: list[str], seeds: int, sign: str, width: int) -> Iterator[RenderableType]:
    """Yield a table of the first ``points``: a column for each of the ``knobs`` where they fit, else one column.

    ``seeds``: most finished trials of a point; ``sign``: before a deviation; ``width`` [characters].
    """
    first = points[:MOST_POINTS]
    names = [point[0]["trial"].rpartition("s")[0] for point in first]
    fewer = [f"{name} {len(point)}" for name, point in zip(names, first, strict=True) if len(point) < seeds]
    names = [name if len(point) == seeds else f"{name}*" for name, point in zip(names, first, strict=True)]
    reached = {
        head: [mean_and_sd(point, column, "+" if head == "gain" else "", sign) for point in first]
        for head, column in measures(points).items()
    }
    short = short_names(knobs)
    columns = {short[knob]: [shown(point[0][knob]) for point in first] for knob in knobs} | reached
    widths = [max(map(len, [head, *cells])) for head, cells in [("point", names), *columns.items()]]
    if sum(widths) + 2 * len(columns) > width:
        most = {knob: Counter(point[0][knob] for point in points).most_common(1)[0] for knob in knobs}
        # as in an ablation: the values that more than three quarters of the points share
        common = {knob: value for knob, (value, count) in most.items() if 4 * count > 3 * len(points)}
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
        yield Text(f"* seeds finished: {', '.join(fewer)} of {seeds}")
    if len(points) > MOST_POINTS:
        yield Text(f"and {len(points) - MOST_POINTS} more in results.csv")


def measures(points: list[Point]) -> dict[str, str]:
    """Return heading -> column of the measures in a table of configurations.

    The ceiling where a trial has one, and clients' own models on their own classes where the strategy has them.
    """
    found = {"selection": "selection", "final": "accuracy_final", "control": "accuracy_control", "gain": "gain"}
    probed = any(row["accuracy_ceiling"] is not None for point in points for row in point)
    own = any(row.get("personal_own") is not None for point in points for row in point)
    new = any(row["accuracy_server_student"] is not None for point in points for row in point)
    found |= {"new network": "accuracy_server_student"} if new else {}
    return found | ({"ceiling": "accuracy_ceiling"} if probed else {}) | ({"personal": "personal_own"} if own else {})


def _knobs(values: Mapping[str, Any], short: Mapping[str, str]) -> str:
    return ", ".join(f"{short[knob]}={shown(value)}" for knob, value in values.items())


SHARED = ("stage", "computed", "found", "seconds spent", "seconds saved")


def shared_stages(rows: list[Row]) -> list[tuple[str, int, int, float, float]]:
    """Return by stage (``SHARED``) the trials that computed it and that found it, and the seconds spent and saved."""
    shared = []
    stages = dict.fromkeys(name.removeprefix("cached_") for row in rows for name in row if name.startswith("cached_"))
    for stage in stages:
        cost: dict[bool, list[float]] = {False: [], True: []}
        for row in rows:
            if (cached := row.get(f"cached_{stage}")) is not None:
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
