"""Faults with real signals on pretended machines; runs end with the bits of undisturbed ones (docs/RELIABILITY.md)."""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from helpers import TASKS, TINY, assert_same, stripes_dataset
from safetensors.numpy import load_file

from mosaic_ray.config.resolve import override
from mosaic_ray.core.errors import RequestError
from mosaic_ray.execution.actor_pool import ActorPool
from mosaic_ray.execution.backend import ClientActor
from mosaic_ray.execution.ray_session import RAY_ENVIRONMENT
from mosaic_ray.runs import runner

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning"),
]

PATIENCE_SECONDS = 400.0
MIB = 2**20
Summary = dict[str, Any]


@pytest.fixture(autouse=True)
def stripes_as_data(monkeypatch):
    monkeypatch.setattr("mosaic_ray.data.load.load_dataset", lambda config: stripes_dataset())


@contextlib.contextmanager
def machines(*cpus: int, **head: Any) -> Iterator[tuple[Any, list[Any]]]:
    """(cluster, its nodes): one raylet a machine, the first with the head and the driver."""
    import ray
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(prefix="mf", dir="/tmp") as folder:
        patch.setenv("RAY_TMPDIR", folder)  # of its own, and short, for sockets
        for name, value in RAY_ENVIRONMENT.items():
            patch.setenv(name, os.environ.get(name, value))
        up = Cluster()
        try:
            nodes = [
                up.add_node(
                    num_cpus=count, object_store_memory=100 * MIB, include_dashboard=False, **({} if number else head)
                )
                for number, count in enumerate(cpus)
            ]
            ray.init(address=up.address, log_to_driver=False, logging_level="ERROR")
            yield up, nodes
        finally:
            ray.shutdown()
            up.shutdown()


def go(folder: Path, address: str = "local", **knobs: Any) -> Summary:
    named = {name.replace("__", "."): value for name, value in knobs.items()}
    return runner.run(override(TINY, named), storage=str(folder), address=address, progress=False)


def student(summary: Summary) -> dict[str, np.ndarray]:
    return load_file(Path(summary["paths"]["run"]) / "student.safetensors")


def beside(fault: Callable[[], None], run: Callable[[], Summary]) -> Summary:
    """Return the result of ``run`` in a thread while ``fault`` runs here; both must end."""
    ended: list[Summary | BaseException] = []

    def experiment() -> None:
        try:
            ended.append(run())
        except BaseException as error:
            ended.append(error)

    thread = threading.Thread(target=experiment, daemon=True)
    thread.start()
    fault()
    thread.join(PATIENCE_SECONDS)
    assert ended, "it hangs"
    if isinstance(ended[0], BaseException):
        raise ended[0]
    return ended[0]


