"""Plan the resources of a sweep from the nodes and the trials' configs alone, without Ray.

A sweep holds client hosts (one pool for all trials), trials, and their workers: the Ray Train workers of trials that
distil, and on GPUs the worker for the rest of the server's work. A trial uses one kind at a time. Hosts and workers
wait for nothing, so no trial waits forever if everything that may be held at once also fits at once. ``plan`` finds the
most trials and hosts for which it does, exactly, by dynamic programming over the nodes. A formula that adds up the
nodes' resources would not do: nodes differ, no request may be split between two of them, and three resources bind.
"""

from __future__ import annotations

import functools
import math
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np

from ..config.schema import ExperimentConfig
from ..core.errors import RequestError
from ..core.units import GIB, size

#: Resident memory of one client actor with torch loaded, before its model's own needs (measured: 0.3 to 0.6 GB).
HOST_BYTES = 600 * 2**20

#: The same of a trial: the driver of one experiment, with its data set and the server's stages.
DRIVER_BYTES = 2**30

#: Hosts and trials take at most this share of a node's memory; Train workers and everything else live in the rest.
MEMORY_SHARE = 0.7

#: Nodes that a line names one by one; more are summed up.
MAX_NAMED = 6

#: Ray counts CPUs and GPU shares in ten-thousandths; counted in whole units, ten shares of 0.1 are exactly one.
UNITS = 10_000


def on_ray_gpus(config: ExperimentConfig) -> bool:
    """Return whether clients run on GPUs of Ray's workers; the server's work then does too, not in the driver."""
    return config.runtime.host == "ray" and config.runtime.gpu_share > 0


def server_needs(config: ExperimentConfig, workers: int = 1) -> dict[str, float]:
    """Return what Ray is asked for each of a trial's ``workers``: Ray Train's, or the server's.

    On GPUs one worker asks for no more than a client, so that it fits wherever a client does; several ask for a whole
    GPU each, since NCCL takes one process a GPU.
    """
    knobs = config.runtime
    if not on_ray_gpus(config):
        return {"CPU": 1.0, "GPU": 0.0}
    share = 1.0 if workers > 1 else min(1.0, knobs.gpu_share)
    return {"CPU": min(1.0, knobs.cpus_per_client), "GPU": share}


@dataclass(frozen=True)
class Node:
    """A machine: CPUs, GPUs, bytes of memory. ``to_come``: not up yet, but the autoscaler may start it."""

    name: str
    cpus: float
    gpus: float
    memory: float
    to_come: bool = False

    @property
    def label(self) -> str:
        """Return the name, shortened: Ray's ids are long."""
        return self.name[:16]


@dataclass(frozen=True)
class ResourcePlan:
    """How many hosts, trials and workers run on which node at once.

    ``hosts``, ``trials`` and ``kept`` (places for workers) hold one count per node: together they fit.
    """

    nodes: tuple[Node, ...]
    hosts: tuple[int, ...]
    concurrent: int  # trials at once
    trial: Mapping[str, float]  # resources that a trial asks of Ray
    host: Mapping[str, float]  # resources of a client host
    workers: int  # of one trial: Ray Train's, or the server's
    worker: Mapping[str, float]  # resources of one of them
    limits_hosts: str
    limits_trials: str
    trials: tuple[int, ...]
    kept: tuple[int, ...]
    trials_on: int | None  # the node that every trial must be bound to; None: any
    clients: int  # of the largest trial

    def lines(self) -> list[str]:
        """Return the plan as lines of text."""
        hosts, kept = sum(self.hosts), sum(self.kept)
        bound = "" if self.trials_on is None else f", all on {self.nodes[self.trials_on].label}"
        each = f"each {_amounts(self.trial)}; limited by {self.limits_trials}"
        out = [f"trials at once: {self.concurrent}{bound}, {each}"]
        if hosts:
            out += [
                f"client hosts: {hosts}{self._spread(self.hosts)}, shared by all trials, each {_amounts(self.host)}; "
                f"limited by {self.limits_hosts}",
                f"clients per host: up to {math.ceil(self.clients / hosts)} of a trial's {self.clients}, in turn",
            ]
        else:
            out.append("client hosts: none, clients run inside their trial (runtime.host = serial)")
        if kept:
            whom = "the server's work and Ray Train" if self.worker["GPU"] else "Ray Train"
            out.append(
                f"kept free for {whom}: {_count(kept, 'worker')}{self._spread(self.kept)}, "
                f"{self.workers} a trial, each {_amounts(self.worker)}"
            )
        return [*out, self._left()]

    def _spread(self, counts: Sequence[int]) -> str:
        """Return the nodes that ``counts`` are on; empty with one node."""
        if len(self.nodes) == 1:
            return ""
        used = [f"{n} on {node.label}" for n, node in zip(counts, self.nodes, strict=True) if n]
        return f" ({', '.join(used) if len(used) <= MAX_NAMED else f'on {len(used)} nodes'})"

    def _left(self) -> str:
        """Return what the plan leaves free, with the memory for everything else."""
        held = list(zip((self.hosts, self.trials, self.kept), (self.host, self.trial, self.worker), strict=True))
        each = [[number] for number in range(len(self.nodes))]
        parts = []
        for group in each if len(each) <= MAX_NAMED else [range(len(each))]:
            amounts = []
            for kind, field in (("CPU", "cpus"), ("GPU", "gpus"), ("memory", "memory")):
                has = sum(getattr(self.nodes[i], field) for i in group)
                free = has - sum(counts[i] * asks.get(kind, 0.0) for counts, asks in held for i in group)
                if kind == "memory":
                    amounts.append(f"{free / GIB:.1f} of {size(has, 'GiB')}")
                elif has:
                    amounts.append(f"{round(free, 4):g} of {_count(has, kind)}")
            name = f"{self.nodes[group[0]].label}: " if 1 < len(each) <= MAX_NAMED else ""
            parts.append(name + ", ".join(amounts))
        return "left over: " + "; ".join(parts)


