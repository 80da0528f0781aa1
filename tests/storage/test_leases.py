"""Leases: of several runs that miss a result one computes it, also if a holder dies."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from storing import KEY, OTHER_KEY, PATIENCE_SECONDS, PRELUDE, children, held, remains, start, until

import mosaic_ray.storage.locks as leases_module
from mosaic_ray.core.errors import RunError
from mosaic_ray.storage.locks import Lease
from mosaic_ray.storage.store import StageResult, Store

# ---------------------------------------------------------------- one holder


def test_a_lease_excludes_others_and_itself_until_it_is_released(storage: Path) -> None:
    """Two stores of one process, and one store asked twice."""
    one, two = Store(storage), Store(storage)
    lease = held(one.try_lease(KEY))
    assert two.try_lease(KEY) is None and one.try_lease(KEY) is None
    other = held(two.try_lease(OTHER_KEY))
    lease.release()
    again = held(two.try_lease(KEY))
    lease.release()
    assert one.try_lease(KEY) is None, "an old lease released once more is not the new one"
    again.release()
    other.release()
    assert remains(one) == []


def test_a_holder_that_raises_lets_go(storage: Path) -> None:
    one, two = Store(storage), Store(storage)
    with pytest.raises(ZeroDivisionError), held(one.try_lease(KEY)):
        assert two.try_lease(KEY) is None
        raise ZeroDivisionError
    with held(two.try_lease(KEY)):
        assert one.try_lease(KEY) is None
    assert remains(one) == []


CONTENDER = (
    PRELUDE
    + """
print("ready", flush=True)
sys.stdin.read(1)
while (found := store.get_or_lease(key)) is None:
    (notes / f"waits-{os.getpid()}").touch()
    time.sleep(0.005)
if not isinstance(found, store_module.StageResult):
    with found, open(notes / "computed", "a") as lines:
        lines.write(f"{os.getpid()}\\n")
        lines.flush()
        while len(list(notes.glob("waits-*"))) < 3:
            time.sleep(0.005)
        store.put(key, {"n": 1}, {"p": {"w": np.random.default_rng(0).normal(size=1000)}})
print(hashlib.sha256(store.get(key).load("p")["w"].tobytes()).hexdigest())
"""
)


def test_of_four_processes_that_miss_a_result_one_computes_it(storage: Path, tmp_path: Path) -> None:
    """The one goes on only when the other three have been refused."""
    with children(CONTENDER, *[[str(storage)]] * 4) as contenders:
        start(*contenders)
        outputs = []
        for process in contenders:
            outputs.append(process.communicate(timeout=PATIENCE_SECONDS)[0])
            assert process.returncode == 0
    assert len((tmp_path / "computed").read_text().splitlines()) == 1
    assert len(set(outputs)) == 1 and len(outputs[0]) == 65
    assert remains(Store(storage)) == []


HOLDER = (
    PRELUDE
    + """
lease = store.try_lease(key)
print("holds", flush=True)
sys.stdin.read()
"""
)


def test_a_killed_holders_lease_is_taken_over(storage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(storage)
    with children(HOLDER, [str(storage)]) as (holder,):
        assert holder.stdout and holder.stdout.readline() == "holds\n"
        assert store.get_or_lease(KEY) is None
        holder.kill()
        assert holder.wait() == -signal.SIGKILL
        if store.local_root:
            lease = held(store.try_lease(KEY))  # at once
        else:
            monkeypatch.setattr(leases_module, "TTL_SECONDS", 0.2)
            lease = until(lambda: store.try_lease(KEY))
    lease.release()
    assert remains(store) == []


COUNTER = (
    PRELUDE
    + """
print("ready", flush=True)
sys.stdin.read(1)
count = notes / "count"
for _ in range(150):
    while (lease := store.try_lease(key)) is None:
        pass
    with lease:
        count.write_text(str(int(count.read_text()) + 1))
"""
)


def test_no_two_ever_hold_a_lock_though_its_file_comes_and_goes(tmp_path: Path) -> None:
    (tmp_path / "count").write_text("0")
    with children(COUNTER, *[[str(tmp_path / "local")]] * 3) as counting:
        start(*counting)
        for process in counting:
            process.communicate(timeout=PATIENCE_SECONDS)
            assert process.returncode == 0
    assert (tmp_path / "count").read_text() == "450"


def test_a_result_finished_between_the_look_and_the_lease_is_found(
    storage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, neighbour = Store(storage), Store(storage)
    real = store.try_lease

    def late(key: str) -> Lease | None:
        neighbour.put(key, {"n": 1})
        return real(key)

    monkeypatch.setattr(store, "try_lease", late)
    found = store.get_or_lease(KEY)
    assert isinstance(found, StageResult) and found.facts == {"n": 1} and remains(store) == []


@pytest.mark.parametrize("bad", ["", "../up", "a/b", ".hidden"])
def test_invalid_keys_cannot_be_leased(storage: Path, bad: str) -> None:
    with pytest.raises(ValueError, match="cannot name"):
        Store(storage).try_lease(bad)


def test_storage_that_cannot_be_locked_is_reported_with_its_stage(tmp_path: Path) -> None:
    store = Store(tmp_path)
    (tmp_path / "leases").write_text("")
    with pytest.raises(RunError, match=f"storage {tmp_path}: .* while leasing {KEY}") as caught:
        store.try_lease(KEY)
    assert caught.value.stage == "warmup" and "\n" not in str(caught.value)


def test_a_lease_removes_what_killed_writers_left_and_nothing_else(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.put(KEY, {}, {"p": {"w": np.zeros(3)}})
    store.put(OTHER_KEY, {})
    folder = tmp_path / "objects" / KEY
    old, young, others = folder / "a.1-2.tmp", folder / "b.1-2.tmp", tmp_path / "objects" / OTHER_KEY / "a.1-2.tmp"
    kept = {*folder.iterdir(), young}
    for path in (old, young, others):
        path.touch()
    for path in (*folder.iterdir(), others):
        if path != young:
            os.utime(path, (time.time() - 3700,) * 2)
    held(store.try_lease(KEY)).release()
    assert set(folder.iterdir()) == kept and others.exists()
