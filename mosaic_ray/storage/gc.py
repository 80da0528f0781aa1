"""List the content of a storage and its owners, collect garbage, verify checksums: the backend of `mosaic store`."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from ..core.errors import RequestError, RunError
from ..core.untrusted import parse_json
from .filesystem import ABANDONED_SECONDS, TEMPORARY, Stored
from .locks import LEASES, key_of
from .store import CHECKPOINTS, FOLDERS, MANIFEST, OBJECTS, DamagedFile, Store
from .uri import reason

#: (content of a summary.json, store, stored keys) -> the keys that the run uses, and whether the list is complete.
Trace = Callable[[Mapping[str, Any], Store, Container[str]], tuple[set[str], bool]]

_WORKERS = 8  # threads that read; hashing and network waits release the GIL
_ATTEMPTS = 3  # at reading a result that a living writer replaces meanwhile
_GC = "gc"  # key of the lease that garbage collection holds

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Entry:
    """A stage result or a checkpoint, with its files by name relative to the storage."""

    kind: str
    key: str
    files: Mapping[str, Stored]

    @property
    def folder(self) -> str:
        return f"{self.kind}/{self.key}"

    @property
    def stage(self) -> str:
        return self.key.rpartition("-")[0]

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files.values())

    @property
    def modified(self) -> float:
        """Time of the last write, in seconds since 1970."""
        return max(file.modified for file in self.files.values())

    @property
    def finished(self) -> bool:
        """Whether its manifest exists."""
        return f"{self.folder}/{MANIFEST}" in self.files


@dataclass(frozen=True)
class Owner:
    """A run, trial or experiment that uses the results ``keys``; ``complete``: its summary names all of them."""

    name: str
    status: str
    keys: frozenset[str]
    complete: bool


@dataclass(frozen=True)
class Inventory:
    """The content of a storage."""

    entries: list[Entry]
    owners: list[Owner]
    others: dict[str, Stored]  # files of runs and sweeps, and leftovers of killed writers

    def of(self, kind: str) -> list[Entry]:
        return [entry for entry in self.entries if entry.kind == kind]

    def used_by(self) -> dict[str, list[str]]:
        """Map each used key to the names of its owners."""
        found: dict[str, list[str]] = {}
        for owner in self.owners:
            for key in owner.keys:
                found.setdefault(key, []).append(owner.name)
        return found


@dataclass(frozen=True)
class Garbage:
    """Something to delete: its kind ``what``, the ``name`` of its file or folder, the reason, its size in bytes."""

    what: str
    name: str
    why: str
    size: int
    entry: Entry | None = None


@dataclass(frozen=True)
class Plan:
    """Garbage to delete, and by reason the unused entries that are kept for now."""

    free: list[Garbage]
    kept: dict[str, list[Entry]]


def scan(store: Store, trace: Trace | None) -> Inventory:
    """List everything in ``store``; ``RequestError`` for a summary.json that cannot be parsed.

    Without ``trace`` no summary is read, and there are no owners.
    """
    files: dict[str, Stored] = {}
    for kind in (OBJECTS, CHECKPOINTS, *(("runs", "sweeps", "experiments") if store.local_root else ())):
        with _reading(store, kind):
            files |= store.files.tree(kind)
    folders: dict[tuple[str, str], dict[str, Stored]] = {}
    others = {}
    for name, file in files.items():
        kind, *parents, _ = name.split("/")
        if kind in (OBJECTS, CHECKPOINTS) and len(parents) == 1 and not parents[0].startswith("."):
            folders.setdefault((kind, parents[0]), {})[name] = file
        else:
            others[name] = file
    entries = [Entry(kind, key, found) for (kind, key), found in sorted(folders.items())]
    stored = {entry.key for entry in entries if entry.kind == OBJECTS and entry.finished}
    return Inventory(entries, _owners(store, trace, stored) if trace else [], others)


def _places(store: Store) -> dict[str, str]:
    """Return the folders of runs and trials by their names."""
    places = {f"run {name}": f"runs/{name}" for name in _names(store, "runs")}
    for sweep in _names(store, "sweeps"):
        trials = f"sweeps/{sweep}/trials"
        places |= {f"sweep {sweep}, trial {trial}": f"{trials}/{trial}" for trial in _names(store, trials)}
    return places


def _owners(store: Store, trace: Trace, stored: Container[str]) -> list[Owner]:
    places, owners = _places(store), []
    for name, summary in zip(places, _map(lambda place: _summary(store, place), places.values()), strict=True):
        if summary is not None:
            try:
                keys, complete = trace(summary, store, stored)
            except (TypeError, KeyError, AttributeError, ValueError, RecursionError):
                raise _invalid(store, places[name]) from None
            owners.append(Owner(name, str(summary.get("status")), frozenset(keys), complete))
    for name in _names(store, "experiments"):
        results = _summary(store, f"experiments/{name}", "results.json")
        if results is not None:
            keys = results.get("keys", [])
            if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
                raise _invalid(store, f"experiments/{name}", "results.json")
            owners.append(Owner(f"experiment {name}", "done", frozenset(keys), True))
    return owners


def _names(store: Store, folder: str) -> list[str]:
    with contextlib.suppress(NotADirectoryError), _reading(store, folder):
        return sorted(store.files.names(folder))
    return []


def _summary(store: Store, place: str, file: str = "summary.json") -> dict[str, Any] | None:
    try:
        with _reading(store, place):
            return parse_json(store.files.read(f"{place}/{file}"))
    except (FileNotFoundError, NotADirectoryError):  # still running, or killed
        return None
    except ValueError:
        raise _invalid(store, place, file) from None


def _invalid(store: Store, place: str, file: str = "summary.json") -> RequestError:
    return RequestError(
        f"--storage {store.uri}: {place}/{file} is not whole, so the results that the run uses are unknown; "
        "run it again, or remove its folder"
    )


@contextlib.contextmanager
def _reading(store: Store, what: str) -> Iterator[None]:
    """Turn a storage error in the block into ``RunError``, but not a missing file."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError as error:
        raise RunError(f"storage {store.uri}: {reason(error)} while reading {what}") from error


