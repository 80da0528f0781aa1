"""Leases: of several runs that miss one stage result, one computes it and the others wait for that one.

On a local disk, shared ones too, a lease is a lock of the kernel's on ``leases/<key>``, gone in the moment in which
its holder is. Other storage knows no locks. There a lease is two small objects that nobody else writes: the claim,
``leases/<key>~<owner>``, and the owner's beat, ``leases/~<owner>``, a counter that grows as long as the owner lives.
A watcher takes an owner for dead when it has seen the same beat for ``TTL_SECONDS`` of its own clock; the clocks of
two machines are never compared, and a watcher whose own storage failed for a while begins to count anew. This is as
good as the storage is consistent and the network quick: an owner that stalls for longer, or that alone cannot reach the
storage, loses its lease without knowing. Then a result is computed twice, which costs time and nothing else, since
results are deterministic and writers of one key cannot spoil each other; the two may drop each other's checkpoints.
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
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import TracebackType

from .filesystem import Files

LEASES = "leases"
BEAT_SECONDS = 2.0
TTL_SECONDS = 12.0
#: Looks at, and seconds between them, whether all others that claimed in the same moment have withdrawn.
_LOOKS, _LOOK_SECONDS = 10, 0.1
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
#: A claim's or a beat's name: the key, and the owner.
_CLAIM = re.compile("(.*)~([0-9a-f]{32})")
_now = time.monotonic


def key_of(name: str) -> str:
    """The key that a file of a lease is about; "" for an owner's beat."""
    claim = _CLAIM.fullmatch(name)
    return claim[1] if claim else name


class Lease:
    """The sole right to compute a key, until ``release``, the end of the ``with`` block, or the holder's death."""

    def __init__(self, let_go: Callable[[], None]) -> None:
        self._let_go: Callable[[], None] | None = let_go

    def release(self) -> None:
        """Let the next one have it; again is harmless."""
        let_go, self._let_go = self._let_go, None
        if let_go:
            let_go()

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


class Leases:
    """One store's leases. Neither two stores nor two threads of one store can hold the same key."""

    def __init__(self, files: Files) -> None:
        self._files = files
        self._claims = None if files.local else _Claims(files)

    def take(self, key: str) -> Lease | None:
        """The lease on ``key``; None where somebody holds it. Does not wait for them."""
        if self._claims is None:
            try:
                return self._files.again(lambda: _lock(self._path(key)))
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
                self._claims = _Claims(self._files)  # a file system without locks, as some clusters mount theirs
        return self._claims.take(key)

    def survey(self) -> dict[str, bool]:
        """Every file that leases are made of, by name, and whether its holder lives.

        Where there are claims this takes as long as one of their owners is silent, at most ``TTL_SECONDS``.
        """
        claims = {name: _CLAIM.fullmatch(name) for name in self._files.names(LEASES)}
        own = {self._claims.owner} if self._claims else set()
        living = own | _living_owners(self._files, {claim[2] for claim in claims.values() if claim} - own)
        return {
            name: claim[2] in living if claim else self._files.local and _is_locked(self._path(name))
            for name, claim in claims.items()
        }

    def clear(self, name: str) -> None:
        """Remove a file that ``survey`` found without a holder."""
        if self._claims or _CLAIM.fullmatch(name):
            self._files.delete(f"{LEASES}/{name}")
        elif lease := _lock(self._path(name)):
            lease.release()

    def _path(self, name: str) -> Path:
        return Path(self._files.path(LEASES)) / name


def _lock(path: Path) -> Lease | None:
    """The kernel's lock on ``path``; the file is there only as long as somebody holds or wants it."""
    while True:
        os.makedirs(path.parent, exist_ok=True)
        with contextlib.ExitStack() as undo:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            undo.callback(os.close, descriptor)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return None
            # The last holder may have removed the file after it was opened here: such a lock excludes nobody.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                    undo.pop_all()
                    return Lease(partial(_unlock, path, descriptor))


def _unlock(path: Path, descriptor: int) -> None:
    with contextlib.suppress(OSError):  # a file that stays is locked by the next one as it is
        os.unlink(path)
    os.close(descriptor)


