"""Clients and the server's workers hang by a real SIGSTOP or in an endless call; runs end with the undisturbed bits."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import FACTS, TASKS, TINY, assert_same, stripes, stripes_dataset
from safetensors.numpy import load_file

from mosaic_ray.config.resolve import override
from mosaic_ray.core.errors import RunError
from mosaic_ray.execution import ray_train
from mosaic_ray.execution.actor_pool import ActorPool
from mosaic_ray.execution.backend import ClientActor, RayBackend, SerialBackend, start_hosts
from mosaic_ray.execution.watch import MapEvents
from mosaic_ray.federated.client import (
    ClientContext,
    ClientRound,
    Round,
    StatisticsTask,
    Task,
    TrainTask,
    initial_models,
)
from mosaic_ray.federated.local_training import LocalTrainingConfig
from mosaic_ray.runs import runner
from mosaic_ray.sweeps.runner import SweepRequest
from mosaic_ray.sweeps.runner import run as run_sweep
from mosaic_ray.sweeps.space import Choice, SweepPlan

pytestmark = [
    pytest.mark.ray,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning"),
]

WORK = TASKS | {"statistics": StatisticsTask}
NARROW = {"federation.strategy": "heterofl", "federation.widths": (1.0, 0.5)}
Summary = dict[str, Any]


@pytest.fixture(autouse=True)
def stripes_as_data(monkeypatch):
    monkeypatch.setattr("mosaic_ray.data.load.load_dataset", lambda config: stripes_dataset())


def go(folder: Path, knobs: dict[str, Any]) -> Summary:
    return runner.run(override(TINY, knobs), storage=str(folder), progress=False)


def student(summary: Summary) -> dict[str, np.ndarray]:
    return load_file(Path(summary["paths"]["run"]) / "student.safetensors")


def is_gone(pid: str) -> bool:
    """Whether the process ends; Ray sends SIGKILL some seconds after it was asked to."""
    deadline = time.monotonic() + 120
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    return not Path(f"/proc/{pid}").exists()


def hung(summary: Summary) -> list[tuple[str, int]]:
    return [(f["stage"], f["client"]) for f in summary["health"] if f["code"] == "client.hung"]


def stopping(kind: type[Task], folder: Path, times: int = 1) -> type:
    """An actor that stops by SIGSTOP in the middle of client 1's work of this kind, so many times in all."""

    class Stopping(ClientActor):
        def work(self, common, client_id, *rest):
            if isinstance(common[2], kind) and client_id == 1 and len(os.listdir(folder)) < times:
                (folder / str(os.getpid())).touch()
                os.kill(os.getpid(), signal.SIGSTOP)
            return super().work(common, client_id, *rest)

    return Stopping


#: On a busy machine actors that do work may be silent for so long, too.
RAY = {
    "runtime.host": "ray", "runtime.max_hosts": 2, "runtime.client_timeout": 20.0, "federation.max_client_failures": 20
}  # fmt: skip


def test_a_stopped_process_is_killed_and_its_client_done_again_with_the_same_numbers(tmp_path, ray_up, monkeypatch):
    monkeypatch.setattr("mosaic_ray.execution.backend.ClientActor", stopping(TrainTask, tmp_path))
    config = override(TINY, RAY)
    shards = {k: stripes(40, seed=k) for k in range(3)}
    task = TrainTask("local", 0, LocalTrainingConfig(20, 8, 0.05))
    models = Round(initial_models(ClientContext(config, FACTS, torch.device("cpu"))))
    steps, hangs = [], []
    events = MapEvents(lambda *step: steps.append(step), lambda client, seconds: hangs.append(client))
    timeout = config.runtime.client_timeout
    pool = ActorPool(start_hosts({"CPU": 1.0}, {"": 2}), timeout=timeout)
    backend = RayBackend(config, FACTS, shards.__getitem__, lambda: pool)
    try:
        there = dict(backend.map(task, range(3), models, lambda client: ClientRound(), events=events))
    finally:
        backend.close()
    here = dict(SerialBackend(config, FACTS, shards.__getitem__).map(task, range(3), models, lambda k: ClientRound()))
    [pid] = os.listdir(tmp_path)
    assert 1 in hangs and is_gone(pid)
    assert {client for client, _, _ in steps} == {0, 1, 2}
    for client in range(3):
        assert_same(there[client].weights, here[client].weights)


@pytest.mark.slow
@pytest.mark.parametrize(
    "work, stage",
    [("train", "warmup"), ("prototypes", "prototypes"), ("generate", "generators"), ("statistics", "warmup")],
)
def test_a_stopped_client_is_done_again_elsewhere_with_the_same_numbers(
    tmp_path, ray_up, monkeypatch, undisturbed_tiny, work, stage
):
    (stopped := tmp_path / "stopped").mkdir()
    monkeypatch.setattr("mosaic_ray.execution.backend.ClientActor", stopping(WORK[work], stopped))
    narrow = NARROW if work == "statistics" else {}
    there = go(tmp_path / "ray", RAY | narrow)
    [pid] = os.listdir(stopped)
    assert (stage, 1) in hung(there)
    assert is_gone(pid)
    assert_same(student(there), student(go(tmp_path / "serial", narrow) if narrow else undisturbed_tiny))


