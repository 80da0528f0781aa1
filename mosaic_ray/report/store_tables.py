"""Build the output of `mosaic store`: tables for a terminal, and the same as JSON."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from ..core.text import visible
from ..core.units import size
from ..runs.provenance import UNNAMED
from ..storage.gc import Entry, Garbage, Inventory, Plan, Verdict
from ..storage.store import CHECKPOINTS, OBJECTS
from .tables import _table
from .text import counted

#: Most users of a result that are named; the others are counted.
MOST_USERS = 2


def listing(holdings: Inventory) -> list[RenderableType | str]:
    """List every result with its time, size and users. A run's per-client results share a row."""
    users = holdings.used_by()
    rows: dict[Any, list[Entry]] = {}
    for entry in holdings.entries:
        together = (entry.kind, entry.stage, *users.get(entry.key, ())) if entry.stage in UNNAMED else entry.folder
        rows.setdefault(together, []).append(entry)
    table = _table("result", "size", "when", words="used by")
    for entries in sorted(rows.values(), key=lambda found: max(entry.modified for entry in found)):
        first = entries[0]
        name = first.key if len(entries) == 1 else f"{first.stage}-... ({len(entries)} of them)"
        when = datetime.fromtimestamp(max(entry.modified for entry in entries)).strftime("%Y-%m-%d %H:%M")
        whose = visible(_whose(first, users), "")
        table.add_row(Text(visible(name, "")), size(_bytes(entries)), when, Text(whose))
    return [table, "", _totals(holdings)] if rows else ["no results"]


def _whose(entry: Entry, users: dict[str, list[str]]) -> str:
    if not entry.finished:
        return "unfinished"
    if entry.kind == CHECKPOINTS:
        return "checkpoint"
    names = users.get(entry.key, [])
    more = f" and {len(names) - MOST_USERS} more" if len(names) > MOST_USERS else ""
    return ", ".join(names[:MOST_USERS]) + more or "nobody"


def _totals(holdings: Inventory) -> str:
    used, results, checkpoints = holdings.used_by(), holdings.of(OBJECTS), holdings.of(CHECKPOINTS)
    idle = [entry for entry in results if entry.key not in used]
    runs = sum(owner.name.startswith("run ") for owner in holdings.owners)
    trials = counted(len(holdings.owners) - runs, "trial")
    parts = [f"{_sum(results, 'result')}, used by {counted(runs, 'run')} and {trials}"]
    if idle:
        parts.append(f"{_sum(idle, 'result')} used by nobody (`mosaic store gc` frees what no run needs)")
    if checkpoints:
        parts.append(_sum(checkpoints, "checkpoint"))
    return "; ".join(parts)


def _sum(entries: Sequence[Entry], word: str) -> str:
    return f"{counted(len(entries), word)}, {size(_bytes(entries))}"


def listed(holdings: Inventory) -> dict[str, Any]:
    """Return the content of ``--json``, with every key in its own entry."""
    users = holdings.used_by()
    return {
        "results": [_facts(entry) | {"used_by": users.get(entry.key, [])} for entry in holdings.of(OBJECTS)],
        "checkpoints": [_facts(entry) for entry in holdings.of(CHECKPOINTS)],
        "users": [{"name": owner.name, "status": owner.status, "traced": owner.complete} for owner in holdings.owners],
        "bytes": _bytes(holdings.entries),
    }


def _facts(entry: Entry) -> dict[str, Any]:
    return {
        "key": entry.key, "stage": entry.stage, "bytes": entry.size, "whole": entry.finished,
        "when": datetime.fromtimestamp(entry.modified).astimezone().isoformat(timespec="seconds"),
    }  # fmt: skip


def freed(plan: Plan, dry_run: bool) -> list[RenderableType | str]:
    """List the freed results (those to free, with ``dry_run``), and those that stay."""
    word = "would free" if dry_run else "freed"
    parts: list[RenderableType | str] = []
    if plan.free:
        table = _table(word, "size", words="why")
        for item in plan.free:
            table.add_row(Text(visible(f"{item.what} {item.name}", "")), size(item.size), Text(item.why))
        parts += [table, ""]
    parts.append(f"{word} {size(_bytes(plan.free))} in {counted(len(plan.free), 'place')}")
    parts += [f"stays: {_sum(entries, 'result')}: {why}" for why, entries in _sorted(plan)]
    return parts


def _bytes(items: Iterable[Entry | Garbage]) -> int:
    return sum(item.size for item in items)


def _sorted(plan: Plan) -> list[tuple[str, list[Entry]]]:
    return sorted(plan.kept.items(), key=lambda item: -_bytes(item[1]))


def freed_facts(plan: Plan, dry_run: bool) -> dict[str, Any]:
    """Return the content of ``--json``."""
    return {
        "dry_run": dry_run,
        "freed": [{"what": x.what, "name": x.name, "bytes": x.size, "why": x.why} for x in plan.free],
        "bytes": _bytes(plan.free),
        "stays": [
            {"why": why, "names": [entry.folder for entry in entries], "bytes": _bytes(entries)}
            for why, entries in _sorted(plan)
        ],
    }


def verdict(found: Verdict) -> list[RenderableType | str]:
    """List the damaged results, and count all that were checked."""
    checked = f"{found.results:,} results and checkpoints, {size(found.size)} hashed"
    if not found.damaged:
        return [f"{checked}: all sound"]
    table = _table("damaged", words="why")
    for folder, why in found.damaged.items():
        table.add_row(Text(visible(folder, "")), Text(visible(why, "")))
    return [table, "", f"{checked}: {len(found.damaged):,} damaged; a run that needs one computes it again"]
