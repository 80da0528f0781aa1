"""Clients that do not answer: drop-out, partial participation, and clients with work that fails for good."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import FACTS, TASKS, TINY, assert_same, stripes_dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from mosaic_ray.config.resolve import override
from mosaic_ray.config.validate import check
from mosaic_ray.core.errors import RequestError, RunError
from mosaic_ray.distillation.client_tasks import PrototypesTask
from mosaic_ray.execution import actor_pool
from mosaic_ray.execution.actor_pool import ActorPool, ClientFailure
from mosaic_ray.execution.backend import ClientActor, RayBackend, start_hosts
from mosaic_ray.pipeline.context import FailedClients
from mosaic_ray.pipeline.rounds import answering
from mosaic_ray.runs import runner
from mosaic_ray.runs.plan import stage_keys
from mosaic_ray.storage.store import Store

Summary = dict[str, Any]


@pytest.fixture(autouse=True)
def stripes_as_data(monkeypatch):
    monkeypatch.setattr("mosaic_ray.data.load.load_dataset", lambda config: stripes_dataset())


def go(folder: Path, **knobs: Any) -> Summary:
    named = {name.replace("__", "."): value for name, value in knobs.items()}
    return runner.run(override(TINY, named), storage=str(folder), progress=False)


def student(summary: Summary) -> dict[str, np.ndarray]:
    return load_file(Path(summary["paths"]["run"]) / "student.safetensors")


def failed(summary: Summary) -> list[tuple[str, int, float]]:
    return [(f["stage"], f["client"], f["value"]) for f in summary["health"] if f["code"] == "client.failed"]


@pytest.fixture
def failing(monkeypatch) -> Callable[..., list[int]]:
    """``failing("train", 1)``: client 1's training fails, ``times`` of it or always; answers the list of failures."""

    def arrange(work: str, client: int, times: int = 10**9) -> list[int]:
        task, met = TASKS[work], []
        real = task.run

        def broken(task, context, shard, client_id, *inputs):
            if client_id == client and len(met) < times:
                met.append(client_id)
                raise OSError("its disk is gone")
            return real(task, context, shard, client_id, *inputs)

        monkeypatch.setattr(task, "run", broken)
        return met

    return arrange


# --- drop-out --------------------------------------------------------------------------------------------------------


@settings(max_examples=50)
@given(st.integers(1, 30), st.floats(0.0, 0.99), st.integers(0, 30), st.integers(0, 50), st.data())
def test_dropped_clients_are_drawn_from_the_cohort_and_never_too_many(clients, rate, least, round_num, data):
    asked = sorted(data.draw(st.sets(st.integers(0, clients - 1), min_size=1)))
    least = min(least, len(asked))
    knobs = {"partition.num_clients": clients, "federation.drop_rate": rate, "federation.min_cohort": least}
    config = override(TINY, knobs)
    there = answering(config, "local", round_num, asked)
    assert there == sorted(set(there)) and set(there) <= set(asked)
    assert len(there) >= max(1, least)
    assert there == answering(config, "local", round_num, asked)
    if not rate:
        assert there == asked


def test_the_share_that_stays_is_one_minus_the_rate_and_rounds_differ():
    config = override(TINY, {"partition.num_clients": 50, "federation.drop_rate": 0.3})
    rounds = [answering(config, "local", number, list(range(50))) for number in range(200)]
    assert np.mean([len(there) for there in rounds]) / 50 == pytest.approx(0.7, abs=0.015)
    assert len({tuple(there) for there in rounds}) == 200
    by_client = np.bincount(np.concatenate(rounds), minlength=50) / 200
    assert by_client.min() > 0.5 and by_client.max() < 0.9


def test_drop_out_repeats_and_costs_the_downlink_alone(tmp_path):
    knobs = {"federation__drop_rate": 0.5, "warmup__num_rounds": 4}
    first, again, whole = go(tmp_path / "a", **knobs), go(tmp_path / "b", **knobs), go(tmp_path / "c", **knobs | {
        "federation__drop_rate": 0.0
    })  # fmt: skip
    assert_same(student(first), student(again))
    sent, kept = first["communication_bytes"], whole["communication_bytes"]
    assert sent["downlink"]["weights"] == kept["downlink"]["weights"]
    assert sent["uplink"]["weights"] < kept["uplink"]["weights"]
    assert not failed(first)


# --- clients that fail -----------------------------------------------------------------------------------------------


def test_without_leave_the_first_client_that_fails_ends_the_run(tmp_path, failing):
    met = failing("train", 1)
    with pytest.raises(RunError, match="stage warmup, round 0, client 1: OSError: its disk is gone"):
        go(tmp_path, federation__max_client_failures=2)
    assert len(met) == 2


