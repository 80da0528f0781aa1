"""Pretended machines, on which a resource plan is placed piece by piece."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import product

from mosaic_ray.config.resolve import override
from mosaic_ray.config.schema import ExperimentConfig
from mosaic_ray.execution.resource_plan import DRIVER_BYTES, HOST_BYTES, Node, ResourcePlan

GIB = 2**30


def config(**knobs) -> ExperimentConfig:
    """``config(distill__workers=1)``."""
    return override(ExperimentConfig(), {name.replace("__", "."): value for name, value in knobs.items()})


def cluster(*machines: tuple[float, float, float]) -> list[Node]:
    """Nodes a, b, ... of (CPUs, GPUs, GiB)."""
    return [Node("abcde"[i], cpus, gpus, gib * GIB) for i, (cpus, gpus, gib) in enumerate(machines)]


# --- pretended machines ----------------------------------------------------------------------------------------------


class Machine:
    """A node in Ray's units: CPUs in ten-thousandths, each GPU by itself; a share goes to the fullest fitting GPU."""

    def __init__(self, node: Node) -> None:
        self.cpus = round(node.cpus * 10_000)
        self.gpus = [10_000] * int(node.gpus)
        self.memory = int(node.memory * 0.7)

    def take(self, asks: Mapping[str, float]) -> tuple | None:
        """Take the resources ``asks`` and return them; None if they do not fit."""
        cpus, share = round(asks.get("CPU", 0) * 10_000), round(asks.get("GPU", 0) * 10_000)
        memory = asks.get("memory", 0)
        if share >= 10_000:
            used = [i for i, free in enumerate(self.gpus) if free == 10_000][: share // 10_000]
            enough, each = len(used) == share // 10_000, 10_000
        else:
            open_ = sorted((free, i) for i, free in enumerate(self.gpus) if share and free >= share)
            used, enough, each = [i for _, i in open_[:1]], not share or bool(open_), share
        if not enough or cpus > self.cpus or memory > self.memory:
            return None
        taken = (cpus, tuple((i, each) for i in used), memory)
        self._move(taken, -1)
        return taken

    def fill(self, asks: Mapping[str, float]) -> int:
        """How many fit."""
        count = 0
        while self.take(asks):
            count += 1
        return count

    def give(self, taken: tuple) -> None:
        self._move(taken, 1)

    def _move(self, taken: tuple, sign: int) -> None:
        cpus, gpus, memory = taken
        self.cpus += sign * cpus
        self.memory += sign * memory
        for i, each in gpus:
            self.gpus[i] += sign * each


def wants(one: ExperimentConfig) -> tuple[dict, dict, dict, int]:
    """Return the resources of a host, a trial and a worker, and the workers of a trial; not read from the plan."""
    knobs, gpus = one.runtime, one.runtime.gpu_share
    if knobs.host == "serial":
        return {}, {"CPU": max(1.0, knobs.cpus_per_client), "GPU": gpus, "memory": DRIVER_BYTES}, {}, 0
    host = {"CPU": knobs.cpus_per_client, "GPU": gpus, "memory": HOST_BYTES}
    trial = {"CPU": 0.0, "GPU": 0.0, "memory": DRIVER_BYTES}
    workers = max(one.distill.train_workers, 1 if gpus else 0)  # on GPUs the server's own work needs one
    worker = {"CPU": 1.0, "GPU": 0.0}
    if gpus:
        worker = {"CPU": min(1.0, knobs.cpus_per_client), "GPU": 1.0 if workers > 1 else min(1.0, gpus)}
    return host, trial, worker if workers else {}, workers


def deal(count: int, places: int) -> Iterator[tuple[int, ...]]:
    """Every way to deal ``count`` to ``places``."""
    for head in product(range(count + 1), repeat=places - 1):
        if sum(head) <= count:
            yield (*head, count - sum(head))


def most_hosts(nodes: Sequence[Node], one: ExperimentConfig, concurrent: int, trials_on: int | None) -> int:
    """The most hosts beside so many trials and their workers, by trying everything; -1 where these do not fit."""
    host, trial, worker, workers = wants(one)
    anywhere, best = range(len(nodes)), -1
    for trials in deal(concurrent, len(nodes)):
        if trials_on is not None and trials[trials_on] < concurrent:
            continue
        for kept in deal(concurrent * workers, len(nodes)):
            machines = [Machine(node) for node in nodes]
            if all(machines[i].take(trial) for i in anywhere for _ in range(trials[i])) and all(
                machines[i].take(worker) for i in anywhere for _ in range(kept[i])
            ):
                best = max(best, sum(machine.fill(host) for machine in machines) if host else 0)
    return best


def place(made: ResourcePlan, nodes: Sequence[Node]) -> list[Machine] | None:
    """The machines with everything on them, or None where the plan does not fit."""
    machines = [Machine(node) for node in nodes]
    for counts, asks in ((made.hosts, made.host), (made.trials, made.trial), (made.kept, made.worker)):
        for machine, count in zip(machines, counts, strict=True):
            if not all(machine.take(asks) for _ in range(count)):
                return None
    return machines
