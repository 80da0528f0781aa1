"""Leases: one of several runs computes a missing stage result while the others wait for it.

On a local or shared disk a lease is a kernel lock on ``leases/<key>``, which ends with the process that holds it.
Other storage has no locks. There a lease is two small objects that only their owner writes: the claim,
``leases/<key>~<owner>``, and the owner's heartbeat, ``leases/~<owner>``, a counter that grows while the owner lives.
A process takes an owner for dead after it has read the same heartbeat for ``TTL_SECONDS`` of its own clock. Clocks of
two machines are never compared, and a process starts counting again after its own storage failed for a while.

This needs consistent storage and a quick network: an owner that stalls for longer than ``TTL_SECONDS``, or that alone
cannot reach the storage, loses its lease without noticing. Then a result is computed twice. That costs time only:
results are deterministic, and writers of one key cannot damage each other's files. The two may delete each other's
checkpoints.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import threading
import time
import uuid
from pathlib import Path

from ..core.untrusted import kind_of
from .filesystem import Files, set_aside

LEASES = "leases"
HEARTBEAT_SECONDS = 2.0
TTL_SECONDS = 12.0
#: Number of checks for rivals that claimed at the same moment, and seconds between them.
_CHECKS, _CHECK_SECONDS = 10, 0.1
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
#: File name of a claim (key~owner) or a heartbeat (~owner).
_CLAIM = re.compile("(.*)~([0-9a-f]{32})")
_now = time.monotonic


def key_of(name: str) -> str:
    """Return the key that a lease file belongs to; "" for an owner's heartbeat."""
    claim = _CLAIM.fullmatch(name)
    return claim[1] if claim else name


class Lease(contextlib.ExitStack):
    """The exclusive right to compute a key until ``release``, the end of the ``with`` block, or the process's death."""

    release = contextlib.ExitStack.close  # further calls have no effect


class Leases:
    """The leases of one store. A key is held by at most one thread of one store at a time."""

    def __init__(self, files: Files) -> None:
        self._files = files
        self._claims = None if files.local else _Claims(files)

    def take(self, key: str) -> Lease | None:
        """Try to acquire the lease on ``key`` without waiting; None if another holder has it."""
        if self._claims is None:
            try:
                return self._files.retry(lambda: _lock(self._path(key)))
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
                self._claims = _Claims(self._files)  # a file system without locks, as some clusters mount theirs
        return self._claims.take(key)

    def scan(self) -> dict[str, bool]:
        """Return every lease file by name, and whether its holder lives; no folder, link, pipe or device is one.

        With claims of other owners this waits for their heartbeats, ``TTL_SECONDS`` at most.
        """
        claims = {name: _CLAIM.fullmatch(name) for name in self._files.regular(LEASES)}
        own = {self._claims.owner} if self._claims else set()
        living = own | _living_owners(self._files, {claim[2] for claim in claims.values() if claim} - own)
        return {
            name: claim[2] in living if claim else self._files.local and _is_locked(self._path(name))
            for name, claim in claims.items()
        }

    def clear(self, name: str) -> None:
        """Remove a lease file that ``scan`` reported without a living holder."""
        if self._claims or _CLAIM.fullmatch(name):
            self._files.delete(f"{LEASES}/{name}")
        elif lease := _lock(self._path(name)):
            lease.release()

    def _path(self, name: str) -> Path:
        return Path(self._files.path(LEASES)) / name


