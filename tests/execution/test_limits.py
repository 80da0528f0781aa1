"""Ray keeps to the limits of this machine that it does not read itself, such as a Slurm job's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile

import pytest

from mosaic_ray.core import machine
from mosaic_ray.core.machine import Memory
from mosaic_ray.execution import ray_session
from mosaic_ray.execution.ray_session import local_resources, ray_start_options

GIB = 2**30

RESOURCES = """
import json
from mosaic_ray.execution.ray_session import connect, disconnect
connect("local")
import ray
print(json.dumps(ray.cluster_resources()))
disconnect()
"""


def test_options_of_ray_start_give_a_limit_that_ray_does_not_read(monkeypatch):
    monkeypatch.setattr(ray_session, "num_cpus", lambda: 3)
    monkeypatch.setattr(ray_session, "memory", lambda: Memory(2 * GIB, GIB))
    cpus, memory, store = ray_start_options()
    assert cpus == "--num-cpus=3"
    shares = [int(option.removeprefix(name)) for option, name in (
        (memory, "--memory="), (store, "--object-store-memory=")
    )]  # fmt: skip
    assert sum(shares) == GIB
    assert shares[0] > shares[1] > 0


def test_ray_finds_the_memory_of_a_machine_without_limits_itself(monkeypatch):
    monkeypatch.setattr(ray_session, "memory", lambda: Memory(2**60, GIB))
    assert [option.partition("=")[0] for option in ray_start_options()] == ["--num-cpus"]


def test_the_plan_of_a_sweep_reads_the_limits(monkeypatch):
    monkeypatch.setattr(machine, "OWN_CGROUPS", machine.OWN_CGROUPS / "none")
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", "1")
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "512")
    found = local_resources()
    assert (found.cpus, found.memory) == (1, GIB // 2)


@pytest.mark.ray
def test_a_ray_started_here_has_what_slurm_gave():
    limits = {"SLURM_CPUS_ON_NODE": "1", "SLURM_MEM_PER_NODE": "1024"}
    with tempfile.TemporaryDirectory(prefix="mosaic-") as place:  # Ray's sockets need a short path
        asked, env = [sys.executable, "-c", RESOURCES], {**os.environ, **limits, "RAY_TMPDIR": place}
        done = subprocess.run(asked, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["CPU"] == 1
    assert found["memory"] + found["object_store_memory"] == GIB
