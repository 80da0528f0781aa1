"""Random sweeps on a Ray cluster of two pretended nodes: each finishes, computes nothing twice and frees everything."""

from __future__ import annotations

import faulthandler
import functools
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import FACTS, TINY, assert_same, stripes_dataset
from safetensors.numpy import load_file

from mosaic_ray.config.resolve import override
from mosaic_ray.core.errors import RequestError
from mosaic_ray.execution.resource_plan import Node, plan
from mosaic_ray.methods.mosaic.graph import GENERATORS
from mosaic_ray.runs.plan import stage_keys
from mosaic_ray.sweeps import runner as sweep_runner
from mosaic_ray.sweeps import tune as tuning
from mosaic_ray.sweeps.results import NOT_REPRODUCIBLE, read_results
from mosaic_ray.sweeps.space import Choice, SweepPlan

GIB = 2**30

#: (CPUs, bytes) of the pretended nodes, the driver's first: enough for three trials at once, or six client hosts.
NODES = ((2, 5 * GIB), (1, 2 * GIB))

#: A plan takes half a minute, or with Ray Train a few of them; a plan that takes this long hangs.
PATIENCE_SECONDS = 420.0

KNOBS = {
    "partition.omega": (0.3, 3.0),
    "partition.num_clients": (2, 4),
    "warmup.lr": (0.02, 0.05),
    "generator.lambda_d": (2.0, 5.0),
    "generator.lambda_i": (0.0, 10.0),
    "meta.updates": (10, 20),
    "distill.steps": (5, 10),
    "finetune.lr": (1e-4, 1e-2),
}


def random_request(number: int) -> sweep_runner.SweepRequest:
    """The plan of this number, the same one whenever it is drawn."""
    draws = random.Random(number)
    base = {
        "partition.num_clients": draws.randint(2, 6),
        "partition.validation_fraction": draws.choice((0.0, 0.2)),
        "federation.cohort_size": draws.choice((0, 0, 2)),
        "distill.workers": draws.choices((0, 1, 2, 3), (8, 2, 1, 1))[0],
        "runtime.host": draws.choices(("ray", "serial"), (5, 1))[0],
        "runtime.cpus_per_client": draws.choice((0.25, 0.5, 1.0)),
        "runtime.max_hosts": draws.choice((0, 0, 0, 2)),
    }
    names = draws.sample(sorted(KNOBS), draws.randint(1, 2))
    search = draws.choice(("grid", "random"))
    return sweep_runner.SweepRequest(
        override(TINY, base),
        f"random {number}",
        SweepPlan("random", knobs={name: Choice(KNOBS[name]) for name in names}),
        search=search,
        samples=draws.randint(2, 4) if search == "random" else None,
        seeds=draws.choice(((0,), (0,), (1, 2))),
        max_concurrent=draws.choice((None, None, 1, 2, 4, 4)),
    )


def refusal(request: sweep_runner.SweepRequest, nodes: list[Node]) -> str | None:
    """Return the resource plan's error for ``request``; None where it fits."""
    sweep = sweep_runner.prepare(request)
    options = {"num_trials": sweep.search.total, "max_concurrent": request.max_concurrent, "trials_on": 0}
    try:
        plan(nodes, sweep.configs, **options)
    except RequestError as error:
        return str(error)
    return None


def test_random_plans_cover_every_kind():
    """The plans of the stress test include every kind of host, Train workers, and some that cannot fit."""
    nodes = [Node(name, cpus, 0, size) for name, (cpus, size) in zip("ab", NODES, strict=True)]
    requests = [random_request(number) for number in range(20)]
    fit = [request for request in requests if refusal(request, nodes) is None]
    kinds = Counter((r.config.runtime.host, min(r.config.distill.workers, 1)) for r in fit)
    assert kinds["ray", 0] >= 8 and kinds["ray", 1] >= 2 and kinds["serial", 0] >= 1
    assert 1 <= len(requests) - len(fit) <= 4
    assert {r.max_concurrent for r in fit} == {None, 1, 2, 4} and {r.search for r in fit} == {"grid", "random"}
    assert {r.config.runtime.cpus_per_client for r in fit} == {0.25, 0.5, 1.0}


# --- on Ray ----------------------------------------------------------------------------------------------------------

on_ray = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning"),
]


def marked(test: Callable[..., None]) -> Callable[..., None]:
    return functools.reduce(lambda found, mark: mark(found), on_ray, test)


@pytest.fixture(scope="module")
def cluster():
    """Two raylets of pretended size; this process is joined to the first."""
    import ray
    from ray.cluster_utils import Cluster

    from mosaic_ray.execution.ray_session import RAY_ENVIRONMENT

    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(prefix="mc", dir="/tmp") as folder:
        # its own folder, so that the address of another Ray on this machine stays; a short one, for sockets
        patch.setenv("RAY_TMPDIR", folder)
        for name, value in RAY_ENVIRONMENT.items():
            patch.setenv(name, os.environ.get(name, value))
        up = Cluster()
        try:
            for cpus, size in NODES:
                up.add_node(num_cpus=cpus, memory=size, object_store_memory=100 * 2**20, include_dashboard=False)
            ray.init(address=up.address, log_to_driver=False, logging_level="ERROR")
            yield up
        finally:
            ray.shutdown()
            up.shutdown()


@pytest.fixture(autouse=True)
def stripes_as_data(monkeypatch):
    """Sweeps in this process train on the tiny data set; trials get it from here, through Ray's object store."""
    monkeypatch.setattr("mosaic_ray.data.load.load_dataset", lambda config: stripes_dataset())


