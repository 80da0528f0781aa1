"""Signs of life: an actor is hung if it is silent while the driver looks, and for no other reason."""

from __future__ import annotations

import math

import pytest
from ray.exceptions import ActorUnavailableError
from terminals import Clock

from mosaic_ray.execution import watch
from mosaic_ray.execution.watch import LEAST_SECONDS, LONGEST_SILENCES, POLL_SECONDS, Watch

CALL = "c0ffee"


class Actor:
    """An actor whose polls answer ``now``; None: not yet, an exception: with an error. Its own remote method, too."""

    def __init__(self) -> None:
        self.now: object = (CALL, 0, 0)
        self.polls = 0
        self.progress = self

    def options(self, concurrency_group: str) -> Actor:
        assert concurrency_group == watch.SIGNS
        return self

    def remote(self) -> Actor:
        self.polls += 1
        return self


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    def get(actor: Actor) -> object:
        if isinstance(actor.now, Exception):
            raise actor.now
        return actor.now

    clock = Clock()
    monkeypatch.setattr(watch.time, "monotonic", clock)
    monkeypatch.setattr("ray.wait", lambda refs, timeout: ([ref for ref in refs if ref.now is not None], []))
    monkeypatch.setattr("ray.get", get)
    return clock


def silence(watch: Watch, clock: Clock, actor: Actor, looks: int, seconds: float = POLL_SECONDS) -> float:
    """The silence of ``actor`` after so many looks, with so many seconds between two."""
    for _ in range(looks):
        clock.now += seconds
        assert watch.is_due()
        found = watch.look(actor).silent
    return found


def test_steps_are_signs_of_life_and_their_lack_is_none(clock: Clock) -> None:
    watched, actor = Watch(60.0), Actor()
    watched.begin(actor)
    for step in range(50):
        actor.now = (CALL, step, 100)
        assert silence(watched, clock, actor, 1) <= 2 * POLL_SECONDS
    assert silence(watched, clock, actor, 30) > watched.limit
    assert watched.call_in_hand(actor) == CALL
    actor.now = ("another call", 49, 100)
    assert silence(watched, clock, actor, 1) == 0


def test_a_process_that_never_answers_is_silent_and_is_asked_once(clock: Clock) -> None:
    watched, actor = Watch(60.0), Actor()
    actor.now = None
    watched.begin(actor)
    assert silence(watched, clock, actor, 30) > watched.limit
    assert actor.polls == 1 and watched.call_in_hand(actor) == ""


def test_a_poll_that_fails_is_asked_again(clock: Clock) -> None:
    watched, actor = Watch(60.0), Actor()
    watched.begin(actor)
    silence(watched, clock, actor, 2)
    actor.now = ActorUnavailableError("restarting", None)
    assert silence(watched, clock, actor, 1) == 0 and watched.call_in_hand(actor) == ""
    assert actor.polls == 3


def test_a_driver_that_did_not_look_takes_nobody_for_hung(clock: Clock) -> None:
    """It was stopped for a day, or aggregated for an hour."""
    watched, actor = Watch(60.0), Actor()
    watched.begin(actor)
    actor.now = None
    assert silence(watched, clock, actor, 1, 86400.0) <= 2 * POLL_SECONDS
    watched.begin(actor)
    assert silence(watched, clock, actor, 1, 3600.0) <= 2 * POLL_SECONDS


def test_an_answer_about_earlier_work_says_nothing_about_new_work(clock: Clock) -> None:
    watched, actor, answered = Watch(60.0), Actor(), Actor()
    actor.remote = lambda: answered  # at once, with the call in hand now
    watched.begin(actor)
    silence(watched, clock, actor, 1)
    watched.begin(actor)
    actor.now, actor.remote = None, lambda: actor  # stopped as the next call begins
    assert silence(watched, clock, actor, 30) > watched.limit
    assert watched.call_in_hand(actor) == ""


def test_short_work_is_never_asked(clock: Clock) -> None:
    watched = Watch()
    clock.now += POLL_SECONDS / 2
    assert not watched.is_due()


def test_the_limit_follows_the_longest_silence_that_ended(clock: Clock) -> None:
    watched, actor = Watch(), Actor()
    assert watched.limit == LEAST_SECONDS
    watched.begin(actor)
    silence(watched, clock, actor, 2)
    longest = silence(watched, clock, actor, 9)
    assert watched.limit == LEAST_SECONDS  # it has not ended yet
    actor.now = (CALL, 1, 100)
    silence(watched, clock, actor, 1)
    assert watched.limit >= LONGEST_SILENCES * longest > LEAST_SECONDS
    other = Watch()
    other.begin(actor)
    longest = silence(other, clock, actor, 10)
    other.end(actor)  # its work ended without another step
    assert other.limit == LONGEST_SILENCES * longest


def test_a_number_is_the_limit_and_minus_one_is_none(clock: Clock) -> None:
    assert Watch(7.0).limit == 7.0 and Watch(-1.0).limit == math.inf
