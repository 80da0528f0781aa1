"""The cohort: the fold over clients, in this process or on Ray actors, with the same numbers from either."""

from __future__ import annotations

import contextlib
import heapq
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from ..config import ExperimentConfig
from ..errors import RunError
from ..records import DataFacts, ImageSet
from .memory import give_back

Own = Callable[[int], Mapping[str, Any]]

#: Times that one client's work is given to another host after its actor died, before the run gives up.
MAX_LOSSES = 5


def no_own(client_id: int) -> Mapping[str, Any]:
    """Nothing but what is common."""
    return {}


class Cohort(Protocol):
    """Asks clients for work and yields (client, result).

    ``ordered``: in client order, so that a sum does not depend on scheduling; otherwise as results arrive. ``cost``
    orders dispatch, longest first.
    """

    def ask(
        self,
        work: str,
        clients: Sequence[int],
        common: Mapping[str, Any],
        own: Own = no_own,
        *,
        ordered: bool = True,
        cost: Callable[[int], float] | None = None,
    ) -> Iterator[tuple[int, Any]]: ...

    def release(self) -> None:
        """Give the hosts' resources back until the next ask."""

    def close(self) -> None: ...


def client_threads(config: ExperimentConfig) -> int:
    """Torch threads of a client: its CPUs, at least one. Results depend on it in the last bit, so hosts agree on it."""
    return max(1, int(config.runtime.cpus_per_client))


def work_on(
    config: ExperimentConfig, facts: DataFacts, device: str, work: str, client_id: int, shard: Any, common, own
):
    """One client's work, here; any failure carries its address."""
    import torch

    from ..methods.client_work import WORK, Bench

    torch.set_num_threads(client_threads(config))
    bench = Bench(config, facts, torch.device(device))
    try:
        return WORK[work](bench, bench.shard(*shard), client_id, common, own)
    except RunError:
        raise
    except Exception as error:
        round_num = common.get("round") if common.get("phase") else None
        raise RunError(f"{type(error).__name__}: {error}", round=round_num, client=client_id) from error


class SerialCohort:
    """Every client in turn, in this process."""

    def __init__(self, config: ExperimentConfig, facts: DataFacts, shards: Callable[[int], ImageSet]) -> None:
        self._config, self._facts, self._shards = config, facts, shards

    def ask(self, work, clients, common, own=no_own, *, ordered=True, cost=None):
        """See ``Cohort``; always in client order."""
        import torch

        device = "cuda" if self._config.runtime.gpus_per_client and torch.cuda.is_available() else "cpu"
        threads = torch.get_num_threads()
        for client_id in sorted(clients):
            shard = self._shards(client_id)
            try:
                result = work_on(
                    self._config, self._facts, device, work, client_id, (shard.images, shard.labels), common,
                    own(client_id),
                )  # fmt: skip
            finally:
                torch.set_num_threads(threads)
            yield client_id, result

    def release(self) -> None:
        """Nothing is held."""

    def close(self) -> None:
        """Nothing to close."""


class ClientActor:
    """A client host on Ray. It keeps nothing between calls: any experiment may use it, any other redo its work."""

    def __init__(self, gpu: bool) -> None:
        import torch

        torch.set_num_threads(1)  # until the first work says otherwise: importing torch must not take every core
        if gpu and not torch.cuda.is_available():
            raise RunError("a GPU share was given to this client actor, but torch finds no CUDA device")
        self._device = "cuda" if gpu else "cpu"

    def ping(self) -> bool:
        """True once the actor is up (again)."""
        return True

    def rest(self) -> None:
        """Nothing to do for a while."""
        give_back()

    def work(
        self,
        config: ExperimentConfig,
        facts: DataFacts,
        work: str,
        client_id: int,
        shard: tuple[Any, Any],
        common: Mapping[str, Any],
        own: Mapping[str, Any],
    ) -> tuple[bool, Any]:
        """(True, result); two return values, so that the driver learns of the end without fetching the result.

        ``shard`` holds references to the client's images and labels, read in place from shared memory.
        """
        import ray

        arrays = ray.get(list(shard))
        return True, work_on(config, facts, self._device, work, client_id, arrays, common, own)