def in_time(work: Callable[[], Any], storage: Path) -> Any:
    """Return or raise the result of ``work``; where it hangs, dump stacks and the last log lines, and fail."""
    ended: list[Any] = []

    def go() -> None:
        try:
            ended.append((work(), None))
        except BaseException as error:
            ended.append((None, error))

    thread = threading.Thread(target=go, daemon=True)
    thread.start()
    thread.join(PATIENCE_SECONDS)
    if not ended:
        faulthandler.dump_traceback(sys.__stderr__)
        logs = sorted(storage.glob("sweeps/*/trials/*/log.txt"))
        last_lines = "\n".join(f"{path.parent.name}: {path.read_text().splitlines()[-1:]}" for path in logs)
        pytest.fail(f"it hangs: no end within {PATIENCE_SECONDS:g} s\n{last_lines}")
    result, error = ended[0]
    if error is not None:
        raise error
    return result


def run(request: sweep_runner.SweepRequest, storage: Path, cluster: Any) -> sweep_runner.Outcome:
    return in_time(
        lambda: sweep_runner.run(request, storage=str(storage), address=cluster.address, progress=False), storage
    )


def wait_until(holds: Callable[[], bool], what: Callable[[], Any]) -> None:
    """Ray frees what a process held a moment after its end."""
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline, what()
        time.sleep(0.1)


def check_nothing_is_left(storage: Path) -> None:
    import ray

    def held() -> dict[str, float]:
        free = ray.available_resources()
        held = {name: amount - free.get(name, 0.0) for name, amount in ray.cluster_resources().items()}
        return {name: amount for name, amount in held.items() if not name.startswith("object_store") and amount}

    def groups() -> list[str]:
        return [group["state"] for group in ray.util.placement_group_table().values() if group["state"] != "REMOVED"]

    wait_until(lambda: not held() and not groups(), lambda: f"still held: {held()}, placement groups {groups()}")
    assert not list((storage / "leases").glob("*"))


def check_computed_once(outcome: sweep_runner.Outcome) -> None:
    """Every unique stage, named by its key beforehand, was computed by exactly one trial; of generators, every one."""
    computed, asked = Counter(), set()
    made, generators = 0, set()
    for result in outcome.results:
        summary = result.summary
        sizes = [sum(row) for row in summary["label_counts"]]
        config = override(TINY, summary["config"])
        keys = stage_keys(config, stripes_dataset().identity, FACTS, sizes)
        generators |= set(keys["generators"])
        assert summary["stages"].keys() == keys.keys()
        for stage, facts in summary["stages"].items():
            if stage == "generators":
                assert facts["key"] == GENERATORS.joint_key(keys[stage])
                made += len(sizes) - facts["cached_clients"]
            else:
                assert (facts["key"],) == keys[stage]
                asked.add(facts["key"])
                computed[facts["key"]] += not facts["cached"]
    assert computed == dict.fromkeys(asked, 1)
    assert made == len(generators)


@marked
@pytest.mark.parametrize("number", range(20))
def test_a_random_plan_runs_to_the_end(number, tmp_path, cluster):
    from mosaic_ray.execution.ray_session import nodes

    request = random_request(number)
    why = refusal(request, nodes())
    if why is not None:
        with pytest.raises(RequestError) as refused:
            run(request, tmp_path, cluster)
        assert str(refused.value) == why
    else:
        outcome = run(request, tmp_path, cluster)
        assert [(r.summary["status"], r.summary.get("error")) for r in outcome.results] == (
            [("done", None)] * sweep_runner.prepare(request).search.total
        )
        check_computed_once(outcome)
    check_nothing_is_left(tmp_path)


@marked
def test_killed_client_hosts_change_nothing(tmp_path, cluster, monkeypatch):
    """Both hosts of the second node are killed while trials are at work on them."""
    import ray

    request = sweep_runner.SweepRequest(
        override(TINY, {"runtime.host": "ray", "runtime.cpus_per_client": 0.5, "partition.num_clients": 4}),
        "killed",
        SweepPlan("two", knobs={"generator.lambda_d": Choice((2.0, 5.0)), "partition.omega": Choice((0.3, 3.0))}),
    )
    undisturbed = run(request, tmp_path / "a", cluster)

    second = next(node["NodeID"] for node in ray.nodes() if node["Resources"]["CPU"] == NODES[1][0])
    victims, killed = [], []
    started, follow = tuning.started, tuning._Progress.on_trial_result

    def note(hosts: list[Any]) -> list[Any]:
        up = started(hosts)
        where = ray.get(
            [h.__ray_call__.remote(lambda _: (ray.get_runtime_context().get_node_id(), os.getpid())) for h in up]
        )
        victims.extend(pid for node, pid in where if node == second)
        return up

    def kill(self, iteration, trials, trial, result, **info):
        follow(self, iteration, trials, trial, result, **info)
        if result.get("stage") in ("warmup", "generators") and victims:
            os.kill(victims[0], signal.SIGKILL)
            killed.append(victims.pop(0))

    monkeypatch.setattr(tuning, "started", note)
    monkeypatch.setattr(tuning._Progress, "on_trial_result", kill)
    outcome = run(request, tmp_path / "b", cluster)
    assert len(killed) == 2 and not victims
    check_computed_once(outcome)
    check_nothing_is_left(tmp_path / "b")
    left, right = (Path(o.place) for o in (undisturbed, outcome))
    tables = [read_results(place / "results.parquet").drop_columns(NOT_REPRODUCIBLE) for place in (left, right)]
    assert tables[0].equals(tables[1])
    for result in outcome.results:
        student = f"trials/{result.trial}/student.safetensors"
        assert_same(load_file(left / student), load_file(right / student))
