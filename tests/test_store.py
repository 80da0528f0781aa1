"""The store: what is put is what is got, through kills, damage, full disks and neighbours."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pyarrow import fs

import mosaic_ray.runtime.files as files_module
import mosaic_ray.runtime.store as store_module
from mosaic_ray.errors import RequestError, RunError
from mosaic_ray.runtime.store import CorruptResult, Store, stage_key

KEY = "warmup-0123456789abcdef0123"
FACTS = {"rounds": [1, 2], "accuracy": 0.1 + 0.2, "name": "zażółć", "none": None, "yes": True}


def arrays(fill: float = 1.0) -> dict[str, np.ndarray]:
    return {"w": np.full((3, 2), fill, np.float32), "num_batches_tracked": np.array(7, np.int64)}


def same(got: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> bool:
    return list(got) == list(wanted) and all(
        got[n].dtype == a.dtype and got[n].shape == a.shape and got[n].tobytes() == np.asarray(a, order="C").tobytes()
        for n, a in wanted.items()
    )


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def store(tmp_path: Path, said: list[str]) -> Store:
    return Store(str(tmp_path / "s"), say=said.append)


@pytest.fixture(params=["local", "other"])
def any_store(
    request: pytest.FixtureRequest, tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> Store:
    """A local store, and one whose file system the store cannot know to be local (as s3:// and gs:// are)."""
    if request.param == "other":
        os.makedirs(tmp_path / "bucket")
        remote = fs.SubTreeFileSystem(str(tmp_path / "bucket"), fs.LocalFileSystem())
        monkeypatch.setattr(store_module, "open_uri", lambda uri: (remote, "prefix"))
    return Store(str(tmp_path / "s"), say=said.append)


# ---------------------------------------------------------------- keys

knobs = st.dictionaries(
    st.text(max_size=8),
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text(max_size=8)
    ),
    max_size=5,
)


@given(knobs, st.integers(0, 9), st.lists(st.text(max_size=5), max_size=3))
def test_stage_key_does_not_depend_on_the_order_or_kind_of_containers(
    values: dict[str, object], version: int, upstream: list[str]
) -> None:
    key = stage_key("warmup", version, values | {"widths": (1.0, 0.5)}, upstream)
    turned = dict(reversed((values | {"widths": [np.float64(1.0), 0.5]}).items()))
    assert key == stage_key("warmup", version, turned, tuple(upstream))
    assert key.startswith("warmup-") and len(key) == len("warmup-") + 20


def test_stage_key_changes_with_every_argument() -> None:
    lr = 0.1
    keys = {
        stage_key("a", 1, {"lr": lr}, ["x", "y"]),
        stage_key("b", 1, {"lr": lr}, ["x", "y"]),
        stage_key("a", 2, {"lr": lr}, ["x", "y"]),
        stage_key("a", 1, {"lr": float(np.nextafter(lr, 1))}, ["x", "y"]),
        stage_key("a", 1, {"lr": np.float32(lr)}, ["x", "y"]),  # is another number
        stage_key("a", 1, {"lr": lr, "k": None}, ["x", "y"]),
        stage_key("a", 1, {"lr": lr}, ["y", "x"]),
        stage_key("a", 1, {"lr": lr}, ["x"]),
    }
    assert len(keys) == 8


def test_stage_key_is_the_same_in_every_version() -> None:
    """Golden: a change here throws away every result that users have stored."""
    text = b'{"knobs":{"lr":0.05,"widths":[1.0]},"stage":"warmup","upstream":["partition-0"],"version":1}'
    key = stage_key("warmup", 1, {"widths": (1.0,), "lr": 0.05}, ["partition-0"])
    assert key == "warmup-" + hashlib.sha256(text).hexdigest()[:20] == "warmup-63b5cdfe09b337827659"


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), np.float32("nan"), np.zeros(2), {1: 2}, object(), b"x"])
def test_what_json_would_bend_is_refused_by_its_place(store: Store, bad: object) -> None:
    with pytest.raises(ValueError, match=r"knobs\.a\[1\]"):
        stage_key("s", 1, {"a": [0, bad]}, [])
    with pytest.raises(ValueError, match=r"facts\.a\.b"):
        store.put(KEY, {"a": {"b": bad}})
    assert store.get(KEY) is None