def _is_locked(path: Path) -> bool:
    """Whether somebody holds the kernel's lock on ``path``."""
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
    """Those whose beat changes within ``TTL_SECONDS``."""

    def beat(owner: str) -> bytes | None:
        with contextlib.suppress(FileNotFoundError):
            return files.read(f"{LEASES}/~{owner}")
        return None

    first, living, begun = {owner: beat(owner) for owner in owners}, set(), _now()
    silent = {owner for owner, found in first.items() if found is not None}  # without a beat nobody lives
    while silent and _now() - max(begun, files.recovered) < TTL_SECONDS:
        time.sleep(BEAT_SECONDS / 4)
        living |= {owner for owner in silent if beat(owner) not in (first[owner], None)}
        silent -= living
    return living


class _Claims:
    """Leases where there are no locks: see the module's head."""

    def __init__(self, files: Files) -> None:
        self._files, self.owner = files, uuid.uuid4().hex
        self._guard = threading.Lock()  # one thread at a time; the beat goes on without it
        self._held: set[str] = set()
        self._count = 0  # never begins anew: an equal count means that no beat came in between
        self._stop = threading.Event()
        self._beating: threading.Thread | None = None
        self._seen: dict[str, tuple[bytes, float]] = {}  # another owner's beat, and when it was first seen so

    def take(self, key: str) -> Lease | None:
        with self._guard:
            if key in self._held or self._rivals(key):
                return None
            with contextlib.ExitStack() as undo:
                undo.callback(self._rest)
                self._wake()
                undo.callback(self._withdraw, key)
                self._files.put(f"{LEASES}/{key}~{self.owner}", b"")
                if not self._alone(key):
                    return None
                self._held.add(key)
                undo.pop_all()
                return Lease(partial(self._let_go, key))

    def _alone(self, key: str) -> bool:
        """Whether nobody else claims ``key`` now that the own claim is there for them to see.

        Each puts first and looks then, so of two at least one sees the other, and no two are ever alone. The smallest
        name looks again while the others withdraw, so that in the end somebody is.
        """
        for _ in range(_LOOKS):
            rivals = self._rivals(key)
            if not rivals:
                return True
            if min(rivals) < self.owner:
                return False
            time.sleep(_LOOK_SECONDS)
        return False

    def _rivals(self, key: str) -> list[str]:
        """Other owners, alive as far as can be seen, that claim ``key``; dead ones' claims are removed."""
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
            beat = self._files.read(f"{LEASES}/~{owner}")
        except FileNotFoundError:  # the beat comes before the first claim and goes after the last
            return False
        before, since = self._seen.get(owner, (None, 0.0))
        if beat != before:
            self._seen[owner] = beat, _now()
            return True
        return _now() - max(since, self._files.recovered) < TTL_SECONDS

    def _wake(self) -> None:
        """Begin to beat, unless it goes on already."""
        if self._beating is None:
            self._put_beat()
            self._stop.clear()
            self._beating = threading.Thread(target=self._beat, daemon=True, name="lease-beat")
            self._beating.start()

    def _beat(self) -> None:
        while not self._stop.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError):  # tried again for long already; others may have taken over
                self._put_beat()

    def _put_beat(self) -> None:
        self._count += 1
        self._files.put(f"{LEASES}/~{self.owner}", str(self._count).encode())

    def _rest(self) -> None:
        """Stop beating where there is nothing to hold."""
        if self._beating and not self._held:
            self._stop.set()
            self._beating.join()  # a beat under way would come back after its removal
            self._beating = None
            with contextlib.suppress(OSError):
                self._files.delete(f"{LEASES}/~{self.owner}")

    def _withdraw(self, key: str) -> None:
        with contextlib.suppress(OSError):  # the claim is worth nothing without its beat
            self._files.delete(f"{LEASES}/{key}~{self.owner}")

    def _let_go(self, key: str) -> None:
        with self._guard:
            self._held.discard(key)
            self._withdraw(key)
            self._rest()
