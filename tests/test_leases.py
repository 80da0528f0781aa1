"""Leases and what stands on them: of several runs that miss a result one computes, whoever fails or dies."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import TINY, assert_same, stripes_dataset
from pyarrow import fs
from safetensors.numpy import load_file

import mosaic_ray.runtime.leases as leases_module
import mosaic_ray.runtime.store as store_module
from mosaic_ray import launch
from mosaic_ray.config import flatten, override
from mosaic_ray.errors import RunError
from mosaic_ray.methods import client_work
from mosaic_ray.methods.client_work import Bench
from mosaic_ray.runtime.cohort import SerialCohort
from mosaic_ray.runtime.leases import BEAT_SECONDS, TTL_SECONDS, Lease
from mosaic_ray.runtime.store import CorruptResult, StageResult, Store
from mosaic_ray.runtime.tracking import Tracker
from mosaic_ray.stages.partition import partition_stage
from mosaic_ray.stages.rounds import warmup_stage
from mosaic_ray.stages.run import Run
from mosaic_ray.stages.uploads import Generators, generators_stage

KEY = "warmup-0123456789abcdef0123"
OTHER_KEY = "warmup-ffffffffffffffffffff"
PATIENCE_SECONDS = 60.0


def bucket(folder: str) -> tuple[fs.FileSystem, str]:
    """A file system that a store cannot know to be local, as s3:// and gs:// are."""
    os.makedirs(folder, exist_ok=True)
    return fs.SubTreeFileSystem(folder, fs.LocalFileSystem()), "prefix"


