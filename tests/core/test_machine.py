"""The processors and the memory that this process may use: control groups of both versions, Slurm, affinity."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from mosaic_ray.core import machine
from mosaic_ray.core.machine import Memory

GIB = 2**30


@pytest.fixture(autouse=True)
def pretended(tmp_path, monkeypatch):
    """A machine of 64 CPUs and 256 GiB, 200 of them available, without control groups or Slurm."""
    monkeypatch.setattr(machine, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(machine, "OWN_CGROUPS", tmp_path / "own")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=256 * GIB, available=200 * GIB))
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def groups(tmp_path):
    """Write the names of this process's groups, and files of groups given as FOLDER: {FILE: CONTENT}."""

    def write(own: str, tree: dict[str, dict[str, str]]) -> None:
        (tmp_path / "own").write_text(own)
        for folder, files in tree.items():
            place = tmp_path / "cgroup" / folder
            place.mkdir(parents=True, exist_ok=True)
            for name, content in files.items():
                (place / name).write_text(content + "\n")

    return write


def v2(limit: str, used: int, inactive: int = 0, active: int = 0) -> dict[str, str]:
    stat = f"anon 5\nfile 7\ninactive_file {inactive}\nactive_file {active}"
    return {"memory.max": limit, "memory.current": str(used), "memory.stat": stat}


def v1(limit: int, used: int, inactive: int = 0, active: int = 0) -> dict[str, str]:
    # without total_: this group alone, without those below
    stat = f"inactive_file 1\nactive_file 1\ntotal_inactive_file {inactive}\ntotal_active_file {active}"
    return {"memory.limit_in_bytes": str(limit), "memory.usage_in_bytes": str(used), "memory.stat": stat}


def test_without_limits_it_is_the_machine():
    assert machine.memory() == Memory(256 * GIB, 200 * GIB)
    assert machine.num_cpus() == 64


def test_version_2_counts_the_tightest_group_on_the_way_up(groups):
    groups(
        "0::/system.slice/job_7/step_0\n",
        {
            "": {"cgroup.controllers": "cpu memory"},
            "system.slice": {"cpu.max": "800000 100000"} | v2("max", 90 * GIB),
            "system.slice/job_7": {"cpu.max": "350000 100000"} | v2(str(16 * GIB), 10 * GIB, 1 * GIB, 2 * GIB),
            "system.slice/job_7/step_0": {"cpu.max": "max 100000"} | v2(str(32 * GIB), 1 * GIB),
            "system.slice/job_8": {"cpu.max": "100000 100000"} | v2(str(GIB), GIB),  # another job's
        },
    )
    assert machine.memory() == Memory(16 * GIB, 9 * GIB)  # 16 less 10, of which 3 are pages of files
    assert machine.num_cpus() == 3


def test_total_and_available_may_come_from_different_groups(groups):
    groups("0::/a/b\n", {"a": v2(str(8 * GIB), 7 * GIB), "a/b": v2(str(4 * GIB), 2 * GIB)})
    assert machine.memory() == Memory(4 * GIB, 1 * GIB)


def test_version_1_has_a_tree_for_each_controller(groups):
    groups(
        "12:cpuset:/\n9:cpu,cpuacct:/slurm/job_7\n4:memory:/slurm/job_7/step\n0::/init.scope\n",
        {
            "cpu/slurm/job_7": {"cpu.cfs_quota_us": "-1", "cpu.cfs_period_us": "100000"},
            "cpu/slurm": {"cpu.cfs_quota_us": "600000", "cpu.cfs_period_us": "100000"},
            "memory": v1(2**63 - 4096, 150 * GIB),
            "memory/slurm/job_7": v1(20 * GIB, 12 * GIB, 3 * GIB, 1 * GIB),
            "memory/slurm/job_7/step": v1(2**63 - 4096, 5 * GIB),
        },
    )
    assert machine.memory() == Memory(20 * GIB, 12 * GIB)
    assert machine.num_cpus() == 6


@pytest.mark.parametrize("own", ["4:memory:/docker/abc\n3:cpu:/docker/abc\n", "4:memory:/../..\n3:cpu:/../..\n"])
def test_in_a_container_the_top_is_its_own_group(groups, own):
    quota = {"cpu.cfs_quota_us": "50000", "cpu.cfs_period_us": "100000"}
    groups(own, {"cpu": quota, "memory": v1(2 * GIB, 3 * GIB)})
    assert machine.memory() == Memory(2 * GIB, 0)
    assert machine.num_cpus() == 1  # half of one, rounded up to one


@pytest.mark.parametrize("variables, cpus, memory", [
    ({"CPUS_ON_NODE": "16", "MEM_PER_NODE": "8192"}, 16, Memory(8 * GIB, 8 * GIB)),
    ({"CPUS_ON_NODE": "16", "CPUS_PER_TASK": "4", "MEM_PER_CPU": "1024"}, 4, Memory(16 * GIB, 16 * GIB)),
    ({"CPUS_ON_NODE": "128", "MEM_PER_NODE": "0"}, 64, Memory(256 * GIB, 200 * GIB)),  # --mem=0: all of it
    ({"CPUS_ON_NODE": "8", "MEM_PER_NODE": str(230 * 1024)}, 8, Memory(230 * GIB, 200 * GIB)),
    ({"CPUS_ON_NODE": "2(x3)", "MEM_PER_CPU": "1024"}, 64, Memory(256 * GIB, 200 * GIB)),  # no number: not counted
])  # fmt: skip
def test_slurm_says_what_a_job_has(monkeypatch, variables, cpus, memory):
    for name, value in variables.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert machine.num_cpus() == cpus
    assert machine.memory() == memory


def test_a_job_of_slurm_counts_what_its_group_uses(groups, monkeypatch):
    monkeypatch.setenv("SLURM_MEM_PER_NODE", str(16 * 1024))
    groups("0::/job_7\n", {"job_7": v2(str(17 * GIB), 14 * GIB)})
    assert machine.memory() == Memory(16 * GIB, 3 * GIB)


def test_the_affinity_bounds_the_cpus(monkeypatch):
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", "16")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5}, raising=False)
    assert machine.num_cpus() == 2


def test_this_machine_is_read_as_it_is(monkeypatch):
    monkeypatch.undo()
    have = machine.memory()
    assert 0 < have.available <= have.total <= psutil.virtual_memory().total
    assert 1 <= machine.num_cpus() <= os.cpu_count()
    if Path("/proc/self/cgroup").exists() and Path("/sys/fs/cgroup").is_dir():
        assert any(group.is_dir() for group in machine._own_groups("memory"))
