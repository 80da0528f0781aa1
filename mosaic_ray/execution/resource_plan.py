"""The resource plan of a sweep: a pure function of what there is and what is asked, without Ray.

A sweep holds three kinds of things at once: client hosts (one pool for all trials), trials, and the Ray Train workers
of trials that distil. Hosts and workers wait for nothing, so whatever a trial waits for ends, provided that everything
that may be held at once also fits at once. That is what ``plan`` solves for: a few linear inequalities in whole
numbers, node by node.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np

from ..config.schema import ExperimentConfig
from ..core.errors import RequestError

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

#: The solver stops within half a per cent of the most hosts (exact below 100 of them), or after these many branches.
GAP, MAX_BRANCHES = 0.005, 1000


@dataclass(frozen=True)
class Node:
    """A machine: CPUs, GPUs, bytes of memory. ``to_come``: the cluster's autoscaler may start it when it is asked."""

    name: str
    cpus: float
    gpus: float
    memory: float
    to_come: bool = False

    @property
    def label(self) -> str:
        """The name in words; Ray's own ids are long."""
        return self.name[:16]


@dataclass(frozen=True)
class ResourcePlan:
    """What runs where, and how much of it at once.

    ``hosts``, ``trials`` and ``kept`` (places for Train workers) hold one count per node: together they fit.
    """

    nodes: tuple[Node, ...]
    hosts: tuple[int, ...]
    concurrent: int  # trials at once
    trial: Mapping[str, float]  # what a trial asks of Ray
    host: Mapping[str, float]  # what a client host asks
    workers: int  # Train workers of one trial
    worker: Mapping[str, float]  # what each of them asks
    limits_hosts: str
    limits_trials: str
    trials: tuple[int, ...]
    kept: tuple[int, ...]
    trials_on: int | None  # the node that every trial must be bound to; None: any
    clients: int  # of the largest trial

    def lines(self) -> list[str]:
        """The plan in words."""
        hosts, kept = sum(self.hosts), sum(self.kept)
        bound = "" if self.trials_on is None else f", all on {self.nodes[self.trials_on].label}"
        trials = (
            f"trials at once: {self.concurrent}{bound}, each {_amounts(self.trial)}; limited by {self.limits_trials}"
        )
        if not hosts:
            return [trials, "client hosts: none, clients run inside their trial (runtime.host = serial)", self._left()]
        out = [
            trials,
            f"client hosts: {hosts}{self._spread(self.hosts)}, shared by all trials, each {_amounts(self.host)}; "
            f"limited by {self.limits_hosts}",
            f"clients per host: up to {math.ceil(self.clients / hosts)} of a trial's {self.clients}, in turn",
        ]
        if kept:
            out.append(
                f"kept free for Ray Train: room for {_count(kept, 'worker')}{self._spread(self.kept)}, "
                f"{self.workers} a trial, each {_amounts(self.worker)}"
            )
        return [*out, self._left()]

    def _spread(self, counts: Sequence[int]) -> str:
        """How ``counts`` lie on the nodes, where there is more than one."""
        used = [f"{n} on {node.label}" for n, node in zip(counts, self.nodes, strict=True) if n]
        if len(self.nodes) == 1:
            return ""
        return f" ({', '.join(used) if len(used) <= MAX_NAMED else f'on {len(used)} nodes'})"

    def _left(self) -> str:
        """What nobody may hold, memory for everything else included."""
        held = list(zip((self.hosts, self.trials, self.kept), (self.host, self.trial, self.worker), strict=True))
        everywhere, parts = list(range(len(self.nodes))), []
        for group in [[i] for i in everywhere] if len(everywhere) <= MAX_NAMED else [everywhere]:
            amounts = []
            for kind, field in (("CPU", "cpus"), ("GPU", "gpus"), ("memory", "memory")):
                has = sum(getattr(self.nodes[i], field) for i in group)
                free = has - sum(counts[i] * asks.get(kind, 0.0) for counts, asks in held for i in group)
                if kind == "memory":
                    amounts.append(f"{free / 2**30:.1f} of {_gib(has)}")
                elif has:
                    amounts.append(f"{round(free, 4):g} of {_count(has, kind)}")
            name = f"{self.nodes[group[0]].label}: " if 1 < len(everywhere) <= MAX_NAMED else ""
            parts.append(name + ", ".join(amounts))
        return "left over: " + "; ".join(parts)


