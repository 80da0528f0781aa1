"""Of several runs that miss a stage one computes it, also if one fails or dies."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import TINY, assert_same, stripes_dataset
from safetensors.numpy import load_file
from storing import KEY, OTHER_KEY, PATIENCE_SECONDS, children, held, remains, start

from mosaic_ray.config.resolve import flatten, override
from mosaic_ray.core.errors import RunError
from mosaic_ray.execution.backend import SerialBackend
from mosaic_ray.federated.client import ClientContext, TrainTask
from mosaic_ray.methods.mosaic.client_uploads import Generators
from mosaic_ray.methods.mosaic.graph import GENERATORS
from mosaic_ray.pipeline.context import RunContext
from mosaic_ray.pipeline.partition import deal
from mosaic_ray.pipeline.rounds import warm_up
from mosaic_ray.runs import runner as launch
from mosaic_ray.storage.locks import Lease
from mosaic_ray.storage.store import CorruptResult, StageResult, Store
from mosaic_ray.tracking.tracker import Tracker

# ---------------------------------------------------------------- a stage


@pytest.fixture(autouse=True)
def look_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mosaic_ray.pipeline.context.POLL_SECONDS", 0.01)
    monkeypatch.setattr("mosaic_ray.methods.mosaic.client_uploads.POLL_SECONDS", 0.01)


class Heard(Tracker):
    """A tracker that keeps its lines and calls ``then`` after each."""

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
        """Block the thread until another run waits for it; then continue, or fail."""
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


def bare_run(storage: Path, tracker: Tracker) -> RunContext:
    return RunContext(
        TINY,
        stripes_dataset(),
        ClientContext(TINY, stripes_dataset().facts, torch.device("cpu")),
        Store(storage),
        tracker,
    )


@pytest.mark.parametrize("fails", [False, True])
def test_a_stage_waits_for_its_lease_and_takes_over_on_failure(storage: Path, fails: bool) -> None:
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
    assert heard.lines == ["teacher: waiting for another run that computes it"], "logged once"
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
    """Make ``execute`` remove a damaged result and start over; the lease is free."""
    run = bare_run(tmp_path, Heard())

    def compute(writer: Any, progress: Any) -> dict[str, Any]:
        raise CorruptResult(OTHER_KEY, "p", "its SHA-256 differs")

    with pytest.raises(CorruptResult, match=r"^stage teacher: .*its SHA-256 differs") as caught:
        run.stage("teacher", KEY, compute)
    assert caught.value.key == OTHER_KEY and remains(run.store) == []


# ---------------------------------------------------------------- the generators


class Watched:
    """A serial cohort that records the client of each result, and calls ``before(k)`` first."""

    seconds = 0.0

    def __init__(self, cohort: SerialBackend, before: Callable[[int], None]) -> None:
        self.cohort, self.before = cohort, before
        self.clients: list[int] = []

    def map(self, task: Any, clients: Any, *rest: Any, **options: Any) -> Iterator[tuple[int, Any]]:
        for client_id, made in self.cohort.map(task, clients, *rest, **options):
            self.before(client_id)
            self.clients.append(client_id)
            yield client_id, made


class Party:
    """A run that is about to make its generators."""

    def __init__(self, storage: Path, tracker: Tracker, before: Callable[[int], None] = lambda k: None) -> None:
        self.run = bare_run(storage, tracker)
        self.run.backend = SerialBackend(TINY, self.run.dataset.facts, self.run.shard)
        deal(self.run)
        self.warmup = warm_up(self.run)
        self.run.backend = self.asked = Watched(self.run.backend, before)

    def make(self) -> Generators:
        return self.run.run(GENERATORS, self.warmup)

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
    monkeypatch.setattr("mosaic_ray.methods.mosaic.client_uploads.MAX_LEASES", 1)
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
import mosaic_ray.data.load
from helpers import stripes_dataset
from mosaic_ray.runs import runner
from mosaic_ray.config.resolve import ExperimentConfig, override
from mosaic_ray.storage.store import Store
storage, name, knobs = sys.argv[1:]
mosaic_ray.data.load.load_dataset = lambda config: stripes_dataset()
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
print(json.dumps(runner.run(config, storage=storage, name=name, progress=False)))
"""


def runner(storage: Path, name: str) -> contextlib.AbstractContextManager[list[subprocess.Popen[str]]]:
    """A process that runs the short experiment when signalled; the one named "halts" stops at a checkpoint."""
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
        patch.setattr("mosaic_ray.data.load.load_dataset", lambda config: stripes_dataset())
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

    real = TrainTask.run

    def train(task: TrainTask, *inputs: Any) -> Any:
        if task.phase == "local":
            rounds.append(task.round_num)
        return real(task, *inputs)

    def say(tracker: Tracker, text: str) -> None:
        if text == "warmup: waiting for another run that computes it":
            other.kill()

    with runner(tmp_path, "halts") as (other,):
        start(other)
        assert other.stdout and other.stdout.readline() == "saved\n"
        monkeypatch.setattr(TrainTask, "run", train)
        monkeypatch.setattr(Tracker, "say", say)
        summary = run_here(tmp_path)
        assert other.wait() == -signal.SIGKILL
    assert rounds == [1] * 3 + [2] * 3, "round 0 is the dead run's"
    assert summary["stages"]["warmup"]["waited_seconds"] > 0 and not summary["stages"]["warmup"]["cached"]
    assert_same_outcome(summary, alone)
