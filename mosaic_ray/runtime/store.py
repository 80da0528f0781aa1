"""Stage results under the hash of what they depend on, so that a killed run resumes and a sweep pays once.

Layout under the storage path, local or any URI that ``pyarrow.fs`` opens::

    objects/<key>/manifest.json                      facts, and each payload's name, size and SHA-256
    objects/<key>/part-<12 hex of SHA-256>.safetensors
    checkpoints/<key>/...                            the same format; a new save replaces the old one

A result exists once its manifest does. The manifest is written last and appears whole (locally a temporary file is
renamed into place, elsewhere it is a single put), and payloads are named by content, so a kill at any moment leaves
the old result or the new one, and writers of one key cannot spoil each other. What a killed writer leaves is not read.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from pyarrow import fs

from ..errors import RequestError, RunError
from ..records import Weights

FORMAT = 1
MANIFEST = "manifest.json"
OBJECTS, CHECKPOINTS = "objects", "checkpoints"
MIN_FREE_BYTES = 64 << 20
_CHUNK = 4 << 20

#: Named groups of named arrays.
Parts = Mapping[str, Mapping[str, np.ndarray]]


class CorruptResult(RunError):
    """A payload vanished or changed after ``Store.get`` verified it; asking ``get`` again gives None."""

    def __init__(self, key: str, part: str, why: str) -> None:
        super().__init__(f'stage result {key}: part "{part}" cannot be read: {why}')
        self.key, self.part = key, part
        self.args = (key, part, why)  # what pickle calls the class with


class _Damage(Exception):
    """``(file name, why)``: a stored file is not what its manifest says."""


def _plain(value: Any, where: str) -> Any:
    """``value`` as JSON holds it, losing nothing; ``ValueError`` names the place of what would be lost."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{where} = {value}: only finite numbers can be stored")
        return value
    if isinstance(value, Mapping):
        for name in value:
            if not isinstance(name, str):
                raise ValueError(f"{where}: key {name!r} is not a word")
        return {name: _plain(item, f"{where}.{name}") for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    raise ValueError(f"{where}: a {type(value).__name__} is no fact; arrays belong into parts")


def _canonical(value: Any) -> bytes:
    """The one JSON spelling of a plain value: sorted keys, floats by ``repr``, ASCII."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def stage_key(stage: str, version: int, knobs: Mapping[str, Any], upstream: Sequence[str]) -> str:
    """``stage-`` and 20 hex digits that change with any of the arguments; equal on every machine.

    Knobs may nest and hold numpy scalars; tuples count as lists; the order of ``upstream`` counts, that of knobs not.
    """
    asked = {"stage": stage, "version": int(version), "knobs": _plain(knobs, "knobs"), "upstream": list(upstream)}
    return f"{stage}-{hashlib.sha256(_canonical(asked)).hexdigest()[:20]}"


def _encode(part: str, arrays: Mapping[str, np.ndarray]) -> bytes:
    """``arrays`` as safetensors."""
    # safetensors writes the buffer as it lies in memory, so a transposed view would silently come back shuffled
    whole = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    try:
        return safetensors.numpy.save(whole)
    except safetensors.SafetensorError as error:
        shown = ", ".join(f"{name} {array.dtype}" for name, array in whole.items() if array.dtype.kind not in "biuf")
        raise ValueError(f'part "{part}" ({shown}): {error}') from None


def _reason(error: OSError) -> str:
    """One line for an operating system's or a cloud's error."""
    return os.strerror(error.errno) if error.errno else str(error).splitlines()[0]


class _Files:
    """The few file operations a store needs; paths are relative to its root."""

    def __init__(self, filesystem: fs.FileSystem, root: str) -> None:
        self.filesystem, self.root = filesystem, root.rstrip("/") or "/"
        self.local = isinstance(filesystem, fs.LocalFileSystem)

    def path(self, name: str) -> str:
        return f"{self.root}/{name}"

    def chunks(self, name: str) -> Iterator[bytes]:
        with self.filesystem.open_input_stream(self.path(name)) as source:
            while chunk := source.read(_CHUNK):
                yield chunk

    def read(self, name: str) -> bytes:
        return b"".join(self.chunks(name))

    def put(self, name: str, data: bytes) -> None:
        """``data`` under ``name``: whole or, after an error or a kill, not at all (locally) or known by its hash."""
        folder, target = self.path(name).rpartition("/")[0], self.path(name)
        if not self.local:
            self.filesystem.create_dir(folder, recursive=True)
            with self.filesystem.open_output_stream(target) as sink:
                sink.write(data)
            return
        for attempt in (1, 2):
            os.makedirs(folder, exist_ok=True)
            try:
                _put_local(folder, target, data)
                return
            except FileNotFoundError:  # a neighbour dropped this checkpoint folder in between
                if attempt == 2:
                    raise

    def delete(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.filesystem.delete_file(self.path(name))

    def delete_folder(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.filesystem.delete_dir(self.path(name))

    def names(self, folder: str) -> list[str]:
        found = self.filesystem.get_file_info(fs.FileSelector(self.path(folder), allow_not_found=True))
        return [info.base_name for info in found]


def _put_local(folder: str, target: str, data: bytes) -> None:
    """Write beside, flush to the disk, rename into place."""
    beside = f"{target}.{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp"
    try:
        descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(descriptor, view) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(beside, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(beside)
        raise
    descriptor = os.open(folder, os.O_RDONLY)  # the rename itself must outlive a power cut
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _open(uri: str) -> tuple[fs.FileSystem, str]:
    """The file system and the path that ``uri`` means."""
    if "://" in uri:
        filesystem, root = fs.FileSystem.from_uri(uri)
        return filesystem, root
    return fs.LocalFileSystem(), str(Path(uri).expanduser().absolute())


class StageResult:
    """A finished stage: ``facts`` (plain JSON) and named ``parts`` of arrays, read from the store when asked for."""

    def __init__(self, files: _Files, folder: str, manifest: Mapping[str, Any]) -> None:
        self._files, self._folder, self._entries = files, folder, manifest["files"]
        self.key: str = manifest["key"]
        self.facts: dict[str, Any] = manifest["facts"]
        self.parts: tuple[str, ...] = tuple(self._entries)

    def load(self, part: str) -> Weights:
        """The arrays of ``part``, in the order in which they were added: fresh, writable copies.

        The bytes are hashed again here; ``CorruptResult`` where they vanished or changed since ``get``.
        """
        entry = self._entries[part]
        try:
            data = self._files.read(f"{self._folder}/{entry['name']}")
        except OSError as error:
            raise CorruptResult(self.key, part, _reason(error)) from None
        if hashlib.sha256(data).hexdigest() != entry["sha256"]:
            raise CorruptResult(self.key, part, "its SHA-256 differs")
        arrays = safetensors.numpy.load(data)
        return {name: arrays[name] for name in entry["arrays"]}


class StageWriter:
    """A result in the making; nothing of it can be seen until ``commit``."""

    def __init__(self, store: Store, room: str, key: str) -> None:
        if not key or key.startswith(".") or "/" in key:
            raise ValueError(f"{key!r} cannot name a stage result")
        self._store, self._room, self._key = store, room, key
        self._entries: dict[str, dict[str, Any]] = {}

    def add(self, part: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Write ``arrays`` (numbers of any shape) as one file now, so that nothing of them need stay in memory."""
        data = _encode(part, arrays)
        digest = hashlib.sha256(data).hexdigest()
        name = f"part-{digest[:12]}.safetensors"
        self._put(name, data)
        self._entries[part] = {"name": name, "size": len(data), "sha256": digest, "arrays": list(arrays)}

    def commit(self, facts: Mapping[str, Any]) -> StageResult:
        """Make the result visible, all at once. ``facts`` come back as JSON holds them (tuples as lists)."""
        manifest = {
            "key": self._key,
            "version": FORMAT,
            "facts": _plain(facts, "facts"),
            "files": dict(self._entries),
        }
        # Insertion order is kept on disk (it is the parts' order); the checksum is over the canonical spelling.
        sealed = manifest | {"sha256": hashlib.sha256(_canonical(manifest)).hexdigest()}
        self._put(MANIFEST, json.dumps(sealed, allow_nan=False).encode())
        self._store._written.add((self._room, self._key))
        return StageResult(self._store._files, f"{self._room}/{self._key}", manifest)

    def _put(self, name: str, data: bytes) -> None:
        try:
            self._store._files.put(f"{self._room}/{self._key}/{name}", data)
        except OSError as error:
            why = "no space left" if error.errno in (errno.ENOSPC, errno.EDQUOT) else _reason(error)
            raise RunError(
                f"storage {self._store.uri}: {why} while writing {self._room}/{self._key}; "
                "mend it and give the same command again to resume",
                stage=self._key.rpartition("-")[0] or None,
            ) from error


class Store:
    """Results and checkpoints under ``uri``: a local path, or file://, s3://, gs:// and what else pyarrow.fs knows.

    ``fresh`` hides whatever this object did not write itself; writing still replaces it.
    ``say`` is told, in a line, of every damaged result that will be computed again.
    """

    def __init__(
        self, uri: str | os.PathLike[str], *, fresh: bool = False, say: Callable[[str], None] | None = None
    ) -> None:
        self.uri, self.fresh = os.fspath(uri), fresh
        self.say = say or (lambda text: None)
        self._written: set[tuple[str, str]] = set()
        try:
            self._files = _Files(*_open(self.uri))
            if self._files.local:
                os.makedirs(self._files.root, exist_ok=True)
        except (OSError, ValueError, NotImplementedError) as error:
            raise self._refuse(error) from None

    @property
    def local_root(self) -> Path | None:
        """The storage folder where it is a local one."""
        return Path(self._files.root) if self._files.local else None

    def check_writable(self) -> None:
        """``RequestError`` unless a file of 1 MiB can be written and removed, and a local disk has room for more."""
        probe = f"{OBJECTS}/.probe-{uuid.uuid4().hex}"
        try:
            if self._files.local and (free := shutil.disk_usage(self._files.root).free) < MIN_FREE_BYTES:
                raise RequestError(
                    f"--storage {self.uri}: the disk is full ({free >> 20} MiB free, "
                    f"{MIN_FREE_BYTES >> 20} MiB needed); make room or name another folder"
                )
            self._files.put(probe, bytes(1 << 20))
            self._files.delete(probe)
        except OSError as error:
            raise self._refuse(error) from None

    def get(self, key: str) -> StageResult | None:
        """The result under ``key`` with every byte verified; None where it is absent or damaged (said, and removed)."""
        return self._get(OBJECTS, key, "stage result {} is damaged ({}: {}); computing it again")

    def writer(self, key: str) -> StageWriter:
        """A result to be filled part by part."""
        return StageWriter(self, OBJECTS, key)

    def put(self, key: str, facts: Mapping[str, Any], parts: Parts | None = None) -> StageResult:
        """A whole result at once."""
        return self._fill(self.writer(key), facts, parts or {})

    def discard(self, key: str) -> None:
        """Remove the result under ``key``, so that it is computed again."""
        self._written.discard((OBJECTS, key))
        self._files.delete_folder(f"{OBJECTS}/{key}")

    def upload(self, folder: Path, name: str) -> None:
        """Copy a local folder's files below ``name`` in this storage (for storage that is not a local path)."""
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            self._files.put(f"{name}/{path.relative_to(folder).as_posix()}", path.read_bytes())

    def save_checkpoint(self, key: str, facts: Mapping[str, Any], parts: Parts) -> None:
        """Replace the checkpoint under ``key``: until the new one is whole, the old one stands."""
        kept = self._fill(StageWriter(self, CHECKPOINTS, key), facts, parts)
        current = {entry["name"] for entry in kept._entries.values()}
        with contextlib.suppress(OSError):  # what cannot be tidied now is tidied by the next save or the drop
            for name in self._files.names(f"{CHECKPOINTS}/{key}"):
                if name.startswith("part-") and name.endswith(".safetensors") and name not in current:
                    self._files.delete(f"{CHECKPOINTS}/{key}/{name}")

    def load_checkpoint(self, key: str) -> StageResult | None:
        """The newest whole checkpoint under ``key``, verified; None where there is none, or a damaged one (said)."""
        return self._get(CHECKPOINTS, key, "checkpoint {} is damaged ({}: {}); starting its stage again")

    def drop_checkpoint(self, key: str) -> None:
        """Remove the checkpoint under ``key``, if there is one."""
        self._written.discard((CHECKPOINTS, key))
        with contextlib.suppress(OSError):  # a leftover checkpoint is only disk space: its stage's result comes first
            self._files.delete_folder(f"{CHECKPOINTS}/{key}")

    @staticmethod
    def _fill(writer: StageWriter, facts: Mapping[str, Any], parts: Parts) -> StageResult:
        for part, arrays in parts.items():
            writer.add(part, arrays)
        return writer.commit(facts)

    def _get(self, room: str, key: str, complaint: str) -> StageResult | None:
        if self.fresh and (room, key) not in self._written:
            return None
        folder = f"{room}/{key}"
        try:
            manifest = self._manifest(folder, key)
            if manifest is None:
                return None
            for entry in manifest["files"].values():
                self._verify(folder, entry)
        except _Damage as damage:
            self.say(complaint.format(key, *damage.args))
            # Only the manifest goes: a neighbour may be putting the same payload right at this moment.
            with contextlib.suppress(OSError):
                self._files.delete(f"{folder}/{MANIFEST}")
            return None
        return StageResult(self._files, folder, manifest)

    def _manifest(self, folder: str, key: str) -> dict[str, Any] | None:
        """The manifest in ``folder``, its checksum verified; None where there is none."""
        try:
            manifest: dict[str, Any] = json.loads(self._files.read(f"{folder}/{MANIFEST}"))
            seal = manifest.pop("sha256")
            sound = seal == hashlib.sha256(_canonical(manifest)).hexdigest()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise _Damage(MANIFEST, _reason(error)) from None
        except (ValueError, AttributeError, KeyError, TypeError, RecursionError):
            raise _Damage(MANIFEST, "not a whole manifest") from None
        if not sound:
            raise _Damage(MANIFEST, "its SHA-256 differs")
        if (manifest["key"], manifest["version"]) != (key, FORMAT):
            raise _Damage(MANIFEST, f"it is for {manifest['key']}, format {manifest['version']}")
        return manifest

    def _verify(self, folder: str, entry: Mapping[str, Any]) -> None:
        digest, size = hashlib.sha256(), 0
        try:
            for chunk in self._files.chunks(f"{folder}/{entry['name']}"):
                digest.update(chunk)
                size += len(chunk)
        except FileNotFoundError:
            raise _Damage(entry["name"], "it is missing") from None
        except OSError as error:
            raise _Damage(entry["name"], _reason(error)) from None
        if size != entry["size"]:
            raise _Damage(entry["name"], f"{size} bytes instead of {entry['size']}")
        if digest.hexdigest() != entry["sha256"]:
            raise _Damage(entry["name"], "its SHA-256 differs")

    def _refuse(self, error: Exception) -> RequestError:
        why = _reason(error) if isinstance(error, OSError) else str(error).splitlines()[0]
        wanted = "it takes a folder that can be written, or a file://, s3:// or gs:// URI"
        return RequestError(f"--storage {self.uri}: {why}; {wanted}")