def _amounts(asks: Mapping[str, float]) -> str:
    """``{"CPU": 1, "GPU": 0, "memory": 2**30}`` as ``1 CPU, 1.0 GiB``."""
    parts = [_count(asks[kind], kind) for kind in ("CPU", "GPU") if asks[kind]]
    return ", ".join([*parts, *([_gib(asks["memory"])] if "memory" in asks else [])])


def _count(amount: float, noun: str) -> str:
    return f"{amount:g} {noun}{'' if 0 < amount <= 1 else 's'}"


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"


@dataclass(frozen=True)
class _Need:
    """The worst that any trial of the sweep asks for."""

    pool: bool  # clients run on hosts
    host_cpus: float
    trial_cpus: float  # above 0 where clients run inside the trial
    gpus: float  # of a host, and of a trial
    workers: int
    clients: int
    per_round: int  # clients asked in a round; the fewest of any trial, since they leave most hosts idle
    max_hosts: float


def _need(configs: Sequence[ExperimentConfig]) -> _Need:
    on_ray = [c for c in configs if c.runtime.host == "ray"]
    serial = [c for c in configs if c.runtime.host == "serial"]
    return _Need(
        pool=bool(on_ray),
        host_cpus=max((c.runtime.cpus_per_client for c in on_ray), default=0.0),
        trial_cpus=max((max(1.0, c.runtime.cpus_per_client) for c in serial), default=0.0),
        gpus=max(c.runtime.gpus_per_client for c in configs),
        workers=max((c.distill.workers for c in on_ray), default=0),  # serial distils in the trial's own process
        clients=max(c.partition.num_clients for c in configs),
        per_round=min(c.federation.cohort_size or c.partition.num_clients for c in configs),
        max_hosts=min((c.runtime.max_hosts for c in on_ray if c.runtime.max_hosts), default=math.inf),
    )


@dataclass(frozen=True)
class _Packing:
    """Counts per node."""

    hosts: tuple[int, ...]
    trials: tuple[int, ...]
    workers: tuple[int, ...]


SCARCE = ("CPUs", "GPUs", "memory")


