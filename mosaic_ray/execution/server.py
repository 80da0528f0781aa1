"""Run the server's own work, such as the teacher's training and evaluation, on a Ray worker with a share of a GPU.

Where clients run on GPUs the driver may be on a machine without one. What a worker computes depends on its arguments
alone, so Ray may do it again on another machine.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from ..config.schema import ExperimentConfig
from ..core.errors import OutOfGpuMemory, RunError
from ..core.types import DataFacts
from .actor_pool import PATIENCE_FOR_MACHINES, end, first_line
from .backend import SERVER_TOO_LARGE, ClientActor, ship_by_value
from .determinism import choose_kernels
from .gpu_memory import is_out_of_memory
from .reports import MAX_FAILURES, Report, ReportForwarder, ignore
from .watch import SIGNS, Curve, no_sign

if TYPE_CHECKING:
    from ..federated.client import ClientContext

#: Seconds without work after which a worker is ended, so that no trial holds a share while it waits for another.
IDLE_SECONDS = 60.0


@dataclass(frozen=True)
class _Items:
    """Takes the place of an iterator among the arguments: references to its items."""

    refs: list[Any]


class ServerActor(ClientActor):
    """A Ray actor that calls functions of the server. It keeps nothing between calls.

    It may use all of its GPU: clients' memory is capped, its own is not.
    """

    def call(
        self,
        function: Callable[..., Any],
        config: ExperimentConfig,
        facts: DataFacts,
        args: Sequence[Any],
        report: bool,
    ) -> tuple[Any, Curve]:
        """Return ``function``'s result and its reports, which the driver also reads meanwhile (if it takes ``report``).

        Until the first report or step it is enough that the process answers.
        """
        curve = self.curve = []  # before the imports: the driver asks for it meanwhile
        self.counts = False
        import ray
        import torch

        from ..federated.client import ClientContext

        def note(step: int, metrics: Mapping[str, float]) -> None:
            curve.append((step, dict(metrics)))
            self.step()

        def work() -> Any:
            choose_kernels(config)
            torch.set_num_threads(config.runtime.driver_threads)
            given = [(ray.get(ref) for ref in arg.refs) if isinstance(arg, _Items) else arg for arg in args]
            context = ClientContext(config, facts, torch.device(self._device), lambda done, total: self.step())
            try:
                return function(context, *given, **({"report": note} if report else {}))
            except Exception as error:
                if is_out_of_memory(error):
                    raise OutOfGpuMemory(SERVER_TOO_LARGE) from error
                raise

        try:
            return self._thread.submit(work).result(), curve
        finally:
            self.curve = ()  # the next call's driver may ask before that call begins


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
        make_room: Callable[[OutOfGpuMemory | None], None],
        hung: Callable[[float], None] = ignore,
    ) -> Any:
        """Return ``function(context, *args)``, with ``report`` as a keyword where it is given; raise what it raises.

        ``make_room`` ends the run's client actors; with an error for lack of memory fewer share a GPU from then on. A
        worker that dies is replaced, and the call done again; so is one without a sign of life, which is killed, and
        ``hung(seconds)`` is called. Work that does not fit into the GPU's memory is done again once, after
        ``make_room``; in a sweep it raises ``OutOfGpuMemory``.
        """
        import ray
        from ray.exceptions import ObjectLostError, RayActorError, RayTaskError

        self._join()
        self._timer.cancel()
        crowded, starved, deaths = self._crowded(), self._shared, 0
        if crowded:
            make_room(None)
        ship_by_value(function, *args)
        sent = [_Items([ray.put(item) for item in arg]) if isinstance(arg, Iterator) else arg for arg in args]
        forwarder = ReportForwarder(report, context.config.runtime.client_timeout, hung)
        while True:
            try:
                with self._lock:
                    actor = self._actor = self._actor or self._start()
                    call = actor.call.remote(function, context.config, context.facts, sent, report is not None)
                    with forwarder.live(actor, partial(list, [actor])):
                        result, curve = ray.get(call)
                break
            except RayTaskError as error:
                cause = error.cause if isinstance(error.cause, Exception) else RunError(first_line(error))
                if starved or not isinstance(cause, OutOfGpuMemory):
                    raise cause from error
                starved = True
                self.release()
                make_room(cause)
            except (RayActorError, ObjectLostError) as error:
                self.release()
                deaths += 1
                if deaths > MAX_FAILURES:
                    died = f"the process of the server's work died: {first_line(error)}"
                    raise RunError(no_sign(forwarder.silent, deaths) if forwarder.hangs else died) from error
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

        options: dict[str, Any] = {
            "num_cpus": self._needs["CPU"], "num_gpus": self._needs["GPU"], "concurrency_groups": {SIGNS: 1},
            "scheduling_strategy": PlacementGroupSchedulingStrategy(None),  # type: ignore[arg-type] # not a trial's own
        }  # fmt: skip
        actor: Any = ray.remote(**options)(ServerActor).remote(1.0)
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
