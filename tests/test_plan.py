"""The resource plan of a sweep: placed on pretended machines, searched exhaustively, and run in random order."""

from __future__ import annotations

import math
import random
import subprocess
import sys
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mosaic_ray.config import ExperimentConfig, override
from mosaic_ray.errors import RequestError
from mosaic_ray.runtime.resources import DRIVER_BYTES, HOST_BYTES, Node, ResourcePlan, plan

GIB = 2**30


def config(**knobs) -> ExperimentConfig:
    """``config(distill__workers=1)``."""
    return override(ExperimentConfig(), {name.replace("__", "."): value for name, value in knobs.items()})


def cluster(*machines: tuple[float, float, float]) -> list[Node]:
    """Nodes a, b, ... of (CPUs, GPUs, GiB)."""
    return [Node("abcde"[i], cpus, gpus, gib * GIB) for i, (cpus, gpus, gib) in enumerate(machines)]


# --- pretended machines ----------------------------------------------------------------------------------------------


class Machine:
    """One node as Ray keeps it: CPUs in ten-thousandths, each GPU by itself; a share goes on the fullest with room."""

    def __init__(self, node: Node) -> None:
        self.cpus = round(node.cpus * 10_000)
        self.gpus = [10_000] * int(node.gpus)
        self.memory = int(node.memory * 0.7)

    def take(self, asks: Mapping[str, float]) -> tuple | None:
        """What was taken, or None where ``asks`` does not fit."""
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
    """What a host, a trial and a worker ask, and the workers of a trial; said anew, not read from the plan."""
    knobs, serial = one.runtime, one.runtime.host == "serial"
    gpus = knobs.gpus_per_client
    host = {"CPU": knobs.cpus_per_client, "GPU": gpus, "memory": HOST_BYTES}
    trial = {"CPU": max(1.0, knobs.cpus_per_client) if serial else 0.0, "GPU": gpus, "memory": DRIVER_BYTES}
    workers = 0 if serial else one.distill.workers
    return {} if serial else host, trial, {"CPU": 1.0, "GPU": float(gpus > 0)} if workers else {}, workers


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
        if workers and trial["GPU"] and max(trials) < concurrent:
            continue  # these are kept together
        if trials_on is not None and trials[trials_on] < concurrent:
            continue
        for kept in deal(concurrent * workers, len(nodes)):
            if trials_on is not None and kept[trials_on] < sum(kept):
                continue
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


# --- random clusters and sweeps --------------------------------------------------------------------------------------

machines = st.tuples(st.sampled_from([0.5, 1, 2, 3, 4, 8]), st.integers(0, 8), st.floats(1, 16))
small_machines = st.tuples(st.sampled_from([0.5, 1, 2, 3, 4]), st.integers(0, 3), st.floats(1, 12))


def clusters(most: int, each: st.SearchStrategy = machines) -> st.SearchStrategy[list[Node]]:
    return st.lists(each, min_size=1, max_size=most).map(lambda rows: cluster(*rows))


configs = st.builds(
    config,
    partition__num_clients=st.sampled_from([2, 3, 10]),
    federation__cohort_size=st.integers(0, 2),
    runtime__host=st.sampled_from(["ray", "ray", "ray", "serial"]),
    runtime__cpus_per_client=st.sampled_from([0.1, 0.25, 0.3, 0.5, 1.0, 2.0]),
    runtime__gpus_per_client=st.sampled_from([0.0, 0.0, 0.1, 0.25, 0.3, 0.5, 0.6, 1.0, 2.0]),
    runtime__max_hosts=st.sampled_from([0, 0, 1, 3]),
    distill__workers=st.sampled_from([0, 0, 1, 2, 3]),
)
asks = st.fixed_dictionaries(
    {
        "num_trials": st.integers(1, 6),
        "max_concurrent": st.none() | st.integers(1, 7),
        "trials_on": st.none() | st.just(0),
    }
)


def planned(nodes: Sequence[Node], one: ExperimentConfig, ask: Mapping) -> ResourcePlan | None:
    """The plan, or None where it is refused."""
    try:
        return plan(nodes, [one], **ask)
    except RequestError:
        return None


