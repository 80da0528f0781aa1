"""The resource plan of a sweep, worked out by hand."""

from __future__ import annotations

import subprocess
import sys

import pytest
from pretended import GIB, cluster, config, place

from mosaic_ray.config.resolve import override
from mosaic_ray.core.errors import RequestError
from mosaic_ray.execution.resource_plan import Node, plan

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
        (cluster((64, 3, 99)), {"runtime__gpus_per_client": 0.1, "distill__workers": 1}, {}, (26,), 4,
         ("GPUs", "client hosts")),
        (cluster((64, 3, 99)), {"runtime__gpus_per_client": 0.1, "distill__workers": 2}, {}, (10,), 1,
         ("clients", "GPUs")),
        (cluster((64, 4, 256)), {"runtime__gpus_per_client": 2.0}, {}, (1,), 2, ("GPUs", "GPUs")),
        (cluster((4, 0, 16), (8, 1, 20)), {"runtime__gpus_per_client": 0.1}, {"trials_on": 0}, (0, 6), 2,
         ("CPUs", "client hosts")),
        (cluster((4, 1, 16)), {"runtime__gpus_per_client": 0.1, "runtime__cpus_per_client": 0.25}, {}, (8,), 2,
         ("GPUs", "client hosts")),
        (cluster((4, 2, 2.4), (4, 2, 2.4)), {"runtime__gpus_per_client": 0.1}, {"max_concurrent": 2}, (1, 1), 2,
         ("memory", "--max")),
        (cluster((4, 2, 2.4), (4, 2, 2.4)), {"runtime__gpus_per_client": 0.1, "distill__workers": 1},
         {"max_concurrent": 2}, (1, 1), 2, ("memory", "--max")),
        (cluster(*[(8, 0, 32)] * 4), {"runtime__max_hosts": 10}, {}, (8, 2, 0, 0), 2, ("runtime.max_hosts", "hosts")),
        (PAIR, {}, {"trials_on": 0}, (2, 8), 2, ("CPUs", "client hosts")),
        (PAIR, {"distill__workers": 2}, {"trials_on": 0}, (2, 4), 2, ("CPUs", "client hosts")),
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
    assert made.hosts == (19,)  # and the server's share: 20 in all
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
        "kept free for Ray Train: 2 workers, 1 a trial, each 1 CPU",
        "left over: 0 of 8 CPUs, 26.5 of 32.0 GiB",
    ]
    shares = plan(cluster((8, 1, 32)), [config(partition__num_clients=10, runtime__gpus_per_client=0.1)], num_trials=2)
    assert shares.lines()[-2:] == [
        "kept free for the server's work and Ray Train: 2 workers, 1 a trial, each 1 CPU, 0.1 GPU",
        "left over: 0 of 8 CPUs, 0.2 of 1 GPU, 26.5 of 32.0 GiB",
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
        (cluster((9, 1, 9)), {"distill__workers": 2, "runtime__gpus_per_client": 0.1}, {},
         r"^distill\.workers = 2: .* 2 GPUs for them beside 0\.1 for a client host; there is 1 GPU, .* at most 1$"),
        (PAIR, {"distill__workers": 10}, {"trials_on": 0}, r"there are 10 CPUs, .* most 9 \(0 distils in the trial's"),
        (LAPTOP, {"runtime__cpus_per_client": 4.0}, {},
         r"^runtime\.cpus_per_client = 4: a client host needs 4 on one node; there are 2 CPUs, so .* be at most 2$"),
        (LAPTOP, {"runtime__cpus_per_client": 4.0, "distill__workers": 2}, {}, r"most 2 with distill\.workers = 0$"),
        (LAPTOP, {"runtime__cpus_per_client": 4.0, "runtime__host": "serial"}, {}, r"a trial needs 4 .* at most 2$"),
        (LAPTOP, {"runtime__gpus_per_client": 0.5}, {}, r"^runtime\.gpus_per_client = 0\.5: a client host and the "
         r"server's worker need 0\.5 each; there are 0 GPUs, so it may be at most 0 \(0 runs clients on CPUs\)"),
        (cluster((8, 1, 8)), {"runtime__gpus_per_client": 1.0}, {}, r"there is 1 GPU, so it may be at most 0\.5"),
        (cluster((8, 0, 8), (8, 2, 8)), {"runtime__gpus_per_client": 0.5, "runtime__host": "serial"}, {"trials_on": 0},
         r"there are 2 GPUs, 0 on a, where trials run, so it may be at most 0"),
        (cluster((8, 0, 64), (8, 2, 0.5)), {"runtime__gpus_per_client": 0.5}, {},
         r"there are 2 GPUs, at most 2 on one node, but no node has CPUs, GPUs and memory together, so .* at most 0"),
        (cluster((2, 0, 2), (2, 0, 0.5)), {}, {}, r"^memory: a trial needs 1\.0 GiB and a client host 0\.6 GiB, within "
         r"70% of a node's; there is 2\.5 GiB, at most 2\.0 GiB on one node; a node with 2\.3 GiB would do"),
        (cluster((2, 0, 2)), {}, {}, r"^memory: .*; a node with 2\.3 GiB would do, or runtime\.host = serial$"),
        (cluster((2, 0, 1)), {"runtime__host": "serial"}, {}, r"^memory: a trial needs .* with 1\.4 GiB would do$"),
        (LAPTOP, {}, {"max_concurrent": 0}, r"^--max-concurrent 0: "),
    ],
)  # fmt: skip
def test_requests_that_can_never_fit_are_refused_in_one_line_with_advice(nodes, knobs, ask, says):
    with pytest.raises(RequestError, match=says) as caught:
        plan(nodes, [config(**knobs)], num_trials=27, **ask)
    assert "\n" not in str(caught.value)


def test_planning_loads_neither_ray_nor_torch():
    code = "import mosaic_ray.execution.resource_plan, sys; print({'ray', 'torch', 'scipy'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
