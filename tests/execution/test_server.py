"""The server's work on a GPU worker: pretended GPUs of pretended machines, on which everything computes on the CPU."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from helpers import FACTS, TINY, assert_same, stripes_dataset
from safetensors.numpy import load_file

from mosaic_ray.config.resolve import override
from mosaic_ray.core.errors import OutOfGpuMemory, RunError
from mosaic_ray.execution import ray_train, server
from mosaic_ray.execution.backend import ClientActor
from mosaic_ray.execution.ray_session import RAY_ENVIRONMENT
from mosaic_ray.execution.server import Server, ServerActor
from mosaic_ray.federated.client import ClientContext, initial_weights
from mosaic_ray.runs import runner
from mosaic_ray.sweeps import runner as sweep_runner
from mosaic_ray.sweeps import tune as tuning
from mosaic_ray.sweeps.space import Choice, SweepPlan

MIB = 2**20
SHARE = {"runtime.host": "ray", "runtime.gpus_per_client": 0.3, "distill.workers": 1}

pytestmark = [
    pytest.mark.ray,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning"),
]


@contextlib.contextmanager
def machines(*nodes: tuple[int, int]) -> Iterator[Any]:
    """A Ray cluster of nodes of (CPUs, GPUs), the first with the head and the driver."""
    import ray
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(prefix="ms", dir="/tmp") as folder:
        patch.setenv("RAY_TMPDIR", folder)  # of its own, and short, for sockets
        for name, value in RAY_ENVIRONMENT.items():
            patch.setenv(name, os.environ.get(name, value))
        up = Cluster()
        try:
            for cpus, gpus in nodes:
                up.add_node(num_cpus=cpus, num_gpus=gpus, object_store_memory=100 * MIB, include_dashboard=False)
            ray.init(address=up.address, log_to_driver=False, logging_level="ERROR")
            yield up
        finally:
            ray.shutdown()
            up.shutdown()


def pretend(patch: pytest.MonkeyPatch, log: Path) -> None:
    """Everything that holds a share of a GPU computes on the CPU, and notes in ``log`` the machine that it is on."""

    def note(what: str) -> None:
        import ray

        with open(log, "a") as file:
            gpus = ray.get_runtime_context().get_accelerator_ids()["GPU"]
            file.write(f"{what} {ray.get_runtime_context().get_node_id()} {len(gpus)}\n")

    class Client(ClientActor):
        def __init__(self, share: float) -> None:
            super().__init__(0.0)

        def work(self, common, *rest):
            note(type(common[2]).__name__)
            return super().work(common, *rest)

    class OwnWork(ServerActor):
        def __init__(self, gpu: bool) -> None:
            super().__init__(False)

        def call(self, function, *rest):
            note(function.__name__)
            return super().call(function, *rest)

    worker = ray_train._worker

    def train(settings):
        note("distil")
        return worker(settings)

    patch.setattr("mosaic_ray.execution.backend.ClientActor", Client)
    patch.setattr("mosaic_ray.execution.server.ServerActor", OwnWork)
    patch.setattr("mosaic_ray.execution.ray_train.worker_device", lambda task: "cpu")
    patch.setattr("mosaic_ray.execution.ray_train._worker", train)


def noted(log: Path) -> dict[str, set[tuple[str, int]]]:
    """What was done, on which nodes and with how many GPUs."""
    found: dict[str, set[tuple[str, int]]] = {}
    for line in log.read_text().splitlines():
        what, node, gpus = line.split()
        found.setdefault(what, set()).add((node, int(gpus)))
    return found


@pytest.fixture(autouse=True)
def stripes_as_data(monkeypatch):
    monkeypatch.setattr("mosaic_ray.data.load.load_dataset", lambda config: stripes_dataset())


def student(summary: dict[str, Any]) -> dict[str, np.ndarray]:
    return load_file(Path(summary["paths"]["run"]) / "student.safetensors")


def is_gone(pid: int) -> bool:
    """Whether the process ends; Ray sends SIGKILL some seconds after it was asked to."""
    deadline = time.monotonic() + 120
    while psutil.pid_exists(pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    return not psutil.pid_exists(pid)


def gpu_node() -> str:
    import ray

    [found] = [node["NodeID"] for node in ray.nodes() if node["Resources"].get("GPU")]
    return found


def no_room(starved: OutOfGpuMemory | None) -> None:
    raise AssertionError("there is room enough")


EVERYTHING = {"TrainTask", "GeneratorTask", "PrototypesTask", "teach", "distil", "logits_of"}


@pytest.mark.slow
def test_a_head_without_a_gpu_leaves_a_runs_work_to_the_other_node(tmp_path, monkeypatch, undisturbed_tiny):
    """On a local folder; the numbers are those of one process, bit for bit."""
    pretend(monkeypatch, log := tmp_path / "log")
    with machines((1, 0), (3, 1)) as cluster:
        summary = runner.run(override(TINY, SHARE), storage=str(tmp_path), address=cluster.address, progress=False)
        assert noted(log) == {what: {(gpu_node(), 1)} for what in EVERYTHING}
    assert_same(student(summary), student(undisturbed_tiny))
    assert summary["accuracy"] == undisturbed_tiny["accuracy"]


@pytest.mark.slow
def test_a_head_without_a_gpu_leaves_a_sweeps_work_to_the_other_node(tmp_path, monkeypatch, undisturbed_tiny):
    import ray

    pretend(monkeypatch, log := tmp_path / "log")
    run_trial = tuning.run_trial

    def pretended_trial(knobs, context):
        with pytest.MonkeyPatch.context() as patch:
            pretend(patch, log)
            run_trial(knobs, context)

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # trials cannot import it
    monkeypatch.setattr(tuning, "run_trial", pretended_trial)
    plan = SweepPlan("two", knobs={"distill.lr": Choice((TINY.distill.lr, 2e-3))})
    with machines((1, 0), (3, 1)) as cluster:
        request = sweep_runner.SweepRequest(override(TINY, SHARE), "two", plan)
        outcome = sweep_runner.run(request, storage=str(tmp_path), address=cluster.address, progress=False)
        assert noted(log) == {what: {(gpu_node(), 1)} for what in EVERYTHING}
    assert [result.summary["status"] for result in outcome.results] == ["done", "done"]
    assert_same(student(outcome.results[0].summary), student(undisturbed_tiny))


@pytest.mark.slow
@pytest.mark.parametrize("workers, share, hosts", [(1, 0.1, 9), (0, 1.0, 1)], ids=["ten tenths", "one whole"])
def test_one_gpu_is_enough_for_clients_and_server(tmp_path, monkeypatch, undisturbed_tiny, workers, share, hosts):
    """Ten clients of a tenth fill a GPU but for the server's tenth; with whole GPUs they take turns."""
    pretend(monkeypatch, log := tmp_path / "log")
    clients = {"partition.num_clients": 10} if hosts > 1 else {}
    more = {
        "runtime.eval_rounds": 0, "runtime.cpus_per_client": 0.1, "runtime.gpus_per_client": share,
        "distill.workers": workers,
    }  # fmt: skip
    said = []
    monkeypatch.setattr("mosaic_ray.execution.placement.PATIENCE_SECONDS", 900.0)  # nine processes load torch
    monkeypatch.setattr("mosaic_ray.tracking.tracker.Tracker.say", lambda self, text: said.append(text))
    with machines((2, 1)) as cluster:
        summary = runner.run(
            override(TINY, SHARE | more | clients), storage=str(tmp_path), address=cluster.address, progress=False
        )
    assert summary["status"] == "done" and any(f"on {hosts} actors" in text for text in said)
    assert noted(log).keys() == (EVERYTHING if workers else EVERYTHING - {"distil"} | {"distil_here"})
    if not clients:
        assert_same(student(summary), student(undisturbed_tiny))