@settings(max_examples=80, deadline=None)
@given(clusters(5), configs, asks)
def test_everything_that_may_be_held_at_once_fits_at_once(nodes, one, ask):
    made = planned(nodes, one, ask)
    if made is None:
        return
    assert place(made, nodes), made
    host, trial, worker, workers = wants(one)
    assert (made.host, made.trial, made.worker, made.workers) == (host, trial, worker, workers)
    assert sum(made.trials) == made.concurrent >= 1
    assert sum(made.kept) == made.concurrent * workers
    assert made.concurrent <= min(ask["num_trials"], ask["max_concurrent"] or math.inf)
    assert sum(made.hosts) <= min(
        made.concurrent * one.partition.num_clients if host else 0, one.runtime.max_hosts or math.inf
    )
    assert sum(made.hosts) >= 1 or not host
    if ask["trials_on"] is not None:
        assert made.trials[0] == made.concurrent and made.kept[0] == sum(made.kept)
    assert (made.trials_on is not None) == (ask["trials_on"] is not None or bool(workers and trial["GPU"]))
    if made.trials_on is not None:
        assert made.trials[made.trials_on] == made.concurrent


@settings(max_examples=50, deadline=None)
@given(clusters(2, small_machines), configs, asks.map(lambda ask: ask | {"num_trials": min(3, ask["num_trials"])}))
def test_the_plan_is_the_best_that_trying_everything_finds_and_only_what_cannot_fit_is_refused(nodes, one, ask):
    pool, per_round = one.runtime.host == "ray", one.federation.cohort_size or one.partition.num_clients
    limit = one.runtime.max_hosts or math.inf
    concurrent = hosts = 0
    for count in range(1, min(ask["num_trials"], ask["max_concurrent"] or 3) + 1):
        room = min(most_hosts(nodes, one, count, ask["trials_on"]), limit)
        busy = ask["max_concurrent"] or not pool or count <= math.ceil(room / per_round) + 1
        if room >= pool and busy:
            concurrent, hosts = count, min(room, count * one.partition.num_clients)
    made = planned(nodes, one, ask)
    assert (made.concurrent, sum(made.hosts)) == (concurrent, hosts) if made else not concurrent


@settings(max_examples=50, deadline=None)
@given(clusters(3), configs, asks, machines, st.integers(0, 2), st.booleans())
def test_a_larger_cluster_never_runs_fewer_trials_nor_as_many_on_fewer_hosts(nodes, one, ask, extra, which, join):
    if join:
        larger = [*nodes, Node("new", extra[0], extra[1], extra[2] * GIB)]
    else:
        which %= len(nodes)
        old = nodes[which]
        grown = Node(old.name, old.cpus + extra[0], old.gpus + extra[1], old.memory + extra[2] * GIB)
        larger = [*nodes[:which], grown, *nodes[which + 1 :]]
    before, after = planned(nodes, one, ask), planned(larger, one, ask)
    if before:
        assert (after.concurrent, sum(after.hosts)) >= (before.concurrent, sum(before.hosts))


# --- no deadlock: a sweep in random order ----------------------------------------------------------------------------


