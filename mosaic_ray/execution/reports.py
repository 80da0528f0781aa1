"""Follow the server's own work on Ray actors: forward its reports, and kill workers that give no sign of life."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from .actor_pool import end
from .watch import SIGNS, Curve, Watch, Working

Report = Callable[[int, Mapping[str, float]], None]

#: Seconds between two reads of the reports.
POLL_SECONDS = 1.0

#: Ray's options of a ``ReportQueue``.
QUEUE: dict[str, Any] = {"num_cpus": 0, "concurrency_groups": {SIGNS: 1}}

#: Seconds to wait for the queue of a worker that is to be killed.
PATIENCE_SECONDS = 30.0

#: Work that lost its worker is done again this often; it is deterministic, so it ends the same.
MAX_FAILURES = 3


def ignore(seconds: float) -> None:
    """Do nothing about a worker that hung."""


class ReportQueue(Working):
    """Hold the reports and signs of Ray Train's workers, which the driver cannot ask. A Ray actor."""

    def __init__(self) -> None:
        self.curve: Curve = []
        self.counts = False
        self._workers: list[Any] = []

    def put(self, step: int, metrics: dict[str, float]) -> None:
        self.curve.append((step, metrics))

    def sign(self, worker: Any) -> None:
        """Note a sign of life of ``worker``, an actor. Time without one counts from the first on."""
        if worker not in self._workers:
            self._workers.append(worker)
        self.step()

    def forget(self) -> list[Any]:
        """Return the workers that gave signs, and wait for the first sign of others."""
        workers, self._workers, self.counts = self._workers, [], False
        return workers


class ReportForwarder:
    """Forward each step's metrics exactly once, in order: live during the work, the rest at the end.

    ``timeout``: seconds without a sign of life after which workers are killed, as ``Watch`` takes them; ``hung`` is
    called with these seconds. The caller does the work again.
    """

    def __init__(self, report: Report | None, timeout: float, hung: Callable[[float], None] = ignore) -> None:
        self._report, self._hung, self._last, self._watch = report, hung, -1, Watch(timeout)
        self._failure: Exception | None = None
        self.hangs, self.silent = 0, 0.0  # how often workers were killed, and for how long the last ones were silent

    @contextlib.contextmanager
    def live(self, source: Any, workers: Callable[[], list[Any]]) -> Iterator[None]:
        """Follow the work of the block; raise an error of ``report`` at its end.

        ``source``: an actor that is ``Working``; ``workers`` returns the actors to kill if it counts no more steps.
        """
        done = threading.Event()
        thread = threading.Thread(target=self._poll, args=(done, source, workers), daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
        if self._failure:
            raise self._failure

    def flush(self, curve: Curve) -> None:
        """Forward the steps of ``curve`` that were not forwarded yet; work that is done again repeats its steps."""
        for step, metrics in curve:
            if self._report and step > self._last:
                self._report(step, metrics)
                self._last = step

    def _poll(self, done: threading.Event, source: Any, workers: Callable[[], list[Any]]) -> None:
        import ray

        self._watch.begin(source)
        asked = None
        try:
            while not done.wait(POLL_SECONDS):
                if self._report:
                    asked = asked or source.reports.options(concurrency_group=SIGNS).remote(self._last)
                    if ray.wait([asked], timeout=0)[0]:  # a source that hangs is not waited for
                        answer, asked = asked, None
                        with contextlib.suppress(ray.exceptions.ActorUnavailableError):  # it did not answer in time
                            self.flush(ray.get(answer))
                if self._watch.is_due() and (sign := self._watch.look(source)).silent > self._watch.limit:
                    self._kill(workers(), sign.silent)
                    self._watch.begin(source)
        except ray.exceptions.RayError:  # the source's node died: the curve comes at the end
            return
        except Exception as error:
            self._failure = error

    def _kill(self, workers: list[Any], seconds: float) -> None:
        hanging = [worker for worker in workers if not _is_dead(worker)]  # Train may be waiting for another's start
        end(hanging)
        if hanging:
            self.hangs, self.silent = self.hangs + 1, seconds
            self._hung(seconds)


def _is_dead(actor: Any) -> bool:
    import ray

    try:
        ray.get(actor.__ray_ready__.remote(), timeout=POLL_SECONDS)
    except ray.exceptions.RayError as error:
        return isinstance(error, ray.exceptions.RayActorError)
    return False
