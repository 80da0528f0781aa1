"""Two calls at once in an actor's hand: results, order, and what the death of an actor costs."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mosaic_ray.execution.actor_pool import ActorPool, ClientFailure, ClientMap
from mosaic_ray.execution.watch import MapEvents, Working

pytestmark = pytest.mark.ray


class Doubling(Working):
    """Returns twice the client's number; dies the first ``deaths`` times that it works for client 3."""

    def __init__(self, folder: str, deaths: int) -> None:
        self.folder, self.deaths = Path(folder), deaths

    def ping(self) -> str:
        return "worker"

    def work(self, common: Any, client_id: int, shard: Any, own: Any) -> tuple[float, int]:
        if client_id == 3 and len(os.listdir(self.folder)) < self.deaths:
            (self.folder / str(os.getpid())).touch()
            time.sleep(0.2)  # until its next call has come
            os.kill(os.getpid(), signal.SIGKILL)
        if client_id == own:
            raise ValueError("no input")
        return 1.0, 2 * client_id


@pytest.fixture
def mapped(ray_up, tmp_path, monkeypatch):
    """``mapped(actors=2, ...)``: (client, result) of twelve clients, and how many calls an actor had after each."""

    def run(actors: int = 2, deaths: int = 0, max_failures: int = 1, shared: bool = False, refused: int = -1):
        import ray

        made = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=0, concurrency_groups={"signs": 1})(Doubling)
        pool = ActorPool([made.remote(str(tmp_path), deaths) for _ in range(actors)], shared=shared)
        in_hand, begun, call = [], [], ClientMap._call

        def note(self: ClientMap, actor: Any) -> None:
            waiting = len(self._queue)
            call(self, actor)
            in_hand.append((len(self._in_hand(actor)), waiting))

        monkeypatch.setattr(ClientMap, "_call", note)
        events = MapEvents(step=lambda client_id, done, total: begun.append(client_id))
        shards = dict.fromkeys(range(12))
        common = (None, None, SimpleNamespace(round_num=7))
        work = ClientMap(pool, shards, common, range(12), None, lambda k: refused, None, max_failures, events)
        try:
            return list(work.results(ordered=True)), in_hand, begun
        finally:
            pool.close()

    return run


@pytest.mark.parametrize("actors", [1, 2, 5])
def test_results_come_in_order_and_no_actor_has_more_than_two_calls(mapped, actors):
    found, in_hand, begun = mapped(actors)
    assert found == [(k, 2 * k) for k in range(12)]
    assert sorted(begun) == list(range(12))
    assert max(calls for calls, _ in in_hand) == 2
    # a second call only while more clients wait than there are actors: the last ones go to whichever is idle first
    assert all(waiting > actors for calls, waiting in in_hand if calls == 2)


def test_runs_that_share_actors_take_one_call_at_once(mapped):
    found, in_hand, _ = mapped(shared=True)
    assert found == [(k, 2 * k) for k in range(12)] and {calls for calls, _ in in_hand} == {1}


@pytest.mark.parametrize("deaths", [1, 2])
def test_only_the_client_in_hand_fails_when_its_actor_dies(mapped, deaths):
    found, _, _ = mapped(deaths=deaths, max_failures=deaths)
    failures = {k: result for k, result in found if isinstance(result, ClientFailure)}
    assert list(failures) == [3] and failures[3].failures == deaths and "its actor died" in str(failures[3].error)
    assert [k for k, _ in found] == list(range(12))
    assert all(result == 2 * k for k, result in found if k != 3)


def test_an_actor_that_died_works_on(mapped):
    found, in_hand, begun = mapped(deaths=1, max_failures=2)
    assert found == [(k, 2 * k) for k in range(12)]
    assert Counter(begun)[3] == 2 and set(begun) == set(range(12))
    assert max(calls for calls, _ in in_hand) == 2  # also after its restart


def test_an_exception_costs_its_own_client_alone(mapped):
    found, _, _ = mapped(refused=4, max_failures=3)
    assert {k for k, result in found if isinstance(result, ClientFailure)} == {4}
    assert dict(found)[4].failures == 3 and "no input" in str(dict(found)[4].error)