@pytest.mark.parametrize("work", ["train", "prototypes", "generate"])
def test_a_failure_that_passes_shows_in_no_number(tmp_path, undisturbed_tiny, failing, work):
    met = failing(work, 1, times=2)
    disturbed = go(tmp_path)
    assert len(met) == 2 and not failed(disturbed)
    assert_same(student(disturbed), student(undisturbed_tiny))


def test_with_leave_the_rounds_go_on_without_it_as_if_it_had_not_been_asked(tmp_path, failing, monkeypatch):
    knobs = {"federation__min_cohort": 2, "federation__max_client_failures": 1, "method": "fedavg"}
    with monkeypatch.context() as patch:
        patch.setattr("mosaic_ray.pipeline.rounds.cohort_of", lambda config, phase, round_num: [0, 2])
        without = go(tmp_path / "a", method="fedavg")
    failing("train", 1)
    summary = go(tmp_path / "b", **knobs)
    # fedavg's student has no rounds of its own: control and finetune are one result, noted under both names
    warmup, closing = TINY.warmup.num_rounds, TINY.finetune.num_rounds
    assert set(failed(summary)) == {("warmup", 1, float(warmup)), ("finetune", 1, float(closing))}
    assert_same(student(summary), student(without))
    sent = summary["communication_bytes"]
    assert 2 * sent["downlink"]["weights"] == 3 * sent["uplink"]["weights"]  # it was sent the model all the same


def test_a_client_without_a_generator_is_left_out_and_asked_again_by_the_next_run(tmp_path, failing, monkeypatch):
    with monkeypatch.context() as patch:
        met = []
        real = TASKS["generate"].run

        def broken(task, context, shard, client_id, *rest):
            if client_id == 1:
                met.append(client_id)
                raise OSError("its disk is gone")
            return real(task, context, shard, client_id, *rest)

        patch.setattr(TASKS["generate"], "run", broken)
        first = go(tmp_path, federation__min_cohort=1)
    assert len(met) == TINY.federation.max_client_failures
    assert failed(first) == [("generators", 1, 1.0)]
    second = go(tmp_path, federation__min_cohort=1)
    assert failed(second) == [] and second["stages"]["generators"]["cached_clients"] == 2
    assert first["stages"]["generators"]["key"] != second["stages"]["generators"]["key"]
    assert not second["stages"]["distill"]["cached"] and second["stages"]["teacher"]["cached"]
    fresh = go(tmp_path / "fresh", federation__min_cohort=1)
    assert_same(student(second), student(fresh))


def test_a_client_without_prototypes_is_left_out(tmp_path, failing):
    failing("prototypes", 0)
    summary = go(tmp_path, federation__min_cohort=2)
    assert failed(summary) == [("prototypes", 0, 1.0)]
    assert go(tmp_path, federation__min_cohort=2)["health"] == summary["health"]  # found and reported again


def test_when_too_few_are_left_the_first_without_leave_is_named(tmp_path, monkeypatch):
    def broken(task, *inputs):
        raise OSError("no disk anywhere")

    monkeypatch.setattr(TASKS["train"], "run", broken)
    with pytest.raises(RunError, match="stage warmup, round 0, client 2: OSError: no disk anywhere"):
        go(tmp_path, federation__min_cohort=1, federation__max_client_failures=1)


def test_clients_left_out_are_part_of_a_checkpoint():
    failed_clients = FailedClients("warmup")
    for client_id in (4, 2, 4):
        failed_clients.note(client_id, ClientFailure(RunError("gone", client=client_id), 3))
    again = FailedClients.of("warmup", failed_clients.facts())
    assert again.findings() == failed_clients.findings()
    found = [(f.client, f.value, f.message) for f in again.findings()]
    assert found == [
        (2, 1.0, "left out once, the last time for gone"),
        (4, 2.0, "left out 2 times, the last time for gone"),
    ]


# --- what keys know of it --------------------------------------------------------------------------------------------


def test_keys_change_only_where_clients_may_be_missing():
    def keys(**knobs: Any) -> dict[str, Any]:
        return stage_keys(override(TINY, {f"federation.{name}": value for name, value in knobs.items()}), "x", FACTS)

    strict = keys()
    assert keys(max_client_failures=7) == strict
    assert keys(min_cohort=2)["warmup"] != strict["warmup"]
    assert keys(min_cohort=2, max_client_failures=7)["warmup"] != keys(min_cohort=2)["warmup"]
    assert keys(drop_rate=0.1)["warmup"] != strict["warmup"]


def test_more_than_are_asked_cannot_be_needed():
    with pytest.raises(RequestError, match=r"federation\.min_cohort = 4: only 3 clients are asked in a round"):
        check(override(TINY, {"federation.min_cohort": 4}))
    with pytest.raises(RequestError, match=r"only 2 clients are asked in a round \(federation\.cohort_size\)"):
        check(override(TINY, {"federation.min_cohort": 3, "federation.cohort_size": 2}))


