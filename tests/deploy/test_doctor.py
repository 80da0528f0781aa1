"""`mosaic doctor` on this machine: its checks, and which findings are problems."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from cli_runner import ask

from mosaic_ray.config.registry import DATASETS
from mosaic_ray.config.schema import DataConfig
from mosaic_ray.core.errors import RequestError
from mosaic_ray.deploy import doctor

REPO = Path(__file__).resolve().parents[2]


def test_doctor_finds_this_machine_fit(tmp_path):
    result = ask("doctor", "--storage", str(tmp_path / "new"))
    assert result.exit_code == 0, result.stdout
    rows = [line.split(maxsplit=2) for line in result.stdout.splitlines()]
    assert {row[0] for row in rows} <= {"ok", "warning"}
    assert {"python:", "packages:", "cpu:", "memory:", "gpu:", "bf16:", "storage:", "disk:", "data:"} <= {
        r[1] for r in rows
    }
    assert not (tmp_path / "new").exists()


def test_doctor_fails_on_a_storage_that_is_a_file(tmp_path):
    (tmp_path / "file").touch()
    result = ask("doctor", "--storage", str(tmp_path / "file" / "below"))
    assert result.exit_code == 1
    assert re.search(r"^problem +storage: .*file.*--storage", result.stdout, re.MULTILINE)


def test_doctor_refuses_the_remote_storage_that_a_run_refuses(tmp_path):
    [check] = doctor._storage("s3://key:hunter2@bucket/results")
    assert check.severity == "problem" and "hunter2" not in check.found and "holds no secrets" in check.found
    assert [check.severity for check in doctor._storage("ftp9://host/path")] == ["problem"]
    assert list(doctor._storage(f"file://{tmp_path}/new")) == [
        doctor.Check("storage", "ok", f"file://{tmp_path}/new is writable")
    ]


def test_doctor_compares_versions_with_the_declared_bounds(monkeypatch):
    declared = ["numpy>=1", "click>=999", "no-such-thing>=1", "torch>=999; extra == 'x'"]
    monkeypatch.setattr("importlib.metadata.requires", lambda name: declared)
    checks = {check.what: check for check in doctor._packages()}
    assert sorted(checks) == ["click", "no-such-thing", "packages"]
    assert checks["packages"].found.startswith("numpy ")
    assert (checks["click"].severity, checks["click"].fix) == ("problem", "pip install 'click>=999'")
    assert checks["no-such-thing"].found == "not installed"


def test_doctor_names_the_data_sets_that_are_there(tmp_path, monkeypatch):
    monkeypatch.delenv("MOSAIC_DATA", raising=False)
    (tmp_path / "cifar-10-batches-py").mkdir()
    check = doctor._data(DataConfig(root=str(tmp_path)))
    assert "cifar10 (cifar-10-batches-py)" in check.found
    assert "not there: mnist, fmnist, svhn, cifar100" in check.found
    assert doctor._data(DataConfig(root=str(tmp_path / "none"))).severity == "warning"


@pytest.mark.parametrize("name", sorted(set(DATASETS) - {"digits"}))
def test_doctor_looks_where_the_loader_looks(tmp_path, name):
    from mosaic_ray.data.load import load_dataset

    with pytest.raises(RequestError) as caught:
        load_dataset(DataConfig(name=name, root=str(tmp_path)))
    assert str(tmp_path / doctor.folders()[name]) in str(caught.value)


@pytest.mark.ray
def test_doctor_starts_ray_when_asked(tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "mosaic_ray", "doctor", "--ray", "--address", "local", "--storage", str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=REPO,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(r"^ok +ray: local: \d+ CPUs", result.stdout, re.MULTILINE)