def finishes(made: ResourcePlan, nodes: Sequence[Node], num_trials: int, local: bool, seed: int) -> bool:
    """A sweep as Ray would run it, whatever happens next drawn at random; False where nothing can happen any more.

    Trials start where there is room, do client work on the pool (first come, first served) and distil in groups of
    workers that start together or not at all, anywhere.
    """
    draw = random.Random(seed)
    machines = [Machine(node) for node in nodes]
    for machine, count in zip(machines, made.hosts, strict=True):
        assert all(machine.take(made.host) for _ in range(count))
    idle, queue = sum(made.hosts), deque()  # clients waiting for a host, by trial
    phases = [[draw.choice(["clients", "distil", "own"]) for _ in range(4)] for _ in range(num_trials)]
    waiting, running, groups, busy, left = list(range(num_trials)), {}, {}, [], {}

    def any_order(only: int | None) -> list[Machine]:
        return draw.sample(machines, len(machines)) if only is None else [machines[only]]

    def start(trial: int) -> bool:
        for machine in any_order(made.trials_on):
            if len(running) < made.concurrent and (taken := machine.take(made.trial)):
                running[trial] = (machine, taken)
                waiting.remove(trial)
                return True
        return False

    def distil(trial: int) -> bool:
        taken: list[tuple[Machine, tuple]] = []
        for machine in any_order(made.trials_on if local else None):
            while len(taken) < made.workers and (one := machine.take(made.worker)):
                taken.append((machine, one))
        if len(taken) == made.workers:
            groups[trial] = taken
            return True
        for machine, one in taken:
            machine.give(one)
        return False

    def step(trial: int) -> bool:
        """The trial's next move; False while it waits."""
        if trial in groups:
            for machine, one in groups.pop(trial):
                machine.give(one)
        elif left.get(trial):
            return False
        elif not phases[trial]:
            machine, taken = running.pop(trial)
            machine.give(taken)
            return True
        elif phases[trial][0] == "distil" and made.workers and not distil(trial):
            return False
        elif phases[trial][0] == "clients" and made.host:
            left[trial] = draw.randint(1, 4)
            queue.extend([trial] * left[trial])
        if trial not in groups:
            phases[trial].pop(0)
        return True

    def work() -> bool:
        nonlocal idle
        if queue and idle:
            idle -= 1
            busy.append(queue.popleft())
            return True
        return False

    def answer() -> bool:
        nonlocal idle
        if busy:
            left[busy.pop(draw.randrange(len(busy)))] -= 1
            idle += 1
            return True
        return False

    while waiting or running:
        moves = [(start, t) for t in waiting] + [(step, t) for t in running] + [(work,), (answer,)]
        draw.shuffle(moves)
        if not any(move(*args) for move, *args in moves):
            return False
    return True


@settings(max_examples=50, deadline=None)
@given(clusters(3), configs, asks, st.integers(0, 2**32))
def test_no_order_of_events_ends_in_a_deadlock(nodes, one, ask, seed):
    made = planned(nodes, one, ask)
    if made:
        local = ask["trials_on"] is not None
        assert all(finishes(made, nodes, ask["num_trials"], local, seed + i) for i in range(5))


STRAY = config(runtime__gpus_per_client=0.1, runtime__cpus_per_client=0.1, distill__workers=1, runtime__max_hosts=3)


@pytest.mark.parametrize(
    "nodes, one, spoil",
    [
        (cluster((2, 0, 16)), config(distill__workers=1), {"hosts": (2,)}),
        (cluster((2, 0, 16)), config(distill__workers=1), {"workers": 2}),
        (cluster((2, 0, 16)), config(distill__workers=1), {"concurrent": 2, "trial": {"CPU": 1.0}, "hosts": (0,)}),
        (cluster((4, 1, 16), (4, 1, 16)), STRAY, {"trials_on": None}),
    ],
    ids=["a host too many", "a worker too many", "trials that hold the workers' CPUs", "a trial on the worker's GPU"],
)
def test_the_simulation_finds_a_deadlock_where_there_is_one(nodes, one, spoil):
    made = plan(nodes, [one], num_trials=4)
    spoilt = replace(made, **spoil)
    assert all(finishes(made, nodes, 4, False, seed) for seed in range(20))
    assert not all(finishes(spoilt, nodes, 4, False, seed) for seed in range(20))


# --- by hand ---------------------------------------------------------------------------------------------------------

LAPTOP = cluster((2, 0, 8))
PAIR = cluster((2, 0, 8), (8, 0, 32))


