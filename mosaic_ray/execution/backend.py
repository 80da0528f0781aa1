"""The cohort: the fold over clients, in this process or on Ray actors, with the same numbers from either."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from ..config.schema import ExperimentConfig
from ..core.errors import RunError
from ..core.types import DataFacts, ImageSet
from .actor_pool import PATIENCE_SECONDS, ActorPool, ClientFailure, Fold, end, first_line
from .malloc import give_back, keep_freed

Own = Callable[[int], Mapping[str, Any]]


def no_own(client_id: int) -> Mapping[str, Any]:
    """Nothing but what is common."""
    return {}


class ClientBackend(Protocol):
    """Asks clients for work and yields (client, result).

    ``ordered``: in client order, so that a sum does not depend on scheduling; otherwise as results arrive. ``cost``
    orders dispatch, longest first. A client whose work fails, or whose host dies with it, is asked again; after
    ``federation.max_client_failures`` a ``ClientFailure`` takes the place of its result.
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

    from ..federated.client import ClientContext
    from .tasks import WORK

    torch.set_num_threads(client_threads(config))
    context = ClientContext(config, facts, torch.device(device))
    try:
        return WORK[work](context, context.shard(*shard), client_id, common, own)
    except RunError:
        raise
    except Exception as error:
        round_num = common.get("round") if common.get("phase") else None
        raise RunError(f"{type(error).__name__}: {error}", round=round_num, client=client_id) from error


class SerialBackend:
    """Every client in turn, in this process."""

    def __init__(self, config: ExperimentConfig, facts: DataFacts, shards: Callable[[int], ImageSet]) -> None:
        self._config, self._facts, self._shards = config, facts, shards

    def ask(self, work, clients, common, own=no_own, *, ordered=True, cost=None):
        """See ``ClientBackend``; always in client order."""
        import torch

        device = "cuda" if self._config.runtime.gpus_per_client and torch.cuda.is_available() else "cpu"
        threads = torch.get_num_threads()
        for client_id in sorted(clients):
            shard = self._shards(client_id)
            arrays = (shard.images, shard.labels)
            for failures in range(1, self._config.federation.max_client_failures + 1):
                try:
                    result = work_on(self._config, self._facts, device, work, client_id, arrays, common, own(client_id))
                    break
                except RunError as error:
                    result = ClientFailure(error, failures)
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

        keep_freed()
        torch.set_num_threads(1)  # until the first work says otherwise: importing torch must not take every core
        if gpu and not torch.cuda.is_available():
            raise RunError("a GPU share was given to this client actor, but torch finds no CUDA device")
        self._device = "cuda" if gpu else "cpu"

    def ping(self) -> str:
        """Ray's id of the worker process, once the actor is up (again)."""
        import ray

        return ray.get_runtime_context().get_worker_id()

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


def started(hosts: list[Any], patience_seconds: float = PATIENCE_SECONDS) -> list[Any]:
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
            raise RunError(f"a client actor cannot start: {first_line(error)}") from error
    if not up:
        raise RunError(
            f"no client actor could start within {patience_seconds:g} s: other jobs hold the cluster's CPUs, GPUs or "
            "memory (`ray status` shows who)"
        )
    end([pings[ping] for ping in late])
    return [pings[ping] for ping in up]


class RayBackend:
    """Clients on ``ClientActor``s: one each while they fit, otherwise as many as fit, each hosting clients in turn.

    Nothing starts before the first ``ask``. An actor that dies costs the work in hand: that client is queued again
    while Ray restarts the actor.
    """

    def __init__(
        self,
        config: ExperimentConfig,
        facts: DataFacts,
        shards: Callable[[int], ImageSet],
        make_pool: Callable[[], ActorPool],
    ) -> None:
        """``make_pool`` answers the actors."""
        self._config, self._facts, self._shards, self._hire = config, facts, shards, make_pool
        self._crew: ActorPool | None = None
        self._refs: dict[int, tuple[Any, Any]] = {}

    def _start(self) -> ActorPool:
        if self._crew is None:
            self._crew = self._hire()
            if not self._refs:
                import ray

                for client_id in range(self._config.partition.num_clients):
                    shard = self._shards(client_id)
                    self._refs[client_id] = (ray.put(shard.images), ray.put(shard.labels))
        return self._crew

    def ask(self, work, clients, common, own=no_own, *, ordered=True, cost=None):
        """See ``ClientBackend``."""
        crew, call = self._start(), (self._config, self._facts, work)
        failures = self._config.federation.max_client_failures
        yield from Fold(crew, self._refs, call, sorted(clients), common, own, cost, failures).results(ordered)
        for actor in crew.actors:
            if crew.is_up(actor):
                actor.rest.remote()

    def release(self) -> None:
        if self._crew:
            self._crew.close()
        self._crew = None

    def close(self) -> None:
        self.release()
        self._refs.clear()
