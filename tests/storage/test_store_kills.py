"""The store with kills at every step, and with concurrent writers of the same keys."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from storing import FACTS, KEY, arrays, payload, same

import mosaic_ray.storage.filesystem as files_module
import mosaic_ray.storage.store as store_module
from mosaic_ray.storage.store import Store


class Killed(BaseException):
    """Stands for SIGKILL: after it no operation of the process happens any more."""


STEPS = ("makedirs", "open", "write", "fsync", "close", "replace", "unlink")


class DyingOs:
    """``os`` for the store: the ``last``-th file operation is the process's end; a write then ends half way."""

    def __init__(self, last: int) -> None:
        self.last, self.count = last, 0

    def __getattr__(self, name: str) -> object:
        real = getattr(os, name)
        if name not in STEPS:
            return real

        def step(*args: Any, **kwargs: Any) -> object:
            self.count += 1
            if self.count >= self.last:
                if name == "write" and self.count == self.last:
                    os.write(args[0], bytes(args[1])[: len(args[1]) // 2])
                raise Killed
            return real(*args, **kwargs)

        return step


def killed_at_every_step(
    store: Store, monkeypatch: pytest.MonkeyPatch, work: Callable[[], object], check: Callable[[bool], None]
) -> int:
    """Run ``work`` with a kill at step 1, 2, ... until it lives; ``check(whole)`` after each. Returns the steps."""
    for last in range(1, 1000):
        dying = DyingOs(last)
        delete = store.files.delete

        def counted(name: str, dying: DyingOs = dying, delete: Callable[[str], None] = delete) -> None:
            dying.count += 1
            if dying.count >= dying.last:
                raise Killed
            delete(name)

        with monkeypatch.context() as patch:
            patch.setattr(files_module, "os", dying)
            patch.setattr(store.files, "delete", counted)
            try:
                work()
                whole = True
            except Killed:
                whole = False
        check(whole)
        if whole:
            return dying.count
    raise AssertionError("the work never ends")


def test_O12_a_kill_at_any_step_leaves_all_or_nothing(
    store: Store, logged: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = {"a": arrays(1.0), "b": arrays(2.0)}

    def check(whole: bool) -> None:
        got = store.get(KEY)
        assert got is not None or not whole
        if got is not None:
            assert got.facts == FACTS and all(same(got.load(p), parts[p]) for p in parts)
        again = store.put(KEY, FACTS, parts)  # the rerun overwrites leftovers
        rerun = store.get(KEY)
        assert rerun is not None and same(again.load("a"), parts["a"]) and same(rerun.load("b"), parts["b"])
        for path in Path(store.local_root or "").glob(f"objects/{KEY}/[mp]*"):
            if not path.name.endswith(".tmp"):
                path.unlink()

    steps = killed_at_every_step(store, monkeypatch, lambda: store.put(KEY, FACTS, parts), check)
    assert steps >= 3 * len(("open", "write", "fsync", "close", "replace")) and not logged


def test_O12_a_kill_at_any_step_leaves_the_old_checkpoint_or_the_new(
    store: Store, logged: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = arrays(1.0), arrays(2.0)
    store.save_checkpoint(KEY, {"round": 1}, {"w": old})

    def check(whole: bool) -> None:
        got = store.load_checkpoint(KEY)
        assert got is not None and (got.facts["round"] == 2 or not whole)
        assert same(got.load("w"), {1: old, 2: new}[got.facts["round"]])
        store.save_checkpoint(KEY, {"round": 1}, {"w": old})
        assert payload(store, "checkpoints").exists(), "one payload is left, with no leftovers of the kill"

    def work() -> None:
        store.save_checkpoint(KEY, {"round": 2}, {"w": new})

    killed_at_every_step(store, monkeypatch, work, check)
    assert not logged


CHILD = """
import os, signal, sys
import numpy as np
import mosaic_ray.storage.store as m
at, real, count = int(sys.argv[2]), os.fsync, 0
def fsync(descriptor):
    global count
    count += 1
    if count == at:
        os.kill(os.getpid(), signal.SIGKILL)
    real(descriptor)
os.fsync = fsync
store = m.Store(sys.argv[1])
for n in range(3):
    store.save_checkpoint("k-1", {"n": n}, {"w": {"w": np.full(1000, n)}})
store.put("k-1", {"n": 3}, {"w": {"w": np.full(1000, 3)}})
store.drop_checkpoint("k-1")
print("done")
"""


@pytest.mark.parametrize("at", [3, 7, 14])
def test_O12_a_really_killed_process_leaves_something_whole(tmp_path: Path, logged: list[str], at: int) -> None:
    """fsync 1-4 are the first checkpoint (payload, folder, manifest, folder), 5-8 the second, 13-16 the result."""

    def child(kill_at: int) -> int:
        argv = [sys.executable, "-c", CHILD, str(tmp_path), str(kill_at)]
        path = os.pathsep.join([str(Path(store_module.__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
        return subprocess.run(argv, env=os.environ | {"PYTHONPATH": path}, capture_output=True).returncode

    assert child(at) == -signal.SIGKILL
    store = Store(str(tmp_path), log=logged.append)
    checkpoint = store.load_checkpoint("k-1")
    assert (None if checkpoint is None else checkpoint.facts["n"]) == {3: None, 7: 0, 14: 2}[at]
    if checkpoint is not None:
        assert (checkpoint.load("w")["w"] == checkpoint.facts["n"]).all()
    assert store.get("k-1") is None and child(0) == 0 and not logged
    done = store.get("k-1")
    assert done is not None and (done.load("w")["w"] == 3).all() and store.load_checkpoint("k-1") is None


# ---------------------------------------------------------------- neighbours


def test_two_threads_committing_one_key_never_show_a_mixture(store: Store, logged: list[str]) -> None:
    """Two writers disagree on purpose; every reader sees one's whole result or the other's."""
    start, wrong, done = threading.Barrier(3), [], threading.Event()

    def write(number: int) -> None:
        start.wait()
        for _ in range(15):
            store.put(KEY, {"n": number}, {"a": arrays(number), "b": arrays(number + 0.5)})

    def read() -> None:
        start.wait()
        while not done.is_set():
            got = store.get(KEY)
            if got is not None:
                n = got.facts["n"]
                if not (same(got.load("a"), arrays(n)) and same(got.load("b"), arrays(n + 0.5))):
                    wrong.append(n)

    threads = [threading.Thread(target=write, args=(n,)) for n in (1, 2)]
    reader = threading.Thread(target=read)
    for thread in (*threads, reader):
        thread.start()
    for thread in threads:
        thread.join()
    done.set()
    reader.join()
    assert not wrong and not logged and store.get(KEY) is not None


def test_two_processes_committing_one_key_both_succeed(tmp_path: Path, logged: list[str]) -> None:
    code = (
        "import sys, numpy as np; from mosaic_ray.storage.store import Store\n"
        "s = Store(sys.argv[1])\nsys.stdin.read(1)\n"
        "for _ in range(20): s.put('k-1', {'n': sys.argv[2]}, {'p': {'w': np.full(5000, int(sys.argv[2]))}})"
    )
    path = os.pathsep.join([str(Path(store_module.__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    children = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path), n], stdin=subprocess.PIPE, env=os.environ | {"PYTHONPATH": path}
        )
        for n in "12"
    ]
    for child in children:
        child.communicate(b"g")
    assert [child.returncode for child in children] == [0, 0]
    got = Store(str(tmp_path), log=logged.append).get("k-1")
    assert got is not None and not logged and (got.load("p")["w"] == int(got.facts["n"])).all()


def test_a_folder_dropped_by_a_neighbour_is_made_again(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = os.replace, []

    def replace(source: str, target: str) -> None:
        calls.append(target)
        if len(calls) == 1:
            shutil.rmtree(os.path.dirname(target))
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    store.save_checkpoint(KEY, {"n": 1}, {})
    assert store.load_checkpoint(KEY) is not None