@pytest.mark.parametrize(
    "nodes, knobs, ask, hosts, concurrent, limits",
    [
        (LAPTOP, {}, {}, (2,), 2, ("CPUs", "client hosts")),
        (LAPTOP, {"partition__num_clients": 100}, {}, (2,), 2, ("CPUs", "client hosts")),
        (LAPTOP, {"partition__num_clients": 1}, {}, (2,), 3, ("CPUs", "client hosts")),
        (LAPTOP, {}, {"num_trials": 1}, (2,), 1, ("CPUs", "the number of trials")),
        (LAPTOP, {}, {"max_concurrent": 1}, (2,), 1, ("CPUs", "--max-concurrent")),
        (LAPTOP, {}, {"max_concurrent": 9}, (1,), 5, ("memory", "memory")),
        (LAPTOP, {"runtime__host": "serial"}, {}, (0,), 2, ("runtime.host = serial", "CPUs")),
        (LAPTOP, {"runtime__host": "serial", "distill__workers": 2}, {}, (0,), 2, ("runtime.host = serial", "CPUs")),
        (LAPTOP, {"distill__workers": 1}, {}, (1,), 1, ("CPUs", "CPUs")),
        (cluster((2, 0, 3)), {}, {}, (1,), 1, ("memory", "memory")),
        (cluster((64, 0, 256)), {"runtime__max_hosts": 4}, {}, (4,), 2, ("runtime.max_hosts", "client hosts")),
        (cluster((64, 0, 256)), {"partition__num_clients": 2}, {"max_concurrent": 3}, (6,), 3, ("clients", "--max")),
        (cluster((64, 1, 256)), {"runtime__gpus_per_client": 0.1}, {}, (8,), 2, ("GPUs", "client hosts")),
        (cluster((64, 3, 99)), {"runtime__gpus_per_client": 0.1, "distill__workers": 1}, {}, (8,), 2, ("GPUs", "GPUs")),
        (cluster((64, 4, 256)), {"runtime__gpus_per_client": 2.0}, {}, (1,), 1, ("GPUs", "GPUs")),
        (cluster((4, 2, 2.4), (4, 2, 2.4)), {"runtime__gpus_per_client": 0.1}, {"max_concurrent": 2}, (1, 1), 2,
         ("memory", "--max")),
        (cluster((4, 2, 2.4), (4, 2, 2.4)), {"runtime__gpus_per_client": 0.1, "distill__workers": 1},
         {"max_concurrent": 2}, (2, 1), 1, ("memory", "memory")),
        (cluster(*[(8, 0, 32)] * 4), {"runtime__max_hosts": 10}, {}, (8, 2, 0, 0), 2, ("runtime.max_hosts", "hosts")),
        (PAIR, {}, {"trials_on": 0}, (2, 8), 2, ("CPUs", "client hosts")),
        (PAIR, {"distill__workers": 2}, {"trials_on": 0}, (0, 8), 1, ("CPUs", "CPUs")),
        (PAIR, {"distill__workers": 2}, {}, (2, 4), 2, ("CPUs", "client hosts")),
    ],
)  # fmt: skip
def test_plans_by_hand(nodes, knobs, ask, hosts, concurrent, limits):
    one = config(**({"partition__num_clients": 10} | knobs))
    made = plan(nodes, [one], **({"num_trials": 27} | ask))
    assert place(made, nodes)
    assert (sum(made.hosts), made.concurrent) == (sum(hosts), concurrent)
    if not made.workers or ask:
        assert made.hosts == hosts
    assert limits[0] in made.limits_hosts and limits[1] in made.limits_trials


def test_ten_tenths_of_a_gpu_are_one_gpu_and_of_a_cpu_one_cpu():
    one = config(partition__num_clients=100, runtime__cpus_per_client=0.1, runtime__gpus_per_client=0.1)
    made = plan(cluster((2, 2, 64)), [one], num_trials=1)
    assert made.hosts == (19,)  # and the trial's own share: 20 in all
    made = plan(cluster((3, 0, 64)), [override(one, {"runtime.gpus_per_client": 0.0})], num_trials=1)
    assert made.hosts == (30,)
    sixths = override(one, {"runtime.gpus_per_client": 0.16666})  # 0.1667 to Ray, of which a GPU holds five
    assert plan(cluster((2, 2, 64)), [sixths], num_trials=1).hosts == (9,)


def test_the_plan_is_for_the_worst_of_the_trials():
    trials = [config(runtime__cpus_per_client=2.0), config(distill__workers=2), config(partition__num_clients=50)]
    made = plan(cluster((64, 0, 256)), trials, num_trials=3, max_concurrent=1)
    assert (made.host["CPU"], made.workers, made.clients) == (2.0, 2, 50)
    assert made.hosts == (31,)


