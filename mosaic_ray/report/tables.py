"""Build tables for a terminal of 80 columns or more, with or without colour."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..core.types import ROLES, Finding
from ..core.units import size
from ..runs.plan import StageWork
from ..runs.summary import ClientRecord, CommunicationRecord, StageRecord, Summary
from .text import percent

#: Most findings in the closing table; summary.json has all.
MOST_FINDINGS = 12

#: The most sets of modalities whose accuracies are listed one by one.
MOST_SUBSETS = 7

#: What stands beside every ceiling.
CEILING = "ceiling: reads all clients' images; not a federated method"

SEVERITIES = {"error": "bold red", "warning": "yellow", "info": "dim"}


def _table(first: str, *columns: str, gap: int = 2, words: str | None = None) -> Table:
    """Return an empty table with a column of names, then of numbers, ``gap`` spaces apart, then of ``words``."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 0, 0, gap - 1))
    table.add_column(Text(first), no_wrap=True)
    for column in columns:
        table.add_column(Text(column), justify="right", overflow="fold")  # never lose a digit
    if words is not None:
        table.add_column(Text(words))
    return table


def closing_table(content: Mapping[str, Any]) -> RenderableType:
    """Show a run's accuracies, its cost, its health findings and the places of its files; summary.json's ``content``.

    Print it with ``crop=False``: paths are never broken.
    """
    summary = Summary.from_json(content)
    parts: list[RenderableType] = [_accuracy(summary), ""]
    if (summary.accuracy or {}).get("ceiling") is not None:
        parts.insert(1, Text(f"* {CEILING}"))
    more = [client_rows(summary.client_accuracy)] if summary.client_accuracy else []
    more += [subset_rows(summary.subset_accuracy)] if summary.subset_accuracy else []
    for heads, rows in more:
        table = _table(*heads)
        for label, *cells in rows:
            table.add_row(Text(label), *cells)
        parts += [table, ""]
    if summary.stages:
        parts += [_stages(summary.stages), ""]
    if summary.communication_bytes:
        modalities = (summary.communication and summary.communication.modalities) or []
        parts += [_communication(summary.communication_bytes, modalities), ""]
    if summary.communication:
        parts += [_comparison(summary.communication), ""]
    if summary.health:
        parts += [*_health(summary.health), ""]
    return Group(*parts, *_places(summary.paths or {}))


def subset_rows(found: Mapping[str, Mapping[str, float]]) -> tuple[list[str], list[list[str]]]:
    """Return the heads and rows of the table of accuracies by the modalities that are there, small sets first.

    Of more than ``MOST_SUBSETS`` sets the table has single modalities and all of them, and means by their number.
    """
    roles = [role for role in ROLES if role in found]
    names = list(next(iter(found.values())))
    rows = {name: [name] for name in names}
    if len(names) > MOST_SUBSETS:
        by_size: dict[int, list[str]] = {}
        for name in names:
            by_size.setdefault(1 + name.count("+"), []).append(name)
        largest = max(by_size)
        rows = {name: [name] for name in by_size[1]} | {
            f"mean of {len(group)} sets of {size}": group for size, group in by_size.items() if size < largest
        } | {"all of them": by_size[largest]}
    rows["mean over all sets"] = names
    cells = [
        [label, *(percent(sum(found[role][name] for name in group) / len(group)) for role in roles)]
        for label, group in rows.items()
    ]
    return ["modalities that are there", *roles], cells


def _accuracy(summary: Summary) -> Table:
    values = summary.accuracy or {}
    federation = (summary.config or {}).get("federation", {})
    strategy = federation.get("strategy") or federation.get("optimiser", "fedavg")  # an older name
    strategy = {"fedavg": "FedAvg"}.get(strategy, strategy)
    rows = {
        "initial": f"{strategy} after the warm-up",
        "teacher": "teacher",
        "distilled": "student, distilled",
        "final": "student after the closing rounds (final)",
        "control": f"{strategy} after the same rounds (control)",
    }
    if values.get("server_student") is not None:
        rows["server_student"] = "network that no client holds"
    if values.get("ceiling") is not None:
        rows["ceiling"] = "linear probe (ceiling)*"
    seed = "-" if summary.seed is None else summary.seed
    table = _table(f"{summary.method or 'run'}, seed {seed}", "test accuracy", "gain over control")
    final, control = values.get("final"), values.get("control")
    if summary.personal_accuracy is not None:
        rows["personal"] = "clients' own models after the warm-up, on own classes"
        values = values | {"personal": summary.personal_accuracy.own}
    for key, label in rows.items():
        gain, value = "", values.get(key)
        if key in ("teacher", "distilled") and value is None:  # the method has none
            continue
        if key == "final" and final is not None and control is not None:
            gain = f"{100 * (final - control):+.1f} points"
        shown = "-" if value is None else f"{100 * value:.1f} %"
        table.add_row(Text(label), shown, gain, style="bold" if key == "final" else "")
    return table


def client_rows(record: ClientRecord) -> tuple[list[str], list[list[str]]]:
    """Return the heads and the rows of the table of accuracies at the clients, over all and by network and width."""
    names = {"own": "own models after the warm-up", "final": "final model", "adapted": "final model, adapted"}
    groups = {f", {g['classifier']} of width {g['width']:g} ({g['clients']})": g for g in record.groups}
    rows = [
        [names.get(name, name) + which] + [f"{100 * value:.1f} %" for value in figures[name].values()]
        for name in record.all
        for which, figures in ({"": record.all} | (groups if len(groups) > 1 else {})).items() if figures[name]
    ]  # fmt: skip
    return ["at the clients, on own classes", "mean", "sd", "worst tenth"], rows


