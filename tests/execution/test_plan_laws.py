"""The resource plan over random clusters: placed piece by piece, searched exhaustively, run in random order."""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pretended import GIB, Machine, cluster, config, most_hosts, place, wants

from mosaic_ray.config.schema import ExperimentConfig
from mosaic_ray.core.errors import RequestError
from mosaic_ray.execution.resource_plan import Node, ResourcePlan, plan

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


@settings(max_examples=80)
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
    assert (made.trials_on is not None) == (ask["trials_on"] is not None)
    if made.trials_on is not None:
        assert made.trials[made.trials_on] == made.concurrent


@settings(max_examples=50)
@given(clusters(2, small_machines), configs, asks.map(lambda ask: ask | {"num_trials": min(3, ask["num_trials"])}))
def test_the_plan_is_the_best_that_trying_everything_finds_and_only_what_cannot_fit_is_refused(nodes, one, ask):
    pool, per_round = one.runtime.host == "ray", one.federation.cohort_size or one.partition.num_clients
    limit = one.runtime.max_hosts or math.inf
    concurrent = hosts = 0
    for count in range(1, min(ask["num_trials"], ask["max_concurrent"] or 3) + 1):
        capacity = min(most_hosts(nodes, one, count, ask["trials_on"]), limit)
        busy = ask["max_concurrent"] or not pool or count <= math.ceil(capacity / per_round) + 1
        if capacity >= pool and busy:
            concurrent, hosts = count, min(capacity, count * one.partition.num_clients)
    made = planned(nodes, one, ask)
    assert (made.concurrent, sum(made.hosts)) == (concurrent, hosts) if made else not concurrent


@settings(max_examples=50)
@given(clusters(3), configs, asks, machines, st.integers(0, 2), st.booleans())
def test_a_larger_cluster_never_runs_fewer_trials_nor_as_many_on_fewer_hosts(nodes, one, ask, extra, which, join):
    if join:
        larger = [*nodes, Node("new", extra[0], extra[1], extra[2] * GIB)]
    else:
        which %= len(nodes)
        old = nodes[which]
        poll_scale_up = Node(old.name, old.cpus + extra[0], old.gpus + extra[1], old.memory + extra[2] * GIB)
        larger = [*nodes[:which], poll_scale_up, *nodes[which + 1 :]]
    before, after = planned(nodes, one, ask), planned(larger, one, ask)
    if before:
        assert (after.concurrent, sum(after.hosts)) >= (before.concurrent, sum(before.hosts))


# --- no deadlock: a sweep in random order ----------------------------------------------------------------------------


def finishes(made: ResourcePlan, nodes: Sequence[Node], num_trials: int, seed: int) -> bool:
    """Simulate a sweep on Ray with events in random order; return False at a deadlock.

    Trials start where they fit, do client work on the pool (first come, first served), distil in groups of workers
    that start together or not at all, anywhere, and on GPUs do the server's own work on one worker.
    """
    draw = random.Random(seed)
    machines = [Machine(node) for node in nodes]
    for machine, count in zip(machines, made.hosts, strict=True):
        assert all(machine.take(made.host) for _ in range(count))
    idle, queue = sum(made.hosts), deque()  # clients waiting for a host, by trial
    phases = [[draw.choice(["clients", "distil", "own"]) for _ in range(4)] for _ in range(num_trials)]
    waiting, running, groups, busy, left = list(range(num_trials)), {}, {}, [], {}
    own = {"GPU": 0.0, **made.worker}
    own["GPU"] = min(own["GPU"], made.host.get("GPU", 0.0))
    on_server = {"distil": (made.workers, made.worker) if made.workers else None, "clients": None}
    on_server["own"] = (1, own) if own["GPU"] else None

    def any_order(only: int | None) -> list[Machine]:
        return draw.sample(machines, len(machines)) if only is None else [machines[only]]

    def start(trial: int) -> bool:
        for machine in any_order(made.trials_on):
            if len(running) < made.concurrent and (taken := machine.take(made.trial)):
                running[trial] = (machine, taken)
                waiting.remove(trial)
                return True
        return False

    def work_as_server(trial: int, count: int, asks: Mapping[str, float]) -> bool:
        taken: list[tuple[Machine, tuple]] = []
        for machine in any_order(None):
            while len(taken) < count and (one := machine.take(asks)):
                taken.append((machine, one))
        if len(taken) == count:
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
        elif (ask := on_server[phases[trial][0]]) and not work_as_server(trial, *ask):
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


@settings(max_examples=50)
@given(clusters(3), configs, asks, st.integers(0, 2**32))
def test_no_order_of_events_ends_in_a_deadlock(nodes, one, ask, seed):
    made = planned(nodes, one, ask)
    if made:
        assert all(finishes(made, nodes, ask["num_trials"], seed + i) for i in range(5))


HALVES = config(runtime__gpus_per_client=0.5, runtime__cpus_per_client=0.5)


@pytest.mark.parametrize(
    "nodes, one, spoil",
    [
        (cluster((2, 0, 16)), config(distill__workers=1), {"hosts": (2,)}),
        (cluster((2, 0, 16)), config(distill__workers=1), {"workers": 2}),
        (cluster((2, 0, 16)), config(distill__workers=1), {"concurrent": 2, "trial": {"CPU": 1.0}, "hosts": (0,)}),
        (cluster((4, 1, 16)), HALVES, {"hosts": (2,)}),
    ],
    ids=["a host too many", "a worker too many", "trials that hold the workers' CPUs", "a host on the server's share"],
)
def test_the_simulation_finds_a_deadlock_where_there_is_one(nodes, one, spoil):
    made = plan(nodes, [one], num_trials=4)
    spoilt = replace(made, **spoil)
    assert all(finishes(made, nodes, 4, seed) for seed in range(20))
    assert not all(finishes(spoilt, nodes, 4, seed) for seed in range(20))