def test_the_plan_in_words():
    one = config(partition__num_clients=10, distill__workers=1)
    assert plan(cluster((8, 0, 32)), [one], num_trials=27).lines() == [
        "trials at once: 2, each 1.0 GiB; limited by client hosts, which are busy already",
        "client hosts: 6, shared by all trials, each 1 CPU, 0.6 GiB; limited by CPUs",
        "clients per host: up to 2 of a trial's 10, in turn",
        "kept free for Ray Train: room for 2 workers, 1 a trial, each 1 CPU",
        "left over: 0 of 8 CPUs, 26.5 of 32.0 GiB",
    ]
    lines = plan(
        cluster((2, 1, 8)), [config(runtime__host="serial", runtime__gpus_per_client=0.5)], num_trials=9
    ).lines()
    assert lines[0] == "trials at once: 2, each 1 CPU, 0.5 GPU, 1.0 GiB; limited by CPUs and GPUs"
    assert lines[-1] == "left over: 0 of 2 CPUs, 0 of 1 GPU, 6.0 of 8.0 GiB"
    wide = [Node(f"machine {i}", 4, 0, 16 * GIB) for i in range(20)]
    words = "\n".join(plan(wide, [config(partition__num_clients=100)], num_trials=9, trials_on=0).lines())
    assert "all on machine 0" in words and "(on 20 nodes)" in words and "of 80 CPUs" in words


@pytest.mark.parametrize(
    "nodes, knobs, ask, says",
    [
        (LAPTOP, {"distill__workers": 2}, {}, r"^distill\.workers = 2: a trial needs 2 CPUs for them beside 1 for a "
         r"client host; there are 2 CPUs, so distill\.workers may be at most 1 \(0 distils in the trial's own proc"),
        (cluster((9, 1, 9)), {"distill__workers": 1, "runtime__gpus_per_client": 0.1}, {},
         r"^distill\.workers = 1: .* 1 GPU for them beside 0\.1 for the trial and 0\.1 .*there is 1 GPU, .* at most 0"),
        (PAIR, {"distill__workers": 3}, {"trials_on": 0}, r"there are 10 CPUs, 2 on a, where trials run, so .* most 2"),
        (LAPTOP, {"runtime__cpus_per_client": 4.0}, {},
         r"^runtime\.cpus_per_client = 4: a client host needs 4 on one node; there are 2 CPUs, so .* be at most 2$"),
        (LAPTOP, {"runtime__cpus_per_client": 4.0, "distill__workers": 2}, {}, r"most 2 with distill\.workers = 0$"),
        (LAPTOP, {"runtime__cpus_per_client": 4.0, "runtime__host": "serial"}, {}, r"a trial needs 4 .* at most 2$"),
        (LAPTOP, {"runtime__gpus_per_client": 0.5}, {}, r"^runtime\.gpus_per_client = 0\.5: a trial and a client host "
         r"need 0\.5 each; there are 0 GPUs, so it may be at most 0 \(0 runs clients on CPUs\)"),
        (cluster((8, 1, 8)), {"runtime__gpus_per_client": 1.0}, {}, r"there is 1 GPU, so it may be at most 0\.5"),
        (cluster((8, 0, 8), (8, 2, 8)), {"runtime__gpus_per_client": 0.5}, {"trials_on": 0},
         r"there are 2 GPUs, 0 on a, where trials run, so it may be at most 0"),
        (cluster((8, 0, 64), (8, 2, 1)), {"runtime__gpus_per_client": 0.5}, {},
         r"there are 2 GPUs, at most 2 on one node, but no node has CPUs, GPUs and memory together, so .* at most 0"),
        (cluster((2, 0, 2), (2, 0, 0.5)), {}, {}, r"^memory: a trial needs 1\.0 GiB and a client host 0\.6 GiB, within "
         r"70% of a node's; there is 2\.5 GiB, at most 2\.0 GiB on one node; a node with 2\.3 GiB would do"),
        (cluster((2, 0, 2)), {}, {}, r"^memory: .*; a node with 2\.3 GiB would do, or runtime\.host = serial$"),
        (cluster((2, 0, 1)), {"runtime__host": "serial"}, {}, r"^memory: a trial needs .* with 1\.4 GiB would do$"),
        (LAPTOP, {}, {"max_concurrent": 0}, r"^--max-concurrent 0: "),
    ],
)  # fmt: skip
def test_what_can_never_fit_is_refused_in_one_line_that_says_what_would(nodes, knobs, ask, says):
    with pytest.raises(RequestError, match=says) as caught:
        plan(nodes, [config(**knobs)], num_trials=27, **ask)
    assert "\n" not in str(caught.value)


def test_planning_loads_neither_ray_nor_torch():
    code = "import mosaic_ray.runtime.resources, sys; print({'ray', 'torch', 'scipy'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