@pytest.mark.parametrize("bad", ["", "../up", "a/b", ".hidden"])
def test_a_key_is_a_plain_name(store: Store, bad: str) -> None:
    with pytest.raises(ValueError, match="cannot name"):
        store.put(bad, {})


# ---------------------------------------------------------------- what is put is what is got


def test_put_then_get(any_store: Store, said: list[str]) -> None:
    assert any_store.get(KEY) is None
    made = any_store.put(KEY, FACTS, {"global": arrays(), "client 1": arrays(2.0)})
    got = any_store.get(KEY)
    assert got is not None and not said
    for result in (made, got):
        assert result.key == KEY and result.facts == FACTS and result.parts == ("global", "client 1")
        assert same(result.load("global"), arrays()) and same(result.load("client 1"), arrays(2.0))


def test_facts_of_a_fresh_and_of_a_cached_result_are_alike(store: Store) -> None:
    made = store.put(KEY, {"widths": (1.0, np.float32(0.1)), "n": np.int64(3), "no": np.bool_(False)})
    assert made.facts == {"widths": [1.0, float(np.float32(0.1))], "n": 3, "no": False}
    assert made.facts["no"] is False and type(made.facts["n"]) is int
    cached = store.get(KEY)
    assert cached is not None and cached.facts == made.facts


@given(st.floats(allow_nan=False, allow_infinity=False), st.text(), st.integers())
@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_facts_come_back_exactly(store: Store, number: float, word: str, whole: int) -> None:
    store.put(KEY, {"v": [number, word, whole]})
    got = store.get(KEY)
    assert got is not None and repr(got.facts["v"]) == repr([number, word, whole])


ANY_ARRAY = hnp.arrays(
    st.sampled_from([np.int64, np.int32, np.float32, np.float64, np.float16, np.uint8, np.bool_]),
    hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4),
)


@given(st.dictionaries(st.text(min_size=1, max_size=6), ANY_ARRAY, max_size=4), st.sampled_from("CTRS"))
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_arrays_come_back_exactly(store: Store, plain: dict[str, np.ndarray], view: str) -> None:
    """0-d, empty, transposed, reversed and strided ones, NaN bits included, in the order given."""
    bend: Any = {
        "C": lambda a: a,
        "T": lambda a: a.T,
        "R": np.flip,
        "S": lambda a: a[::2] if a.ndim else a,
    }[view]
    wanted = {name: bend(a) for name, a in plain.items()}
    store.put(KEY, {}, {"p": wanted})
    got = store.get(KEY)
    assert got is not None and same(got.load("p"), wanted)


def test_loaded_arrays_are_writable_and_private(store: Store) -> None:
    result = store.put(KEY, {}, {"p": arrays()})
    first = result.load("p")
    first["w"][:] = -1
    first["num_batches_tracked"][...] = 0
    assert same(result.load("p"), arrays())


def test_arrays_of_objects_are_refused_by_name(store: Store) -> None:
    with pytest.raises(ValueError, match=r'part "p" \(names object\)'):
        store.put(KEY, {}, {"p": {"names": np.array(["a", None]), "fine": np.zeros(2)}})


def test_a_second_commit_replaces_the_first_and_spares_its_readers(store: Store) -> None:
    old = store.put(KEY, {"n": 1}, {"p": arrays(1.0)})
    store.put(KEY, {"n": 2}, {"p": arrays(2.0)})
    got = store.get(KEY)
    assert got is not None and got.facts == {"n": 2} and same(got.load("p"), arrays(2.0))
    assert same(old.load("p"), arrays(1.0))


