"""Leases: of several runs that miss one stage result, one computes it and the others wait for that one.

On a local disk, shared ones too, a lease is a lock of the kernel's on ``leases/<key>``, gone in the moment in which
its holder is. Other storage knows no locks. There a lease is two small objects that nobody else writes: the claim,
``leases/<key>~<owner>``, and the owner's beat, ``leases/~<owner>``, a counter that grows as long as the owner lives.
A watcher takes an owner for dead when it has seen the same beat for ``TTL_SECONDS`` of its own clock; the clocks of
two machines are never compared. This is as good as the storage is consistent and the network quick: an owner that
stalls for longer loses its lease without knowing. Then a result is computed twice, which costs time and nothing else,
since results are deterministic and writers of one key cannot spoil each other.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import threading
import time
import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import TracebackType

from .files import Files

LEASES = "leases"
BEAT_SECONDS = 2.0
TTL_SECONDS = 12.0
#: Looks at, and seconds between them, whether all others that claimed in the same moment have withdrawn.
_LOOKS, _LOOK_SECONDS = 10, 0.1
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
_now = time.monotonic


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
                return _lock(Path(self._files.path(LEASES)) / key)
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
                self._claims = _Claims(self._files)  # a file system without locks, as some clusters mount theirs
        return self._claims.take(key)


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


class _Claims:
    """Leases where there are no locks: see the module's head."""

    def __init__(self, files: Files) -> None:
        self._files, self._owner = files, uuid.uuid4().hex
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
                self._files.put(f"{LEASES}/{key}~{self._owner}", b"")
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
            if min(rivals) < self._owner:
                return False
            time.sleep(_LOOK_SECONDS)
        return False

    def _rivals(self, key: str) -> list[str]:
        """Other owners, alive as far as can be seen, that claim ``key``; dead ones' claims are removed."""
        alive = []
        for name in self._files.names(LEASES):
            claimed, _, owner = name.rpartition("~")
            if claimed == key and owner != self._owner:
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
        return _now() - since < TTL_SECONDS

    def _wake(self) -> None:
        """Begin to beat, unless it goes on already."""
        if self._beating is None:
            self._put_beat()
            self._stop.clear()
            self._beating = threading.Thread(target=self._beat, daemon=True, name="lease-beat")
            self._beating.start()

    def _beat(self) -> None:
        while not self._stop.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError):  # one beat is missed; TTL_SECONDS allow for some
                self._put_beat()

    def _put_beat(self) -> None:
        self._count += 1
        self._files.put(f"{LEASES}/~{self._owner}", str(self._count).encode())

    def _rest(self) -> None:
        """Stop beating where there is nothing to hold."""
        if self._beating and not self._held:
            self._stop.set()
            self._beating.join()  # a beat under way would come back after its removal
            self._beating = None
            with contextlib.suppress(OSError):
                self._files.delete(f"{LEASES}/~{self._owner}")

    def _withdraw(self, key: str) -> None:
        with contextlib.suppress(OSError):  # the claim is worth nothing without its beat
            self._files.delete(f"{LEASES}/{key}~{self._owner}")

    def _let_go(self, key: str) -> None:
        with self._guard:
            self._held.discard(key)
            self._withdraw(key)
            self._rest()