def _stages(stages: Mapping[str, StageRecord]) -> Table:
    table = _table("stage", "seconds", "")
    for name, record in stages.items():
        table.add_row(Text(name), _seconds(record.seconds), "cached" if record.cached else "computed")
    total = sum(record.seconds or 0.0 for record in stages.values() if not record.cached)
    table.add_row("computed in this run", _seconds(total), "", style="bold")
    return table


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _communication(moved: Mapping[str, Mapping[str, float]], modalities: Sequence[Mapping[str, Any]] = ()) -> Table:
    up, down = moved.get("uplink", {}), moved.get("downlink", {})
    table = _table("communication", "uplink", "downlink")
    for kind in dict.fromkeys([*up, *down]):
        table.add_row(Text(kind), size(up.get(kind, 0)), size(down.get(kind, 0)))
        for row in modalities if kind == "weights" else ():
            what = f"of {row['modality']}, {row['clients']} clients" if row["modality"] else "of what all share"
            table.add_row(Text(f"  {what}", style="dim"), size(row["uplink"]), size(row["downlink"]))
    table.add_row("total", size(sum(up.values())), size(sum(down.values())), style="bold")
    return table


def _comparison(record: CommunicationRecord) -> Text:
    """Compare all bytes with the predicted ones, and with the bytes of FedAvg and FedRolex in the same rounds."""
    share, total = record.measured_over_predicted, record.total or 0.0
    words = [] if share is None else [f"{100 * share:.1f} % of what arithmetic predicts"]
    for name, ways in (record.baselines or {}).items():
        words.append(f"{total / sum(sum(kinds.values()) for kinds in ways.values()):.2f} of {name}'s")
    return Text(f"{size(total)} in all: {'; '.join(words)}")


def worst_first(findings: list[Finding]) -> list[Finding]:
    return sorted(findings, key=lambda finding: list(SEVERITIES).index(finding.severity))


def _health(findings: list[Finding]) -> list[RenderableType]:
    """Show findings, the worst first; each advice only once."""
    findings = worst_first(findings)
    table = _table("health", words="where")
    table.add_column("")
    advised: set[str] = set()
    for finding in findings[:MOST_FINDINGS]:
        severity, advice = finding.severity, finding.advice
        where = finding.stage + (f", client {finding.client}" if finding.client >= 0 else "")
        words = [finding.message, *([advice] if advice and advice not in advised else [])]
        advised.add(advice)
        table.add_row(Text(severity, style=SEVERITIES[severity]), Text(where), Text("; ".join(words)))
    left = len(findings) - MOST_FINDINGS
    return [table, Text(f"and {left} more in summary.json")] if left > 0 else [table]


def _places(paths: Mapping[str, str]) -> list[RenderableType]:
    lines = [("files", paths.get("run", ""))]
    if board := paths.get("tensorboard"):
        lines.append(("curves", shlex.join(["tensorboard", "--logdir", board])))
    return [Text(f"{what:<8}{text}", no_wrap=True, overflow="ignore") for what, text in lines if text]


def partition_table(counts: np.ndarray, modalities: Sequence[Sequence[str]] = ()) -> RenderableType:
    """Show ``counts`` [clients, classes] as a table; for more than 10 classes only each client's largest ones.

    ``modalities``: those of each client, which are shown where there are several.
    """
    counts = np.asarray(counts)
    num_clients, num_classes = counts.shape
    sizes, held = counts.sum(axis=1), (counts > 0).sum(axis=1)
    head, every = (["modalities"], [""]) if modalities else ([], [])
    own = [[Text("+".join(names))] for names in modalities] or [[]] * num_clients
    if num_classes <= 10:
        table = _table("client", *map(str, range(num_classes)), "all", *head, gap=1)
        for client, row in enumerate(counts):
            table.add_row(str(client), *("." if n == 0 else str(n) for n in row), str(sizes[client]), *own[client])
        table.add_row("all", *map(str, counts.sum(axis=0)), str(sizes.sum()), *every, style="bold")
    else:
        table = _table("client", "samples", "classes", "largest (class: samples)", *head)
        for client, row in enumerate(counts):
            largest = [c for c in np.argsort(-row, kind="stable")[:4] if row[c]]
            shown = ", ".join(f"{c}: {row[c]}" for c in largest)
            table.add_row(str(client), str(sizes[client]), str(held[client]), shown, *own[client])
        table.add_row("all", str(sizes.sum()), str((counts.sum(axis=0) > 0).sum()), "", *every, style="bold")
    facts = (
        f"{num_clients} clients hold {sizes.min()} to {sizes.max()} samples (median {np.median(sizes):g}), "
        f"of {held.min()} to {held.max()} of {num_classes} classes"
    )
    return Group(table, "", Text(facts))


def work_table(rows: Sequence[StageWork]) -> RenderableType:
    """Show by stage the results that are needed, the distinct ones to compute, their work, and the stored ones."""
    any_stored = any(row.stored for row in rows)
    table = _table("stage", "asked for", "computed", "work", *(["in the store"] if any_stored else []))
    for row in rows:
        amounts = ", ".join(f"{amount:,} {unit}" for unit, amount in row.work.items())
        stored = [f"{row.stored:,}"] if any_stored else []
        table.add_row(Text(row.stage), f"{row.asked:,}", f"{row.unique:,}", amounts if row.unique else "-", *stored)
    return table