def _amounts(asks: Mapping[str, float]) -> str:
    """Format ``{"CPU": 1, "GPU": 0, "memory": 2**30}`` as ``1 CPU, 1.0 GiB``."""
    parts = [_count(asks[kind], kind) for kind in ("CPU", "GPU") if asks[kind]]
    return ", ".join([*parts, *([size(asks["memory"], "GiB")] if "memory" in asks else [])])


def _count(amount: float, noun: str) -> str:
    return f"{amount:g} {noun}{'' if 0 < amount <= 1 else 's'}"


@dataclass(frozen=True)
class _Need:
    """The largest request of any trial of the sweep."""

    pool: bool  # clients run on hosts
    host_cpus: float
    trial_cpus: float  # above 0 where clients run inside the trial
    gpus: float  # of a host, and of a trial in which clients run
    inside: bool  # clients run on GPUs inside a trial
    train: int  # Ray Train's workers
    train_on_cpus: bool  # of a trial without GPUs
    clients: int
    per_round: int  # clients asked in a round; the fewest of any trial, since they leave most hosts idle
    max_hosts: float

    @property
    def compete(self) -> bool:  # whether trials and workers compete for CPUs or GPUs
        return bool(self.workers and (self.trial_cpus or self.trial_gpus))

    @property
    def trial_gpus(self) -> float:
        return self.gpus if self.inside else 0.0

    @property
    def workers(self) -> int:
        """Return how many workers a trial has at once: Ray Train's, on GPUs at least the server's."""
        return max(self.train, int(self.pool and self.gpus > 0))

    @property
    def worker(self) -> dict[str, float]:
        """Return what a worker asks for, in the words of ``server_needs``."""
        if not (self.gpus and self.pool):
            return {"CPU": 1.0, "GPU": 0.0}
        cpus = 1.0 if self.train_on_cpus else min(1.0, self.host_cpus)
        return {"CPU": cpus, "GPU": 1.0 if self.workers > 1 else min(1.0, self.gpus)}


def _need(configs: Sequence[ExperimentConfig]) -> _Need:
    on_ray = [c for c in configs if c.runtime.host == "ray"]
    serial = [c for c in configs if c.runtime.host == "serial"]
    return _Need(
        pool=bool(on_ray),
        host_cpus=max((c.runtime.cpus_per_client for c in on_ray), default=0.0),
        trial_cpus=max((max(1.0, c.runtime.cpus_per_client) for c in serial), default=0.0),
        gpus=max(c.runtime.gpu_share for c in configs),
        inside=any(c.runtime.gpu_share for c in serial),
        train=max((c.distill.train_workers for c in on_ray), default=0),  # serial distils in the trial's own process
        train_on_cpus=any(c.distill.train_workers and not on_ray_gpus(c) for c in on_ray),
        clients=max(c.partition.num_clients for c in configs),
        per_round=min(c.federation.cohort_size or c.partition.num_clients for c in configs),
        max_hosts=min((c.runtime.max_hosts for c in on_ray if c.runtime.max_hosts), default=math.inf),
    )