def test_nothing_is_seen_before_commit(store: Store) -> None:
    writer = store.writer(KEY)
    writer.add("p", arrays())
    assert store.get(KEY) is None
    writer.commit({})
    assert store.get(KEY) is not None


def test_fresh_hides_what_was_there_and_shows_what_it_wrote(store: Store) -> None:
    store.put(KEY, {"n": 1})
    store.put("other-1", {})
    store.save_checkpoint(KEY, {"n": 1}, {})
    fresh = Store(store.uri, fresh=True)
    assert fresh.get(KEY) is None and fresh.load_checkpoint(KEY) is None
    fresh.save_checkpoint(KEY, {"n": 2}, {})
    assert fresh.get(KEY) is None, "a checkpoint of that name is not a result"
    fresh.put(KEY, {"n": 2})
    got, checkpoint = fresh.get(KEY), fresh.load_checkpoint(KEY)
    assert got is not None and got.facts == {"n": 2} and checkpoint is not None and checkpoint.facts == {"n": 2}
    assert fresh.get("other-1") is None
    later = Store(store.uri).get(KEY)
    assert later is not None and later.facts == {"n": 2}


def test_stores_of_one_session_share_what_they_wrote_and_no_other_session_does(tmp_path: Path) -> None:
    plain = Store(tmp_path)
    plain.put(KEY, {"n": 0})
    one, two, other = (Store(tmp_path, fresh=True, session=name) for name in ("a", "a", "b"))
    one.put(KEY, {"n": 1})
    one.save_checkpoint(KEY, {"n": 2}, {})
    for store, seen in ((one, True), (two, True), (plain, True), (other, False)):
        found, checkpoint = store.get(KEY), store.load_checkpoint(KEY)
        assert (found is not None, checkpoint is not None) == (seen, seen)
        assert not seen or (found and checkpoint and (found.facts, checkpoint.facts) == ({"n": 1}, {"n": 2}))
    other.put(KEY, {"n": 3})
    assert two.get(KEY) is None, "it was replaced"
    two.drop_checkpoint(KEY)
    assert one.load_checkpoint(KEY) is None
    assert len({plain.session, Store(tmp_path).session, Store(tmp_path).session}) == 3


