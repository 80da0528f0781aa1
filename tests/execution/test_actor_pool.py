"""Calls to actors, two at once and each of several clients: results, order, and what the death of an actor costs."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mosaic_ray.core.errors import RunError
from mosaic_ray.execution.actor_pool import CALL_SECONDS, MOST_IN_A_CALL, ActorPool, ClientFailure, ClientMap
from mosaic_ray.execution.backend import ClientActor
from mosaic_ray.execution.watch import MapEvents, Working

pytestmark = pytest.mark.ray


class Doubling(Working):
    """Returns twice the client's number; dies the first ``deaths`` times that it works for client 3.

    It says that its work took ``seconds``, and notes the clients that it worked for in the file ``worked``.
    """

    def __init__(self, folder: str, deaths: int, seconds: float) -> None:
        self.folder, self.deaths, self.seconds = Path(folder) / "deaths", deaths, seconds
        self.folder.mkdir(exist_ok=True)
        self.worked = Path(folder) / "worked"

    work_in_turn = ClientActor.work_in_turn

    def ping(self) -> str:
        return "worker"

    def work(self, common: Any, client_id: int, shard: Any, own: Any) -> tuple[float, int]:
        if client_id == 3 and len(os.listdir(self.folder)) < self.deaths:
            (self.folder / str(os.getpid())).touch()
            time.sleep(0.2)  # until its next call has come
            os.kill(os.getpid(), signal.SIGKILL)
        with open(self.worked, "a", encoding="utf-8") as file:
            file.write(f"{client_id} ")
        if client_id == own:
            raise ValueError("no input")
        if -client_id == own:
            raise RunError("diverged", client=client_id)
        return self.seconds, 2 * client_id


@pytest.fixture
def mapped(ray_up, tmp_path, monkeypatch):
    """``mapped(actors=2, ...)``: (client, result) of twelve clients, and how many calls an actor had after each.

    ``seconds`` of a client's work decide how many share a call, whose numbers of clients are ``run.calls``.
    """

    def run(
        actors: int = 2, deaths: int = 0, max_failures: int = 1, shared: bool = False, refused: int | None = None,
        seconds: float = 1.0, clients: int = 12,
    ):  # fmt: skip
        import ray

        made = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=0, concurrency_groups={"signs": 1})(Doubling)
        pool = ActorPool([made.remote(str(tmp_path), deaths, seconds) for _ in range(actors)], shared=shared)
        in_hand, begun, call = [], [], ClientMap._call
        run.calls = []

        def note(self: ClientMap, actor: Any) -> None:
            waiting = len(self._queue)
            call(self, actor)
            in_hand.append((len(self._in_hand(actor)), waiting))
            run.calls.append(waiting - len(self._queue))

        monkeypatch.setattr(ClientMap, "_call", note)
        events = MapEvents(step=lambda client_id, done, total: begun.append(client_id))
        shards = dict.fromkeys(range(clients))
        common = (None, None, SimpleNamespace(round_num=7))
        work = ClientMap(pool, shards, common, range(clients), None, lambda k: refused, None, max_failures, events)
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


# --- several clients in a call ---------------------------------------------------------------------------------------

SHORT = CALL_SECONDS / 6


def worked(folder: Path) -> Counter[int]:
    """How often the actors worked for each client."""
    return Counter(map(int, (folder / "worked").read_text().split()))


def test_clients_whose_work_is_short_share_calls(mapped, tmp_path):
    found, in_hand, _ = mapped(seconds=SHORT, clients=60)
    assert found == [(k, 2 * k) for k in range(60)]
    assert sum(mapped.calls) == 60 and max(mapped.calls) == 6
    assert mapped.calls[0] == 1  # nothing is known yet
    assert mapped.calls[-1] == 1  # at the end no actor waits for the other's long call
    assert set(worked(tmp_path).values()) == {1}
    assert max(calls for calls, _ in in_hand) == 2


def test_a_call_has_a_largest_number_of_clients(mapped):
    mapped(seconds=CALL_SECONDS / 1000, clients=120, actors=1)
    assert max(mapped.calls) == MOST_IN_A_CALL


@pytest.mark.parametrize("deaths", [1, 2])
def test_when_an_actor_dies_in_a_shared_call_each_client_shows_by_itself_whether_it_was_the_cause(mapped, deaths):
    """Client 3 is in a shared call at first, since an earlier one has shown how short the work is."""
    found, _, _ = mapped(seconds=SHORT, clients=60, actors=1, deaths=deaths, max_failures=1)
    failures = [k for k, result in found if isinstance(result, ClientFailure)]
    assert failures == ([3] if deaths == 2 else [])  # the first death is not counted: there were others in the call
    assert [k for k, _ in found] == list(range(60))
    assert all(result == 2 * k for k, result in found if k not in failures)


def test_a_client_that_fails_in_a_shared_call_fails_alone(mapped, tmp_path):
    found, _, _ = mapped(seconds=SHORT, clients=60, actors=1, refused=-5, max_failures=3)
    assert [k for k, result in found if isinstance(result, ClientFailure)] == [5]
    assert dict(found)[5].failures == 3 and "diverged" in str(dict(found)[5].error)
    assert worked(tmp_path) == Counter(range(60)) + Counter({5: 2})  # the others' results are kept


def test_an_exception_of_the_call_itself_is_looked_for_client_by_client(mapped):
    found, _, _ = mapped(seconds=SHORT, clients=60, actors=1, refused=5, max_failures=3)
    assert [k for k, result in found if isinstance(result, ClientFailure)] == [5]
    assert dict(found)[5].failures == 3 and "no input" in str(dict(found)[5].error)
