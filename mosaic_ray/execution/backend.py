"""Run tasks for clients, in this process or on Ray actors, with the same numbers from either."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from ..config.schema import ExperimentConfig
from ..config.user_code import is_file_module
from ..core.errors import OutOfGpuMemory, RunError
from ..core.types import DataFacts, ImageSet
from .actor_pool import PATIENCE_SECONDS, ActorPool, ClientFailure, ClientMap, end, first_line
from .determinism import choose_kernels
from .gpu_memory import CONTEXT_BYTES, is_out_of_memory
from .malloc import give_back, keep_freed
from .precision import device_of
from .watch import IGNORED, SIGNS, MapEvents, Working

if TYPE_CHECKING:
    from ..federated.client import Task

B = TypeVar("B")
P = TypeVar("P")
R = TypeVar("R")


class ClientBackend(Protocol):
    """Runs tasks for clients."""

    @property
    def seconds(self) -> float:
        """Return the seconds that finished client tasks took, all together."""
        ...

    def map(
        self,
        task: Task[B, P, R],
        clients: Sequence[int],
        broadcast: B,
        per_client: Callable[[int], P],
        *,
        ordered: bool = True,
        cost: Callable[[int], float] | None = None,
        events: MapEvents = IGNORED,
    ) -> Iterator[tuple[int, R | ClientFailure]]:
        """Yield (client, result) of ``task`` for each of ``clients``.

        Args:
            broadcast: input that is the same for all clients; sent once.
            per_client: input of one client.
            ordered: yield in client order, so that a sum does not depend on scheduling; else as results arrive.
            cost: relative cost of a client's work; the most expensive work is dispatched first.

        If work fails or its actor dies, the work is tried again. After ``federation.max_client_failures`` failures a
        ``ClientFailure`` takes the place of the result. A client that hangs as often ends the map with a ``RunError``.
        """
        ...

    def release(self, starved: OutOfGpuMemory | None = None) -> None:
        """Give the actors' resources back until the next call of ``map``.

        ``starved``: half as many clients share a GPU from then on, if there may be fewer.
        """

    def close(self) -> None:
        """Give everything back."""


def client_threads(config: ExperimentConfig) -> int:
    """Return a client's torch threads: its CPUs, at least one. Results depend on the number in the last bit."""
    return max(1, int(config.runtime.cpus_per_client))


