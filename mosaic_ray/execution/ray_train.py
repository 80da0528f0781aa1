"""Run distillation: one Ray Train ``fit()`` (0, 1 or more workers), or in this process without Ray."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from ..core.errors import OutOfGpuMemory, RunError
from ..core.types import Weights
from ..distillation.student_training import AGAIN, DistContext, DistillTask, distil, inspect_student
from ..federated.client import ClientContext
from .backend import SERVER_TOO_LARGE
from .determinism import choose_kernels
from .gpu_memory import is_out_of_memory
from .malloc import keep_freed
from .reports import MAX_FAILURES, PATIENCE_SECONDS, POLL_SECONDS, QUEUE, Report, ReportForwarder, ReportQueue, ignore
from .resource_plan import on_ray_gpus, server_needs
from .watch import Curve, no_sign

#: The student, figures, how often the teacher predicts each class (int64 [C]), and the curve.
Outcome = tuple[Weights, dict[str, float], np.ndarray, Curve]


def _loop(task: DistillTask, device: torch.device, dist: DistContext, report: Report) -> Outcome:
    keep_freed()
    choose_kernels(task.config)
    torch.set_num_threads(task.config.runtime.driver_threads)
    curve: Curve = []

    def record(step: int, metrics: dict[str, float]) -> None:
        if AGAIN not in metrics:
            curve.append((step, metrics))
        report(step, metrics)

    weights, figures = distil(task, device, dist, record)
    looked, named = inspect_student(task, weights, device)
    return weights, figures | looked, named, curve


def distil_here(context: ClientContext, task: DistillTask, *, report: Report) -> Outcome:
    """Distil in this process, without Ray Train; restore torch's thread count afterwards."""
    threads = torch.get_num_threads()
    try:
        return _loop(task, context.device, DistContext(progress=context.progress), report)
    finally:
        torch.set_num_threads(threads)


def _worker(settings: dict[str, Any]) -> Outcome:
    import ray
    import ray.train.torch
    from ray import train

    os.environ.setdefault("OMP_NUM_THREADS", str(settings["threads"]))
    context = train.get_context()
    task = settings.get("task") or ray.get(settings["ref"][0])
    dist = DistContext()
    if context.get_world_size() > 1:
        dist = DistContext(context.get_world_rank(), context.get_world_size(), torch.distributed.all_reduce)
    report = settings.get("report") or (lambda step, metrics: None)
    if settings.get("queue"):
        [queue] = settings["queue"]
        own, signed = ray.get_runtime_context().current_actor, 0.0

        def progress(done: int, total: int) -> None:
            nonlocal signed
            if time.monotonic() - signed > POLL_SECONDS:
                signed = time.monotonic()
                queue.sign.remote(own)  # the answer is not waited for

        dist = replace(dist, progress=progress)
        if dist.rank == 0:
            report = queue.put.remote
    device = torch.device(settings["device"])
    if device.type == "cuda":  # Train shows a machine's workers all of its GPUs
        device = train.torch.get_device()
        torch.cuda.set_device(device)
    return _loop(task, device, dist, report)


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


def worker_device(task: DistillTask) -> str:
    """Return the kind of device that Ray Train's workers compute on."""
    return "cuda" if on_ray_gpus(task.config) else "cpu"


def distil_on_ray(task: DistillTask, report: Report, storage: str, hung: Callable[[float], None] = ignore) -> Outcome:
    """Distil in one ``TorchTrainer.fit()``: ``distill.workers`` workers, in process with 0.

    Workers run on any node: they write nothing into ``storage``, Ray Train's folder, which this node alone must reach.
    The outcome comes back through Ray's object store. Results do not depend on the number of workers beyond rounding:
    each draws its share of the generators' images and gradients are summed. A worker that dies costs the steps since
    the start of the loop; so does one without a sign of life, which is killed, and ``hung(seconds)`` is called.
    """
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    workers, knobs = task.config.distill.train_workers, task.config.runtime
    device, each = worker_device(task), server_needs(task.config, workers)
    settings: dict[str, Any] = {"threads": knobs.driver_threads, "device": device}
    queue: Any = None
    if workers == 0:
        settings |= {"task": task, "report": report}
    else:
        settings["ref"] = [ray.put(task)]  # in a list, so that it travels as a reference
        queue = ray.remote(**QUEUE)(ReportQueue).remote()
        settings["queue"] = [queue]
    forwarder = ReportForwarder(report, knobs.client_timeout, hung)
    threads = torch.get_num_threads()
    trainer = TorchTrainer(
        _worker,  # type: ignore[arg-type] # declared as without a value, which Result.return_value then holds
        train_loop_config=settings,
        torch_config=TorchConfig(backend="nccl" if device == "cuda" else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=workers, use_gpu=workers > 0 and each["GPU"] > 0, resources_per_worker=each if workers else None
        ),
        run_config=RunConfig(
            name="distill",
            storage_path=storage,
            # the limit is of Train v2, which Ray puts in the place of the class that mypy sees
            failure_config=FailureConfig(max_failures=MAX_FAILURES, controller_failure_limit=0),  # type: ignore[call-arg]
        ),
    )
    try:
        following = forwarder.live(queue, lambda: ray.get(queue.forget.remote(), timeout=PATIENCE_SECONDS))
        with following if workers else contextlib.nullcontext():
            result = _fit(trainer)
    except RunError:
        raise
    except Exception as error:  # Train wraps the error of a worker
        failures = getattr(error, "worker_failures", None)
        cause = next(iter(failures.values())) if failures else error
        if is_out_of_memory(getattr(cause, "_base_exc", cause)):
            raise OutOfGpuMemory(SERVER_TOO_LARGE, stage="distill") from error
        if forwarder.hangs > MAX_FAILURES:
            raise RunError(no_sign(forwarder.silent, forwarder.hangs), stage="distill") from error
        line = next((ln for ln in reversed(str(cause).splitlines()) if ln.strip()), type(cause).__name__)
        raise RunError(f"distillation: {line.strip()}", stage="distill") from error
    finally:
        torch.set_num_threads(threads)
    outcome: Outcome = result.return_value
    if workers > 0:
        forwarder.flush(outcome[3])
    return outcome
