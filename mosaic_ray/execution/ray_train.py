"""Run distillation: one Ray Train ``fit()`` (0, 1 or more workers), or in this process without Ray."""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..core.errors import RunError
from ..core.types import Weights
from ..distillation.student_training import DistContext, DistillTask, distil
from .determinism import choose_kernels
from .malloc import keep_freed
from .precision import device_of
from .ray_session import own_node

Report = Callable[[int, Mapping[str, float]], None]
Outcome = tuple[Weights, dict[str, float], list[tuple[int, dict[str, float]]]]

#: Seconds between two reads of the reports of Train's workers.
POLL_SECONDS = 1.0

#: A worker group that lost a worker starts again this often; the loop is deterministic, so it ends the same.
MAX_FAILURES = 3


def _loop(task: DistillTask, dist: DistContext, report: Report) -> Outcome:
    import torch

    keep_freed()
    choose_kernels(task.config)
    torch.set_num_threads(task.config.runtime.driver_threads)
    curve: list[tuple[int, dict[str, float]]] = []

    def record(step: int, metrics: dict[str, float]) -> None:
        curve.append((step, metrics))
        report(step, metrics)

    weights, final = distil(task, device_of(task.config), dist, record)
    return weights, final, curve


def distil_serial(task: DistillTask, report: Report) -> Outcome:
    """Distil in this process, without Ray; restore torch's thread count afterwards."""
    import torch

    threads = torch.get_num_threads()
    try:
        return _loop(task, DistContext(), report)
    finally:
        torch.set_num_threads(threads)


class ReportQueue:
    """Hold the reports of Train's first worker until the driver, which waits in ``fit``, reads them. A Ray actor."""

    def __init__(self) -> None:
        self._reports: list[tuple[int, dict[str, float]]] = []

    def put(self, step: int, metrics: dict[str, float]) -> None:
        self._reports.append((step, metrics))

    def drain(self) -> list[tuple[int, dict[str, float]]]:
        """Return all reports since the last call."""
        reports, self._reports = self._reports, []
        return reports


class ReportForwarder:
    """Forward each step's metrics exactly once, in order: live during training, the rest at the end."""

    def __init__(self, report: Report, queue: Any) -> None:
        self._report, self._queue, self._last, self._done = report, queue, 0, threading.Event()
        self._failure: Exception | None = None

    @contextlib.contextmanager
    def live(self) -> Iterator[None]:
        """Forward reports while the block runs; raise an error of ``report`` at its end."""
        thread = threading.Thread(target=self._poll, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._done.set()
            thread.join()
        if self._failure:
            raise self._failure

    def flush(self, curve: list[tuple[int, dict[str, float]]]) -> None:
        """Forward the steps of ``curve`` that were not forwarded yet; a loop that was restarted repeats its steps."""
        for step, metrics in curve:
            if step > self._last:
                self._report(step, metrics)
                self._last = step

    def _poll(self) -> None:
        import ray

        while not self._done.wait(POLL_SECONDS):
            try:
                reports = ray.get(self._queue.drain.remote())
            except ray.exceptions.RayError:  # its node died: the curve comes at the end
                return
            try:
                self.flush(reports)
            except Exception as error:
                self._failure = error
                return


def _worker(settings: dict[str, Any]) -> Outcome:
    import ray
    import torch
    from ray import train
    from safetensors.numpy import save_file

    os.environ.setdefault("OMP_NUM_THREADS", str(settings["threads"]))
    context = train.get_context()
    task = settings.get("task") or ray.get(settings["ref"][0])
    dist = DistContext()
    if context.get_world_size() > 1:
        dist = DistContext(context.get_world_rank(), context.get_world_size(), torch.distributed.all_reduce)
    report = settings.get("report") or (lambda step, metrics: None)
    if settings.get("queue") and dist.rank == 0:
        [queue] = settings["queue"]
        report = queue.put.remote  # the answer is not waited for
    outcome = _loop(task, dist, report)
    if settings["checkpoint"]:
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = None
            if dist.rank == 0:
                save_file(outcome[0], Path(folder) / "student.safetensors")
                checkpoint = train.Checkpoint.from_directory(folder)
            train.report(outcome[1], checkpoint=checkpoint)
    return outcome


def _fit(trainer: Any) -> Any:
    """Call ``trainer.fit()``, again if a process dies that Train does not replace: its controller, or a worker that is
    just starting. A wait for resources that ends in vain is not repeated."""
    from ray.exceptions import RayActorError

    for _ in range(MAX_FAILURES):
        try:
            return trainer.fit()
        except Exception as error:
            cause = getattr(error, "controller_failure", error)
            if not isinstance(cause, RayActorError) and type(cause).__name__ != "WorkerGroupStartupFailedError":
                raise
    return trainer.fit()


def distil_on_ray(task: DistillTask, report: Report, storage: str, *, here: bool = False) -> Outcome:
    """Distil in one ``TorchTrainer.fit()``: ``distill.workers`` workers, in process with 0; ``here``: all on this node.

    Results do not depend on the number of workers beyond rounding: each draws its share of the generators' images and
    gradients are summed. A worker that dies costs the steps since the start of the loop.
    """
    import ray
    import torch
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    workers, knobs = task.config.distill.workers, task.config.runtime
    gpu = knobs.device == "cuda"
    settings: dict[str, Any] = {"threads": knobs.driver_threads, "checkpoint": workers > 0}
    if workers == 0:
        settings |= {"task": task, "report": report}
    else:
        settings["ref"] = [ray.put(task)]  # in a list, so that it travels as a reference
        settings["queue"] = [ray.remote(num_cpus=0)(ReportQueue).remote()]
        forwarder = ReportForwarder(report, *settings["queue"])
    threads = torch.get_num_threads()
    each = {"CPU": 1.0, "GPU": float(gpu)} | (own_node() if here else {})
    trainer = TorchTrainer(
        _worker,  # type: ignore[arg-type] # declared as without a value, which Result.return_value then holds
        train_loop_config=settings,
        torch_config=TorchConfig(backend="nccl" if gpu and torch.cuda.is_available() else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=workers, use_gpu=gpu and workers > 0, resources_per_worker=each if workers else None
        ),
        run_config=RunConfig(
            name="distill",
            storage_path=storage,
            # the limit is of Train v2, which Ray puts in the place of the class that mypy sees
            failure_config=FailureConfig(max_failures=MAX_FAILURES, controller_failure_limit=0),  # type: ignore[call-arg]
            checkpoint_config=CheckpointConfig(num_to_keep=1),
        ),
    )
    try:
        with forwarder.live() if workers else contextlib.nullcontext():
            result = _fit(trainer)
    except RunError:
        raise
    except Exception as error:  # Train wraps the error of a worker
        failures = getattr(error, "worker_failures", None)
        cause = next(iter(failures.values())) if failures else error
        line = next((ln for ln in reversed(str(cause).splitlines()) if ln.strip()), type(cause).__name__)
        raise RunError(f"distillation: {line.strip()}", stage="distill") from error
    finally:
        torch.set_num_threads(threads)
    outcome: Outcome = result.return_value
    if workers > 0:
        forwarder.flush(outcome[2])
    return outcome
