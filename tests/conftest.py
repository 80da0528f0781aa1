"""Fixtures that several test modules share."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from storing import bucket
from terminals import Terminal

import mosaic_ray.storage.locks as leases_module
import mosaic_ray.storage.store as store_module
from mosaic_ray.execution import ray_session
from mosaic_ray.runs import runner
from mosaic_ray.storage.store import Store
from mosaic_ray.sweeps import runner as sweep_runner

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported: so ``helpers`` must not be imported above

# An example's time says how busy the machine is.
settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")


_SHARED_RAY, _HOME = contextlib.ExitStack(), str(Path.home())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put whole runs on Ray first, since they take longest: then workers have short tests left at the end."""
    items.sort(key=lambda item: ("ray_up" not in _fixtures(item), item.get_closest_marker("ray") is None))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Stop the shared Ray before a test that does not use it; skip a test that needs a GPU where there is none."""
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("it needs a GPU that torch can use")
    if "ray_up" not in _fixtures(item):
        _SHARED_RAY.close()


def _fixtures(item: pytest.Item) -> Sequence[str]:
    return getattr(item, "fixturenames", ())


@pytest.fixture(scope="session", autouse=True)
def _no_waiting_for_disks() -> Iterator[None]:
    """Let ``os.fsync`` return at once in this process: no test pulls a plug, and a tiny run calls it 140 times."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="session")
def _no_ray_left() -> Iterator[None]:
    yield
    _SHARED_RAY.close()


@pytest.fixture
def ray_up(_no_ray_left: None) -> Any:
    """Ray with 4 CPUs; consecutive tests that use it share it."""
    import ray
    from helpers import small_ray

    if ray.is_initialized():
        return ray
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", _HOME)  # Ray's token is read once in a process: not below the home of one test
        return _SHARED_RAY.enter_context(small_ray(num_cpus=4))


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder of real data sets; tests that need it skip where it is absent."""
    root = Path(os.environ.get("MOSAIC_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")
    if not (root / "FashionMNIST").is_dir():
        pytest.skip(f"no real data under {root} (set MOSAIC_DATA)")
    return root


@pytest.fixture(scope="session")
def undisturbed_tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The summary of a whole run of ``TINY`` on stripes, in this process; its files are only read."""
    from helpers import TINY, stripes_dataset

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mosaic_ray.data.load.load_dataset", lambda config: stripes_dataset())
        return runner.run(TINY, storage=str(tmp_path_factory.mktemp("tiny")), progress=False)


@pytest.fixture
def tiny_in_storage(undisturbed_tiny: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """``undisturbed_tiny``, and a copy of its store at ``tmp_path``."""
    shutil.copytree(Path(undisturbed_tiny["paths"]["run"]).parents[1], tmp_path, dirs_exist_ok=True)
    return undisturbed_tiny


@pytest.fixture
def logged() -> list[str]:
    """The lines that ``store`` and ``any_store`` log."""
    return []


@pytest.fixture
def store(tmp_path: Path, logged: list[str]) -> Store:
    return Store(str(tmp_path / "s"), log=logged.append)


@pytest.fixture(params=["local", "other"])
def any_store(
    request: pytest.FixtureRequest, tmp_path: Path, logged: list[str], monkeypatch: pytest.MonkeyPatch
) -> Store:
    """A local store, and one with a file system that is not known to be local."""
    if request.param == "other":
        monkeypatch.setattr(store_module, "open_uri", lambda uri: bucket(str(tmp_path / "bucket")))
    return Store(str(tmp_path / "s"), log=logged.append)


@pytest.fixture(params=["local", "other"])
def storage(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The place of stores: a local disk, or a file system without locks (there no slow owner counts as dead)."""
    if request.param == "other":
        monkeypatch.setattr(store_module, "open_uri", bucket)
    monkeypatch.setattr(leases_module, "HEARTBEAT_SECONDS", 0.02)
    monkeypatch.setattr(leases_module, "TTL_SECONDS", float("inf"))
    monkeypatch.setattr(leases_module, "_CHECK_SECONDS", 0.01)
    return tmp_path / request.param


@pytest.fixture
def bucket_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The place of stores: a file system without locks."""
    monkeypatch.setattr(store_module, "open_uri", bucket)
    monkeypatch.setattr(leases_module, "_CHECK_SECONDS", 0.01)
    return tmp_path / "other"


@pytest.fixture
def two_cpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine of 2 CPUs and 8 GiB on which Ray cannot be imported; an empty working directory."""
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setattr(ray_session, "local_resources", lambda: ray_session.Resources(2, 0, 8 * 2**30))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("MOSAIC_DATA", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def tty(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """A terminal of 80 columns."""
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    return Terminal()


class Trials(list):
    failing: tuple[str, ...] = ()
    interrupts: tuple[str, ...] = ()


@pytest.fixture
def trials(monkeypatch) -> list[str]:
    """Replace Ray: trials end when they are started, and their names are recorded.

    A trial named in ``failing`` fails; at one named in ``interrupts`` somebody presses Ctrl-C.
    """
    ran = Trials()

    def run(sweep, queue, datasets, storage, address):
        while True:
            try:
                trial = queue.next()
            except StopIteration:
                return
            if trial.name in ran.interrupts:
                raise KeyboardInterrupt
            queue.start(trial.name)
            ran.append(trial.name)
            status = "failed" if trial.name in ran.failing else "done"
            if status == "failed":
                queue.state.record(trial, status=status, stage="warmup", round=3, client=1, error="loss is\nnan")
            else:
                selection = {"metric": "validation accuracy", "value": 0.5}
                queue.state.record(trial, status=status, selection=selection, session=queue.state.session)
            queue.report(trial.name, {"status": status})
            queue.finish(trial.name)

    monkeypatch.setattr(sweep_runner, "_run_trials", run)
    return ran