@pytest.fixture(params=["local", "other"])
def storage(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where stores lie: on a local disk, or where there are no locks (there no slow one is taken for dead)."""
    if request.param == "other":
        monkeypatch.setattr(store_module, "open_uri", bucket)
    monkeypatch.setattr(leases_module, "BEAT_SECONDS", 0.02)
    monkeypatch.setattr(leases_module, "TTL_SECONDS", float("inf"))
    monkeypatch.setattr(leases_module, "_LOOK_SECONDS", 0.01)
    return tmp_path / request.param


@pytest.fixture
def bucket_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(store_module, "open_uri", bucket)
    monkeypatch.setattr(leases_module, "_LOOK_SECONDS", 0.01)
    return tmp_path / "other"


def remains(store: Store) -> list[str]:
    return store._files.names("leases")


def until(found: Callable[[], Any]) -> Any:
    """What ``found`` answers once it answers."""
    end = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < end:
        if (answer := found()) is not None:
            return answer
        time.sleep(0.005)
    raise AssertionError("it never came")


def held(lease: Lease | None) -> Lease:
    assert lease is not None
    return lease


PRELUDE = """
import hashlib, json, os, sys, time
from pathlib import Path
import numpy as np
from pyarrow import fs
import mosaic_ray.runtime.leases as leases_module
import mosaic_ray.runtime.store as store_module
folder = Path(sys.argv[1])
if folder.name == "other":
    store_module.open_uri = lambda uri: (fs.SubTreeFileSystem(uri, fs.LocalFileSystem()), "prefix")
leases_module.BEAT_SECONDS, leases_module.TTL_SECONDS = 0.02, float("inf")
store, key, notes = store_module.Store(str(folder)), "warmup-0123456789abcdef0123", folder.parent
"""


def child(code: str, *words: str) -> subprocess.Popen[str]:
    """A process that runs ``code``, with this checkout and the test helpers at hand."""
    here = [str(Path(__file__).parent), str(Path(store_module.__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    return subprocess.Popen(
        [sys.executable, "-c", code, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(here)},
    )  # fmt: skip


@contextlib.contextmanager
def children(code: str, *argvs: list[str]) -> Iterator[list[subprocess.Popen[str]]]:
    """One process for each list of words; killed at the end where they still run."""
    started = [child(code, *words) for words in argvs]
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.communicate()


def start(*processes: subprocess.Popen[str]) -> None:
    """Let them go once all are ready."""
    for process in processes:
        assert process.stdout and process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin
        process.stdin.write("g")
        process.stdin.flush()


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
        said = []
        for process in contenders:
            said.append(process.communicate(timeout=PATIENCE_SECONDS)[0])
            assert process.returncode == 0
    assert len((tmp_path / "computed").read_text().splitlines()) == 1
    assert len(set(said)) == 1 and len(said[0]) == 65
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
def test_what_is_no_key_cannot_be_leased(storage: Path, bad: str) -> None:
    with pytest.raises(ValueError, match="cannot name"):
        Store(storage).try_lease(bad)


def test_storage_that_cannot_be_locked_is_said_with_its_stage(tmp_path: Path) -> None:
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


# ---------------------------------------------------------------- where there are no locks


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets every watcher's clock on; no owner beats by itself."""
    now = [1000.0]

    def advance(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(leases_module, "_now", lambda: now[0])
    monkeypatch.setattr(leases_module, "BEAT_SECONDS", 1e6)
    return advance


def test_an_owner_is_dead_when_its_beat_has_stood_still_for_a_watchers_ttl(
    bucket_only: Path, clock: Callable[[float], None]
) -> None:
    assert BEAT_SECONDS * 4 < TTL_SECONDS
    owner, watcher, third = Store(bucket_only), Store(bucket_only), Store(bucket_only)
    lost = held(owner.try_lease(KEY))
    clock(10 * TTL_SECONDS)
    assert watcher.try_lease(KEY) is None, "seen for the first time"
    clock(TTL_SECONDS - 0.1)
    assert watcher.try_lease(KEY) is None
    owner._leases._claims._put_beat()
    clock(10 * TTL_SECONDS)
    assert watcher.try_lease(KEY) is None, "another beat than the last time"
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
    """Its beat goes on counting: one that began anew would look to an early watcher as if it had stood still."""
    owner, watcher = Store(bucket_only), Store(bucket_only)
    for _ in range(2):
        with held(owner.try_lease(KEY)):
            assert watcher.try_lease(KEY) is None
        clock(10 * TTL_SECONDS)


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
    return [thread for thread in threading.enumerate() if thread.name == "lease-beat"]


def test_the_heart_beats_while_anything_is_held(bucket_only: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases_module, "BEAT_SECONDS", 0.01)
    store = Store(bucket_only)
    one, two = held(store.try_lease(KEY)), held(store.try_lease(OTHER_KEY))
    (name,) = [name for name in remains(store) if name.startswith("~")]
    one.release()
    before = store._files.read(f"leases/{name}")
    until(lambda: store._files.read(f"leases/{name}") not in (before, b"") or None)
    assert len(beats()) == 1
    two.release()
    assert beats() == [] and remains(store) == []


@pytest.mark.parametrize("count", [2, 4])
def test_of_several_that_claim_in_the_same_moment_one_gets_it(
    bucket_only: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """All have found the key free, and all put their claims before any of them looks again."""
    monkeypatch.setattr(leases_module, "_LOOKS", 10_000)
    stores, together = [Store(bucket_only) for _ in range(count)], threading.Barrier(count)
    got: list[Lease | None] = []

    def take(store: Store) -> None:
        real = store._files.put

        def put(name: str, data: bytes) -> None:
            if KEY in name:
                together.wait(PATIENCE_SECONDS)
            real(name, data)
            if KEY in name:
                together.wait(PATIENCE_SECONDS)

        store._files.put = put
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
    real = store._files.put

    def put(name: str, data: bytes) -> None:
        real(name, data)
        if KEY in name:
            raise OSError(errno.EIO, "the network is away")

    with monkeypatch.context() as patch:
        patch.setattr(store._files, "put", put)
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


# ---------------------------------------------------------------- a stage


@pytest.fixture(autouse=True)
def look_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mosaic_ray.stages.run.POLL_SECONDS", 0.01)
    monkeypatch.setattr("mosaic_ray.stages.uploads.POLL_SECONDS", 0.01)


class Heard(Tracker):
    """A tracker whose lines are kept, and which does ``then`` after each of them."""

    def __init__(self, then: Callable[[], object] = lambda: None) -> None:
        super().__init__(None, progress=False, stream=io.StringIO())
        self.lines: list[str] = []
        self.then = then

    def say(self, text: str) -> None:
        self.lines.append(text)
        self.then()


class Neighbour(threading.Thread):
    """Another run, at ``work`` in a thread; its failure is kept."""

    def __init__(self, work: Callable[[], object]) -> None:
        super().__init__()
        self.work = work
        self.error: Exception | None = None
        self.halted, self.go_on = threading.Event(), threading.Event()
        self.fails = False

    def run(self) -> None:
        try:
            self.work()
        except Exception as error:
            self.error = error

    def halt(self) -> None:
        """Called in the thread: until somebody waits for it; then go on, or fail."""
        self.halted.set()
        assert self.go_on.wait(PATIENCE_SECONDS)
        if self.fails:
            raise RunError("no such thing", client=1)

    def begin(self) -> None:
        self.start()
        assert self.halted.wait(PATIENCE_SECONDS)


def after_some_looks(store: Store, do: Callable[[], object]) -> None:
    """``do`` when ``store`` has been asked in vain for the tenth time."""
    real, vain = store.get_or_lease, []

    def look(key: str) -> StageResult | Lease | None:
        if (found := real(key)) is None:
            vain.append(key)
            assert len(vain) < 5000, "it never came"
            if len(vain) == 10:
                do()
        return found

    store.get_or_lease = look


def bare_run(storage: Path, tracker: Tracker) -> Run:
    return Run(
        TINY, stripes_dataset(), Bench(TINY, stripes_dataset().facts, torch.device("cpu")), Store(storage), tracker
    )


@pytest.mark.parametrize("fails", [False, True])
def test_a_stage_waits_for_the_run_that_computes_it_and_goes_on_where_that_fails(storage: Path, fails: bool) -> None:
    computed = []

    def compute(writer: Any, progress: Any) -> dict[str, Any]:
        computed.append(threading.current_thread())
        if threading.current_thread() is neighbour:
            neighbour.halt()
        writer.add("p", {"w": np.arange(4.0)})
        progress.scalar("meta/loss", 1, 0.5)
        return {}

    theirs = bare_run(storage, Heard())
    neighbour = Neighbour(lambda: theirs.stage("teacher", KEY, compute))
    neighbour.fails = fails
    neighbour.begin()
    ours = bare_run(storage, heard := Heard())
    after_some_looks(ours.store, neighbour.go_on.set)
    result = ours.stage("teacher", KEY, compute)
    neighbour.join()
    assert heard.lines == ["teacher: waiting for another run that computes it"], "said once"
    assert computed == [neighbour] + [threading.main_thread()] * fails
    assert_same(result.load("p"), {"w": np.arange(4.0)})
    log = ours.log["teacher"]
    assert log["cached"] is not fails and log["waited_seconds"] > 0
    if fails:
        assert log["computed_seconds"] <= log["seconds"] - log["waited_seconds"] + 0.002, "waiting is no computing"
        assert str(neighbour.error) == "stage teacher, client 1: no such thing" and not theirs.log
    else:
        assert theirs.log["teacher"]["cached"] is False and "waited_seconds" not in theirs.log["teacher"]
        assert log["computed_seconds"] == theirs.log["teacher"]["computed_seconds"]
    assert remains(ours.store) == []


def test_a_damage_met_while_computing_is_still_known_as_one(tmp_path: Path) -> None:
    """So that ``launch`` removes what is damaged and begins again; the lease is free."""
    run = bare_run(tmp_path, Heard())

    def compute(writer: Any, progress: Any) -> dict[str, Any]:
        raise CorruptResult(OTHER_KEY, "p", "its SHA-256 differs")

    with pytest.raises(CorruptResult, match=r"^stage teacher: .*its SHA-256 differs") as caught:
        run.stage("teacher", KEY, compute)
    assert caught.value.key == OTHER_KEY and remains(run.store) == []


# ---------------------------------------------------------------- the generators


class Watched:
    """A serial cohort that notes whose work it hands on, and calls ``before(k)`` just before it does."""

    def __init__(self, cohort: SerialCohort, before: Callable[[int], None]) -> None:
        self.cohort, self.before = cohort, before
        self.clients: list[int] = []

    def ask(self, work: str, clients: Any, *rest: Any, **options: Any) -> Iterator[tuple[int, Any]]:
        for client_id, made in self.cohort.ask(work, clients, *rest, **options):
            self.before(client_id)
            self.clients.append(client_id)
            yield client_id, made


class Party:
    """A run that is about to make its generators."""

    def __init__(self, storage: Path, tracker: Tracker, before: Callable[[int], None] = lambda k: None) -> None:
        self.run = bare_run(storage, tracker)
        self.run.cohort = SerialCohort(TINY, self.run.dataset.facts, self.run.shard)
        self.shards = partition_stage(self.run)
        self.warmup = warmup_stage(self.run, self.shards)
        self.run.cohort = self.asked = Watched(self.run.cohort, before)

    def make(self) -> Generators:
        return generators_stage(self.run, self.shards, self.warmup)

    @property
    def log(self) -> dict[str, Any]:
        return self.run.log["generators"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Generators]:
    """A store that ends with the warm-up, and the generators that follow."""
    root = tmp_path_factory.mktemp("undisturbed")
    Party(root / "warm", Heard())
    shutil.copytree(root / "warm", root / "all")
    return root / "warm", Party(root / "all", Heard()).make()


@pytest.fixture
def warm(undisturbed: tuple[Path, Generators], tmp_path: Path) -> Path:
    return Path(shutil.copytree(undisturbed[0], tmp_path / "warm"))


def assert_same_generators(got: Generators, wanted: Generators) -> None:
    assert got.key == wanted.key and got.figures == wanted.figures
    for left, right in zip(got.weights(), wanted.weights(), strict=True):
        assert_same(left, right)


@pytest.mark.parametrize("fails", [False, True])
def test_generators_are_made_once_though_two_runs_want_them(
    warm: Path, undisturbed: tuple[Path, Generators], fails: bool
) -> None:
    """The other run has stored client 0's and holds the leases of 1 and 2 when this one begins."""
    theirs = Party(warm, Heard(), lambda k: neighbour.halt() if k == 1 else None)
    neighbour = Neighbour(theirs.make)
    neighbour.fails = fails
    neighbour.begin()
    ours = Party(warm, heard := Heard())
    assert sorted(remains(ours.run.store)) == sorted(result.key for result in undisturbed[1].results[1:])
    after_some_looks(ours.run.store, neighbour.go_on.set)
    made = ours.make()
    neighbour.join()
    assert heard.lines == ["generators: waiting for another run that computes 2 of 3"]
    assert (theirs.asked.clients, ours.asked.clients) == (([0], [1, 2]) if fails else ([0, 1, 2], []))
    assert ours.log["cached_clients"] == (1 if fails else 3) and ours.log["cached"] is not fails
    assert ours.log["waited_seconds"] > 0 and remains(ours.run.store) == []
    if fails:
        assert str(neighbour.error) == "stage generators, client 1: no such thing"
    else:
        assert theirs.log["cached_clients"] == 0 and theirs.log["cached"] is False
    assert_same_generators(made, undisturbed[1])


def test_generators_of_others_are_waited_for_with_no_lease_in_hand(
    warm: Path, undisturbed: tuple[Path, Generators], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Client 1's is computed elsewhere; 0 and 2 are free, and few leases may be held at once."""
    monkeypatch.setattr("mosaic_ray.stages.uploads.MAX_LEASES", 1)
    wanted = undisturbed[1].results[1]
    neighbour = Store(warm)
    lease = held(neighbour.try_lease(wanted.key))
    seen = []

    def finish() -> None:
        seen.append(remains(neighbour))
        neighbour.put(wanted.key, wanted.facts, {part: wanted.load(part) for part in wanted.parts})
        lease.release()

    at_work: list[int] = []
    ours = Party(warm, Heard(finish), lambda k: at_work.append(len(remains(neighbour))))
    made = ours.make()
    assert seen == [[wanted.key]] and ours.asked.clients == [0, 2]
    assert at_work == [2, 2], "the neighbour's lease and one"
    assert ours.log["cached_clients"] == 1 and ours.log["cached"] is False
    assert_same_generators(made, undisturbed[1])


# ---------------------------------------------------------------- whole runs

SHORT = override(
    TINY, {"warmup.checkpoint_rounds": 1, "generator.steps": 2, "meta.updates": 2, "distill.steps": 2}
)  # fmt: skip

RUNNER = """
import json, sys
import mosaic_ray.data.datasets
from helpers import stripes_dataset
from mosaic_ray import launch
from mosaic_ray.config import ExperimentConfig, override
from mosaic_ray.runtime.store import Store
storage, name, knobs = sys.argv[1:]
mosaic_ray.data.datasets.load_dataset = lambda config: stripes_dataset()
save = Store.save_checkpoint

def save_and_halt(*words):
    save(*words)
    print("saved", flush=True)
    sys.stdin.read()

if name == "halts":
    Store.save_checkpoint = save_and_halt
print("ready", flush=True)
sys.stdin.read(1)
config = override(ExperimentConfig(), json.loads(knobs))
print(json.dumps(launch.run(config, storage=storage, name=name, progress=False)))
"""


def runner(storage: Path, name: str) -> contextlib.AbstractContextManager[list[subprocess.Popen[str]]]:
    """A process that runs the short experiment once it is told to; the one called "halts" stops at a checkpoint."""
    return children(RUNNER, [str(storage), name, json.dumps(flatten(SHORT))])


def run_here(storage: Path) -> dict[str, Any]:
    return launch.run(SHORT, storage=str(storage), name="here", progress=False)


def assert_same_outcome(got: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert got["accuracy"] == wanted["accuracy"]
    students = (load_file(Path(summary["paths"]["run"]) / "student.safetensors") for summary in (got, wanted))
    assert_same(*students)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """The short experiment, undisturbed; runs of this process are on its data from here on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mosaic_ray.data.datasets.load_dataset", lambda config: stripes_dataset())
        yield run_here(tmp_path_factory.mktemp("alone"))


def test_two_runs_at_once_compute_every_stage_once(tmp_path: Path, alone: dict[str, Any]) -> None:
    with runner(tmp_path, "there") as (other,):
        start(other)
        got = [run_here(tmp_path), json.loads(other.communicate(timeout=PATIENCE_SECONDS)[0])]
    logs = [summary["stages"] for summary in got]
    for name in alone["stages"]:
        if name != "generators":
            assert sum(not log[name]["cached"] for log in logs) == 1, name
    assert sum(3 - log["generators"]["cached_clients"] for log in logs) == 3
    for summary in got:
        assert_same_outcome(summary, alone)
    assert remains(Store(tmp_path)) == []


def test_a_killed_runs_warmup_is_taken_over_at_its_checkpoint(
    tmp_path: Path, alone: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    rounds = []

    def train(bench: Bench, shard: Any, client_id: int, common: Any, own: Any) -> Any:
        if common["phase"] == "local":
            rounds.append(common["round"])
        return client_work.train(bench, shard, client_id, common, own)

    def say(tracker: Tracker, text: str) -> None:
        if text == "warmup: waiting for another run that computes it":
            other.kill()

    with runner(tmp_path, "halts") as (other,):
        start(other)
        assert other.stdout and other.stdout.readline() == "saved\n"
        monkeypatch.setitem(client_work.WORK, "train", train)
        monkeypatch.setattr(Tracker, "say", say)
        summary = run_here(tmp_path)
        assert other.wait() == -signal.SIGKILL
    assert rounds == [1] * 3 + [2] * 3, "round 0 is the dead run's"
    assert summary["stages"]["warmup"]["waited_seconds"] > 0 and not summary["stages"]["warmup"]["cached"]
    assert_same_outcome(summary, alone)