def _map(work: Callable[[T], R], items: Iterable[T]) -> list[R]:
    with ThreadPoolExecutor(_WORKERS) as pool:
        return list(pool.map(work, items))


def plan(
    inventory: Inventory,
    leases: Mapping[str, bool],
    named: Mapping[str, Container[str]],
    older_than: float,
    now: float,
) -> Plan:
    """Choose the results to delete; a pure function.

    ``leases``: lease files, and whether their holders live. ``named``: folder -> files that its manifest names.
    ``older_than``: age in seconds up to which results without an owner are kept. ``now``: seconds since 1970.
    """
    used = set().union(*(owner.keys for owner in inventory.owners)) if inventory.owners else set()
    incomplete = [owner.name for owner in inventory.owners if not owner.complete]
    held = {key_of(name) for name, lives in leases.items() if lives} - {"", _GC}
    finished = {entry.key for entry in inventory.of(OBJECTS) if entry.finished}
    free: list[Garbage] = []
    kept: dict[str, list[Entry]] = {}
    for entry in inventory.entries:
        is_result = entry.kind == OBJECTS
        if entry.key in held:
            why = "somebody computes it right now"
        elif is_result and entry.finished and entry.key in used:
            if old := _unnamed(entry, named.get(entry.folder, entry.files), now - older_than):
                size = sum(entry.files[name].size for name in old)
                free.append(Garbage("files", entry.folder, f"{len(old)} that its manifest does not name", size, entry))
            continue
        elif not is_result and entry.key in finished:
            free.append(Garbage("checkpoint", entry.folder, "its stage is finished", entry.size, entry))
            continue
        elif now - entry.modified < older_than:
            why = "younger than --older-than; an unfinished run may need it"
        elif held:  # earlier results of running runs are in no summary yet
            why = f"runs are at work in this storage ({', '.join(sorted(held)[:2])}) and may need it"
        elif incomplete and entry.stage in ("generator", "judged"):
            why = f"{incomplete[0]} may use it: its summary.json is incomplete"
        else:
            what = "result" if is_result else "checkpoint"
            why = "no run or trial uses it" if entry.finished else "it was never finished"
            free.append(Garbage(what, entry.folder, why, entry.size, entry))
            continue
        kept.setdefault(why, []).append(entry)
    gone = {name for item in free if item.entry and item.what != "files" for name in item.entry.files}
    inside = {name: file for entry in inventory.entries for name, file in entry.files.items() if name not in gone}
    for name, file in (inside | inventory.others).items():
        is_leftover = TEMPORARY.search(name) or name.startswith(f"{OBJECTS}/.probe-")
        if is_leftover and now - file.modified > ABANDONED_SECONDS:
            free.append(Garbage("temporary file", name, "its writer was killed", file.size))
    free += [
        Garbage("lease", f"{LEASES}/{name}", "its holder is gone", 0) for name, lives in leases.items() if not lives
    ]
    return Plan(free, kept)


