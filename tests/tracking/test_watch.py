"""Ray Train's reports to the driver: each step once and in order, also after losses and repeats."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.exceptions import ActorDiedError

from mosaic_ray.core.errors import RunError
from mosaic_ray.execution import ray_train
from mosaic_ray.execution.ray_train import ReportForwarder, ReportQueue

CURVE = [(step, {"loss": 1 / step}) for step in range(1, 6)]


@given(st.lists(st.integers(0, 5), max_size=4))
def test_a_loop_that_begins_again_is_reported_once(lengths):
    seen = []
    log_validation = ReportForwarder(lambda step, metrics: seen.append((step, metrics)), None)
    for length in lengths:  # each attempt gets so far
        log_validation.rest(CURVE[:length])
    log_validation.rest(CURVE)
    assert seen == CURVE


def test_a_letter_is_taken_once():
    box = ReportQueue()
    for step, metrics in CURVE[:2]:
        box.post(step, metrics)
    assert box.take() == CURVE[:2] and box.take() == []


class Box:
    """Stands for the actor, and its method for a remote one; ``take`` is asked in the watch's own thread."""

    def __init__(self, answers):
        self.answers, self.empty, self.take = answers, threading.Event(), self

    def remote(self):
        if not self.answers:
            self.empty.set()
            return []
        return self.answers.pop(0)


@pytest.fixture
def at_once(monkeypatch):
    monkeypatch.setattr(ray_train, "LOOK_SECONDS", 0.0)

    def get(answer):
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr("ray.get", get)


def test_reports_come_while_the_block_runs(at_once):
    seen, box = [], Box([CURVE[:2], [], CURVE[2:4]])
    log_validation = ReportForwarder(lambda step, metrics: seen.append(step), box)
    with log_validation.live():
        assert box.empty.wait(60)
        assert seen == [1, 2, 3, 4]
    log_validation.rest(CURVE)
    assert seen == [1, 2, 3, 4, 5]


def test_when_the_queue_dies_the_curve_comes_at_the_end(at_once):
    seen = []
    log_validation = ReportForwarder(lambda step, metrics: seen.append(step), Box([CURVE[:1], ActorDiedError()]))
    with log_validation.live():
        pass
    log_validation.rest(CURVE)
    assert seen == [1, 2, 3, 4, 5]


def test_a_report_that_fails_ends_the_run_with_its_own_words(at_once):
    def full(step, metrics):
        raise RunError("no space left")

    box = Box([CURVE])
    with pytest.raises(RunError, match="no space left"), ReportForwarder(full, box).live():
        for thread in threading.enumerate():
            if thread is not threading.current_thread() and thread.daemon and "_look" in thread.name:
                thread.join(60)