@pytest.mark.slow
@pytest.mark.parametrize("work", ["teach", "logits_of"])
def test_a_worker_that_stops_costs_a_run_only_time(tmp_path, monkeypatch, undisturbed_tiny, work):
    """By a real SIGSTOP in the middle of the server's work; its process is killed, and the numbers are the same."""
    pretend(monkeypatch, tmp_path / "log")
    (stopped := tmp_path / "stopped").mkdir()

    class Stopping(server.ServerActor):
        def call(self, function, *rest):
            if function.__name__ == work and not os.listdir(stopped):
                (stopped / str(os.getpid())).touch()
                os.kill(os.getpid(), signal.SIGSTOP)
            return super().call(function, *rest)

    monkeypatch.setattr("mosaic_ray.execution.server.ServerActor", Stopping)
    more = {"runtime.client_timeout": 20.0, "distill.workers": 0}
    with machines((2, 1)) as cluster:
        summary = runner.run(
            override(TINY, SHARE | more), storage=str(tmp_path / "run"), address=cluster.address, progress=False
        )
    [pid] = os.listdir(stopped)
    assert is_gone(int(pid))
    assert "server.hung" in {finding["code"] for finding in summary["health"]}
    assert_same(student(summary), student(undisturbed_tiny))


# --- one worker ------------------------------------------------------------------------------------------------------


