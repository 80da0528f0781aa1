"""A real `ray up` of clusters/ssh.yaml: a sweep on three machines, one of them lost on the way; its token; its end."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from subprocess import CompletedProcess

import psutil
import pytest
from cli_runner import REPO, refusal
from netns import HOME, Lan, Machine, lan, missing

from mosaic_ray.sweeps.results import NOT_REPRODUCIBLE, read_results

pytestmark = pytest.mark.cluster

FILE = "clusters/ssh.yaml"

SPACE = """
from mosaic_ray.spaces import SweepPlan

def plan():
    points = ({"generator.lambda_d": x, "finetune.lr": y} for x, y in ((2.0, 0.001), (10.0, 0.003)))
    return SweepPlan("tiny", points=tuple(points), base={
        "partition.num_clients": 3, "model.width": 4, "warmup.num_rounds": 6, "warmup.local_steps": 10,
        "generator.steps": 60, "generator.ngf": 4, "generator.ndf": 4, "meta.updates": 30, "distill.steps": 60,
        "distill.guard": False, "finetune.num_rounds": 6, "runtime.precision": "fp32",
    })
"""

#: The machines' ~/mosaic-env. Their Python is the one that runs the tests, on the disk that they share; their pip only
#: records its arguments.
PROGRAMS = {
    "pip": 'echo "$@" > ~/pip-was-asked',
    "ray": f'exec "{sys.prefix}/bin/ray" "$@"',
    "mosaic": f'exec "{sys.executable}" -m mosaic_ray "$@"',
}


@dataclass(frozen=True)
class Cluster:
    """The laptop, with clusters/ssh.yaml in ``place``, the head and the workers."""

    place: Path
    net: Lan
    laptop: Machine
    head: Machine
    workers: tuple[Machine, ...]

    def ray(self, command: str, *words: str) -> str:
        """Run `ray COMMAND clusters/ssh.yaml WORDS` on the laptop; return its output."""
        done = self.laptop.run("ray", command, FILE, *words, cwd=self.place, env={"RAY_USAGE_STATS_ENABLED": "0"})
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def here(self, *words: str, **options: object) -> CompletedProcess[str]:
        """Run `mosaic WORDS` on the laptop."""
        return self.laptop.run(sys.executable, "-m", "mosaic_ray", *words, **options)

    @property
    def sweep(self) -> tuple[str, ...]:
        """The sweep's command, without the address."""
        return "sweep", "--space", f"{self.place}/tiny.py", "--name", "tiny", "--max-concurrent", "1", "--address"

    @property
    def machines(self) -> tuple[Machine, ...]:
        return (self.head, *self.workers)

    def await_nodes(self) -> None:
        """Wait until the autoscaler counts every machine, and a raylet runs on each."""

        def all_there() -> bool:
            status = self.head.run("ray", "status", env={"RAY_AUTH_MODE": "token"}).stdout
            return f" {len(self.machines)} local.cluster.node" in status and all(map(raylets, self.machines))

        until(all_there, 150, "not every machine joined")


def raylets(machine: Machine) -> list[psutil.Process]:
    return [process for process in machine.processes() if process.name() == "raylet"]