def run_task(
    config: ExperimentConfig,
    facts: DataFacts,
    device: str,
    task: Task[B, P, R],
    client_id: int,
    shard: Sequence[Any],
    broadcast: B,
    own: P,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> R:
    """Run one client's task in this process; any failure is a ``RunError`` that names round and client.

    ``shard``: the client's images uint8 [n, C, H, W] and labels int64 [n], and those of each further client that a
    ``Batch`` works on. ``progress(done, total)`` counts steps.
    """
    import torch

    from ..federated.client import Batch, ClientContext

    torch.set_num_threads(client_threads(config))
    choose_kernels(config)
    context = ClientContext(config, facts, torch.device(device), progress)
    try:
        shards = [context.shard(images, labels) for images, labels in zip(shard[::2], shard[1::2], strict=True)]
        data: Any = shards if isinstance(task, Batch) else shards[0]
        return task.run(context, data, client_id, broadcast, own)
    except RunError:
        raise
    except Exception as error:
        round_num = getattr(task, "round_num", None)
        if is_out_of_memory(error):
            raise OutOfGpuMemory(TOO_LARGE, round=round_num, client=client_id) from error
        raise RunError(f"{type(error).__name__}: {error}", round=round_num, client=client_id) from error


#: A client's failure where no other client is on its GPU, and that of the server's work.
TOO_LARGE, SERVER_TOO_LARGE = (
    f"out of GPU memory: lower {knobs}, model.width or data.image_size, or set runtime.device = cpu"
    for knobs in (
        "warmup.batch_size, generator.batch_size", "meta.batch_size, distill.samples_per_generator",
    )
)  # fmt: skip


def take_device(share: float) -> str:
    """Return the torch device of a process that holds ``share`` of a GPU (0: none), and cap what it may allocate there.

    The context is outside of torch's allocator, so it is taken off the cap. A share of a half or more is not capped:
    its only neighbour may be the server's worker, which works while clients wait.
    """
    import torch

    if not share:
        return "cpu"
    if not torch.cuda.is_available():
        raise RunError("a GPU share was given to this process, but torch finds no CUDA device")
    if share < 0.5:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(max(share / 2, share - CONTEXT_BYTES / total))
    return "cuda"


def members_of(task: Task[Any, Any, Any], client_id: int) -> tuple[int, ...]:
    """Return the clients whose data the work of ``client_id`` reads: itself, or those of its ``Batch``."""
    from ..federated.client import Batch

    return task.members[client_id] if isinstance(task, Batch) else (client_id,)


def ship_by_value(*things: Any) -> None:
    """Let Ray send the modules of ``things`` that come from a plug-in's FILE.py, which its workers cannot import."""
    import ray

    for thing in things:
        name = getattr(thing if callable(thing) else type(thing), "__module__", None)
        module = sys.modules.get(name or "")
        if module is not None and is_file_module(module):
            ray.cloudpickle.register_pickle_by_value(module)


class SerialBackend:
    """Runs every client in turn, in this process."""

    def __init__(self, config: ExperimentConfig, facts: DataFacts, shards: Callable[[int], ImageSet]) -> None:
        self._config, self._facts, self._shards = config, facts, shards
        self.seconds = 0.0

    def map(
        self,
        task: Task[B, P, R],
        clients: Sequence[int],
        broadcast: B,
        per_client: Callable[[int], P],
        *,
        ordered: bool = True,
        cost: Callable[[int], float] | None = None,
        events: MapEvents = IGNORED,
    ) -> Iterator[tuple[int, R | ClientFailure]]:
        """Implement ``ClientBackend.map``, always in client order."""
        import torch

        device = device_of(self._config).type
        threads = torch.get_num_threads()
        for client_id in sorted(clients):
            shards = map(self._shards, members_of(task, client_id))
            arrays = [array for shard in shards for array in (shard.images, shard.labels)]
            own = per_client(client_id)
            result: R | ClientFailure
            began = time.perf_counter()
            step = partial(events.step, client_id)
            step(0, 0)
            for failures in range(1, self._config.federation.max_client_failures + 1):
                try:
                    result = run_task(self._config, self._facts, device, task, client_id, arrays, broadcast, own, step)
                    break
                except RunError as error:
                    if isinstance(error, OutOfGpuMemory) and self._config.runtime.gpu_share < 1:
                        raise  # a sweep's trial, which others share the GPU with, runs again with more of it
                    result = ClientFailure(error, failures)
                finally:
                    torch.set_num_threads(threads)
            self.seconds += time.perf_counter() - began
            yield client_id, result

    def release(self, starved: OutOfGpuMemory | None = None) -> None:
        """Hold nothing."""

    def close(self) -> None:
        """Hold nothing."""


class ClientActor(Working):
    """A Ray actor that runs tasks. It keeps nothing between calls, so any actor can do any client's work again.

    Tasks run in a thread of their own, made here, so that they use the heap that ``keep_freed`` set up.
    """

    def __init__(self, share: float) -> None:
        """``share`` of a GPU that the actor holds; 0: it runs on CPUs."""
        import torch

        keep_freed(one_heap=True)
        torch.set_num_threads(1)  # until the first task sets its own: importing torch must not take every core
        self._thread = ThreadPoolExecutor(1)
        self._thread.submit(torch.set_num_threads, 1).result()
        self._device = self._thread.submit(take_device, share).result()

    def ping(self) -> str:
        """Return Ray's id of the worker process, once the actor is up (again)."""
        import ray

        found: str = ray.get_runtime_context().get_worker_id()
        return found

    def trim_memory(self) -> None:
        """Give freed memory back to the system."""
        give_back()

    def work(
        self,
        common: tuple[ExperimentConfig, DataFacts, Task[Any, Any, Any], Any],
        client_id: int,
        shard: tuple[Any, ...],
        own: Any,
    ) -> tuple[float, Any]:
        """Return (seconds, result): two values, so that the driver learns of the end without fetching the result.

        ``common``: configuration, facts, task and broadcast, the same for all clients. ``shard`` holds references to
        the images and labels of the client, or of each client of a ``Batch``. All arrays are read in place from shared
        memory.
        """
        import ray

        config, facts, task, broadcast = common
        call = str(ray.get_runtime_context().get_task_id())

        def note(done: int, total: int) -> None:
            self.now = call, done, total

        self.counts = bool(task.unit)
        note(0, 0)
        try:
            began, arrays = time.perf_counter(), ray.get(list(shard))

            def work() -> Any:
                return run_task(config, facts, self._device, task, client_id, arrays, broadcast, own, note)

            result = self._thread.submit(work).result()
            return time.perf_counter() - began, result
        finally:
            self.now = "", 0, 0


    def work_in_turn(self, common: Any, inputs: Sequence[tuple[int, Any, Any]]) -> tuple[Any, list[Any]]:
        """Do ``work`` for several clients, each with its (client, shard, own), up to the first that fails.

        Returns (seconds, number of results, that error or None) and the results.
        """
        seconds, results = 0.0, list[Any]()
        for client_id, shard, own in inputs:
            try:
                taken, result = self.work(common, client_id, shard, own)
            except RunError as error:
                return (seconds, len(results), error), results
            seconds += taken
            results.append(result)
        return (seconds, len(results), None), results


def start_hosts(needs: Mapping[str, float], counts: Mapping[str, int]) -> list[Any]:
    """Start client actors that hold ``needs`` ("CPU", "GPU", "memory" in bytes) each.

    ``counts`` of them on each node, by Ray's node id; "" leaves the choice to Ray. Where its node is gone, one moves.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    options: dict[str, Any] = {
        "num_cpus": needs["CPU"], "num_gpus": needs.get("GPU", 0.0), "memory": needs.get("memory") or None,
        "max_restarts": -1, "max_task_retries": 0, "concurrency_groups": {SIGNS: 1},
    }  # fmt: skip
    actor = ray.remote(**options)(ClientActor)
    hosts = []
    for node, count in counts.items():
        where = {"scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=True)} if node else {}
        hosts += [actor.options(**where).remote(needs.get("GPU", 0.0)) for _ in range(count)]
    return hosts


def started(hosts: list[Any], patience_seconds: float = PATIENCE_SECONDS) -> list[Any]:
    """Return the actors that are up within ``patience_seconds``; end the others: other jobs hold their resources.

    Raises ``RunError`` where none is up.
    """
    import ray

    pings = {host.ping.remote(): host for host in hosts}
    up, late = ray.wait(list(pings), num_returns=len(pings), timeout=patience_seconds)
    for ping in up:
        try:
            ray.get(ping)
        except Exception as error:
            raise RunError(f"a client actor cannot start: {first_line(error)}") from error
    if not up:
        raise RunError(
            f"no client actor could start within {patience_seconds:g} s: other jobs hold the cluster's CPUs, GPUs or "
            "memory (`ray status` shows it)"
        )
    end([pings[ping] for ping in late])
    return [pings[ping] for ping in up]


class RayBackend:
    """Runs clients on ``ClientActor``s: one each while they fit, otherwise as many as fit, each for several clients.

    Nothing starts before the first call of ``map``. An actor that dies costs the work in hand: that client is queued
    again while Ray restarts the actor.
    """

    def __init__(
        self,
        config: ExperimentConfig,
        facts: DataFacts,
        shards: Callable[[int], ImageSet],
        make_pool: Callable[[], ActorPool],
        halve: Callable[[OutOfGpuMemory], bool] = lambda error: False,
    ) -> None:
        """``make_pool`` starts the actors; after ``halve`` half as many share a GPU, if there may be fewer."""
        self._config, self._facts, self._shards, self._make_pool = config, facts, shards, make_pool
        self._halve = halve
        self._pool: ActorPool | None = None
        self._refs: dict[int, tuple[Any, Any]] = {}
        self._before = 0.0  # seconds of pools that were released

    @property
    def seconds(self) -> float:
        """Implement ``ClientBackend.seconds``."""
        return self._before + (self._pool.seconds if self._pool else 0.0)

    def map(
        self,
        task: Task[B, P, R],
        clients: Sequence[int],
        broadcast: B,
        per_client: Callable[[int], P],
        *,
        ordered: bool = True,
        cost: Callable[[int], float] | None = None,
        events: MapEvents = IGNORED,
    ) -> Iterator[tuple[int, R | ClientFailure]]:
        """Implement ``ClientBackend.map``."""
        import ray

        pool = self._pool = self._pool or self._make_pool()
        if not self._refs:
            for client_id in range(self._config.partition.num_clients):
                shard = self._shards(client_id)
                self._refs[client_id] = (ray.put(shard.images), ray.put(shard.labels))
        call = (self._config, self._facts, task)
        ship_by_value(task, getattr(task, "task", task))
        failures = self._config.federation.max_client_failures
        data = {first: tuple(ref for k in members_of(task, first) for ref in self._refs[k]) for first in clients}
        yield from ClientMap(pool, data, call, sorted(clients), broadcast, per_client, cost, failures, events).results(
            ordered
        )
        for actor in pool.actors:
            if pool.is_up(actor):
                actor.trim_memory.remote()

    def release(self, starved: OutOfGpuMemory | None = None) -> None:
        """End the actors, unless other runs share them."""
        if starved:
            self._halve(starved)
        if self._pool:
            self._before += self._pool.seconds
            self._pool.close()
        self._pool = None

    def close(self) -> None:
        """Release the actors and the clients' images."""
        self.release()
        self._refs.clear()
