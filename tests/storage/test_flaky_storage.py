"""Retries of transient storage errors; lasting ones end a run with one line, and it resumes."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_runner import ask
from flaky import Flaky
from helpers import TINY, assert_same, stripes_dataset
from pyarrow import fs
from safetensors.numpy import load_file
from storing import FACTS, KEY, arrays, held, remains, same, until

import mosaic_ray.storage.filesystem as files_module
import mosaic_ray.storage.locks as leases_module
import mosaic_ray.storage.store as store_module
from mosaic_ray.config.resolve import to_toml
from mosaic_ray.core.errors import RunError
from mosaic_ray.runs import runner
from mosaic_ray.storage.filesystem import Files
from mosaic_ray.storage.gc import verify
from mosaic_ray.storage.store import Store
from mosaic_ray.storage.uri import is_transient, reason

URI = "s3://bucket/results"


class Clock:
    """Time that passes in sleeps alone."""

    def __init__(self) -> None:
        self.now, self.slept = 1000.0, []

    def monotonic(self) -> float:
        return self.now

    time = monotonic

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(files_module, "time", made)
    return made


@pytest.fixture
def flaky(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Flaky:
    """What every URI means in this test; its pauses are short."""
    made = Flaky(tmp_path / "bucket")
    monkeypatch.setattr(store_module, "open_uri", lambda uri: (made.filesystem(), "prefix"))
    monkeypatch.setattr(files_module, "_PAUSES", (0.001, 0.004))
    monkeypatch.setattr(files_module, "PATIENCE_SECONDS", 5.0)
    return made


# ---------------------------------------------------------------- retries


@pytest.mark.parametrize(
    "error, passes",
    [
        *((OSError(number, "x"), True) for number in (errno.EIO, errno.EAGAIN, errno.ETIMEDOUT, errno.ESTALE)),
        (ConnectionResetError(errno.ECONNRESET, "x"), True),
        *((OSError(number, "x"), False) for number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)),
        (FileNotFoundError(errno.ENOENT, "x"), False),
        (IsADirectoryError(errno.EISDIR, "x"), False),
        (OSError("When listing: AWS Error NETWORK_CONNECTION during ListObjectsV2 operation: curlCode: 28"), True),
        (OSError("AWS Error SLOW_DOWN during PutObject operation: Please reduce your request rate."), True),
        (OSError("AWS Error SERVICE_UNAVAILABLE during PutObject operation: x"), True),
        (OSError("AWS Error UNKNOWN (HTTP status 503) during HeadObject operation: No response body."), True),
        (OSError("AWS Error NO_SUCH_UPLOAD during CompleteMultipartUpload operation: x"), True),
        (OSError("google::cloud::Status(UNAVAILABLE: try again)"), True),
        (OSError("AWS Error ACCESS_DENIED during PutObject operation: No response body."), False),
        (OSError("AWS Error NO_SUCH_BUCKET during CreateMultipartUpload operation: no"), False),
        (OSError("AWS Error INVALID_ACCESS_KEY_ID during PutObject operation: no"), False),
        (OSError("AWS Error SIGNATURE_DOES_NOT_MATCH during PutObject operation: no"), False),
        (OSError("AWS Error UNKNOWN (HTTP status 400) during HeadObject operation: No response body."), False),
        (OSError("Bucket 'x' not found. To create buckets, enable the allow_bucket_creation option."), False),
        (OSError("google::cloud::Status(PERMISSION_DENIED: no)"), False),
    ],
    ids=str,
)  # fmt: skip
def test_transient_errors_are_known_by_number_or_by_text(error: OSError, passes: bool) -> None:
    assert is_transient(error) is passes


def test_a_clouds_error_is_shortened() -> None:
    text = "When reading information for key 'x' in bucket 'b': AWS Error ACCESS_DENIED during HeadObject operation"
    assert reason(OSError(f"{text}: No response body.\nmore")) == "AWS Error ACCESS_DENIED during HeadObject operation"
    assert reason(OSError("")) == "OSError"


def failing(error: OSError, times: float) -> tuple[Callable[[], str], list[int]]:
    """Work that fails so often before it is done, and the list of its calls."""
    calls: list[int] = []

    def work() -> str:
        calls.append(1)
        if len(calls) <= times:
            raise error
        return "done"

    return work, calls


def local(folder: Path) -> Files:
    return Files(fs.LocalFileSystem(), str(folder))


def test_pauses_double_and_jitter_up_to_a_bound(tmp_path: Path, clock: Clock) -> None:
    work, calls = failing(OSError(errno.EIO, "x"), 10)
    assert local(tmp_path).retry(work) == "done" and len(calls) == 11
    first, longest = files_module._PAUSES
    for number, slept in enumerate(clock.slept):
        whole = min(first * 2**number, longest)
        assert whole / 2 <= slept <= whole
    assert len({round(slept / min(first * 2**n, longest), 6) for n, slept in enumerate(clock.slept)}) == 10


def test_lasting_errors_are_raised_at_once(tmp_path: Path, clock: Clock) -> None:
    work, calls = failing(OSError(errno.ENOSPC, "x"), 1)
    with pytest.raises(OSError, match="x"):
        local(tmp_path).retry(work)
    assert len(calls) == 1 and clock.slept == []


def test_retries_end_and_storage_that_is_down_is_tried_once(tmp_path: Path, clock: Clock) -> None:
    files, error = local(tmp_path), TimeoutError(errno.ETIMEDOUT, "x")
    logged: list[str] = []
    files.log = logged.append
    begun = clock.now
    with pytest.raises(TimeoutError):
        files.retry(failing(error, float("inf"))[0])
    assert files_module.PATIENCE_SECONDS / 2 < clock.now - begun <= files_module.PATIENCE_SECONDS
    assert logged == ["storage fails (Connection timed out); trying again for up to 120 s"]
    clock.slept.clear()
    with pytest.raises(TimeoutError):
        files.retry(failing(error, float("inf"))[0])
    assert clock.slept == [] and len(logged) == 1, "it is known to be down"
    with pytest.raises(FileNotFoundError):
        files.read("absent")
    assert files.retry(failing(error, 3)[0]) == "done", "an answer, if only that there is no such file: up again"


def test_before_a_run_there_is_little_patience(tmp_path: Path, clock: Clock) -> None:
    hasty, begun = Files(fs.LocalFileSystem(), str(tmp_path), files_module.OPENING_SECONDS), clock.now
    with pytest.raises(OSError, match="x"):
        hasty.retry(failing(OSError(errno.EIO, "x"), float("inf"))[0])
    assert clock.now - begun <= files_module.OPENING_SECONDS


@pytest.mark.parametrize("step", ["write", "fsync", "replace", "makedirs"])
def test_a_local_write_is_tried_again_from_its_beginning(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    real, failures = getattr(os, step), []

    def stumble(*args: Any, **options: Any) -> object:
        if len(failures) < 3:
            failures.append(1)
            raise OSError(errno.ESTALE, "stale")
        return real(*args, **options)

    files = local(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, step, stumble)
        files.put("a/b", b"data")
    assert files.read("a/b") == b"data" and len(failures) == 3
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]


def test_a_read_that_breaks_off_begins_again(flaky: Flaky, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files_module, "_CHUNK", 4)
    files, data = Files(flaky.filesystem(), "prefix"), bytes(range(40))
    files.put("a", data)
    reads: list[str] = []

    def breaks(call: str, path: str) -> bool:
        reads.append(call)
        return call == "read" and reads.count("read") in (3, 9)

    flaky.fails = breaks
    assert files.read("a") == data and reads.count("open") == 3
    reads.clear()
    assert files.digest("a", 40)[0] == 40 and reads.count("open") == 3


@pytest.mark.parametrize("call", ["CreateMultipartUpload", "UploadPart", "CompleteMultipartUpload"])
def test_a_put_that_fails_for_good_shows_nothing_and_spares_what_was_there(
    flaky: Flaky, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    monkeypatch.setattr(files_module, "PATIENCE_SECONDS", 0.02)
    files = Files(flaky.filesystem(), "prefix")
    files.put("old", b"old")
    flaky.fails = lambda name, path: name == call
    for name in ("old", "new"):
        with pytest.raises(OSError, match=r"reset|NETWORK|part"):
            files.put(name, b"new")
    flaky.fix()
    assert files.names("") == ["old"] and files.read("old") == b"old"


# ---------------------------------------------------------------- the store's contract


@pytest.mark.parametrize("seed", range(3))
def test_the_stores_contract_where_a_fifth_of_all_calls_fails(flaky: Flaky, seed: int, logged: list[str]) -> None:
    flaky.share = 0.2
    flaky._draws.seed(seed)
    one, two = Store(URI, log=logged.append), Store(URI)
    one.check_writable()
    for number in range(8):
        key = f"warmup-{number:020d}"
        lease = one.get_or_lease(key)
        assert lease is not None and two.get_or_lease(key) is None
        with lease:
            one.save_checkpoint(key, {"round": 1}, {"w": arrays(number)})
            one.save_checkpoint(key, {"round": 2}, {"w": arrays(number + 1)})
            kept = two.load_checkpoint(key)
            assert kept is not None and kept.facts == {"round": 2} and same(kept.load("w"), arrays(number + 1))
            one.put(key, FACTS, {"global": arrays(number), "client 1": arrays(2.0)})
            one.drop_checkpoint(key)
        got = two.get(key)
        assert got is not None and got.facts == FACTS and same(got.load("global"), arrays(number))
        assert two.load_checkpoint(key) is None
    one.write("sweeps/n/plan.json", b"{}")
    assert two.files.read("sweeps/n/plan.json") == b"{}" and two.files.names("sweeps") == ["n"]
    one.files.move("sweeps/n", "sweeps/n.1")
    two.discard(KEY)
    assert one.get(KEY) is None and remains(one) == [] and not logged
    assert two.files.names("sweeps") == ["n.1"] and len(one.files.names("objects")) == 8 and not verify(one).damaged
    assert flaky.failures > 0.1 * flaky.calls > 50


def test_storage_that_is_down_is_not_taken_for_damage(
    flaky: Flaky, monkeypatch: pytest.MonkeyPatch, logged: list[str]
) -> None:
    monkeypatch.setattr(files_module, "PATIENCE_SECONDS", 0.02)
    store = Store(URI, log=logged.append)
    made = store.put(KEY, FACTS, {"p": arrays()})
    flaky.down = True
    works = (lambda: store.get(KEY), lambda: made.load("p"), lambda: store.discard(KEY), lambda: store.put(KEY, {}))
    for work in works:
        with pytest.raises(RunError, match=f"storage {URI}: .* while .*{KEY}; fix it and give the same") as caught:
            work()
        assert caught.value.stage == "warmup" and "\n" not in str(caught.value)
    flaky.down = False
    got = store.get(KEY)
    assert got is not None and same(got.load("p"), arrays()) and not logged


# ---------------------------------------------------------------- leases


def test_an_outage_at_the_watcher_does_not_expire_a_lease(flaky: Flaky, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both were cut off for longer than the lease lives; the watcher is back first."""
    monkeypatch.setattr(files_module, "TROUBLE_SECONDS", 0.01)
    monkeypatch.setattr(leases_module, "HEARTBEAT_SECONDS", 1e6)
    owner, watcher = Store(URI), Store(URI)
    lease = held(owner.try_lease(KEY))
    assert watcher.try_lease(KEY) is None
    monkeypatch.setattr(leases_module, "TTL_SECONDS", 0.2)
    away = [True] * 100
    flaky.fails = lambda call, path: bool(away and away.pop())
    assert watcher.try_lease(KEY) is None, "its clock has run on, but it could not look"
    assert not away
    lease.release()


