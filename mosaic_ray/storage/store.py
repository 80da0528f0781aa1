"""Store stage results under a hash of their inputs, so that killed runs resume and trials of a sweep share results.

Layout below the storage path, which is local or any URI that ``pyarrow.fs`` opens:

    objects/<key>/manifest.json                      facts, session, and each payload's name, size and SHA-256
    objects/<key>/part-<12 hex of SHA-256>.safetensors
    checkpoints/<key>/...                            the same format; a new save replaces the old one
    leases/...                                       keys that are being computed; see ``locks``

A result exists once its manifest does. The manifest is written last and atomically (a temporary file that is renamed,
or a single put), and payloads are named by content. So a kill at any moment leaves the old result or the new one, and
writers of one key cannot damage each other's files. Leftovers of killed writers are never read.

Nothing that is stored is trusted: the form of manifests, the names, kinds and sizes of files, and every byte by its
SHA-256 are checked. Anybody can write that too, so a reader of a result checks its content (``StageResult.read_as``).
What does not fit counts as damaged, and is computed again.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from ..core.errors import RequestError, RunError
from ..core.types import Weights
from ..core.untrusted import MAX_JSON, kind_of, parse_json
from .filesystem import OPENING_SECONDS, Files, answer_of
from .hashing import canonical_json, to_json_value
from .hashing import stage_key as stage_key  # part of this module's interface
from .locks import LEASES, Lease, Leases
from .uri import CREDENTIALS, join, open_uri, reason, redacted, remedy

FORMAT = 1
MANIFEST = "manifest.json"
OBJECTS, CHECKPOINTS = "objects", "checkpoints"
#: Folders below the root of a storage.
FOLDERS = (OBJECTS, CHECKPOINTS, LEASES, "runs", "sweeps", "experiments")
MIN_FREE_BYTES = 64 << 20

#: Named groups of named arrays.
Parts = Mapping[str, Mapping[str, np.ndarray]]


class CorruptResult(RunError):
    """A payload vanished or changed after ``Store.get`` verified it; the next ``get`` returns None."""

    def __init__(self, key: str, part: str, why: str, stage: str | None = None) -> None:
        super().__init__(f'stage result {key}: part "{part}" cannot be read: {" ".join(why.split())}', stage=stage)
        self.key, self.part, self.why = key, part, why

    def at(self, stage: str) -> CorruptResult:
        """Add the stage as ``RunError.at`` does, keeping the type, so that the run can start over."""
        return CorruptResult(self.key, self.part, self.why, self.stage or stage)


class DamagedFile(Exception):
    """A stored file differs from its manifest; the arguments are (file name, reason)."""


def _fault(manifest: Mapping[str, Any]) -> str:
    """Return what is wrong with the form of a manifest; empty if nothing is."""
    files = manifest.get("files")
    if not isinstance(manifest.get("facts"), dict) or not isinstance(files, dict):
        return "it has no facts or no files"
    for part, entry in files.items():
        fields = [entry.get(name) for name in ("name", "size", "sha256", "arrays")] if isinstance(entry, dict) else []
        match fields:
            case [str(name), int(size), str(digest), list(arrays)] if size >= 0 and all(map(_is_text, arrays)):
                if re.fullmatch("[0-9a-f]{64}", digest) and name == f"part-{digest[:12]}.safetensors":
                    continue
        return f"its entry of the part {part[:80]!r} is not what a store writes"
    return ""


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _names_in(path: str) -> set[str] | None:
    """Return the names of the arrays in a safetensors file; None where it is none."""
    try:
        with safetensors.safe_open(path, "np") as opened:
            return set(opened.keys())
    except (OSError, ValueError, safetensors.SafetensorError):
        return None


def _name(key: str) -> str:
    """Return ``key`` if it is a valid file name, else raise ``ValueError``."""
    if not key or key.startswith(".") or "/" in key:
        raise ValueError(f"{key!r} cannot name a stage result")
    return key


class StageResult:
    """A finished stage: ``facts`` (plain JSON), and named ``parts`` of arrays that ``load`` reads from the store."""

    def __init__(self, store: Store, folder: str, manifest: Mapping[str, Any]) -> None:
        self._store, self._folder, self._entries = store, folder, manifest["files"]
        self.key: str = manifest["key"]
        self.facts: dict[str, Any] = manifest["facts"]
        self.parts: tuple[str, ...] = tuple(self._entries)
        #: Called by ``load`` as check(part, arrays, whether their writer found them finite); raises if they are wrong.
        self.check: Callable[[str, Weights, bool], None] = lambda part, arrays, finite: None

    def load(self, part: str) -> Weights:
        """Return fresh, writable arrays of ``part``, in the order in which they were added.

        The bytes are hashed again. Raises ``CorruptResult`` if they vanished or changed since ``get``, ``RunError`` if
        the storage fails.
        """
        entry = self._entries.get(part)
        if entry is None:
            raise CorruptResult(self.key, part, "there is none")
        try:
            data = self._store.files.read(f"{self._folder}/{entry['name']}", entry["size"])
        except OSError as error:
            self._store._raise_if_storage_down(error, self._folder, self.key)
            raise CorruptResult(self.key, part, reason(error)) from None
        if hashlib.sha256(data).hexdigest() != entry["sha256"]:
            raise CorruptResult(self.key, part, "its SHA-256 differs")
        with self.read_as(part):
            loaded = safetensors.numpy.load(data)
            arrays = {name: loaded[name] for name in entry["arrays"]}
            self.check(part, arrays, entry.get("finite", True))
            return arrays

    @contextlib.contextmanager
    def read_as(self, part: str = "facts") -> Iterator[None]:
        """Raise ``CorruptResult`` for ``part`` where the block, which reads and checks the result, raises anything."""
        try:
            yield
        except (RequestError, RunError):
            raise
        except Exception as error:
            raise CorruptResult(self.key, part, f"{type(error).__name__}: {error}"[:200]) from error


class StageWriter:
    """Writes a result part by part; it becomes visible at ``commit``."""

    def __init__(self, store: Store, kind: str, key: str) -> None:
        self._store, self._kind, self._key = store, kind, _name(key)
        self._entries: dict[str, dict[str, Any]] = {}

    def add(self, part: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Write numeric ``arrays`` of any shape as one file immediately, so that the caller can free them.

        Raises ``ValueError`` for an unsupported dtype.
        """
        # safetensors writes the buffer in memory order, so a transposed view would silently be stored wrong.
        whole = {name: np.asarray(array, order="C") for name, array in arrays.items()}
        try:
            data = safetensors.numpy.save(whole)
        except safetensors.SafetensorError as error:
            shown = ", ".join(f"{name} {x.dtype}" for name, x in whole.items() if x.dtype.kind not in "biuf")
            raise ValueError(f'part "{part}" ({shown}): {error}') from None
        digest = hashlib.sha256(data).hexdigest()
        name = f"part-{digest[:12]}.safetensors"
        self._put(name, data)
        self._entries[part] = {"name": name, "size": len(data), "sha256": digest, "arrays": list(arrays)}
        if not all(np.isfinite(array).all() for array in whole.values() if array.dtype.kind == "f"):
            self._entries[part]["finite"] = False  # of a run that diverged, so that it is not taken for damage

    def commit(self, facts: Mapping[str, Any]) -> StageResult:
        """Make the result visible atomically. ``facts`` are converted to JSON types (tuples become lists)."""
        manifest = {
            "key": self._key,
            "version": FORMAT,
            "session": self._store.session,
            "facts": to_json_value(facts, "facts"),
            "files": dict(self._entries),
        }
        # Insertion order is kept on disk (it is the parts' order); the checksum is over the canonical spelling.
        sealed = manifest | {"sha256": hashlib.sha256(canonical_json(manifest)).hexdigest()}
        data = json.dumps(sealed, allow_nan=False).encode()
        if len(data) > MAX_JSON:
            raise RunError(f"the facts of {self._key} have {len(data):,} bytes; {MAX_JSON:,} can be stored")
        self._put(MANIFEST, data)
        if self._kind == OBJECTS:
            self._store.used.add(self._key)
        return StageResult(self._store, f"{self._kind}/{self._key}", manifest)

    def _put(self, name: str, data: bytes) -> None:
        try:
            self._store.files.put(f"{self._kind}/{self._key}/{name}", data)
        except OSError as error:
            raise self._store._run_error(error, f"writing {self._kind}/{self._key}", self._key) from error


