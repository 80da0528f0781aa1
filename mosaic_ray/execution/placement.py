"""Place a run's clients and its server's work: in this process, on its own Ray actors, or on a sweep's shared pool."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from ..config.resolve import override
from ..config.schema import ExperimentConfig
from ..core.errors import OutOfGpuMemory, RequestError
from ..core.types import DataFacts, ImageSet
from ..distillation.student_training import DistillTask
from .actor_pool import PATIENCE_FOR_MACHINES, PATIENCE_SECONDS, ActorPool
from .backend import ClientBackend, RayBackend, SerialBackend, start_hosts
from .devices import halved, on_a_gpu
from .ray_session import connect, hosts_beside_server, machines_to_come, nodes
from .ray_train import Outcome, distil_here, distil_on_ray
from .reports import Report
from .resource_plan import on_ray_gpus, server_needs
from .server import Server


@dataclass(frozen=True)
class Placement:
    """Start clients and distillation where the configuration requests them; nothing starts before its first use.

    ``address``: the Ray cluster of a run on its own. ``pool``: client actors that a sweep's trials share; Ray is
    joined already, and distillation without Train workers happens in this process, since Ray Train's in-process mode
    cannot start inside a Tune trial (the loop is the same one, bit for bit).
    """

    address: str = "local"
    pool: tuple[Any, ...] = ()
    in_trial: bool = False

    def backend(
        self, config: ExperimentConfig, facts: DataFacts, shards: Callable[[int], ImageSet], say: Callable[[str], None]
    ) -> ClientBackend:
        """Return the clients of ``config``; ``shards`` returns a client's training images."""
        if config.runtime.host == "serial":
            return SerialBackend(config, facts, shards)
        timeout = config.runtime.client_timeout

        def trial_again(error: OutOfGpuMemory) -> list[Any]:
            """Leave it to the sweep, which runs the trial again, unless a client has a GPU to itself already."""
            if halved(config.runtime.gpu_share) > config.runtime.gpu_share:
                raise error
            return []

        if self.pool:
            shared = partial(ActorPool, self.pool, shared=True, say=say, timeout=timeout, fewer=trial_again)
            return RayBackend(config, facts, shards, shared)
        now = config  # with the share of a GPU that is left to it
        needs = {"CPU": config.runtime.cpus_per_client, "GPU": config.runtime.gpu_share}

        def more(have: int) -> list[Any]:
            """Add actors for nodes that joined later; pending actors make the autoscaler start expected ones."""
            try:
                wanted = hosts_beside_server(now, nodes(expect=True))
            except RequestError:  # nodes went away and none that is left fits: wait for their return
                return []
            return start_hosts(needs, {"": max(0, wanted - have)})

        def halve(error: OutOfGpuMemory) -> bool:
            nonlocal now
            share = halved(needs["GPU"])
            if share == needs["GPU"]:
                return False
            needs["GPU"], now = share, override(config, {"runtime.gpus_per_client": share})
            who = "the server's work" if error.client is None else f"client {error.client}"
            say(f"{who}: out of GPU memory; going on with {on_a_gpu(share)}")
            return True

        def fewer(error: OutOfGpuMemory) -> list[Any]:
            return start_hosts(needs, {"": hosts_beside_server(now, nodes(expect=True))}) if halve(error) else []

        def own() -> ActorPool:
            connect(self.address)
            to_come = machines_to_come() if self.address != "local" else []
            count = hosts_beside_server(now, [*nodes(), *to_come])
            later = f", some on machines that the cluster is yet to start ({len(to_come)} at most)" if to_come else ""
            say(f"Ray is up: {config.partition.num_clients} clients on {count} actors{later}")
            return ActorPool(
                start_hosts(needs, {"": count}), more=None if self.address == "local" else more, say=say,
                fewer=fewer, timeout=timeout,
                patience_seconds=PATIENCE_FOR_MACHINES if to_come else PATIENCE_SECONDS,
            )  # fmt: skip

        return RayBackend(config, facts, shards, own, halve)

    def server(self, config: ExperimentConfig) -> Server | None:
        """Return the worker for the server's work; None where that is this process."""
        if not on_ray_gpus(config):
            return None

        return Server(
            server_needs(config), lambda: None if self.in_trial else connect(self.address), shared=self.in_trial
        )

    def distil(
        self,
        task: DistillTask,
        report: Report,
        storage: str,
        on_server: Callable[..., Any],
        hung: Callable[[float], None],
    ) -> Outcome:
        """Return the distilled student. ``storage``: Ray Train's folder; the functions are those of ``RunContext``."""
        config = task.config
        without_train = config.runtime.host == "serial" or self.in_trial or on_ray_gpus(config)
        if without_train and not (config.distill.train_workers and config.runtime.host == "ray"):
            outcome: Outcome = on_server(distil_here, task, report=report)
            return outcome
        if not self.in_trial:
            connect(self.address)
        return distil_on_ray(task, report, storage, hung)