def test_an_owner_that_was_cut_off_is_taken_over_and_both_store_the_same(
    flaky: Flaky, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss of the lease is not noticed; the result is complete, and no owner releases another's lease."""
    monkeypatch.setattr(leases_module, "HEARTBEAT_SECONDS", 0.01)
    monkeypatch.setattr(leases_module, "TTL_SECONDS", 0.1)
    monkeypatch.setattr(files_module, "PATIENCE_SECONDS", 0.02)
    owner = Store(URI)
    healthy = Flaky(tmp_path / "bucket")
    monkeypatch.setattr(store_module, "open_uri", lambda uri: (healthy.filesystem(), "prefix"))
    other = Store(URI)
    mine = held(owner.try_lease(KEY))
    flaky.down = True
    theirs = until(lambda: other.try_lease(KEY))
    flaky.down = False
    owner.put(KEY, FACTS, {"p": arrays()})
    mine.release()
    assert other.try_lease(KEY) is None, "it is still the other's"
    other.put(KEY, FACTS, {"p": arrays()})
    theirs.release()
    got = owner.get(KEY)
    assert got is not None and same(got.load("p"), arrays()) and remains(other) == []


# ---------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mosaic_ray.data.load.load_dataset", lambda config: stripes_dataset())
        summary = runner.run(TINY, storage=str(tmp_path_factory.mktemp("still")), progress=False)
    return {"summary": summary, "student": load_file(Path(summary["paths"]["run"]) / "student.safetensors")}


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """A command line that runs TINY on the flaky storage."""
    monkeypatch.setattr("mosaic_ray.data.load.load_dataset", lambda config: stripes_dataset())
    (tmp_path / "tiny.toml").write_text(to_toml(TINY))
    return ["run", "--config", str(tmp_path / "tiny.toml"), "--storage", URI, "--name", "one"]


def ended_equal(folder: Path, undisturbed: dict[str, Any]) -> None:
    summary = json.loads((folder / "prefix/runs/one/summary.json").read_text())
    for name in ("accuracy", "per_class_accuracy", "communication_bytes", "label_counts"):
        assert summary[name] == undisturbed["summary"][name], name
    assert_same(load_file(folder / "prefix/runs/one/student.safetensors"), undisturbed["student"])


def test_a_run_where_a_fifth_of_all_calls_fails_ends_with_the_same_numbers(
    flaky: Flaky, tiny: list[str], undisturbed: dict[str, Any]
) -> None:
    flaky.share = 0.2
    result = ask(*tiny)
    assert result.exit_code == 0, result.stderr
    ended_equal(flaky.folder, undisturbed)
    assert flaky.failures > 50 and "damaged" not in result.stderr


DOWN = {
    "warmup": lambda call, path: call == "UploadPart" and "checkpoints/" in path,
    "generator": lambda call, path: call == "CompleteMultipartUpload" and "objects/generator-" in path,
    "teacher": lambda call, path: call == "UploadPart" and "objects/teacher-" in path,
    "evaluate": lambda call, path: call == "CompleteMultipartUpload" and "objects/evaluate-" in path,
    "files": lambda call, path: call == "CompleteMultipartUpload" and "runs/one/" in path,
}


@pytest.mark.parametrize(
    "moment", ["teacher", *(pytest.param(name, marks=pytest.mark.slow) for name in DOWN if name != "teacher")]
)
def test_storage_that_goes_down_ends_the_run_in_one_line_and_it_resumes(
    flaky: Flaky, tiny: list[str], undisturbed: dict[str, Any], monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    monkeypatch.setattr(files_module, "PATIENCE_SECONDS", 0.05)
    tiny += ["--set", "warmup.checkpoint_rounds=1"]
    flaky.goes_down = DOWN[moment]
    result = ask(*tiny)
    assert result.exit_code == 1, result.stderr
    last = result.stderr.splitlines()[-1]
    assert last.startswith("mosaic: error: ") and f"storage {URI}: " in last and "Traceback" not in result.stderr
    if moment == "files":
        assert "the run's files are kept in" in last
    else:
        assert f"stage {moment}" in last and "give the same command again to resume" in last
    flaky.fix()
    assert not verify(Store(URI)).damaged and not (flaky.folder / "prefix/runs").exists(), "nothing half written"
    result = ask(*tiny)
    assert result.exit_code == 0, result.stderr
    assert "partition: cached" in result.stderr and "damaged" not in result.stderr
    assert moment not in ("teacher", "evaluate", "files") or "warmup: cached" in result.stderr
    assert moment != "warmup" or "warmup: begins" in result.stderr
    ended_equal(flaky.folder, undisturbed)