class Store:
    """Results and checkpoints below ``uri``: a local path, file://, s3://, gs:// or another URI of ``pyarrow.fs``.

    Everything written is marked with ``session``, a new name for each store unless given.
    ``create=False``: raise ``RequestError`` if nothing is stored there yet.
    ``fresh``: ignore results of other sessions; writing still replaces them.
    ``log`` gets one line for every damaged result that will be computed again, and for storage that keeps failing.
    Transient errors are retried (see ``filesystem``); ``RunError`` if they last.
    """

    def __init__(
        self,
        uri: str | os.PathLike[str],
        *,
        fresh: bool = False,
        session: str | None = None,
        create: bool = True,
        log: Callable[[str], None] | None = None,
    ) -> None:
        self.uri, self.fresh = os.fspath(uri), fresh
        if (shown := redacted(self.uri)) != self.uri:
            raise RequestError(f"--storage {shown}: a URI is shown and stored, so it holds no secrets; {CREDENTIALS}")
        self.session = session or uuid.uuid4().hex
        self.log = log or (lambda text: None)
        self.used: set[str] = set()  #: keys of results that this store found or wrote
        try:
            self.files = Files(*answer_of(lambda: open_uri(self.uri)))  #: by names relative to the storage
            self.files.log = lambda text: self.log(f"{self.uri}: {text}")
            if not create and not answer_of(self._impatient_files().exists):
                raise RequestError(f"--storage {self.uri}: nothing is stored there; name where runs were stored")
            if self.files.local:
                os.makedirs(self.files.root, exist_ok=True)
                for place in map(self.files.path, FOLDERS):
                    if os.path.lexists(place) and (kind := kind_of(os.lstat(place).st_mode) or "a file") != "a folder":
                        raise RequestError(f"--storage {self.uri}: {place} is {kind}, not a folder; remove it")
            self.leases = Leases(self.files)
        except (OSError, ValueError, NotImplementedError) as error:
            raise self._request_error(error) from None

    @property
    def local_root(self) -> Path | None:
        """The storage folder if it is local, else None."""
        return Path(self.files.root) if self.files.local else None

    def _impatient_files(self) -> Files:
        """Return the same files with few retries: an error at the start is more often a wrong request."""
        return Files(self.files.filesystem, self.files.root, OPENING_SECONDS)

    def check_writable(self) -> None:
        """Raise ``RequestError`` unless a 1 MiB file can be written and a local disk has ``MIN_FREE_BYTES`` free."""
        files = self._impatient_files()
        probe = f"{OBJECTS}/.probe-{uuid.uuid4().hex}"

        def write_probe() -> None:
            files.put(probe, bytes(1 << 20))
            files.delete(probe)

        try:
            if self.files.local and (free := shutil.disk_usage(self.files.root).free) < MIN_FREE_BYTES:
                raise RequestError(
                    f"--storage {self.uri}: the disk is full ({free >> 20} MiB free, "
                    f"{MIN_FREE_BYTES >> 20} MiB needed); free some space or name another folder"
                )
            answer_of(write_probe)
        except OSError as error:
            raise self._request_error(error) from None

    def get(self, key: str) -> StageResult | None:
        """Return the result under ``key``, every byte verified; None if absent or damaged (logged and removed)."""
        found = self._get(OBJECTS, key, "stage result {} is damaged ({}: {}); computing it again")
        if found is not None:
            self.used.add(key)
        return found

    def writer(self, key: str) -> StageWriter:
        """Return a writer for a result under ``key``."""
        return StageWriter(self, OBJECTS, key)

    def put(self, key: str, facts: Mapping[str, Any], parts: Parts | None = None) -> StageResult:
        """Write a complete result."""
        return self._fill(self.writer(key), facts, parts or {})

    def discard(self, key: str) -> None:
        """Remove the result and the checkpoint under ``key``, so that it is computed again."""
        try:
            for kind in (OBJECTS, CHECKPOINTS):
                self.files.delete(f"{kind}/{key}/{MANIFEST}")
        except OSError as error:
            raise self._run_error(error, f"removing {OBJECTS}/{key}", key) from error

    def try_lease(self, key: str) -> Lease | None:
        """Try to lease ``key``, exclusively across threads, processes and machines; None if it is leased."""
        try:
            lease = self.leases.take(_name(key))
        except OSError as error:
            raise self._run_error(error, f"leasing {key}", key) from error
        if lease:
            self.files.remove_abandoned(f"{OBJECTS}/{key}")
        return lease

    def get_or_lease(self, key: str) -> StageResult | Lease | None:
        """Return the result under ``key``, else a lease to compute it, else (another holder computes it) None."""
        found = self.get(key)
        lease = None if found else self.try_lease(key)
        if lease is None:
            return found
        with lease:  # the result may have been finished before the lease
            return self.get(key) or lease.pop_all()

    def upload(self, folder: Path, name: str) -> None:
        """Copy the files of a local folder to ``name`` in this storage (for storage that is not local)."""
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            self.files.put(f"{name}/{path.relative_to(folder).as_posix()}", path.read_bytes())

    def write(self, name: str, data: bytes) -> None:
        """Replace a file that is no result, such as a sweep's plan, atomically; ``RunError`` if that fails."""
        try:
            self.files.put(name, data)
        except OSError as error:
            raise RunError(f"storage {self.uri}: {reason(error)} while writing {name}") from error

    def where(self, name: str) -> str:
        """Return the path or URI of a file or folder here; a query of the URI stays at its end."""
        return str(self.local_root / name) if self.local_root else join(self.uri, name)

    def save_checkpoint(self, key: str, facts: Mapping[str, Any], parts: Parts) -> None:
        """Replace the checkpoint under ``key``; the old one is valid until the new one is complete."""
        kept = self._fill(StageWriter(self, CHECKPOINTS, key), facts, parts)
        current = {entry["name"] for entry in kept._entries.values()}
        with contextlib.suppress(OSError):  # the next save or drop removes them
            for name in self.files.names(f"{CHECKPOINTS}/{key}"):
                if name.startswith("part-") and name.endswith(".safetensors") and name not in current:
                    self.files.delete(f"{CHECKPOINTS}/{key}/{name}")

    def load_checkpoint(self, key: str) -> StageResult | None:
        """Return the verified checkpoint under ``key``; None if absent or damaged (logged and removed)."""
        return self._get(CHECKPOINTS, key, "checkpoint {} is damaged ({}: {}); starting its stage again")

    def drop_checkpoint(self, key: str) -> None:
        """Remove the checkpoint under ``key`` if it exists."""
        with contextlib.suppress(OSError):  # a leftover checkpoint only takes disk space
            self.files.delete_folder(f"{CHECKPOINTS}/{key}")

    def manifest(self, kind: str, key: str) -> dict[str, Any] | None:
        """Return the manifest of a result or checkpoint; None if absent, ``DamagedFile`` if its checksum differs."""
        folder = f"{kind}/{key}"
        try:
            manifest = parse_json(self.files.read(f"{folder}/{MANIFEST}"))
            seal = manifest.pop("sha256")
            sound = seal == hashlib.sha256(canonical_json(manifest)).hexdigest()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            self._raise_if_storage_down(error, folder, key)
            raise DamagedFile(MANIFEST, reason(error)) from None
        except (ValueError, KeyError, RecursionError):
            raise DamagedFile(MANIFEST, "not a whole manifest") from None
        if not sound:
            raise DamagedFile(MANIFEST, "its SHA-256 differs")
        if (manifest.get("key"), manifest.get("version")) != (key, FORMAT):
            there, version = repr(manifest.get("key"))[:80], repr(manifest.get("version"))[:20]
            raise DamagedFile(MANIFEST, f"it is for {there}, format {version}")
        if fault := _fault(manifest):
            raise DamagedFile(MANIFEST, fault)
        return manifest

    def verify(self, kind: str, manifest: Mapping[str, Any]) -> None:
        """Hash every payload of ``manifest``; ``DamagedFile`` if one is missing or differs."""
        folder = f"{kind}/{manifest['key']}"
        for entry in manifest["files"].values():
            try:
                size, digest = self.files.digest(name := f"{folder}/{entry['name']}", entry["size"] + 1)
            except FileNotFoundError:
                raise DamagedFile(entry["name"], "it is missing") from None
            except OSError as error:
                self._raise_if_storage_down(error, folder, manifest["key"])
                raise DamagedFile(entry["name"], reason(error)) from None
            if size != entry["size"]:
                raise DamagedFile(entry["name"], f"{size} bytes instead of {entry['size']}")
            if digest != entry["sha256"]:
                raise DamagedFile(entry["name"], "its SHA-256 differs")
            if self.files.local and set(entry["arrays"]) != _names_in(self.files.path(name)):
                raise DamagedFile(entry["name"], "it does not hold the arrays that the manifest names")

    @staticmethod
    def _fill(writer: StageWriter, facts: Mapping[str, Any], parts: Parts) -> StageResult:
        for part, arrays in parts.items():
            writer.add(part, arrays)
        return writer.commit(facts)

    def _get(self, kind: str, key: str, complaint: str) -> StageResult | None:
        folder = f"{kind}/{key}"
        try:
            manifest = self.manifest(kind, key)
            if manifest is None or (self.fresh and manifest.get("session") != self.session):
                return None
            self.verify(kind, manifest)
        except DamagedFile as damage:
            self.log(complaint.format(key, *damage.args))
            with contextlib.suppress(OSError):  # only the manifest: another process may be at work on the same payload
                self.files.delete(f"{folder}/{MANIFEST}")
            return None
        return StageResult(self, folder, manifest)

    def _raise_if_storage_down(self, error: OSError, folder: str, key: str) -> None:
        """Raise ``RunError`` unless ``error`` concerns only one file."""
        one_file = isinstance(error, FileNotFoundError | IsADirectoryError | NotADirectoryError)
        if self.files.local:  # bad sectors, or files of other users
            one_file |= error.errno == errno.EIO or not self.files.is_transient(error)
        if not one_file:
            raise self._run_error(error, f"reading {folder}", key) from error

    def _run_error(self, error: OSError, doing: str, key: str) -> RunError:
        why = "no space left" if error.errno in (errno.ENOSPC, errno.EDQUOT) else reason(error)
        return RunError(
            f"storage {self.uri}: {why} while {doing}; fix it and give the same command again to resume",
            stage=key.rpartition("-")[0] or None,
        )

    def _request_error(self, error: Exception) -> RequestError:
        why = reason(error) if isinstance(error, OSError) else str(error).splitlines()[0]
        return RequestError(f"--storage {self.uri}: {why}; {remedy(error)}")
