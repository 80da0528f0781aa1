"""List the runs of a storage, or the trials of a sweep, by an index that is made again where it does not fit.

The index holds a row for each run, and the size and the time of the file that the row was read from. Anybody may have
written it: a row that does not fit its type, or its file, is read again, and no name in it is ever opened.
"""

from __future__ import annotations

import contextlib
import json
import os
import tomllib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Annotated, Any

from ..config.registry import STATUSES
from ..config.resolve import MOST_TOML, dotted
from ..core.errors import RequestError, neighbours
from ..core.serialization import from_json
from ..core.untrusted import parse_json
from ..storage.locks import key_of
from ..storage.store import Store
from ..storage.uri import reason
from .summary import Amount, Share

#: Name of the index: at the root of a storage for its runs, in a sweep's folder for its trials.
INDEX = "index.json"
#: Raise it when rows change: older indices are then made again.
VERSION = 1
#: Bytes of the largest index that is read or written; a run takes about 400.
MOST_BYTES = 64 << 20

_MOST_TIME = 250e9  # seconds since 1970 that a date can hold
_THREADS = 8  # that read from a bucket
_UNREADABLE = (OSError, ValueError, TypeError, AttributeError, RecursionError)  # files of others


@dataclass(frozen=True, kw_only=True)
class RunRow:
    """A run or a trial; ``status``: one of ``STATUSES``.

    ``modified``: seconds since 1970 of its end, of its start if it has not ended.

    ``hours`` add up what its stages took to compute, also where an earlier run computed them.
    """

    name: str
    modified: Annotated[float, (0.0, _MOST_TIME)] = 0.0
    status: str = "interrupted"
    data: str | None = None
    method: str | None = None
    strategy: str | None = None
    clients: int | None = None
    omega: Amount | None = None
    seed: int | None = None
    preset: str | None = None
    accuracy: dict[str, Share | None] | None = None
    hours: Amount | None = None

    @property
    def label(self) -> str:
        """Return method and strategy as `mosaic compare --methods` takes them, the shortest spelling."""
        if self.strategy in (None, "", "fedavg"):
            return self.method or ""
        return self.strategy if self.method == "fedavg" else f"{self.method}+{self.strategy}"

    def reached(self, role: str) -> float | None:
        """Return the test accuracy in [0, 1] of a role's model."""
        return (self.accuracy or {}).get(role)


@dataclass(frozen=True, kw_only=True)
class _Stage:
    seconds: Amount | None = None
    computed_seconds: Amount | None = None


@dataclass(frozen=True, kw_only=True)
class _Summary:
    """The part of summary.json that a row needs."""

    status: str | None = None
    method: str | None = None
    seed: int | None = None
    preset: str | None = None
    accuracy: dict[str, Share | None] | None = None
    stages: dict[str, _Stage] | None = None
    config: dict[str, Any] | None = None


def lease_of(place: str) -> str:
    """Return the key that a process leases while it works on the run ``runs/NAME`` or on the sweep ``sweeps/NAME``."""
    kind, name = place.split("/")[:2]
    return f"{kind.removesuffix('s')}-{name}"


def living(store: Store) -> set[str]:
    """Return the leased keys of a local ``store``; a bucket gets a run's files at its end, so there are none."""
    with contextlib.suppress(OSError):
        return {key_of(name) for name, lives in store.leases.scan().items() if lives} if store.local_root else set()
    return set()


def sweeps_of(store: Store) -> list[str]:
    """Return the names of the sweeps in ``store``."""
    return sorted(_names(store, "sweeps"))


def list_runs(store: Store, sweep: str | None = None) -> list[RunRow]:
    """Return the runs in ``store``, newest first; with ``sweep`` its trials.

    ``RequestError`` where there is no such sweep, or where the storage does not answer.
    """
    if sweep is not None and sweep not in (known := sweeps_of(store)):
        near = neighbours(sweep, known, "`mosaic runs`") if known else "there is none"
        raise RequestError(f"--sweep {sweep}: no such sweep in {store.uri}; {near}")
    below = "runs" if sweep is None else f"sweeps/{sweep}/trials"
    rows, leased = _rows(store, below), living(store)
    for number, row in enumerate(rows):
        # a finished trial of a sweep at work stays as it is
        if lease_of(f"{below}/{row.name}") in leased and (sweep is None or row.status == "interrupted"):
            rows[number] = replace(row, status="running")
    return sorted(rows, key=lambda row: (-row.modified, row.name))