@pytest.fixture
def worker(ray_up, monkeypatch) -> Iterator[Server]:
    """A worker without a share, on the CPU."""

    class OnCPU(ServerActor):
        def __init__(self, gpu: bool) -> None:
            super().__init__(False)

    monkeypatch.setattr(server, "ServerActor", OnCPU)
    made = Server({"CPU": 1.0, "GPU": 0.0}, lambda: None)
    yield made
    made.release()


CONTEXT = ClientContext(override(TINY, {"runtime.driver_threads": 2}), FACTS, torch.device("cpu"))


def test_a_worker_returns_and_raises_what_the_function_does(worker):
    def facts(context, rows, *, report=None):
        return os.getpid(), torch.get_num_threads(), context.config.runtime.driver_threads, [row.sum() for row in rows]

    def refuse(context):
        raise RunError("no features", client=2)

    def fail(context):
        raise ValueError("no class")

    sent = (np.full(count, 2.0) for count in (1, 3))
    pid, *others = worker.call(facts, CONTEXT, (sent,), None, no_room)
    assert pid != os.getpid() and others == [2, 2, [2.0, 6.0]]
    with pytest.raises(RunError, match="no features") as refused:
        worker.call(refuse, CONTEXT, (), None, no_room)
    assert refused.value.client == 2
    with pytest.raises(ValueError, match="no class"):
        worker.call(fail, CONTEXT, (), None, no_room)
    assert worker.call(facts, CONTEXT, ([],), None, no_room)[0] == pid  # it stays up


def test_reports_come_while_the_function_runs_and_each_once(worker, tmp_path):
    """The function waits for the effect of its first report, dies once, and repeats its reports."""
    heard, seen = [], tmp_path / "seen"

    def train(context, died, *, report):
        report(0, {"loss": 2.0})
        while not seen.exists():
            time.sleep(0.01)
        if not died.exists():
            died.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        report(25, {"loss": 1.0})
        return "done"

    def hear(step, metrics):
        heard.append((step, metrics["loss"]))
        seen.touch()

    assert worker.call(train, CONTEXT, (tmp_path / "died",), hear, no_room) == "done"
    assert heard == [(0, 2.0), (25, 1.0)]


#: On a busy machine work may be silent for so long, too.
TIMEOUT = replace(CONTEXT, config=override(CONTEXT.config, {"runtime.client_timeout": 10.0}))


@pytest.mark.parametrize("kind", ["process", pytest.param("call", marks=pytest.mark.slow)])
def test_a_worker_that_stops_is_killed_and_its_call_done_again(worker, tmp_path, kind):
    """It stops in the middle, once: the process by SIGSTOP, or in a call that never returns."""
    heard, hung, stopped = [], [], tmp_path / "stopped"

    def stop(context, *, report):
        report(0, {"loss": 2.0})
        if not stopped.exists():
            stopped.write_text(str(os.getpid()))
            if kind == "process":
                os.kill(os.getpid(), signal.SIGSTOP)
            threading.Event().wait()
        context.progress(1, 2)
        report(25, {"loss": 1.0})
        return os.getpid()

    pid = worker.call(stop, TIMEOUT, (), lambda step, metrics: heard.append(step), no_room, hung.append)
    assert pid != int(stopped.read_text()) and is_gone(int(stopped.read_text()))
    assert len(hung) == 1 and hung[0] > TIMEOUT.config.runtime.client_timeout
    assert heard == [0, 25]


