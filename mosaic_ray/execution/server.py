"""Run the server's own work, such as the teacher's training and evaluation, on a Ray worker with a share of a GPU.

Where clients run on GPUs the driver may be on a machine without one. What a worker computes depends on its arguments
alone, so Ray may do it again on another machine.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..config.schema import ExperimentConfig
from ..core.errors import RunError
from ..core.types import DataFacts
from .actor_pool import PATIENCE_FOR_MACHINES, end, first_line
from .backend import ship_by_value, take_device
from .determinism import choose_kernels
from .malloc import keep_freed
from .ray_train import MAX_FAILURES, Curve, Report, ReportForwarder, ReportQueue

if TYPE_CHECKING:
    from ..federated.client import ClientContext

#: Seconds without work after which a worker is ended, so that no trial holds a share while it waits for another.
IDLE_SECONDS = 60.0


@dataclass(frozen=True)
class _Items:
    """Takes the place of an iterator among the arguments: references to its items."""

    refs: list[Any]


class ServerActor:
    """A Ray actor that calls functions of the server. It keeps nothing between calls."""

    def __init__(self, gpu: bool) -> None:
        import torch

        keep_freed()
        torch.set_num_threads(1)
        self._device = take_device(float(gpu))  # of which it may use all: clients' memory is capped, its own is not

    def ping(self) -> None:
        """Answer once the actor is up."""

    def call(
        self, function: Callable[..., Any], config: ExperimentConfig, facts: DataFacts, args: Sequence[Any], queue: Any
    ) -> tuple[Any, Curve]:
        """Return ``function``'s result and its reports, which also go to ``queue`` (None: it takes no ``report``)."""
        import ray
        import torch

        from ..federated.client import ClientContext

        choose_kernels(config)
        torch.set_num_threads(config.runtime.driver_threads)
        given = [(ray.get(ref) for ref in arg.refs) if isinstance(arg, _Items) else arg for arg in args]
        curve: Curve = []

        def report(step: int, metrics: Mapping[str, float]) -> None:
            curve.append((step, dict(metrics)))
            queue.put.remote(step, dict(metrics))  # the answer is not waited for

        more = {"report": report} if queue is not None else {}
        return function(ClientContext(config, facts, torch.device(self._device)), *given, **more), curve


class Server:
    """The server's worker of one run or trial; it starts with the first call.

    ``join``: joins Ray. ``shared``: client actors serve other trials too, and the sweep's plan keeps room for the
    worker. Else clients and worker take turns where the cluster has too little for both.
    """

    def __init__(self, needs: Mapping[str, float], join: Callable[[], Any], shared: bool = False) -> None:
        self._needs, self._join, self._shared = needs, join, shared
        self._actor: Any = None
        self._lock = threading.RLock()
        self._timer = threading.Timer(0, lambda: None)

    def call(
        self,
        function: Callable[..., Any],
        context: ClientContext,
        args: Sequence[Any],
        report: Report | None,
        make_room: Callable[[], None],
    ) -> Any:
        """Return ``function(context, *args)``, with ``report`` as a keyword where it is given; raise what it raises.

        ``make_room`` ends the run's client actors.
        """
        import ray
        from ray.exceptions import RayActorError, RayTaskError

        self._join()
        self._timer.cancel()
        crowded = self._crowded()
        if crowded:
            make_room()
        ship_by_value(function, *args)
        sent = [_Items([ray.put(item) for item in arg]) if isinstance(arg, Iterator) else arg for arg in args]
        queue = ray.remote(num_cpus=0)(ReportQueue).remote() if report else None
        forwarder = ReportForwarder(report, queue) if report else None
        try:
            with self._lock:
                actor = self._actor = self._actor or self._start()
                call = actor.call.remote(function, context.config, context.facts, sent, queue)
                with forwarder.live() if forwarder else contextlib.nullcontext():
                    result, curve = ray.get(call)
        except RayTaskError as error:
            raise error.cause if isinstance(error.cause, Exception) else RunError(first_line(error)) from error
        except RayActorError as error:
            self.release()
            raise RunError(f"the process of the server's work died: {first_line(error)}") from error
        if forwarder:
            forwarder.flush(curve)
        if crowded:
            self.release()
        else:
            self._timer = threading.Timer(IDLE_SECONDS, self.release)
            self._timer.daemon = True
            self._timer.start()
        return result

    def _crowded(self) -> bool:
        import ray

        if self._shared or self._actor is not None:
            return False
        free = ray.available_resources()
        return any(free.get(kind, 0.0) + 1e-6 < amount for kind, amount in self._needs.items())

    def release(self) -> None:
        """End the worker, until the next call."""
        self._timer.cancel()
        with self._lock:
            if self._actor is not None:
                end([self._actor])
            self._actor = None

    def _start(self) -> Any:
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        actor: Any = ray.remote(
            num_cpus=self._needs["CPU"], num_gpus=self._needs["GPU"], max_restarts=MAX_FAILURES,
            max_task_retries=MAX_FAILURES,
            scheduling_strategy=PlacementGroupSchedulingStrategy(None),  # type: ignore[arg-type] # not in a trial's own
        )(ServerActor).remote(True)  # fmt: skip
        ping = actor.ping.remote()
        if not ray.wait([ping], timeout=PATIENCE_FOR_MACHINES)[0]:
            end([actor])
            raise RunError(
                f"no worker with {self._needs['GPU']:g} GPU could start within {PATIENCE_FOR_MACHINES:g} s: other jobs "
                "hold the cluster's GPUs (`ray status` shows who)"
            )
        try:
            ray.get(ping)
        except Exception as error:
            raise RunError(f"the worker for the server's work cannot start: {first_line(error)}") from error
        return actor
