"""Reports of the server's work to the driver: each step once and in order; workers without a sign of life."""

from __future__ import annotations

import threading

import pytest
import ray
from helpers import FACTS, TINY
from hypothesis import given
from hypothesis import strategies as st
from ray.exceptions import ActorDiedError, ActorUnavailableError, GetTimeoutError

from mosaic_ray.core.errors import RunError
from mosaic_ray.execution import reports, watch
from mosaic_ray.execution.reports import ReportForwarder, ReportQueue
from mosaic_ray.execution.server import ServerActor

CURVE = [(step, {"loss": 1 / step}) for step in range(1, 6)]


@given(st.lists(st.integers(0, 5), max_size=4))
def test_a_loop_that_begins_again_is_reported_once(lengths):
    seen = []
    forwarder = ReportForwarder(lambda step, metrics: seen.append((step, metrics)), 0.0)
    for length in lengths:  # each attempt gets so far
        forwarder.flush(CURVE[:length])
    forwarder.flush(CURVE)
    assert seen == CURVE


def test_the_queue_counts_from_the_first_sign_and_names_the_workers_that_gave_any():
    queue = ReportQueue()
    for step, metrics in CURVE[:3]:
        queue.put(step, metrics)
    assert queue.reports(-1) == CURVE[:3] and queue.reports(1) == CURVE[1:3] and queue.reports(3) == []
    assert queue.progress() != queue.progress()  # nobody works yet
    for worker in "aba":
        queue.sign(worker)
    before = queue.progress()
    assert before == queue.progress()
    queue.sign("b")
    assert before != queue.progress()
    assert queue.forget() == ["a", "b"] and queue.forget() == []
    assert queue.progress() != queue.progress()


class Box:
    """Stands for the actor that is asked, its methods and their answers; ``empty`` is set when it has no more."""

    def __init__(self, answers):
        self.answers, self.empty, self.now = answers, threading.Event(), None
        self.reports = self.progress = self

    def options(self, concurrency_group):
        return self

    def remote(self, after=0):
        if not self.answers:
            self.empty.set()
            return []
        return self.answers.pop(0)


@pytest.fixture
def at_once(monkeypatch):
    monkeypatch.setattr(reports, "POLL_SECONDS", 0.0)

    def get(answer):
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr("ray.get", get)
    monkeypatch.setattr("ray.wait", lambda refs, timeout: (refs, []))


def nobody():
    return []


def test_reports_come_while_the_block_runs(at_once):
    seen, box = [], Box([CURVE[:2], [], CURVE[2:4]])
    forwarder = ReportForwarder(lambda step, metrics: seen.append(step), 0.0)
    with forwarder.live(box, nobody):
        assert box.empty.wait(60)
        assert seen == [1, 2, 3, 4]
    forwarder.flush(CURVE)
    assert seen == [1, 2, 3, 4, 5]


def test_when_the_queue_dies_the_curve_comes_at_the_end(at_once):
    seen = []
    forwarder = ReportForwarder(lambda step, metrics: seen.append(step), 0.0)
    with forwarder.live(Box([CURVE[:1], ActorDiedError()]), nobody):
        pass
    forwarder.flush(CURVE)
    assert seen == [1, 2, 3, 4, 5]


def test_a_worker_that_is_starting_again_is_asked_again(at_once):
    seen, box = [], Box([CURVE[:1], ActorUnavailableError("starting", None), CURVE[1:3]])
    with ReportForwarder(lambda step, metrics: seen.append(step), 0.0).live(box, nobody):
        assert box.empty.wait(60)
    assert seen == [1, 2, 3]


def test_a_worker_has_no_reports_before_and_after_its_work():
    """The driver asks from the start of a call, also while a new process still imports what the call needs."""
    actor, meanwhile = ServerActor(0.0), []
    assert actor.reports(-1) == []

    def train(context, *, report):
        report(0, {"loss": 2.0})
        meanwhile.extend(actor.reports(-1))
        return "done"

    assert actor.call(train, TINY, FACTS, (), True) == ("done", [(0, {"loss": 2.0})])
    assert meanwhile == [(0, {"loss": 2.0})] and actor.reports(-1) == []


def test_a_report_that_fails_ends_the_run_with_its_own_words(at_once):
    def full(step, metrics):
        raise RunError("no space left")

    with pytest.raises(RunError, match="no space left"), ReportForwarder(full, 0.0).live(Box([CURVE]), nobody):
        for thread in threading.enumerate():
            if thread is not threading.current_thread() and thread.daemon and "_poll" in thread.name:
                thread.join(60)


class Worker:
    """Stands for an actor that ``answers`` whether it is up."""

    def __init__(self, answer):
        self.__ray_ready__, self.remote = self, lambda: answer


@pytest.mark.parametrize("answer, killed", [(GetTimeoutError(), True), (None, True), (ActorDiedError(), False)])
def test_workers_without_a_sign_are_killed_unless_they_died_before(at_once, monkeypatch, answer, killed):
    """A worker that answers is stuck in its step; one that died is being replaced."""
    ended, hung, get, worker = [], [], ray.get, Worker(answer)
    monkeypatch.setattr("ray.get", lambda answer, timeout=0.0: get(answer))
    monkeypatch.setattr(reports, "end", ended.extend)
    monkeypatch.setattr(watch, "POLL_SECONDS", 0.01)
    asked = threading.Event()

    def workers():
        asked.set()
        return [worker]

    forwarder = ReportForwarder(None, 0.005, hung.append)
    with forwarder.live(Box([]), workers):
        assert asked.wait(60)
    assert (worker in ended, bool(hung), forwarder.hangs > 0) == (killed, killed, killed)
