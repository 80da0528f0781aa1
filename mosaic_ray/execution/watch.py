"""Signs of life of actors at work: steps done, and how long an actor has been silent."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

#: The concurrency group of ``Working.progress``, which answers while the work runs.
SIGNS = "signs"

Curve = list[tuple[int, dict[str, float]]]

#: Seconds between two polls of an actor at work.
POLL_SECONDS = 3.0

#: By default an actor is hung after so many seconds, or after so many times the longest silence of this run.
LEAST_SECONDS, LONGEST_SILENCES = 120.0, 20.0


@dataclass(frozen=True)
class MapEvents:
    """Functions that a call of ``ClientBackend.map`` reports to while clients are at work.

    ``step(client, done, total)``: steps of the client's task; total 0 means unknown. ``hung(client, seconds)``: the
    client's actor gave no sign of life for so long, and was killed.
    """

    step: Callable[[int, int, int], None] = lambda client_id, done, total: None
    hung: Callable[[int, float], None] = lambda client_id, seconds: None


IGNORED = MapEvents()


class Working:
    """The part of a Ray actor that answers while the actor works, in the concurrency group ``SIGNS``.

    ``counts``: whether the work in hand counts its steps; if not, it is enough that the process answers. ``curve``: the
    reports of the work in hand, with rising steps.
    """

    counts = True
    curve: Sequence[tuple[int, dict[str, float]]] = ()
    now, _polls = ("", 0, 0), 0

    def progress(self) -> tuple[str, int, int]:
        """Return the call in hand (Ray's id of the task; "": none), its steps done, and of how many (0: unknown).

        The answer changes with every poll where the work counts no steps.
        """
        call, done, total = self.now
        self._polls += 1
        return (call, done, total) if self.counts else (call, self._polls, 0)

    def step(self) -> None:
        """Count a step, from the first one on."""
        self.now, self.counts = ("", self.now[1] + 1, 0), True

    def reports(self, after: int) -> Curve:
        """Return the reports of steps behind ``after``."""
        return [(step, metrics) for step, metrics in self.curve if step > after]


def no_sign(seconds: float, times: int) -> str:
    """Return why work is given up that hung ``times`` times, the last time for ``seconds``."""
    return (
        f"no sign of life for {seconds:.0f} s, {times} times (runtime.client_timeout); the same command goes on from "
        "the last stored result, and --set runtime.client_timeout=-1 waits for ever"
    )


@dataclass
class Sign:
    """The state of an actor at work: (call in hand, steps done, of how many), and seconds since that last changed."""

    answer: tuple[str, int, int] | None = None
    silent: float = 0.0
    poll: Any = None


class Watch:
    """Polls actors at work. ``timeout``: seconds without a sign of life; 0: by default; negative: without limit.

    A sign of life is an answer that differs from the one before: more steps, or other work in hand. Silence counts
    while the driver looks, so neither a driver that was stopped nor one with other work takes an actor for hung.
    """

    def __init__(self, timeout: float = 0.0) -> None:
        self._timeout, self._longest = timeout, 0.0
        self._signs: dict[int, Sign] = {}
        self._looked, self._passed = time.monotonic(), 0.0

    @property
    def limit(self) -> float:
        """Return the seconds of silence after which an actor is hung."""
        if not self._timeout:
            return max(LEAST_SECONDS, LONGEST_SILENCES * self._longest)
        return self._timeout if self._timeout > 0 else math.inf

    def begin(self, actor: Any) -> None:
        """Count from now on: ``actor`` is given work. An answer about earlier work is not waited for."""
        self._signs[id(actor)] = Sign()

    def end(self, actor: Any) -> None:
        """Take the end of an actor's work as a sign of life."""
        if sign := self._signs.get(id(actor)):
            self._longest, sign.silent = max(self._longest, sign.silent), 0.0

    def is_due(self) -> bool:
        """Return whether it is time to poll again."""
        self._passed = time.monotonic() - self._looked
        if self._passed < POLL_SECONDS:
            return False
        self._looked += self._passed
        return True

    def look(self, actor: Any) -> Sign:
        """Read the answer of the last poll of ``actor`` and send the next one; one at a time is under way."""
        import ray

        sign = self._signs.setdefault(id(actor), Sign())
        answer = sign.answer
        if sign.poll is not None and ray.wait([sign.poll], timeout=0)[0]:
            try:
                answer = ray.get(sign.poll)
            except ray.exceptions.RayError:  # it died or is being started: its call ends with an error of its own
                answer = None
            sign.poll = None
        sign.silent += min(self._passed, 2 * POLL_SECONDS)
        if answer != sign.answer:
            self._longest, sign.silent = max(self._longest, sign.silent), 0.0
            sign.answer = answer
        if sign.poll is None:
            sign.poll = actor.progress.options(concurrency_group=SIGNS).remote()
        return sign

    def call_in_hand(self, actor: Any) -> str:
        """Return Ray's id of the task that ``actor`` last reported to have in hand; "" where it reported none."""
        sign = self._signs.get(id(actor))
        return sign.answer[0] if sign and sign.answer else ""