def test_a_result_from_before_sessions_can_be_read(store: Store, said: list[str]) -> None:
    store.put(KEY, FACTS, {"p": arrays()})
    path = Path(store.local_root or "") / "objects" / KEY / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["session"], manifest["sha256"]
    seal = hashlib.sha256(json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    path.write_text(json.dumps(manifest | {"sha256": seal}))
    got = store.get(KEY)
    assert got is not None and got.facts == FACTS and same(got.load("p"), arrays())
    assert Store(store.uri, fresh=True).get(KEY) is None and not said


def test_relative_paths_and_file_uris_mean_the_same_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    here = Store("a b")
    here.put(KEY, {"n": 1})
    monkeypatch.chdir("/")
    assert here.get(KEY) is not None, "the folder must not move with the process"
    assert Store((tmp_path / "a b").as_uri()).get(KEY) is not None
    assert here.local_root == tmp_path / "a b"


# ---------------------------------------------------------------- damage


def payload(store: Store, room: str = "objects") -> Path:
    (found,) = Path(store.local_root or "").glob(f"{room}/{KEY}/part-*.safetensors")
    return found


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def become_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (lambda p: os.truncate(p, p.stat().st_size // 2), "bytes instead of"),
    "lengthened": (lambda p: p.write_bytes(p.read_bytes() + b"\0"), "bytes instead of"),
    "flipped": (flip, "its SHA-256 differs"),
    "deleted": (os.unlink, "it is missing"),
    "a folder": (become_folder, ""),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("room", ["objects", "checkpoints"])
def test_a_damaged_payload_is_said_and_is_absent(store: Store, said: list[str], damage: str, room: str) -> None:
    put: Any = {"objects": store.put, "checkpoints": store.save_checkpoint}[room]
    get = {"objects": store.get, "checkpoints": store.load_checkpoint}[room]
    put(KEY, FACTS, {"p": arrays()})
    do, why = DAMAGES[damage]
    path = payload(store, room)
    do(path)
    assert get(KEY) is None
    (line,) = said
    assert KEY in line and "damaged" in line and path.name in line and why in line and "\n" not in line
    assert get(KEY) is None and len(said) == 1, "it is removed, so said once"
    if path.is_dir():
        path.rmdir()
    put(KEY, FACTS, {"p": arrays()})
    again = get(KEY)
    assert again is not None and same(again.load("p"), arrays()) and len(said) == 1


def reseal(path: Path, **changes: object) -> None:
    manifest = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda p: p.write_bytes(b""),
        lambda p: p.write_bytes(os.urandom(100)),
        lambda p: p.write_text("[]"),
        lambda p: p.write_text("{}"),
        lambda p: p.write_text("null"),
        lambda p: p.write_text("[" * 100_000),
        lambda p: os.truncate(p, p.stat().st_size - 1),
        lambda p: reseal(p, facts={"accuracy": 1.0}),
        lambda p: reseal(p, files={}),
        lambda p: reseal(p, version=2),
        lambda p: reseal(p, facts={"a": float("nan")}),
    ],
)
def test_a_damaged_manifest_is_said_and_is_absent(
    store: Store, said: list[str], spoil: Callable[[Path], object]
) -> None:
    store.put(KEY, FACTS, {"p": arrays()})
    spoil(Path(store.local_root or "") / "objects" / KEY / "manifest.json")
    assert store.get(KEY) is None
    assert len(said) == 1 and f"stage result {KEY} is damaged (manifest.json: " in said[0]
    store.put(KEY, FACTS, {"p": arrays()})
    assert store.get(KEY) is not None


def test_a_result_moved_to_another_key_is_not_taken_for_it(store: Store, said: list[str]) -> None:
    store.put(KEY, FACTS)
    shutil.copytree(Path(store.local_root or "") / "objects" / KEY, Path(store.local_root or "") / "objects" / "b-1")
    assert store.get("b-1") is None and "it is for" in said[0]


def test_a_payload_lost_after_get_is_a_corrupt_result(store: Store) -> None:
    result = store.put(KEY, FACTS, {"p": arrays(), "q": arrays(2.0)})
    for path in Path(store.local_root or "").glob(f"objects/{KEY}/part-*"):
        path.unlink() if path.name == result._entries["p"]["name"] else flip(path)
    for part, why in (("p", "No such file"), ("q", "SHA-256")):
        with pytest.raises(CorruptResult, match=why) as caught:
            result.load(part)
        located = caught.value.at("teacher")
        assert (located.key, located.part, located.stage) == (KEY, part, "teacher")
        assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    assert store.get(KEY) is None


def test_a_discarded_result_is_absent_and_its_neighbours_stay(any_store: Store, said: list[str]) -> None:
    held = any_store.put(KEY, FACTS, {"p": arrays()})
    any_store.put("other-1", FACTS)
    any_store.discard(KEY)
    any_store.discard(KEY)
    assert any_store.get(KEY) is None and any_store.get("other-1") is not None and not said
    assert same(held.load("p"), arrays()), "who reads it at this moment is not hurt"


def test_an_uploaded_folder_keeps_its_files_and_their_places(any_store: Store, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "tensorboard").mkdir(parents=True)
    (run / "summary.json").write_bytes(b"{}")
    (run / "tensorboard" / "events").write_bytes(bytes(range(256)))
    any_store.upload(run, "runs/mine")
    assert any_store._files.read("runs/mine/summary.json") == b"{}"
    assert any_store._files.read("runs/mine/tensorboard/events") == bytes(range(256))


# ---------------------------------------------------------------- checkpoints


def test_checkpoints_replace_each_other_and_tidy_up(any_store: Store, said: list[str]) -> None:
    assert any_store.load_checkpoint(KEY) is None
    for number in range(3):
        any_store.save_checkpoint(KEY, {"round": number}, {"w": arrays(number), "kept": arrays(-1.0)})
        got = any_store.load_checkpoint(KEY)
        assert got is not None and got.facts == {"round": number} and same(got.load("w"), arrays(number))
    assert sum(name.startswith("part-") for name in any_store._files.names(f"checkpoints/{KEY}")) == 2
    assert any_store.get(KEY) is None
    any_store.drop_checkpoint(KEY)
    any_store.drop_checkpoint(KEY)
    assert any_store.load_checkpoint(KEY) is None and not any_store._files.names(f"checkpoints/{KEY}") and not said


# ---------------------------------------------------------------- kills


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
        delete = store._files.delete

        def counted(name: str, dying: DyingOs = dying, delete: Callable[[str], None] = delete) -> None:
            dying.count += 1
            if dying.count >= dying.last:
                raise Killed
            delete(name)

        with monkeypatch.context() as patch:
            patch.setattr(files_module, "os", dying)
            patch.setattr(store._files, "delete", counted)
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
    store: Store, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = {"a": arrays(1.0), "b": arrays(2.0)}

    def check(whole: bool) -> None:
        got = store.get(KEY)
        assert got is not None or not whole
        if got is not None:
            assert got.facts == FACTS and all(same(got.load(p), parts[p]) for p in parts)
        again = store.put(KEY, FACTS, parts)  # the rerun completes over whatever lies there
        rerun = store.get(KEY)
        assert rerun is not None and same(again.load("a"), parts["a"]) and same(rerun.load("b"), parts["b"])
        for path in Path(store.local_root or "").glob(f"objects/{KEY}/[mp]*"):
            if not path.name.endswith(".tmp"):
                path.unlink()

    steps = killed_at_every_step(store, monkeypatch, lambda: store.put(KEY, FACTS, parts), check)
    assert steps >= 3 * len(("open", "write", "fsync", "close", "replace")) and not said


def test_O12_a_kill_at_any_step_leaves_the_old_checkpoint_or_the_new(
    store: Store, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = arrays(1.0), arrays(2.0)
    store.save_checkpoint(KEY, {"round": 1}, {"w": old})

    def check(whole: bool) -> None:
        got = store.load_checkpoint(KEY)
        assert got is not None and (got.facts["round"] == 2 or not whole)
        assert same(got.load("w"), {1: old, 2: new}[got.facts["round"]])
        store.save_checkpoint(KEY, {"round": 1}, {"w": old})
        assert payload(store, "checkpoints").exists(), "one payload is left, whatever the kill left behind"

    def work() -> None:
        store.save_checkpoint(KEY, {"round": 2}, {"w": new})

    killed_at_every_step(store, monkeypatch, work, check)
    assert not said


CHILD = """
import os, signal, sys
import numpy as np
import mosaic_ray.runtime.store as m
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
def test_O12_a_really_killed_process_leaves_something_whole(tmp_path: Path, said: list[str], at: int) -> None:
    """fsync 1-4 are the first checkpoint (payload, folder, manifest, folder), 5-8 the second, 13-16 the result."""

    def child(kill_at: int) -> int:
        argv = [sys.executable, "-c", CHILD, str(tmp_path), str(kill_at)]
        path = os.pathsep.join([str(Path(store_module.__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
        return subprocess.run(argv, env=os.environ | {"PYTHONPATH": path}, capture_output=True).returncode

    assert child(at) == -signal.SIGKILL
    store = Store(str(tmp_path), say=said.append)
    checkpoint = store.load_checkpoint("k-1")
    assert (None if checkpoint is None else checkpoint.facts["n"]) == {3: None, 7: 0, 14: 2}[at]
    if checkpoint is not None:
        assert (checkpoint.load("w")["w"] == checkpoint.facts["n"]).all()
    assert store.get("k-1") is None and child(0) == 0 and not said
    done = store.get("k-1")
    assert done is not None and (done.load("w")["w"] == 3).all() and store.load_checkpoint("k-1") is None


# ---------------------------------------------------------------- neighbours


def test_two_threads_committing_one_key_never_show_a_mixture(store: Store, said: list[str]) -> None:
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
    assert not wrong and not said and store.get(KEY) is not None


def test_two_processes_committing_one_key_both_succeed(tmp_path: Path, said: list[str]) -> None:
    code = (
        "import sys, numpy as np; from mosaic_ray.runtime.store import Store\n"
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
    got = Store(str(tmp_path), say=said.append).get("k-1")
    assert got is not None and not said and (got.load("p")["w"] == int(got.facts["n"])).all()


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


# ---------------------------------------------------------------- storage that refuses


def refused(uri: str) -> str:
    with pytest.raises(RequestError) as caught:
        Store(uri).check_writable()
    line = str(caught.value)
    assert line.startswith(f"--storage {uri}: ") and "\n" not in line
    return line


def test_storage_that_cannot_be_written_is_a_request_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "Not a directory" in refused(str(tmp_path / "file" / "below"))
    refused(str(tmp_path / "file"))
    if Path("/proc/self").exists():
        refused("/proc/mosaic_runs")
    assert "ftp9" in refused("ftp9://host/path")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_storage_without_permission_is_a_request_error(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert "Permission denied" in refused(str(tmp_path / "x"))


def test_check_writable_leaves_nothing(any_store: Store) -> None:
    any_store.check_writable()
    assert any_store._files.names("objects") == []


Usage = namedtuple("Usage", "total used free")


def test_a_nearly_full_disk_is_refused_before_the_run(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1 << 30, 1 << 30, 63 << 20))
    with pytest.raises(RequestError, match=r"full.*63 MiB"):
        store.check_writable()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1 << 30, 0, 65 << 20))
    store.check_writable()


@pytest.mark.parametrize(
    "code, word", [(errno.ENOSPC, "no space left"), (errno.EDQUOT, "no space left"), (errno.EIO, "")]
)
def test_a_disk_that_fills_up_is_a_run_error_and_shows_nothing(
    store: Store, said: list[str], monkeypatch: pytest.MonkeyPatch, code: int, word: str
) -> None:
    def write(descriptor: int, data: bytes) -> int:
        raise OSError(code, os.strerror(code))

    store.put(KEY, {"n": 1}, {"p": arrays(1.0)})
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", write)
        with pytest.raises(RunError, match=f"storage {store.uri}: {word}.*{KEY}") as caught:
            store.put(KEY, {"n": 2}, {"p": arrays(2.0)})
    assert caught.value.stage == "warmup" and "\n" not in str(caught.value)
    got = store.get(KEY)
    assert got is not None and got.facts == {"n": 1} and not said
    assert not list(Path(store.local_root or "").rglob("*.tmp")), "a full disk is not filled with remains"


def test_a_really_full_disk(tmp_path: Path, said: list[str]) -> None:
    with small_disk(tmp_path / "disk", "1m") as disk:
        assert "full" in refused(str(disk))
        store = Store(str(disk), say=said.append)
        store.put("small-1", {"n": 1}, {"p": arrays()})
        with pytest.raises(RunError, match="no space left"):
            store.put(KEY, {}, {"p": {"w": np.zeros(2 << 20, np.uint8)}})
        got = store.get("small-1")
        assert store.get(KEY) is None and got is not None and same(got.load("p"), arrays()) and not said
        store.put(KEY, {}, {"p": {"w": np.zeros(1 << 19, np.uint8)}})
        assert store.get(KEY) is not None, "the failed attempt gave its room back"


@contextlib.contextmanager
def small_disk(path: Path, size: str) -> Iterator[Path]:
    path.mkdir()
    try:
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)]
        mounted = subprocess.run(command, capture_output=True)
    except FileNotFoundError:
        pytest.skip("no mount command")
    if mounted.returncode:
        pytest.skip("may not mount")
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)