def _names(store: Store, folder: str) -> list[str]:
    with _listing(store, folder):
        return store.files.names(folder)
    return []


@contextlib.contextmanager
def _listing(store: Store, folder: str) -> Iterator[None]:
    try:
        yield
    except NotADirectoryError:
        pass
    except OSError as error:
        raise RequestError(f"--storage {store.uri}: {folder} cannot be listed: {reason(error)}") from None


def _rows(store: Store, below: str) -> list[RunRow]:
    """Return the rows of all runs in a folder; files are opened only of those that the index lacks."""
    place = f"{os.path.dirname(below)}/{INDEX}".lstrip("/")
    index, stamps, rows = _load(store, place), _stamps(store, below), dict[str, RunRow]()
    for name, stamp in stamps.items():
        entry = index.get(name)
        if isinstance(entry, dict) and entry.get("stamp") == stamp and entry.get("name") == name:
            with contextlib.suppress(ValueError):
                rows[name] = _row(entry)
    left = [name for name in stamps if name not in rows]
    with ThreadPoolExecutor(1 if store.local_root else _THREADS) as pool:
        rows |= zip(left, pool.map(lambda name: _read(store, below, name, stamps[name][0] / 1e9), left), strict=True)
    sound = {name: row for name, row in rows.items() if row.status != "damaged" and name.isprintable()}
    kept = {name: {"stamp": stamps[name]} | vars(row) for name, row in sound.items()}
    if kept != index:
        data = json.dumps({"version": VERSION, "runs": kept}, separators=(",", ":")).encode()
        with contextlib.suppress(OSError):  # a storage that is full or may only be read
            if len(data) <= MOST_BYTES:
                store.files.put(place, data)
    return list(rows.values())


def _row(found: Mapping[str, Any]) -> RunRow:
    """Return a row that fits its types, else raise ``ValueError``."""
    row: RunRow = from_json(RunRow, found)
    if row.status not in STATUSES:
        raise ValueError("status")
    return row


def _load(store: Store, place: str) -> Mapping[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        found = parse_json(store.files.read(place, MOST_BYTES))
        if found.get("version") == VERSION and isinstance(found.get("runs"), dict):
            return found["runs"]
    return {}


def _stamps(store: Store, below: str) -> dict[str, list[int]]:
    """Return the time [ns since 1970] and the size of the summary.json, else of the config.toml, of every run."""
    found: dict[str, list[int]] = {}
    if store.local_root is None:
        with _listing(store, below):
            for path, stored in store.files.tree(below).items():
                (above, _, name), file = path.rpartition("/")[0].rpartition("/"), path.rpartition("/")[2]
                if above == below and (file == "summary.json" or (file == "config.toml" and name not in found)):
                    found[name] = [round(stored.modified * 1e9), stored.size]
        return found
    for name in _names(store, below):
        for file in ("summary.json", "config.toml"):
            with contextlib.suppress(OSError, ValueError):
                info = os.lstat(store.files.path(f"{below}/{name}/{file}"))
                found[name] = [info.st_mtime_ns, info.st_size]
                break
    return found


def _read(store: Store, below: str, name: str, modified: float) -> RunRow:
    """Read the files of a run."""
    place, summary = f"{below}/{name}", _Summary()
    modified = min(max(modified, 0.0), _MOST_TIME)
    try:
        try:
            summary = from_json(_Summary, parse_json(store.files.read(f"{place}/summary.json")))
            knobs = dotted(summary.config or {})
        except FileNotFoundError:
            knobs = dotted(tomllib.loads(store.files.read(f"{place}/config.toml", MOST_TOML).decode()))
        spent = [stage.computed_seconds or stage.seconds or 0.0 for stage in (summary.stages or {}).values()]
        row = {
            "name": name, "modified": modified, "status": summary.status or "interrupted",
            "data": knobs.get("data.name"), "method": summary.method or knobs.get("method"),
            "strategy": knobs.get("federation.strategy", knobs.get("federation.optimiser")),
            "clients": knobs.get("partition.num_clients"), "omega": knobs.get("partition.omega"),
            "seed": knobs.get("seed") if summary.seed is None else summary.seed,
            "preset": summary.preset or knobs.get("preset"), "hours": sum(spent) / 3600 if spent else None,
            "accuracy": {role: share for role, share in (summary.accuracy or {}).items() if share is not None},
        }  # fmt: skip
        return _row(row)
    except _UNREADABLE:
        return RunRow(name=name, modified=modified, status="damaged")