@dataclass(frozen=True)
class _Cluster:
    """Nodes, and where trials must run (None: anywhere)."""

    nodes: tuple[Node, ...]
    trials_on: int | None

    def pack(
        self, need: _Need, trials: int, *, least: int = 0, most: float = math.inf, plenty: Iterable[str] = ()
    ) -> _Packing | None:
        """``trials`` with their workers and as many hosts as fit (``least`` to ``most``), or None.

        On every node, with h hosts, t trials, w workers and s GPUs that are shared out:

            CPUs     host_cpus h + trial_cpus t + w <= the node's
            memory   HOST_BYTES h + DRIVER_BYTES t <= MEMORY_SHARE of the node's
            GPUs     h + t <= s floor(1 / share), or share (h + t) <= s for whole GPUs;   s + w <= the node's

        These are also enough where Ray chooses the places. Trials are alike, workers are alike, and Ray puts a share
        on the fullest GPU that has room (met in 2.60), so a new GPU is opened only where all others are full. Trials
        and workers compete for GPUs alone, or for whole CPUs, of which one is as good as another: with GPUs, all trials
        are bound to one node, since one that strayed could open the GPU that a worker needs.
        ``plenty``: resources to count as endless.
        """
        from scipy.optimize import Bounds, LinearConstraint, milp

        size = len(self.nodes)
        block = trials if self.bound(need) else 1  # trials that share a node
        host, driver, share = (max(1, _units(x)) if x else 0 for x in (need.host_cpus, need.trial_cpus, need.gpus))
        asks, slots = (share // UNITS, 1) if share > UNITS else (1, UNITS // share) if share else (0, 1)
        rows = [
            ([host, driver * block, UNITS, 0], [_units(n.cpus) for n in self.nodes], "CPUs"),
            ([HOST_BYTES, DRIVER_BYTES * block, 0, 0], [int(n.memory * MEMORY_SHARE) for n in self.nodes], "memory"),
            ([asks, asks * block, 0, -slots], [0] * size, ""),
            ([0, 0, int(need.gpus > 0), 1], [int(n.gpus) for n in self.nodes], "GPUs"),
        ]
        matrix, low, high = [], [], []
        for row, has, name in rows:  # a row's common divisor keeps its numbers small, and exact
            divisor = math.gcd(*row)
            matrix.append(np.kron([a // divisor for a in row], np.eye(size)))
            low += [-math.inf] * size
            high += [math.inf if name in plenty else amount // divisor for amount in has]
        totals = ((least, most), (trials // block, trials // block), (trials * need.workers, trials * need.workers))
        for kind, (least_total, most_total) in enumerate(totals):
            matrix.append(np.kron(np.eye(4)[kind], np.ones(size))[None])
            low.append(least_total)
            high.append(most_total if kind or need.pool else 0)
        section = np.full((4, size), math.inf)
        if self.trials_on is not None:  # local storage: Train's workers write beside their trial
            section[1:3] = 0
            section[1:3, self.trials_on] = math.inf
        # hosts count alike, but for a hair in favour of the first nodes
        hair = 0.5 / (size * (1 + sum(_units(n.cpus) // max(1, host) for n in self.nodes)))
        answer = milp(
            np.concatenate([hair * np.arange(size) - 1, np.zeros(3 * size)]),
            integrality=np.ones(4 * size),
            bounds=Bounds(0, section.ravel()),
            constraints=LinearConstraint(np.vstack(matrix), low, high),
            options={"mip_rel_gap": GAP, "node_limit": MAX_BRANCHES},
        )
        if answer.x is None:
            return None
        hosts, blocks, workers, _ = np.rint(answer.x).astype(int).reshape(4, size).tolist()
        return _Packing(tuple(hosts), tuple(t * block for t in blocks), tuple(workers))

    def bound(self, need: _Need) -> bool:
        """Whether all trials must be on one node."""
        return self.trials_on is not None or bool(need.workers and need.gpus)

    def fits(self, need: _Need, plenty: Iterable[str] = ()) -> bool:
        """One trial, its workers, and one host."""
        return self.pack(need, 1, least=need.pool, most=1, plenty=plenty) is not None

    def there(self, kind: str) -> str:
        """What there is of a resource, in words."""
        amounts = [getattr(n, kind.lower()) for n in self.nodes]
        say = _gib if kind == "memory" else "{:g}".format
        total = _gib(sum(amounts)) if kind == "memory" else _count(sum(amounts), kind[:-1])
        what = f"there {'is' if kind == 'memory' or sum(amounts) == 1 else 'are'} {total}"
        if len(amounts) == 1:
            return what
        if self.trials_on is None:
            return f"{what}, at most {say(max(amounts))} on one node"
        return f"{what}, {say(amounts[self.trials_on])} on {self.nodes[self.trials_on].label}, where trials run"


def _units(amount: float) -> int:
    return round(amount * UNITS)


def plan(
    nodes: Sequence[Node],
    configs: Sequence[ExperimentConfig],
    *,
    num_trials: int,
    max_concurrent: int | None = None,
    trials_on: int | None = None,
) -> ResourcePlan:
    """Client hosts on each node and trials at once, such that no trial can wait for what another holds.

    ``configs``: the trials', at least one; the plan is for the worst of them. Unless ``max_concurrent`` says otherwise,
    there are as many trials as keep every host busy in federated rounds, and one more for while a trial is in stages of
    its own. ``trials_on``: the node that trials and their Train workers must run on, where storage is local.
    ``RequestError`` where not even one trial fits.
    """
    if max_concurrent is not None and max_concurrent < 1:
        raise RequestError(f"--max-concurrent {max_concurrent}: at least 1 trial must run")
    need, cluster = _need(configs), _Cluster(tuple(nodes), trials_on)
    least = int(need.pool)

    def fits(trials: int) -> bool:
        packing = cluster.pack(need, trials, least=least, most=need.max_hosts)
        if packing is None:
            return False
        return bool(max_concurrent) or not need.pool or trials <= math.ceil(sum(packing.hosts) / need.per_round) + 1

    wanted = min(num_trials, max_concurrent or num_trials)
    concurrent = _largest(range(1, wanted + 1), fits)
    if concurrent is None:
        raise RequestError(_refusal(cluster, need))
    cap = min(need.clients * concurrent, need.max_hosts)
    packing = cluster.pack(need, concurrent, least=least, most=cap)
    hosts = sum(packing.hosts)

    if concurrent == wanted:
        limits_trials = "--max-concurrent" if wanted < num_trials else "the number of trials"
    elif cluster.pack(need, concurrent + 1, least=least):
        limits_trials = "client hosts, which are busy already"
    else:
        limits_trials = _scarce(lambda plenty: cluster.pack(need, concurrent + 1, least=least, most=1, plenty=plenty))
    if not need.pool:
        limits_hosts = "runtime.host = serial"
    elif hosts == cap:
        limits_hosts = "runtime.max_hosts" if cap == need.max_hosts else "the number of clients"
    else:
        more = {"least": hosts + 1, "most": hosts + 1}
        limits_hosts = _scarce(lambda plenty: cluster.pack(need, concurrent, **more, plenty=plenty))
    return ResourcePlan(
        nodes=cluster.nodes,
        hosts=packing.hosts,
        concurrent=concurrent,
        trial={"CPU": need.trial_cpus, "GPU": need.gpus, "memory": float(DRIVER_BYTES)},
        host={"CPU": need.host_cpus, "GPU": need.gpus, "memory": float(HOST_BYTES)} if need.pool else {},
        workers=need.workers,
        worker={"CPU": 1.0, "GPU": float(need.gpus > 0)} if need.workers else {},
        limits_hosts=limits_hosts,
        limits_trials=limits_trials,
        trials=packing.trials,
        kept=packing.workers,
        trials_on=int(np.argmax(packing.trials)) if cluster.bound(need) else None,
        clients=need.clients,
    )


def _largest(values: Sequence[Any], fits: Callable[[Any], bool]) -> Any:
    """The largest of rising ``values`` that fits, or None; whatever fits, less of it does too."""
    count = bisect_left(values, True, key=lambda value: not fits(value))
    return values[count - 1] if count else None


def _scarce(fits: Callable[[Iterable[str]], object]) -> str:
    """The fewest resources that would have to be more."""
    choices = (c for count in range(1, len(SCARCE) + 1) for c in combinations(SCARCE, count))
    return " and ".join(next(choice for choice in choices if fits(choice)))


def _refusal(cluster: _Cluster, need: _Need) -> str:
    """One line: the knob that keeps one trial, its workers and one host from fitting, what it needs, what would fit."""
    alone = replace(need, workers=0)
    if cluster.fits(alone):
        kind = _scarce(lambda plenty: cluster.fits(need, plenty)).partition(" and ")[0]
        beside = f"{need.host_cpus:g} for a client host"  # only hosts on Ray come with workers
        if kind == "GPUs":
            beside = f"{need.gpus:g} for the trial and {need.gpus:g} for a client host"
        most = _largest(range(need.workers), lambda workers: cluster.fits(replace(need, workers=workers)))
        return (
            f"distill.workers = {need.workers}: a trial needs {_count(need.workers, kind[:-1])} for them "
            f"beside {beside}; {cluster.there(kind)}, so distill.workers may be at most {most} "
            "(0 distils in the trial's own process)"
        )
    short = [kind for kind in SCARCE if not cluster.fits(alone, set(SCARCE) - {kind})]
    if "memory" in short:
        host = f" and a client host {_gib(HOST_BYTES)}" if need.pool else ""
        enough = _gib((DRIVER_BYTES + HOST_BYTES * need.pool) / MEMORY_SHARE)
        serial = replace(alone, pool=False, trial_cpus=max(1.0, need.host_cpus, need.trial_cpus))
        return (
            f"memory: a trial needs {_gib(DRIVER_BYTES)}{host}, within {MEMORY_SHARE:.0%} of a node's; "
            f"{cluster.there('memory')}; a node with {enough} would do"
            + (", or runtime.host = serial" if need.pool and cluster.fits(serial) else "")
        )
    below = [v / 100 for v in range(1, 100)] + [float(v) for v in range(1, 1000)]
    if "GPUs" in short or (need.gpus and "CPUs" not in short):
        knob, field, kind, below = "runtime.gpus_per_client", "gpus", "GPUs", [0.0, *below]
        wants = (
            f"{'a trial and a client host need' if need.pool else 'a trial needs'} {need.gpus:g}{' each' * need.pool}"
        )
    elif need.pool:
        knob, field, kind = "runtime.cpus_per_client", "host_cpus", "CPUs"
        wants = f"a client host needs {need.host_cpus:g} on one node"
    else:
        knob, field, kind, below = "runtime.cpus_per_client", "trial_cpus", "CPUs", below[99:]
        wants = f"a trial needs {need.trial_cpus:g} on one node"
    value = getattr(need, field)
    together = "" if short else ", but no node has CPUs, GPUs and memory together"
    line = f"{knob} = {value:g}: {wants}; {cluster.there(kind)}{together}"
    below = [v for v in below if v < value]
    for base, beside in ((need, ""), (alone, " with distill.workers = 0")):
        most = _largest(below, lambda v, base=base: cluster.fits(replace(base, **{field: v})))
        if most is not None:
            return f"{line}, so it may be at most {most:g}{beside}" + " (0 runs clients on CPUs)" * (kind == "GPUs")
    return line
