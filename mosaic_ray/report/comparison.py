"""Compare methods: the rows of the table that `mosaic compare` prints and exports.

Differences are between final accuracies on test images, paired by seed. Last states only; nothing is chosen here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.text import Text

from ..config.fields import shown
from ..config.plugins import ALIASES
from ..config.resolve import override
from ..config.schema import ExperimentConfig
from ..core.errors import RequestError
from ..core.units import size
from ..runs.equal_compute import client_steps
from ..sweeps.results import Point, Row
from ..sweeps.space import point_name
from .fragment import html_table, paragraph
from .paired import LEVEL, POWER, paired_p, seeds_needed
from .sweep_table import mean_and_sd, measures
from .tables import CEILING, _table
from .text import listed

OMEGA = "partition.omega"

#: Heading -> column, for each model that is scored at the clients: mean and sd over them, mean of the worst tenth.
AT_CLIENTS = {
    "own": "clients_own_mean", "sd own": "clients_own_sd", "worst own": "clients_own_worst_tenth",
    "client": "clients_final_mean", "sd client": "clients_final_sd", "worst client": "clients_final_worst_tenth",
    "adapted": "clients_adapted_mean", "sd adapted": "clients_adapted_sd",
    "worst adapted": "clients_adapted_worst_tenth",
}  # fmt: skip

#: Knobs of a point that its row is named by, or that all rows of a section share.
NAMED = ("method", "federation.strategy", "warmup.num_rounds", OMEGA)

#: Behind the name of a control with equal client compute.
MORE = " (+{} rounds)"


@dataclass(frozen=True)
class Compared:
    """A method under one condition.

    ``finals``: its final accuracies in [0, 1] by seed; ``differences``: these minus the reference's, for the seeds that
    both have, None for the reference itself. ``steps``: a client's compute (``client_steps``), None where unknown.
    ``own``: the knobs that it has for itself.
    """

    name: str
    trials: Point
    finals: Mapping[int, float]
    differences: list[float] | None
    steps: float | None
    own: Mapping[str, Any] = field(default_factory=dict)

    @property
    def mean(self) -> float | None:
        return fmean(self.finals.values()) if self.finals else None

    @property
    def sd(self) -> float | None:
        return stdev(self.finals.values()) if len(self.finals) > 1 else None

    def bytes_of_client(self, way: str) -> float | None:
        """Return the mean over clients and seeds of the bytes sent in the direction ``way``."""
        sent = [(row[f"communication_{way}"], row["partition.num_clients"]) for row in self.trials]
        return fmean(n / clients for n, clients in sent) if sent and all(map(all, sent)) else None


@dataclass(frozen=True)
class Comparison:
    """Methods in the order in which they were typed, by omega (None: the only one); ``against``: the reference."""

    against: str
    seeds: Sequence[int]
    sections: Mapping[float | None, Sequence[Compared]]

    def title(self, omega: float | None) -> str:
        return f"{OMEGA} = {shown(omega)}" if omega is not None else ""

    def best(self, omega: float | None) -> list[str]:
        """Return the names of the methods with the highest mean."""
        means = {method.name: method.mean for method in self.sections[omega] if method.mean is not None}
        return [name for name, mean in means.items() if mean == max(means.values())]

    @property
    def accuracies(self) -> dict[str, str]:
        """Return heading -> column of the accuracies that are shown."""
        found = measures([method.trials for methods in self.sections.values() for method in methods])
        return {head: column for head, column in found.items() if head != "selection"}

    @property
    def at_clients(self) -> dict[str, str]:
        """Return heading -> column of the accuracies at the clients that some trial has."""
        rows = [row for methods in self.sections.values() for method in methods for row in method.trials]
        return {h: column for h, column in AT_CLIENTS.items() if any(row.get(column) is not None for row in rows)}

    @property
    def heads(self) -> list[str]:
        reached = self.accuracies | self.at_clients
        return ["method", *reached, f"vs {self.against}", "p", "needed", "SGD steps", "up", "down"]

    def cells(self, method: Compared) -> list[str]:
        """Return the texts of a row; ``-`` where there is no value, ``*`` behind a significant difference."""
        columns = self.accuracies | self.at_clients
        reached = [mean_and_sd(method.trials, c, "+" if h == "gain" else "") for h, c in columns.items()]
        found = [100 * difference for difference in method.differences or ()]
        p, needed = paired_p(found), seeds_needed(found)
        difference = f"{fmean(found):+.1f}" if found else "-"
        difference += f" ± {stdev(found):.1f}" if len(found) > 1 else ""
        moved = [method.bytes_of_client(way) for way in ("uplink", "downlink")]
        return [
            method.name, *reached, difference + ("*" if p is not None and p < LEVEL else ""),
            "-" if p is None else f"{p:.3f}" if p >= 0.001 else "<0.001", "-" if needed is None else f"{needed:,}",
            "-" if method.steps is None else f"{method.steps:,.0f}",
            *("-" if amount is None else size(amount) for amount in moved),
        ]  # fmt: skip

    @property
    def caption(self) -> list[str]:
        """Return the sentences below the table."""
        over, test = f"seed {listed(self.seeds)}", ", without a test"
        if len(self.seeds) > 1:
            over = f"mean ± standard deviation over seeds {', '.join(map(str, self.seeds))}"
            test = (
                f"; *: p < {LEVEL:g} in a two-sided paired t-test, not corrected for the number of comparisons; "
                f"needed: seeds that would show it with {100 * POWER:.0f} % power"
            )
        lines = [
            f"Test accuracy in percent, {over}, of the last state; test images are for reporting only.",
            f"vs {self.against}: difference of final in points, paired by seed{test}.",
            "SGD steps: a client's compute in steps of local training; up, down: bytes from and to a client.",
        ]
        rows = [row for methods in self.sections.values() for method in methods for row in method.trials]
        if any(row.get("finetune.head") not in (None, "keep") for row in rows):
            lines.append(
                "final: with a head made anew after the closing rounds (finetune.head), for fedavg as well; control: "
                "the same rounds without the method, with the network's own head."
            )
        if self.at_clients:
            lines.append(
                "own, client, adapted: a client's own model, the final model, and that after local steps, on the "
                "client's own mix of classes, means over the clients; sd: their standard deviation over the clients; "
                "worst: means over the worst tenth of them."
            )
        if "ceiling" in self.accuracies:
            lines.append(f"{CEILING.capitalize()}.")
        if any(MORE[-8:] in method.name for methods in self.sections.values() for method in methods):
            lines.append("(+N rounds): as many more rounds as generators, or longer steps, cost the clients.")
        alone = {method.name: method.own for methods in self.sections.values() for method in methods if method.own}
        own = [f"{name} {', '.join(f'{k} = {shown(v)}' for k, v in knobs.items())}" for name, knobs in alone.items()]
        lines += [f"With knobs of their own: {'; '.join(own)}."] if own else []
        absent = [
            f"{method.name}{f' at omega {shown(omega)}' if omega is not None else ''} seed {seed}"
            for omega, methods in self.sections.items() for method in methods for seed in self.seeds
            if seed not in method.finals
        ]  # fmt: skip
        return lines + ([f"Left out of every pair, since they have no result: {'; '.join(absent)}."] if absent else [])

    def _repr_html_(self) -> str:
        tables = [
            html_table(
                self.heads, [self.cells(method) for method in methods], self.title(omega),
                [number for number, method in enumerate(methods) if method.name in self.best(omega)],
            )
            for omega, methods in self.sections.items()
        ]  # fmt: skip
        return "\n".join([*tables, *map(paragraph, self.caption)])

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        """Yield a table for each omega, in parts where its columns do not fit."""
        first = 1 + len(self.accuracies)
        last = first + len(self.at_clients)
        cuts = [1, *range(first, last, 3), last, len(self.heads)]
        yield ""
        for omega, methods in self.sections.items():
            best = self.best(omega)
            rows = [[_plain(cell, options.ascii_only) for cell in self.cells(method)] for method in methods]
            heads = self.heads
            widths = [max(map(len, column)) + 2 for column in zip(heads, *rows, strict=True)]
            parts = [slice(1, None)]
            if sum(widths) > options.max_width + 2:
                parts = [part for part in map(slice, cuts, cuts[1:]) if heads[part]]
            if omega is not None:
                yield Text(self.title(omega), style="bold")
            for part in parts:
                table = _table(heads[0], *heads[part])
                for row in rows:
                    table.add_row(Text(row[0]), *map(Text, row[part]), style="bold" if row[0] in best else "")
                yield table
                yield ""
        yield from (Text(_plain(line, options.ascii_only)) for line in self.caption)


def _plain(text: str, ascii_only: bool) -> str:
    return text.replace("±", "+-") if ascii_only else text


def compare(
    rows: Sequence[Row], points: Sequence[Mapping[str, Any]], config: ExperimentConfig | None, against: str = ""
) -> Comparison:
    """Return the comparison of ``points`` by the ``rows`` of its trials.

    ``config``: what all points change; None where it is not known. ``against``: the reference as ``point_name`` has it;
    by default ``fedavg``, or else the first.
    """
    rounds = config.warmup.num_rounds if config else 0
    names = [
        point_name(point) + (MORE.format(point["warmup.num_rounds"] - rounds) if "warmup.num_rounds" in point else "")
        for point in points
    ]
    against = against or ("fedavg" if "fedavg" in names else names[0])
    finals: list[dict[int, float]] = [{} for _ in points]
    for row in rows:
        if row["status"] == "done" and row["accuracy_final"] is not None:
            finals[row["point"]][row["seed"]] = row["accuracy_final"]
    reference = {points[n].get(OMEGA): n for n in reversed(range(len(points))) if names[n] == against}
    sections: dict[float | None, list[Compared]] = {}
    for number, point in enumerate(points):
        omega, own = point.get(OMEGA), finals[number]
        other = finals[reference[omega]] if omega in reference else {}
        paired = None if reference.get(omega) == number else [own[seed] - other[seed] for seed in own if seed in other]
        trials = [row for row in rows if row["point"] == number and row["status"] == "done"]
        alone = {name: value for name, value in point.items() if name not in (*NAMED, *ALIASES)}
        method = Compared(names[number], trials, own, paired, _steps(config, point), alone)
        sections.setdefault(omega, []).append(method)
    return Comparison(against, sorted({row["seed"] for row in rows}), sections)


def _steps(config: ExperimentConfig | None, point: Mapping[str, Any]) -> float | None:
    try:
        return None if config is None else client_steps(override(config, point))
    except RequestError:  # of another version, or a plug-in that is not at hand
        return None