@pytest.mark.slow
def test_a_call_that_never_returns_is_found_though_its_process_answers(tmp_path, ray_up, monkeypatch, undisturbed_tiny):
    begun = tmp_path / "begun"

    class Stuck(TrainTask):
        def run(self, context, shard, client_id, broadcast, own):
            if client_id == 1 and not begun.exists():
                begun.touch()
                context.progress(1, 3)
                threading.Event().wait()
            return TrainTask.run(self, context, shard, client_id, broadcast, own)

    monkeypatch.setattr("mosaic_ray.pipeline.rounds.TrainTask", Stuck)
    there = go(tmp_path / "ray", RAY)
    assert ("warmup", 1) in hung(there)
    assert_same(student(there), student(undisturbed_tiny))


@pytest.mark.slow
def test_a_client_that_always_hangs_ends_the_run_and_is_never_left_out(tmp_path, ray_up, monkeypatch, undisturbed_tiny):
    (stopped := tmp_path / "stopped").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr("mosaic_ray.execution.backend.ClientActor", stopping(TASKS["train"], stopped, times=9))
        with pytest.raises(RunError) as ended:
            go(tmp_path / "ray", RAY | {"federation.max_client_failures": 2, "federation.min_cohort": 1})
    assert re.fullmatch(
        r"stage warmup, round 0, client 1: no sign of life for \d+ s, 2 times \(runtime\.client_timeout\); the same "
        r"command goes on from the last stored result, and --set runtime\.client_timeout=-1 waits for ever",
        str(ended.value),
    )
    assert len(os.listdir(stopped)) == 2


@pytest.mark.slow
def test_a_stopped_client_of_a_sweep_costs_each_trial_only_time(tmp_path, ray_up, monkeypatch):
    """Two trials share two actors: one is stopped at work of one trial, perhaps with work of the other waiting."""
    (stopped := tmp_path / "stopped").mkdir()
    monkeypatch.setattr("mosaic_ray.execution.backend.ClientActor", stopping(TASKS["generate"], stopped))
    points = (2.0, 5.0)
    plan = SweepPlan("two", knobs={"generator.lambda_d": Choice(points)})
    request = SweepRequest(override(TINY, RAY), "hung", plan, max_concurrent=2)
    outcome = run_sweep(request, storage=str(tmp_path / "sweep"), progress=False)
    assert [result.summary["status"] for result in outcome.results] == ["done", "done"]
    found = [client for result in outcome.results for _, client in hung(result.summary)]
    assert 1 in found
    for point, result in zip(points, outcome.results, strict=True):
        alone = go(tmp_path / "serial", {"generator.lambda_d": point})
        assert_same(load_file(Path(outcome.place) / f"trials/{result.trial}/student.safetensors"), student(alone))


# --- the server's work -----------------------------------------------------------------------------------------------


def stopping_train(stopped: Path, rank: int, how: str) -> Any:
    """Return Train's loop, which stops in its third step, once: the process by SIGSTOP, or in an endless call."""
    worker = ray_train._worker

    def train(settings):
        from ray import train as context

        from mosaic_ray.execution import ray_train as there

        distil = there.distil

        def stop(task, device, dist, report):
            def progress(done, total):
                dist.progress(done, total)
                if done == 3 and not stopped.exists() and context.get_context().get_world_rank() == rank:
                    stopped.write_text(str(os.getpid()))
                    if how == "process":
                        os.kill(os.getpid(), signal.SIGSTOP)
                    threading.Event().wait()

            return distil(task, device, replace(dist, progress=progress), report)

        there.distil = stop
        return worker(settings)

    return train


@pytest.mark.slow
def test_a_train_worker_that_stops_costs_the_distillation_of_a_run(tmp_path, ray_up, monkeypatch, undisturbed_tiny):
    monkeypatch.setattr(ray_train, "_worker", stopping_train(tmp_path / "stopped", 0, "process"))
    there = go(tmp_path / "ray", RAY | {"distill.workers": 1})
    assert is_gone((tmp_path / "stopped").read_text())
    assert [f["stage"] for f in there["health"] if f["code"] == "server.hung"] == ["distill"]
    assert_same(student(there), student(undisturbed_tiny))


@pytest.mark.slow
@pytest.mark.parametrize("workers, rank, how", [(1, 0, "call"), (2, 1, "process")])
def test_a_train_worker_that_stops_costs_the_distillation(tmp_path, ray_up, monkeypatch, workers, rank, how):
    """With two workers both are silent, since each waits for the other's gradients."""
    tasks, hangs = [], []

    def note(context, task, *, report):
        tasks.append(task)
        return ray_train.distil_here(context, task, report=report)

    monkeypatch.setattr("mosaic_ray.execution.placement.distil_here", note)
    go(tmp_path / "serial", {})
    [task] = tasks
    task = replace(task, config=override(task.config, RAY | {"distill.workers": workers}))

    def distilled(steps):
        return ray_train.distil_on_ray(task, lambda step, metrics: steps.append(step), str(tmp_path), hangs.append)

    undisturbed = distilled(before := [])
    monkeypatch.setattr(ray_train, "_worker", stopping_train(tmp_path / "stopped", rank, how))
    disturbed = distilled(after := [])
    assert is_gone((tmp_path / "stopped").read_text())
    assert len(hangs) == 1 and before == after == [5, 10]
    assert_same(disturbed[0], undisturbed[0])