def start_hosts(needs: Mapping[str, float], counts: Mapping[str, int]) -> list[Any]:
    """Client actors that hold ``needs`` ("CPU", "GPU", "memory" in bytes) each.

    ``counts`` of them on each node, by Ray's node id; "" leaves the choice to Ray. Where its node is gone, one moves.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    actor = ray.remote(
        num_cpus=needs["CPU"], num_gpus=needs.get("GPU", 0.0), memory=needs.get("memory") or None, max_restarts=-1,
        max_task_retries=0,
    )(ClientActor)  # fmt: skip
    hosts = []
    for node, count in counts.items():
        where = {"scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=True)} if node else {}
        hosts += [actor.options(**where).remote(bool(needs.get("GPU"))) for _ in range(count)]
    return hosts


def started(hosts: list[Any], patience_seconds: float = 120.0) -> list[Any]:
    """Those of ``hosts`` that are up within ``patience_seconds``; the others (somebody holds their room) are ended.

    ``RunError`` where none is.
    """
    import ray

    pings = {host.ping.remote(): host for host in hosts}
    up, late = ray.wait(list(pings), num_returns=len(pings), timeout=patience_seconds)
    for ping in up:
        try:
            ray.get(ping)
        except Exception as error:
            raise RunError(f"a client actor cannot start: {_first_line(error)}") from error
    if not up:
        raise RunError(
            f"no client actor could start within {patience_seconds:g} s: other jobs hold the cluster's CPUs, GPUs or "
            "memory (`ray status` shows who)"
        )
    for ping in late:
        ray.kill(pings[ping])
    return [pings[ping] for ping in up]


class RayCohort:
    """Clients on ``ClientActor``s: one each while they fit, otherwise as many as fit, each hosting clients in turn.

    Nothing starts before the first ``ask``. An actor that dies costs the work in hand: that client is queued again
    while Ray restarts the actor.
    """

    def __init__(
        self,
        config: ExperimentConfig,
        facts: DataFacts,
        shards: Callable[[int], ImageSet],
        hosts: Callable[[], list[Any]],
        *,
        shared: bool = False,
    ) -> None:
        """``hosts`` answers the actors; ``shared`` ones serve others too and are not ended here."""
        self._config, self._facts, self._shards, self._hosts, self._shared = config, facts, shards, hosts, shared
        self._actors: list[Any] = []
        self._refs: dict[int, tuple[Any, Any]] = {}

    def _start(self) -> None:
        if self._actors:
            return
        self._actors = self._hosts()
        if not self._refs:
            import ray

            for client_id in range(self._config.partition.num_clients):
                shard = self._shards(client_id)
                self._refs[client_id] = (ray.put(shard.images), ray.put(shard.labels))

    @property
    def actors(self) -> list[Any]:
        """The actors alive, for tests that end one."""
        return self._actors

    def ask(self, work, clients, common, own=no_own, *, ordered=True, cost=None):
        """See ``Cohort``."""
        self._start()
        call = (self._config, self._facts, work)
        yield from _Fold(self._actors, self._refs, call, sorted(clients), common, own, cost).results(ordered)
        for actor in self._actors:
            actor.rest.remote()

    def release(self) -> None:
        import ray

        for actor in () if self._shared else self._actors:
            with contextlib.suppress(Exception):  # it may be dead already, which is what we want
                ray.kill(actor)
        self._actors = []

    def close(self) -> None:
        self.release()
        self._refs.clear()


class _Fold:
    """One ask: a queue of clients, the idle actors, and what is running. ``call``: (config, facts, work)."""

    def __init__(self, actors, shards, call, clients, common, own, cost) -> None:
        import ray

        self._call, self._own, self._clients, self._shards = call, own, clients, shards
        self._cost = cost or (lambda client_id: 0.0)
        self._common = ray.put(common)
        self._queue = [(-self._cost(c), c) for c in clients]
        heapq.heapify(self._queue)
        self._idle = list(actors)
        self._running: dict[Any, tuple[int, Any, Any]] = {}  # done -> (client or -1 for a ping, value, actor)
        self._losses: dict[int, int] = {}

    def results(self, ordered: bool) -> Iterator[tuple[int, Any]]:
        """Ends with every client answered, or raises with the address of the one that failed."""
        arrived: dict[int, Any] = {}  # references, not values: early results wait in the object store
        turn = iter(self._clients)
        due = next(turn, None)
        try:
            while due is not None:
                self._dispatch()
                arrived |= self._settle()
                while due is not None and arrived:
                    client_id = due if ordered else next(iter(arrived))
                    if client_id not in arrived:
                        break
                    found, value = self._fetch(client_id, arrived.pop(client_id))
                    if not found:
                        break
                    yield client_id, value
                    del value
                    due = next(turn, None)
        finally:
            self._cancel()

    def _dispatch(self) -> None:
        while self._queue and self._idle:
            _, client_id = heapq.heappop(self._queue)
            actor = self._idle.pop(0)
            done, value = actor.work.options(num_returns=2).remote(
                *self._call, client_id, self._shards[client_id], self._common, self._own(client_id)
            )
            self._running[done] = (client_id, value, actor)

    def _settle(self) -> dict[int, Any]:
        """Wait for something to end; answers what arrived, queues again what was lost."""
        import ray
        from ray.exceptions import OutOfMemoryError, RayActorError, RayTaskError

        if not self._running:
            return {}
        ready, _ = ray.wait(list(self._running), num_returns=1)
        arrived = {}
        for done in ready:
            client_id, value, actor = self._running.pop(done)
            try:
                ray.get(done)
            except RayTaskError as error:
                cause = error.cause if isinstance(error.cause, RunError) else None
                if isinstance(error, OutOfMemoryError):
                    self._lost(client_id, actor, error)
                elif cause is not None:
                    raise cause from None
                else:
                    raise RunError(_first_line(error.cause or error), client=client_id) from error
            except (RayActorError, OutOfMemoryError) as error:
                self._lost(client_id, actor, error)
            else:
                self._idle.append(actor)
                if client_id >= 0:
                    arrived[client_id] = value
        return arrived

    def _lost(self, client_id: int, actor: Any, error: Exception) -> None:
        """The actor died with this client's work: queue the client, and wait for the actor through a ping."""
        self._losses[client_id] = self._losses.get(client_id, 0) + 1
        if self._losses[client_id] > MAX_LOSSES:
            what = (
                f"its actor died {self._losses[client_id]} times: "
                if client_id >= 0
                else "a client actor cannot start: "
            )
            raise RunError(what + _first_line(error), client=client_id if client_id >= 0 else None) from error
        if client_id >= 0:
            heapq.heappush(self._queue, (-self._cost(client_id), client_id))
        # a ping may be asked again and again: Ray holds it until the actor is up, or dead for good
        self._running[actor.ping.options(max_task_retries=-1).remote()] = (-1, None, actor)

    def _fetch(self, client_id: int, reference: Any) -> tuple[bool, Any]:
        """(True, value), or (False, None) where the value went down with its node and must be computed again."""
        import ray
        from ray.exceptions import ObjectLostError

        try:
            return True, ray.get(reference)
        except ObjectLostError:
            heapq.heappush(self._queue, (-self._cost(client_id), client_id))
            return False, None

    def _cancel(self) -> None:
        import ray

        for done in self._running:
            with contextlib.suppress(Exception):  # best effort; an actor's running call cannot be interrupted
                ray.cancel(done, force=False)
        self._running.clear()


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0].strip() if lines else 'no message'}"
