"""Fixtures that several test modules share."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from hypothesis import settings
from storing import bucket
from terminals import Terminal

import mosaic_ray.runtime.leases as leases_module
import mosaic_ray.runtime.store as store_module
from mosaic_ray.runtime import cluster
from mosaic_ray.runtime.store import Store

os.environ.setdefault("OMP_NUM_THREADS", "1")

# An example's time says how busy the machine is.
settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder of real data sets; tests that need it skip where it is absent."""
    root = Path(os.environ.get("MOSAIC_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")
    if not (root / "FashionMNIST").is_dir():
        pytest.skip(f"no real data under {root} (set MOSAIC_DATA)")
    return root


@pytest.fixture
def said() -> list[str]:
    """What ``store`` and ``any_store`` say."""
    return []


@pytest.fixture
def store(tmp_path: Path, said: list[str]) -> Store:
    return Store(str(tmp_path / "s"), say=said.append)


@pytest.fixture(params=["local", "other"])
def any_store(
    request: pytest.FixtureRequest, tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> Store:
    """A local store, and one whose file system the store cannot know to be local."""
    if request.param == "other":
        monkeypatch.setattr(store_module, "open_uri", lambda uri: bucket(str(tmp_path / "bucket")))
    return Store(str(tmp_path / "s"), say=said.append)


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
    """Where stores lie: where there are no locks."""
    monkeypatch.setattr(store_module, "open_uri", bucket)
    monkeypatch.setattr(leases_module, "_LOOK_SECONDS", 0.01)
    return tmp_path / "other"


@pytest.fixture
def two_cpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine of 2 CPUs and 8 GiB on which Ray cannot be imported; an empty working directory."""
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setattr(cluster, "local_resources", lambda: cluster.Resources(2, 0, 8 * 2**30))
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