SCARCE = ("CPUs", "GPUs", "memory")

#: More of a resource than any request asks for.
ENDLESS = 2**60


@functools.lru_cache
def _options(
    need: _Need, has: tuple[float, ...], trials: int, workers: int, most: float, block: int, plenty: tuple[str, ...]
) -> list[tuple[int, int, int]]:
    """Return every (hosts, trials, workers) that a node holds at once and to which nothing can be added.

    The most hosts come first. ``has``: the node's CPUs, GPUs and memory. At most ``most`` hosts, ``workers``, and
    ``trials``, the latter in groups of ``block``. ``plenty``: resources to count as endless.
    """
    amounts = zip(SCARCE, (_units(has[0]), int(has[1]), int(has[2] * MEMORY_SHARE)), strict=True)
    cpus, gpus, memory = (ENDLESS if kind in plenty else amount for kind, amount in amounts)
    host, trial, share = (max(1, _units(x)) if x else 0 for x in (need.host_cpus, need.trial_cpus, need.gpus))
    worker, whole = max(1, _units(need.worker["CPU"])), need.worker["GPU"] == 1
    asks, slots = (share // UNITS, 1) if share > UNITS else (1, UNITS // share) if share else (0, 1)
    held_by_trial = asks if need.trial_gpus else 0
    found: dict[tuple[int, int], int] = {}
    bounds = [most, memory // HOST_BYTES, *([cpus // host] if host else []), *([slots * gpus // asks] if asks else [])]
    for hosts in range(int(min(bounds)) + 1):
        free = cpus - host * hosts
        limits = [trials, (memory - HOST_BYTES * hosts) // DRIVER_BYTES, *([free // trial] if trial else [])]
        held = min([*limits, *([slots * gpus // asks - hosts] if held_by_trial else [])]) // block * block
        for count in range(0 if need.compete else held, held + 1, block):
            used = asks * hosts + held_by_trial * count
            room = gpus + used // -slots if whole else slots * gpus - used if need.worker["GPU"] else workers
            found[count, min(workers, (free - trial * count) // worker, room)] = hosts
    return sorted(((hosts, *others) for others, hosts in found.items()), reverse=True)


@dataclass(frozen=True)
class _Cluster:
    """Nodes, and where trials must run (None: anywhere)."""

    nodes: tuple[Node, ...]
    trials_on: int | None

    def pack(
        self, need: _Need, trials: int, *, least: int | None = None, most: float = math.inf, plenty: Sequence[str] = ()
    ) -> list[tuple[int, ...]] | None:
        """Place ``trials``, their workers and as many hosts as fit; None if they do not fit.

        Returns the hosts, the trials and the workers of each node. There are ``least`` (without it, one if there is a
        pool) to ``most`` hosts.

        On every node, with h hosts, t trials, w workers and s GPUs that are shared out:

            CPUs     host_cpus h + trial_cpus t + worker_cpus w <= the node's
            memory   HOST_BYTES h + DRIVER_BYTES t <= MEMORY_SHARE of the node's
            GPUs     h + w <= the node's floor(1 / share), for workers with a host's share; for whole ones,
                     h <= s floor(1 / share), or share h <= s for hosts of whole GPUs;   s + w <= the node's

        and t counts like h where clients run inside the trial. These conditions are sufficient too where Ray chooses
        the places. Trials are alike, workers are alike, and Ray puts a share on the fullest GPU it fits on (2.60), so
        a new GPU is opened only if all others are full. Trials with a share and workers compete for GPUs: all trials
        are then bound to one node, since a trial elsewhere could open the GPU that a worker needs.

        The search adds one node after the other: ``best[t, w]`` is the most hosts that the nodes so far hold beside t
        trials and w workers. It tries each of a node's ``_options``, so it is exact. Among equals, the first nodes get
        the most hosts.
        """
        workers = trials * need.workers
        block = max(1, trials) if self.bound(need) else 1  # trials that share a node
        options = []
        for number, node in enumerate(self.nodes):
            there = trials if self.trials_on in (None, number) else 0
            has = (node.cpus, node.gpus, node.memory)
            options.append(_options(need, has, there, workers, most if need.pool else 0, block, tuple(plenty)))
        if any(sum(max(o[kind] for o in each) for each in options) < n for kind, n in ((1, trials), (2, workers))):
            return None
        # if the two do not compete, what fits beside the most hosts of every node needs no search
        alone = [-1 if need.compete else sum(each[0][kind] for each in options) for kind in range(3)]
        groups = 0 if alone[1] >= trials else trials // block
        placed = 0 if alone[2] >= workers else workers
        best = np.full((groups + 1, placed + 1), -ENDLESS)
        best[0, 0] = 0
        choices = []
        for each in reversed(options):
            values = np.stack([hosts + best[_rest(groups, t // block)][:, _rest(placed, w)] for hosts, t, w in each])
            choices.append(values.argmax(axis=0))
            best = values.max(axis=0)
        if best[-1, -1] < 0:
            return None
        left: tuple[float, ...] = (most, trials, workers)
        counts: list[tuple[int, ...]] = []
        for each, choice in zip(options, reversed(choices), strict=True):
            option = each[choice[min(groups, int(left[1]) // block), min(placed, int(left[2]))]]
            counts.append(tuple(int(min(pair)) for pair in zip(option, left, strict=True)))
            left = tuple(a - b for a, b in zip(left, counts[-1], strict=True))
        placed_on = list(zip(*counts, strict=True))
        return placed_on if sum(placed_on[0]) >= (need.pool if least is None else least) else None

    def bound(self, need: _Need) -> bool:
        return self.trials_on is not None or bool(need.workers and need.trial_gpus)

    def fits(self, need: _Need, plenty: Sequence[str] = ()) -> bool:
        """Return whether one trial, its workers and one host fit."""
        return self.pack(need, 1, most=1, plenty=plenty) is not None

    def there(self, kind: str) -> str:
        """Describe how much of a resource the nodes have."""
        amounts = [getattr(n, kind.lower()) for n in self.nodes]
        one = max(amounts) if self.trials_on is None else amounts[self.trials_on]
        if kind == "memory":
            what, most = f"there is {size(sum(amounts), 'GiB')}", size(one, "GiB")
        else:
            what, most = f"there {'is' if sum(amounts) == 1 else 'are'} {_count(sum(amounts), kind[:-1])}", f"{one:g}"
        if len(amounts) == 1:
            return what
        if self.trials_on is None:
            return f"{what}, at most {most} on one node"
        return f"{what}, {most} on {self.nodes[self.trials_on].label}, where trials run"


def _units(amount: float) -> int:
    return round(amount * UNITS)


def _rest(total: int, held: int) -> np.ndarray:
    """Return how many of 0 to ``total`` things are left when ``held`` are taken; int [total + 1]."""
    return np.maximum(np.arange(total + 1) - held, 0)


def plan(
    nodes: Sequence[Node],
    configs: Sequence[ExperimentConfig],
    *,
    num_trials: int,
    max_concurrent: int | None = None,
    trials_on: int | None = None,
) -> ResourcePlan:
    """Plan client hosts on each node and concurrent trials, so that no trial can wait for what another holds.

    ``configs``: of the trials, at least one; the plan is for the largest requests. Unless ``max_concurrent`` is given,
    there are as many trials as keep every host busy in federated rounds, and one more for while a trial is in stages of
    its own. ``trials_on``: the node that trials must run on, where storage is local.
    ``RequestError`` where not even one trial fits.
    """
    if max_concurrent is not None and max_concurrent < 1:
        raise RequestError(f"--max-concurrent {max_concurrent}: at least 1 trial must run")
    need, cluster = _need(configs), _Cluster(tuple(nodes), trials_on)

    def fits(trials: int) -> bool:
        packing = cluster.pack(need, trials, most=need.max_hosts)
        if packing is None:
            return False
        return bool(max_concurrent) or not need.pool or trials <= math.ceil(sum(packing[0]) / need.per_round) + 1

    wanted = min(num_trials, max_concurrent or num_trials)
    concurrent = _largest(range(1, wanted + 1), fits)
    if concurrent is None:
        raise RequestError(_refusal(cluster, need))
    cap = min(need.clients * concurrent, need.max_hosts)
    packing = cluster.pack(need, concurrent, most=cap)
    assert packing is not None  # ``fits`` placed as many trials
    hosts_on, trials, kept = packing
    hosts = sum(hosts_on)
    if concurrent == wanted:
        limits_trials = "--max-concurrent" if wanted < num_trials else "the number of trials"
    elif cluster.pack(need, concurrent + 1):
        limits_trials = "client hosts, which are busy already"
    else:
        limits_trials = _scarce(lambda plenty: cluster.pack(need, concurrent + 1, most=1, plenty=plenty))
    if not need.pool:
        limits_hosts = "runtime.host = serial"
    elif hosts == cap:
        limits_hosts = "runtime.max_hosts" if cap == need.max_hosts else "the number of clients"
    else:
        more = hosts + 1
        limits_hosts = _scarce(lambda plenty: cluster.pack(need, concurrent, least=more, most=more, plenty=plenty))
    return ResourcePlan(
        nodes=cluster.nodes,
        hosts=hosts_on,
        concurrent=concurrent,
        trial={"CPU": need.trial_cpus, "GPU": need.trial_gpus, "memory": float(DRIVER_BYTES)},
        host={"CPU": need.host_cpus, "GPU": need.gpus, "memory": float(HOST_BYTES)} if need.pool else {},
        workers=need.workers,
        worker=need.worker if need.workers else {},
        limits_hosts=limits_hosts,
        limits_trials=limits_trials,
        trials=trials,
        kept=kept,
        trials_on=int(np.argmax(trials)) if cluster.bound(need) else None,
        clients=need.clients,
    )


def _largest(values: Sequence[Any], fits: Callable[[Any], bool]) -> Any:
    """Return the largest of rising ``values`` that fits, or None; everything below a value that fits, fits too."""
    count = bisect_left(values, True, key=lambda value: not fits(value))
    return values[count - 1] if count else None


def _scarce(fits: Callable[[Sequence[str]], object]) -> str:
    """Name the fewest resources that would have to grow."""
    choices = (c for count in range(1, len(SCARCE) + 1) for c in combinations(SCARCE, count))
    return " and ".join(next(choice for choice in choices if fits(choice)))


def _refusal(cluster: _Cluster, need: _Need) -> str:
    """Return one line: the knob for which one trial, its workers and one host do not fit, and what would."""
    alone = replace(need, train=0)
    if cluster.fits(alone):
        kind = _scarce(lambda plenty: cluster.fits(need, plenty)).partition(" and ")[0]
        other = need.gpus if kind == "GPUs" else need.host_cpus  # only hosts on Ray come with workers
        most = _largest(range(need.train), lambda workers: cluster.fits(replace(need, train=workers)))
        return (
            f"distill.workers = {need.train}: a trial needs {_count(need.train * need.worker[kind[:-1]], kind[:-1])} "
            f"for them beside {other:g} for a client host; {cluster.there(kind)}, so distill.workers may be at most "
            f"{most}" + ("" if need.gpus else " (0 distils in the trial's own process)")
        )
    short = [kind for kind in SCARCE if not cluster.fits(alone, [other for other in SCARCE if other != kind])]
    if "memory" in short:
        host = f" and a client host {size(HOST_BYTES, 'GiB')}" if need.pool else ""
        enough = size((DRIVER_BYTES + HOST_BYTES * need.pool) / MEMORY_SHARE, "GiB")
        cpus = max(1.0, need.host_cpus, need.trial_cpus)
        serial = replace(alone, pool=False, trial_cpus=cpus, inside=True)
        return (
            f"memory: a trial needs {size(DRIVER_BYTES, 'GiB')}{host}, within {MEMORY_SHARE:.0%} of a node's; "
            f"{cluster.there('memory')}; a node with {enough} would do"
            + (", or runtime.host = serial" if need.pool and cluster.fits(serial) else "")
        )
    shares, whole = [v / 100 for v in range(1, 100)], [float(v) for v in range(1, 1000)]
    if "GPUs" in short or (need.gpus and "CPUs" not in short):
        kind, field, below = "GPUs", "gpus", [0.0, *shares, *whole]
        wants = f"a client host and the server's worker need {need.gpus:g} each"
        wants = wants if need.pool else f"a trial needs {need.gpus:g}"
    elif need.pool:
        kind, field, below = "CPUs", "host_cpus", [*shares, *whole]
        wants = f"a client host needs {need.host_cpus:g} on one node"
    else:
        kind, field, below = "CPUs", "trial_cpus", whole
        wants = f"a trial needs {need.trial_cpus:g} on one node"
    value = getattr(need, field)
    together = "" if short else ", but no node has CPUs, GPUs and memory together"
    line = f"runtime.{kind.lower()}_per_client = {value:g}: {wants}; {cluster.there(kind)}{together}"
    below = [v for v in below if v < value]
    for base, beside in ((need, ""), (alone, " with distill.workers = 0")):
        most = _largest(below, lambda less, base=base: cluster.fits(replace(base, **{field: less})))  # type: ignore[misc]
        if most is not None:
            return f"{line}, so it may be at most {most:g}{beside}" + " (0 runs clients on CPUs)" * (kind == "GPUs")
    return line