def until(holds: Callable[[], object], seconds: float, otherwise: str) -> None:
    """Wait until ``holds()``; fail after ``seconds``."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"{otherwise} within {seconds:g} s"
        time.sleep(0.2)


def filled_in(text: str, head: Machine, workers: tuple[Machine, ...]) -> str:
    """The shipped file, filled in for these machines; three small machines share one machine's memory."""
    for old, new, times in (
        ("head_ip: FILL_IN", f"head_ip: {head.address}", 1),
        ("worker_ips: [FILL_IN]", f"worker_ips: [{', '.join(worker.address for worker in workers)}]", 1),
        ("ssh_user: ubuntu", "ssh_user: root", 1),
        (" ray start ", " ray start --num-cpus=1 --object-store-memory=100000000 ", 2),
    ):
        assert text.count(old) == times, old
        text = text.replace(old, new)
    return text


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster after `ray up`."""
    if reason := missing():
        pytest.skip(reason)
    place = tmp_path_factory.mktemp("up") / "checkout"
    with lan(place, "laptop", "head", "worker1", "worker2") as net:
        laptop, head, *workers = net.machines
        for machine in (head, *workers):
            programs = machine.home / "mosaic-env" / "bin"
            programs.mkdir(parents=True)
            for name, line in PROGRAMS.items():
                (programs / name).write_text(f"#!/bin/sh\n{line}\n")
                (programs / name).chmod(0o755)
        (place / "clusters").mkdir()
        (place / FILE).write_text(filled_in((REPO / FILE).read_text(), head, tuple(workers)))
        (place / "tiny.py").write_text(SPACE)
        (place / "dist").mkdir()
        for name in ("constraints.txt", "mosaic_ray-0-py3-none-any.whl"):
            (place / "dist" / name).write_text(name)
        assert laptop.run("ray", "get-auth-token", "--generate").returncode == 0
        made = Cluster(place, net, laptop, head, tuple(workers))
        made.ray("up", "-y")
        made.await_nodes()
        yield made


def test_every_machine_gets_the_wheel_the_token_and_the_setting(cluster):
    token = (cluster.laptop.home / ".ray/auth_token").read_text()
    for machine in cluster.machines:
        asked = (machine.home / "pip-was-asked").read_text()
        assert f"{HOME}/mosaic/mosaic_ray-0-py3-none-any.whl" in asked and f"-c {HOME}/mosaic/constraints.txt" in asked
        copied = machine.home / ".ray/auth_token"
        assert copied.read_text() == token and copied.stat().st_mode & 0o077 == 0
        assert (machine.home / ".bashrc").read_text().count("RAY_AUTH_MODE=token") == 1


@pytest.mark.parametrize(
    "has, says",
    [
        ({"RAY_AUTH_MODE": "disabled"}, "RAY_AUTH_MODE=disabled sends none"),
        ({"HOME": "/tmp"}, "the cluster wants a token"),
        ({"RAY_AUTH_MODE": "token", "HOME": "/tmp"}, "there is no token"),
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}, "does not take the token in RAY_AUTH_TOKEN"),
    ],
    ids=["not sent", "none", "mode alone", "another"],
)
def test_without_its_token_a_client_is_refused(cluster, has, says):
    address = f"{cluster.head.address}:6379"
    line = refusal(cluster.here("run", "--address", address, env=has))
    assert address in line and says in line


def test_a_sweep_that_loses_a_machine_ends_as_on_one_machine(cluster):
    with ThreadPoolExecutor() as threads:
        sweep = threads.submit(cluster.ray, "exec", shlex.join(["mosaic", *cluster.sweep, "auto"]))
        trials = cluster.head.home / "mosaic_runs/sweeps/tiny/trials"
        lost: list[Machine] = []

        def at_work() -> bool:
            assert not sweep.done(), sweep.result()
            if any(trials.glob("*/summary.json")):
                lost.extend(worker for worker in cluster.workers if client_work(worker))
            return bool(lost)

        until(at_work, 300, "no worker had a client's work in hand")
        lost[0].cut()
        assert len(list(trials.glob("*/summary.json"))) == 1, "the sweep was not in the middle"
        cluster.net.connect(lost[0])
        output = sweep.result()
    assert "Ray is up: 3 client hosts" in output
    alone = cluster.here(*cluster.sweep, "local")
    assert alone.returncode == 0, alone.stderr
    cluster.ray("rsync-down", "~/mosaic_runs/sweeps/", f"{cluster.place}/fetched/")
    fetched = comparable(cluster.place / "fetched")
    assert fetched == comparable(cluster.laptop.home / "mosaic_runs/sweeps")
    assert [row["status"] for row in fetched] == ["done"] * 2
    assert len({row["accuracy_final"] for row in fetched}) > 1, "any results would have been equal"
    cluster.await_nodes()


def client_work(machine: Machine) -> list[psutil.Process]:
    """Return the client actors that are at work now: Ray puts the call into the process's title."""
    return [process for process in machine.processes() if process.cmdline()[:1] == ["ray::ClientActor.work"]]


def comparable(sweeps: Path) -> list[dict]:
    """Return a sweep's results without times and without the trials that computed each stage."""
    return read_results(sweeps / "tiny/results.parquet").drop_columns(NOT_REPRODUCIBLE).to_pylist()


def test_down_ends_ray_on_every_machine(cluster):
    """The workers' own Ray ends by itself within a minute of the head's."""
    cluster.ray("down", "-y")
    assert not raylets(cluster.head)
    until(lambda: not any(map(raylets, cluster.workers)), 120, "Ray still runs on a worker")