# --- Ray -------------------------------------------------------------------------------------------------------------

on_ray = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning")


def deadly() -> type:
    """Return a host that dies of SIGKILL when it trains client 1; a local class is pickled by value."""

    class Deadly(ClientActor):
        def work(self, common, client_id, *rest):
            if isinstance(common[2], TASKS["train"]) and client_id == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().work(common, client_id, *rest)

    return Deadly


@on_ray
@pytest.mark.ray
def test_a_client_that_kills_its_host_is_left_out_on_ray_as_a_failing_one_is_here(
    tmp_path, ray_up, monkeypatch, failing
):
    knobs = {"federation__min_cohort": 2, "federation__max_client_failures": 1, "warmup__num_rounds": 1}
    knobs |= {"finetune__num_rounds": 0}
    monkeypatch.setattr("mosaic_ray.execution.backend.ClientActor", deadly())
    there = go(tmp_path / "ray", **knobs, runtime__host="ray", runtime__max_hosts=2)
    failing("train", 1)
    here = go(tmp_path / "serial", **knobs)
    assert failed(there) == failed(here) == [("warmup", 1, 1.0)]
    assert_same(student(there), student(here))


def hungry(folder: Path) -> type:
    """Return hosts that kill themselves: the first two that train a generator die together. Ray reports the cause."""

    class Hungry(ClientActor):
        def work(self, common, client_id, *rest):
            if isinstance(common[2], TASKS["generate"]) and len(os.listdir(folder)) < 2:
                (folder / str(client_id)).touch()
                for _ in range(6000):  # a minute at most
                    if len(os.listdir(folder)) == 2:
                        break
                    time.sleep(0.01)
                os.kill(os.getpid(), signal.SIGKILL)
            return super().work(common, client_id, *rest)

    return Hungry


@on_ray
@pytest.mark.ray
@pytest.mark.parametrize("memory", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_where_memory_runs_out_fewer_clients_work_at_once(tmp_path, ray_up, monkeypatch, undisturbed_tiny, memory):
    """Both hosts are killed at once. The kill by Ray's own monitor is in test_faults.py, for it needs gigabytes."""
    retired: list[bool] = []
    asked: list[str] = []
    remove = ActorPool.remove

    def note(pool: ActorPool, actor: Any) -> bool:
        retired.append(remove(pool, actor))
        return retired[-1]

    def lacked_memory(worker_id: str) -> bool:
        asked.append(worker_id)
        assert not real(worker_id), "it was no lack of memory"
        return memory

    real = actor_pool.killed_for_memory
    monkeypatch.setattr(actor_pool, "killed_for_memory", lacked_memory)
    monkeypatch.setattr(ActorPool, "remove", note)
    (tmp_path / "killed").mkdir()
    monkeypatch.setattr("mosaic_ray.execution.backend.ClientActor", hungry(tmp_path / "killed"))
    failures = 1 if memory else 2  # a lack of memory is no client's failure
    there = go(tmp_path / "ray", runtime__host="ray", runtime__max_hosts=2, federation__max_client_failures=failures)
    assert retired == ([True, False] if memory else []) and len(set(asked)) == 2 and not failed(there)
    assert_same(student(there), student(undisturbed_tiny))


@on_ray
@pytest.mark.ray
def test_waiting_for_actors_that_do_not_fit_ends(ray_up):
    shards = {k: stripes_dataset().train for k in range(3)}
    nobody = ActorPool(start_hosts({"CPU": 8.0}, {"": 1}), patience_seconds=0.5)
    cohort = RayBackend(TINY, FACTS, shards.__getitem__, lambda: nobody)
    try:
        with pytest.raises(RunError, match=r"no client actor could start within 0\.5 s: other jobs hold"):
            list(cohort.map(PrototypesTask(0), [0], {}, lambda client: None))
    finally:
        cohort.close()


def test_the_last_actor_is_never_retired():
    class Actor:
        pass

    first, second = Actor(), Actor()
    pool = ActorPool([first, second], shared=True)
    pool.mark_up(second, "c0ffee")
    assert pool.remove(first) and pool.actors == [second]
    assert not pool.remove(second) and pool.actors == [second] and pool.is_up(second)


def test_storage_of_left_out_clients_stays_readable(tmp_path, failing):
    """Stored models are of the last round; a client that was left out has the global model."""
    failing("train", 1)
    summary = go(tmp_path, federation__min_cohort=2, federation__max_client_failures=1)
    warmup = Store(str(tmp_path)).get(summary["stages"]["warmup"]["key"])
    assert [part for part in warmup.parts if part.startswith("client_")] == ["client_00000", "client_00002"]
    assert summary["accuracy"]["teacher"] is not None
