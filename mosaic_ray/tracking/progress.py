"""``StageProgress``: the handle with which a stage reports its progress and its curves."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    from types import TracebackType


#: ``[tag, step, value]``; the value is None where it was not finite, so that it survives JSON.
Scalar = list[Any]

_now = time.monotonic


def clock(seconds: float) -> str:
    """Format ``seconds`` as ``m:ss``, or ``h:mm:ss`` from an hour on."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"


class Display(Protocol):
    """Shows stages and messages to the user (``console`` has the implementations)."""

    def begin(self, stage: StageProgress) -> None: ...
    def advance(self, stage: StageProgress) -> None: ...
    def resume(self, stage: StageProgress) -> None: ...
    def end(self, stage: StageProgress) -> None: ...
    def cached(self, name: str) -> None: ...
    def say(self, text: str, mark: str) -> None: ...
    def close(self) -> None: ...


class Output(Protocol):
    """The part of ``tracker.Tracker`` that a stage writes to."""

    display: Display

    def scalar(self, stage: str, tag: str, step: int, value: float) -> Scalar: ...
    def replay_scalars(self, stage: str, recorded: Sequence[Scalar]) -> list[Scalar]: ...
    def image(self, tag: str, step: int, array: np.ndarray) -> None: ...
    def histogram(self, tag: str, step: int, values: np.ndarray) -> None: ...


class StageProgress:
    """A running stage; made by ``Tracker.stage`` and used in a ``with`` block."""

    def __init__(self, tracker: Output, name: str, total: int | None, unit: str) -> None:
        self._tracker = tracker
        self.name, self.total, self.unit = name, total, unit
        self.recorded: list[Scalar] = []
        self.done = self.resumed_at = 0
        self.note = ""
        self.state = "running"  # then done or stopped
        self._begun, self._ended = _now(), math.nan

    def __enter__(self) -> StageProgress:
        self._begun = _now()
        self._tracker.display.begin(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended = _now()
        self.state = "done" if kind is None else "stopped"
        self._tracker.display.end(self)

    def scalar(self, tag: str, step: int, value: float) -> None:
        """Record one point of the curve ``tag``."""
        self.recorded.append(self._tracker.scalar(self.name, tag, int(step), float(value)))

    def image(self, tag: str, step: int, array: np.ndarray) -> None:
        """Write an image uint8 [H, W] or [C, H, W] to TensorBoard."""
        self._tracker.image(tag, step, array)

    def histogram(self, tag: str, step: int, values: np.ndarray) -> None:
        """Write a histogram of the finite ``values`` (any shape) to TensorBoard."""
        self._tracker.histogram(tag, step, values)

    def advance(self, n: int = 1, note: str = "") -> None:
        """Count ``n`` more finished units; ``note`` is shown beside them, such as the loss."""
        self.done += n
        self.note = note or self.note
        self._tracker.display.advance(self)

    def resume(self, recorded: Sequence[Scalar], done: int) -> None:
        """Continue from a checkpoint: write its scalars again and count ``done`` units as finished."""
        self.recorded += self._tracker.replay_scalars(self.name, recorded)
        self.done = self.resumed_at = done
        self._tracker.display.resume(self)

    @property
    def seconds(self) -> float:
        """Return the seconds since the stage began, until it ended."""
        return (_now() if math.isnan(self._ended) else self._ended) - self._begun

    @property
    def count(self) -> str:
        """Return ``round 3/10``, or ``round 3`` where the total is unknown."""
        return f"{self.unit} {self.done}" + ("" if self.total is None else f"/{self.total}")

    @property
    def pace(self) -> list[str]:
        """Return the rate and the remaining time, as far as they are known."""
        fresh, seconds = self.done - self.resumed_at, self.seconds
        if fresh <= 0 or seconds <= 0:
            return []
        rate = fresh / seconds
        words = [f"{rate:.3g} {self.unit}/s" if rate >= 1 else f"{1 / rate:.3g} s/{self.unit}"]
        return words if self.total is None else [*words, f"{clock(max(0, self.total - self.done) / rate)} left"]


Stage = StageProgress  # the name before; pipeline.context imports it
