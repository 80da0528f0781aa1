"""Leases where a storage has no locks: claims kept alive by a heartbeat."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from storing import KEY, OTHER_KEY, PATIENCE_SECONDS, held, remains, until

import mosaic_ray.storage.locks as leases_module
from mosaic_ray.core.errors import RunError
from mosaic_ray.storage.locks import HEARTBEAT_SECONDS, TTL_SECONDS, Lease
from mosaic_ray.storage.store import Store

# ---------------------------------------------------------------- where there are no locks


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets every watcher's clock on; no owner beats by itself."""
    now = [1000.0]

    def advance(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(leases_module, "_now", lambda: now[0])
    monkeypatch.setattr(leases_module, "HEARTBEAT_SECONDS", 1e6)
    return advance


def test_an_owner_is_dead_when_its_beat_has_stood_still_for_a_watchers_ttl(
    bucket_only: Path, clock: Callable[[float], None]
) -> None:
    assert HEARTBEAT_SECONDS * 4 < TTL_SECONDS
    owner, watcher, third = Store(bucket_only), Store(bucket_only), Store(bucket_only)
    lost = held(owner.try_lease(KEY))
    clock(10 * TTL_SECONDS)
    assert watcher.try_lease(KEY) is None, "seen for the first time"
    clock(TTL_SECONDS - 0.1)
    assert watcher.try_lease(KEY) is None
    owner.leases._claims._write_heartbeat()
    clock(10 * TTL_SECONDS)
    assert watcher.try_lease(KEY) is None, "another heartbeat than the last time"
    clock(TTL_SECONDS - 0.1)
    assert watcher.try_lease(KEY) is None, "which counts from when it was seen"
    clock(0.2)
    lease = held(watcher.try_lease(KEY))
    assert third.try_lease(KEY) is None
    lost.release()
    assert third.try_lease(KEY) is None, "the one that was taken for dead lets go of nothing but its own"
    lease.release()
    with held(third.try_lease(KEY)):
        pass
    assert remains(third) == []


def test_an_owner_at_rest_does_not_come_back_as_dead(bucket_only: Path, clock: Callable[[float], None]) -> None:
    """Its heartbeat goes on counting: one that began anew would look to an early watcher as if it had stood still."""
    owner, watcher = Store(bucket_only), Store(bucket_only)
    for _ in range(2):
        with held(owner.try_lease(KEY)):
            assert watcher.try_lease(KEY) is None
        clock(10 * TTL_SECONDS)


def test_an_owner_that_claims_again_keeps_its_claim_from_a_rival_that_found_it_gone(
    bucket_only: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rival reads no heartbeat, the owner claims anew, and only then does the rival remove what it found dead."""
    owner, rival = Store(bucket_only), Store(bucket_only)
    first = held(owner.try_lease(KEY))
    read, again = rival.files.read, list[Lease]()

    def late(name: str) -> bytes:
        if "~" in name and not again:
            first.release()
            again.append(held(owner.try_lease(KEY)))
            raise FileNotFoundError(name)
        return read(name)

    monkeypatch.setattr(rival.files, "read", late)
    found = rival.try_lease(KEY)
    for lease in (*again, *([found] if found else [])):
        lease.release()  # before anything is asserted: a heart that beats on would disturb other tests
    assert found is None and again
    assert remains(rival) == []


def test_a_dead_owners_leases_are_all_free_at_once(bucket_only: Path, clock: Callable[[float], None]) -> None:
    owner, watcher = Store(bucket_only), Store(bucket_only)
    lost = [held(owner.try_lease(key)) for key in (KEY, OTHER_KEY)]
    assert watcher.try_lease(KEY) is None
    clock(TTL_SECONDS + 0.1)
    found = [held(watcher.try_lease(key)) for key in (KEY, OTHER_KEY)]
    for lease in lost + found:
        lease.release()
    assert remains(watcher) == []


def beats() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "lease-heartbeat"]


def test_the_heart_beats_while_anything_is_held(bucket_only: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases_module, "HEARTBEAT_SECONDS", 0.01)
    store = Store(bucket_only)
    one, two = held(store.try_lease(KEY)), held(store.try_lease(OTHER_KEY))
    (name,) = [name for name in remains(store) if name.startswith("~")]
    one.release()
    before = store.files.read(f"leases/{name}")
    until(lambda: store.files.read(f"leases/{name}") not in (before, b"") or None)
    assert len(beats()) == 1
    two.release()
    assert beats() == [] and remains(store) == []


@pytest.mark.parametrize("count", [2, 4])
def test_of_several_that_claim_in_the_same_moment_one_gets_it(
    bucket_only: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """All have found the key free, and all put their claims before any of them looks again."""
    monkeypatch.setattr(leases_module, "_CHECKS", 10_000)
    stores, together = [Store(bucket_only) for _ in range(count)], threading.Barrier(count)
    got: list[Lease | None] = []

    def take(store: Store) -> None:
        real = store.files.put

        def put(name: str, data: bytes) -> None:
            if KEY in name:
                together.wait(PATIENCE_SECONDS)
            real(name, data)
            if KEY in name:
                together.wait(PATIENCE_SECONDS)

        store.files.put = put
        got.append(store.try_lease(KEY))

    threads = [threading.Thread(target=take, args=(store,)) for store in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    leases = [lease for lease in got if lease]
    assert len(got) == count and len(leases) == 1 and len(beats()) == 1
    leases[0].release()
    assert remains(stores[0]) == []


def test_a_claim_that_cannot_be_put_leaves_nothing(bucket_only: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(bucket_only)
    real = store.files.put

    def put(name: str, data: bytes) -> None:
        real(name, data)
        if KEY in name:
            raise OSError(errno.EIO, "the network is away")

    with monkeypatch.context() as patch:
        patch.setattr(store.files, "put", put)
        with pytest.raises(RunError, match="while leasing"):
            store.try_lease(KEY)
    assert beats() == [] and remains(store) == []
    held(store.try_lease(KEY)).release()


def test_a_local_disk_without_locks_is_treated_as_other_storage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", flock)
    one, two = Store(tmp_path), Store(tmp_path)
    with held(one.try_lease(KEY)):
        assert two.try_lease(KEY) is None
    held(two.try_lease(KEY)).release()
    assert not [name for name in remains(one) if "~" in name]