def _unnamed(entry: Entry, named: Container[str], before: float) -> list[str]:
    """Return the payloads of a result that its manifest does not name, last written ``before`` (seconds since 1970)."""
    return [
        name
        for name, file in entry.files.items()
        if name.rpartition("/")[2].startswith("part-") and not TEMPORARY.search(name) and name not in named
        if file.modified < before
    ]


def collect_garbage(store: Store, trace: Trace, older_than: float, *, dry_run: bool) -> Plan:
    """Delete results that no run or trial needs, and return them; with ``dry_run`` only return them."""
    if dry_run:
        return _make_plan(store, trace, older_than)
    lease = store.try_lease(_GC)
    if lease is None:
        raise RequestError(f"--storage {store.uri}: another `mosaic store gc` is at work in it; wait for it to end")
    with lease:
        made = _make_plan(store, trace, older_than)
        try:
            freed = [item for item in made.free if _remove(store, item, older_than)]
        except OSError as error:
            raise RunError(f"storage {store.uri}: {reason(error)} while freeing") from error
    return Plan(freed, made.kept)


def _make_plan(store: Store, trace: Trace, older_than: float) -> Plan:
    # Leases first: a lease that is released later means a new result, which is then young enough to be kept.
    leases = {name: lives for name, lives in store.leases.scan().items() if not (lives and key_of(name) == _GC)}
    inventory = scan(store, trace)
    used = inventory.used_by()
    asked = [entry for entry in inventory.of(OBJECTS) if entry.finished and entry.key in used]
    named = dict(zip((entry.folder for entry in asked), _map(lambda e: _named(store, e), asked), strict=True))
    return plan(inventory, leases, named, older_than, time.time())


def _named(store: Store, entry: Entry) -> Container[str]:
    """Return the files that an entry's manifest names; all files if the manifest is damaged or missing."""
    with contextlib.suppress(DamagedFile):
        if manifest := store.manifest(entry.kind, entry.key):
            return {f"{entry.folder}/{file['name']}" for file in manifest["files"].values()}
    return entry.files


def _remove(store: Store, item: Garbage, older_than: float) -> bool:
    """Delete ``item``; False if its key was leased or its files changed since the inventory."""
    if item.what == "lease":
        store.leases.clear(item.name.partition("/")[2])
        return True
    entry = item.entry
    if entry is None:
        store.files.delete(item.name)
        return True
    lease = store.try_lease(entry.key)
    if lease is None:
        return False
    with lease:
        if store.files.tree(entry.folder) != entry.files:
            return False
        if item.what == "files":
            for name in _unnamed(entry, _named(store, entry), time.time() - older_than):
                store.files.delete(name)
        else:
            store.files.delete(f"{entry.folder}/{MANIFEST}")  # first: without a manifest the rest is no result
            store.files.delete_folder(entry.folder)
    return True


@dataclass(frozen=True)
class Verdict:
    """Number of entries and bytes that were hashed, and damaged folders with the reason."""

    results: int
    size: int
    damaged: dict[str, str]


def verify(store: Store) -> Verdict:
    """Hash every byte of every finished result and checkpoint; list what is neither a file nor a folder, too."""
    asked = [entry for entry in scan(store, None).entries if entry.finished]
    reasons = _map(lambda entry: _damage(store, entry), asked)
    damaged = {entry.folder: why for entry, why in zip(asked, reasons, strict=True) if why}
    for folder in FOLDERS:
        with _reading(store, folder):
            damaged |= store.files.strange(folder, {LEASES: 0, OBJECTS: 1, CHECKPOINTS: 1}.get(folder, math.inf))
    if not damaged:  # folders that are links cannot be listed
        records = [(place, "summary.json") for place in _places(store).values()]
        records += [(f"experiments/{name}", "results.json") for name in _names(store, "experiments")]
        for place, file in records:
            try:
                _summary(store, place, file)
            except (RequestError, RunError):
                damaged[f"{place}/{file}"] = "it is not whole"
    return Verdict(len(asked), sum(entry.size for entry in asked), damaged)


def _damage(store: Store, entry: Entry) -> str | None:
    def content() -> bytes | None:
        with contextlib.suppress(OSError):
            return store.files.read(f"{entry.folder}/{MANIFEST}")
        return None

    for _ in range(_ATTEMPTS):
        before = content()
        try:
            if manifest := store.manifest(entry.kind, entry.key):
                store.verify(entry.kind, manifest)
            return None
        except DamagedFile as damage:
            why = "{}: {}".format(*damage.args)
        if content() == before:
            return why
    return None  # a living writer keeps replacing it, like a checkpoint