@pytest.mark.slow
def test_a_function_that_counts_nothing_is_waited_for_unless_its_process_stops(worker, tmp_path):
    hung = []

    def silent(context, stopped):
        time.sleep(25)
        if not stopped.exists():
            stopped.touch()
            os.kill(os.getpid(), signal.SIGSTOP)
        return "done"

    assert worker.call(silent, TIMEOUT, (tmp_path / "a",), None, no_room, hung.append) == "done"
    assert len(hung) == 1


@pytest.mark.slow
def test_a_worker_that_always_stops_ends_the_run_in_one_line(worker, monkeypatch):
    monkeypatch.setattr(server, "MAX_FAILURES", 1)

    def stop(context):
        context.progress(1, 2)
        os.kill(os.getpid(), signal.SIGSTOP)

    with pytest.raises(RunError, match=r"^no sign of life for \d+ s, 2 times \(runtime\.client_timeout\); the same"):
        worker.call(stop, TIMEOUT, (), None, no_room)


@pytest.mark.parametrize("always", [False, True])
def test_work_that_does_not_fit_into_the_gpu_is_done_again_once_without_clients(worker, tmp_path, always):
    """The clients' actors end, and fewer of them share a GPU from then on."""
    rooms, tried = [], tmp_path / "tried"

    def large(context):
        with open(tried, "a") as file:
            file.write(f"{os.getpid()}\n")
        if always or len(tried.read_text().split()) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return "done"

    def go():
        return worker.call(large, CONTEXT, (), None, rooms.append)

    if always:
        with pytest.raises(OutOfGpuMemory, match=r"^out of GPU memory: lower meta\.batch_size"):
            go()
    else:
        assert go() == "done"
    assert len(set(tried.read_text().split())) == 2  # processes: what the first one held is free
    assert [type(error) for error in rooms] == [OutOfGpuMemory]


def test_in_a_sweep_it_is_left_to_the_sweep(worker):
    """Which runs the trial again, with fewer clients a GPU."""

    def large(context):
        raise RuntimeError("CUDA error: out of memory")

    worker._shared = True
    with pytest.raises(OutOfGpuMemory, match=r"^out of GPU memory"):
        worker.call(large, CONTEXT, (), None, no_room)


def test_an_idle_worker_gives_its_share_back(worker, monkeypatch):
    def pid(context):
        return os.getpid()

    first = worker.call(pid, CONTEXT, (), None, no_room)
    monkeypatch.setattr(server, "IDLE_SECONDS", 0.01)
    assert worker.call(pid, CONTEXT, (), None, no_room) == first
    while psutil.pid_exists(first):
        time.sleep(0.05)
    assert worker.call(pid, CONTEXT, (), None, no_room) != first


def test_where_nothing_is_free_the_clients_leave_first_and_the_worker_afterwards(worker, ray_up):
    class Host:
        def ping(self):
            return True

    hosts = [ray_up.remote(num_cpus=4)(Host).remote()]  # all CPUs
    assert ray_up.get(hosts[0].ping.remote())
    while ray_up.available_resources().get("CPU", 0):
        time.sleep(0.05)
    pid = worker.call(lambda context: os.getpid(), CONTEXT, (), None, lambda starved: ray_up.kill(hosts.pop()))
    assert not hosts
    while psutil.pid_exists(pid):
        time.sleep(0.05)


# --- a GPU -----------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_nccl_with_one_worker_gives_what_the_servers_own_worker_gives(tmp_path, ray_up):
    knobs = {"runtime.device": "cuda", "runtime.gpus_per_client": 0.25}
    configs = [override(TINY, SHARE | knobs | {"distill.workers": count}) for count in (0, 1)]
    folders = tmp_path / "a", tmp_path / "b"  # one store would find the same student
    alone, train = (student(runner.run(c, storage=str(f))) for c, f in zip(configs, folders, strict=True))
    for name, value in alone.items():
        np.testing.assert_allclose(train[name], value, atol=2e-4, err_msg=name)


@pytest.mark.gpu
def test_initial_weights_are_drawn_alike_on_every_device():
    cpu, cuda = (ClientContext(TINY, FACTS, torch.device(kind)) for kind in ("cpu", "cuda"))
    assert_same(initial_weights(cpu), initial_weights(cuda))