def _lock(path: Path) -> Lease | None:
    """Lock ``path`` with ``flock``, creating the file; None if it is locked. Releasing removes the file."""
    while True:
        os.makedirs(path.parent, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            if kind_of(path.lstat().st_mode):
                set_aside(path)
        with Lease() as lease:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
            lease.callback(os.close, descriptor)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return None
            # The previous holder may have removed the file after it was opened here: such a lock excludes nothing.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                    lease.callback(_unlink, path)  # before it is unlocked
                    return lease.pop_all()


def _unlink(path: Path) -> None:
    with contextlib.suppress(OSError):  # a remaining file does not block the next lock
        path.unlink()


def _is_locked(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError as error:
        if error.errno not in (errno.ENOENT, *_NO_LOCKS):
            raise
    return False


def _living_owners(files: Files, owners: set[str]) -> set[str]:
    """Return the owners that are alive: their heartbeat changes within ``TTL_SECONDS``."""

    def heartbeat(owner: str) -> bytes | None:
        with contextlib.suppress(FileNotFoundError):
            return files.read(f"{LEASES}/~{owner}")
        return None

    first, living, started = {owner: heartbeat(owner) for owner in owners}, set(), _now()
    silent = {owner for owner, found in first.items() if found is not None}  # no heartbeat: dead
    while silent and _now() - max(started, files.recovered) < TTL_SECONDS:
        time.sleep(HEARTBEAT_SECONDS / 4)
        living |= {owner for owner in silent if heartbeat(owner) not in (first[owner], None)}
        silent -= living
    return living


class _Claims:
    def __init__(self, files: Files) -> None:
        self._files, self.owner = files, ""  # set by ``take``; a new one after nothing was held
        self._guard = threading.Lock()  # not taken by the heartbeat thread
        self._held: set[str] = set()
        self._count = 0  # never reset: equal counts mean that no heartbeat came in between
        self._stop = threading.Event()
        self._heartbeat: threading.Thread | None = None
        self._seen: dict[str, tuple[bytes, float]] = {}  # owner -> (heartbeat, time it was first seen)

    def take(self, key: str) -> Lease | None:
        with self._guard:
            if key in self._held or self._rivals(key):
                return None
            with Lease() as undo:
                undo.callback(self._stop_heartbeat)
                if self._heartbeat is None:
                    self.owner = uuid.uuid4().hex  # a rival may be removing the last name's files
                    self._write_heartbeat()
                    self._stop.clear()
                    self._heartbeat = threading.Thread(target=self._run_heartbeat, daemon=True, name="lease-heartbeat")
                    self._heartbeat.start()
                undo.callback(self._withdraw, key)
                self._files.put(f"{LEASES}/{key}~{self.owner}", b"")
                if not self._is_sole_claimant(key):
                    return None
                self._held.add(key)
                undo.pop_all()
        lease = Lease()
        lease.callback(self._on_release, key)
        return lease

    def _is_sole_claimant(self, key: str) -> bool:
        """Check for rival claims of ``key`` after ours was written; True if there are none.

        Every owner writes its claim before it checks, so of two rivals at least one sees the other and never do both
        win. The owner with the smallest name repeats the check while the others withdraw, so that one wins in the end.
        """
        for _ in range(_CHECKS):
            rivals = self._rivals(key)
            if not rivals:
                return True
            if min(rivals) < self.owner:
                return False
            time.sleep(_CHECK_SECONDS)
        return False

    def _rivals(self, key: str) -> list[str]:
        """Return the other living owners that claim ``key``, and remove the claims of dead ones."""
        alive = []
        for name in self._files.names(LEASES):
            claimed, _, owner = name.rpartition("~")
            if claimed == key and owner != self.owner:
                if self._is_alive(owner):
                    alive.append(owner)
                else:
                    self._files.delete(f"{LEASES}/{name}")
                    self._files.delete(f"{LEASES}/~{owner}")
        return alive

    def _is_alive(self, owner: str) -> bool:
        try:
            heartbeat = self._files.read(f"{LEASES}/~{owner}")
        except FileNotFoundError:  # written before the first claim, removed after the last
            return False
        before, since = self._seen.get(owner, (None, 0.0))
        if heartbeat != before:
            self._seen[owner] = heartbeat, _now()
            return True
        return _now() - max(since, self._files.recovered) < TTL_SECONDS

    def _run_heartbeat(self) -> None:
        while not self._stop.wait(HEARTBEAT_SECONDS):
            with contextlib.suppress(OSError):  # retried for long already; another owner may have taken over
                self._write_heartbeat()

    def _write_heartbeat(self) -> None:
        self._count += 1
        self._files.put(f"{LEASES}/~{self.owner}", str(self._count).encode())

    def _stop_heartbeat(self) -> None:
        """Stop the heartbeat thread and remove the heartbeat unless a lease is held."""
        if self._heartbeat and not self._held:
            self._stop.set()
            self._heartbeat.join()  # a write under way would restore the file
            self._heartbeat = None
            with contextlib.suppress(OSError):
                self._files.delete(f"{LEASES}/~{self.owner}")

    def _withdraw(self, key: str) -> None:
        with contextlib.suppress(OSError):  # a claim without a heartbeat has no effect
            self._files.delete(f"{LEASES}/{key}~{self.owner}")

    def _on_release(self, key: str) -> None:
        with self._guard:
            self._held.discard(key)
            self._withdraw(key)
            self._stop_heartbeat()