def until(holds: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not (found := holds()):
        assert time.monotonic() < deadline, f"it never came: {what}"
        time.sleep(0.05)
    return found


def stuck_on(node_id: str, work: str, marker: Path) -> type:
    """Return a host that never ends ``work`` on the node ``node_id``."""

    class Stuck(ClientActor):
        def work(self, common, client_id, *rest):
            import ray

            if isinstance(common[2], TASKS[work]) and ray.get_runtime_context().get_node_id() == node_id:
                marker.write_text(str(client_id))
                threading.Event().wait()
            return super().work(common, client_id, *rest)

    return Stuck


@pytest.mark.parametrize("work", ["train", "prototypes", "generate"])
@pytest.mark.parametrize("count", [2, 3])
def test_a_node_that_dies_with_its_clients_at_work_changes_nothing(tmp_path, monkeypatch, work, count):
    """SIGKILL of a raylet while a client of its node is in the middle of ``work``."""
    marker = tmp_path / "at work"
    with machines(*[1] * count) as (cluster, nodes):
        monkeypatch.setattr("mosaic_ray.execution.backend.ClientActor", stuck_on(nodes[1].node_id, work, marker))

        def strike() -> None:
            until(marker.exists, f"{work} on the second node")
            cluster.remove_node(nodes[1], allow_graceful=False)

        there = beside(strike, lambda: go(tmp_path / "ray", cluster.address, runtime__host="ray"))
    assert_same(student(there), student(go(tmp_path / "serial")))


def test_a_machine_that_joins_late_is_used_within_the_round(tmp_path, monkeypatch):
    """The first node's clients wait, in round 0, until one has begun on a node that was not there when it started."""
    joined = tmp_path / "joined"
    with machines(1) as (cluster, nodes):
        first = nodes[0].node_id

        class Waiting(ClientActor):
            def work(self, common, client_id, *rest):
                import ray

                if ray.get_runtime_context().get_node_id() != first:
                    if not joined.exists():
                        joined.write_text(f"{type(common[2]).__name__} {common[2].round_num}")
                elif client_id > 0:  # the first client of the round is served before anybody joins
                    while not joined.exists():
                        time.sleep(0.05)
                return super().work(common, client_id, *rest)

        monkeypatch.setattr("mosaic_ray.execution.backend.ClientActor", Waiting)
        knobs = {"partition__num_clients": 6, "method": "fedavg"}

        def join() -> None:
            until(lambda: hosts_up("ray::Waiting.work"), "a client at work")
            cluster.add_node(num_cpus=1, object_store_memory=100 * MIB, include_dashboard=False)

        there = beside(join, lambda: go(tmp_path / "ray", cluster.address, runtime__host="ray", **knobs))
    assert joined.read_text() == "TrainTask 0"
    assert_same(student(there), student(go(tmp_path / "serial", **knobs)))


def hosts_up(title: str) -> list[psutil.Process]:
    """Descendants of this process that bear ``title``."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if title in " ".join(process.cmdline()):
                found.append(process)
    return found


@pytest.mark.parametrize(
    "workers, title",
    [
        (1, "ray::RayTrainWorker"),  # it is just starting
        (1, "ray::RayTrainWorker.poll_status"),  # the loop is under way
        (2, "ray::RayTrainWorker.poll_status"),
        (1, "ray::TrainController.run"),
    ],
)
def test_a_process_of_trains_that_is_killed_costs_the_loop_in_hand(tmp_path, workers, title):
    killed: list[int] = []
    knobs = {"runtime__host": "ray", "distill__workers": workers, "distill__steps": 400}
    with machines(4) as (cluster, _):
        undisturbed = go(tmp_path / "a", cluster.address, **knobs)
        actor = title.partition(".")[0]
        old = hosts_up(actor)

        def strike() -> None:
            victim = until(lambda: [process for process in hosts_up(actor) if process not in old], actor)[0]
            while title not in " ".join(victim.cmdline()):  # NoSuchProcess where it ends without that call
                time.sleep(0.001)  # calls are short
            os.kill(victim.pid, signal.SIGKILL)
            killed.append(victim.pid)

        disturbed = beside(strike, lambda: go(tmp_path / "b", cluster.address, **knobs))
    assert len(killed) == 1
    assert_same(student(disturbed), student(undisturbed))


def test_a_full_object_store_spills_and_changes_nothing(tmp_path):
    import ray

    with machines(2) as (cluster, _):
        held: list[Any] = []

        def fill() -> None:
            for number in range(30):  # three times what the store holds
                held.append(ray.put(np.full(10 * MIB, number, np.uint8)))
                time.sleep(0.1)

        there = beside(fill, lambda: go(tmp_path / "ray", cluster.address, runtime__host="ray"))
        assert [int(ray.get(ref)[0]) for ref in held] == list(range(30))
    assert_same(student(there), student(go(tmp_path / "serial")))


def test_a_kill_by_the_memory_monitor_leaves_fewer_at_work_and_the_same_numbers(tmp_path, monkeypatch):
    """Ray's own monitor kills a client actor that eats memory, the first time it trains client 0's generator."""
    memory = psutil.virtual_memory()
    limit, most = (memory.total - memory.available + 3 * 2**30) / memory.total, 8 * 2**30
    if memory.available < most + 2 * 2**30:
        pytest.skip(f"{memory.available >> 30} GiB available, 10 are needed")
    marker, seen = tmp_path / "eaten", []

    class Greedy(ClientActor):
        def work(self, common, client_id, *rest):
            if isinstance(common[2], TASKS["generate"]) and client_id == 0 and not marker.exists():
                marker.touch()
                eaten = []
                while sum(map(len, eaten)) < most:
                    eaten.append(np.ones(64 * MIB, np.uint8))
                    time.sleep(0.02)
                raise AssertionError("nobody stopped it")
            return super().work(common, client_id, *rest)

    remove = ActorPool.remove

    def note(pool: ActorPool, actor: Any) -> bool:
        seen.append(len(pool.actors))
        return remove(pool, actor)

    monkeypatch.setattr(ActorPool, "remove", note)
    monkeypatch.setattr("mosaic_ray.execution.backend.ClientActor", Greedy)
    log_validation = {"memory_usage_threshold": limit, "memory_monitor_refresh_ms": 50}
    with machines(2, _system_config=log_validation) as (cluster, _):
        there = go(tmp_path / "ray", cluster.address, runtime__host="ray")
    assert marker.exists() and seen and seen[0] == 2
    assert_same(student(there), student(go(tmp_path / "serial")))


def test_a_cluster_without_the_gpu_asked_for_is_refused_before_anything_is_written(tmp_path):
    with machines(1) as (cluster, _):
        for knobs, says in (
            ({"runtime__gpus_per_client": 0.5}, r"runtime\.gpus_per_client = 0\.5: there are 0 GPUs"),
            ({"runtime__cpus_per_client": 4.0}, r"runtime\.cpus_per_client = 4: there are 1 CPUs, so no client fits"),
        ):
            with pytest.raises(RequestError, match=says):
                go(tmp_path / "s", cluster.address, runtime__host="ray", **knobs)
    assert not list(tmp_path.iterdir())
