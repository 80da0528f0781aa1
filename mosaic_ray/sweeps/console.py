"""What a person sees while a sweep goes on: one live view on a terminal, a few plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

from ..tracking.console import Live, Quiet, clock, is_terminal

if TYPE_CHECKING:
    from rich.console import RenderableType

_now = time.monotonic

#: The live view shows the best trial of so many settings.
MOST_SETTINGS = 4


@dataclass
class _Trial:
    """A trial under way."""

    label: str
    begun: float
    stage: str = ""


class SweepView:
    """Progress of ``total`` trials; a context manager.

    ``stream``: None means standard error. ``progress``: False shows messages only. The best so far is shown for each
    setting (each omega, for example), since scores in two settings do not compare.
    """

    def __init__(
        self,
        total: int,
        *,
        stream: TextIO | None = None,
        progress: bool | None = None,
    ) -> None:
        stream = sys.stderr if stream is None else stream
        self.total = total
        self.best: dict[str, tuple[str, float]] = {}  # setting -> label and selection
        self.ended = {"done": 0, "stopped": 0, "failed": 0}
        self._running: dict[str, _Trial] = {}
        self._begun, self._slots, self._succeeded = _now(), 1, False
        self._durations: list[float] = []
        self._live = _Live(self, stream) if progress is not False and is_terminal(stream) else None
        self._plain = Quiet(stream)
        self._lines = self._live is None and progress is not False

    def __enter__(self) -> SweepView:
        self._begun = _now()
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()

    def begin(self, trial: str, label: str) -> None:
        """``trial`` runs from now on (a second time, where it was taken up again)."""
        self._running[trial] = _Trial(label, _now())
        self._slots = max(self._slots, len(self._running))
        if self._lines:
            self.say(f"{label}: begins")

    def stage(self, trial: str, name: str, note: str = "") -> None:
        """What ``trial`` is at; ``note`` is a few words such as "found"."""
        if trial in self._running:
            self._running[trial].stage = f"{name} {note}".rstrip()

    def found(self, status: str, selection: float | None, label: str, setting: str = "") -> None:
        """A trial that ended in an earlier session."""
        self.ended[status] += 1
        self._rank(status, selection, label, setting)

    def end(self, trial: str, status: str, selection: float | None, label: str, setting: str = "") -> None:
        """``trial`` is done, stopped or failed; ``selection`` (in [0, 1]) is what configurations are chosen by."""
        if ran := self._running.pop(trial, None):
            self._durations.append(_now() - ran.begun)
        self.ended[status] += 1
        self._succeeded |= status != "failed"
        self._rank(status, selection, label, setting)
        if self._lines:
            reached = "" if selection is None or status == "failed" else f"selection {selection:.1%}"
            outcome = {"done": reached or "done", "stopped": "stopped early", "failed": "failed"}[status]
            words = (outcome, self._best(setting), self._left())
            self.say(f"[{sum(self.ended.values())}/{self.total}] {label}: " + ", ".join(word for word in words if word))

    def _rank(self, status: str, selection: float | None, label: str, setting: str) -> None:
        best = self.best.get(setting)
        if status == "done" and selection is not None and (best is None or selection > best[1]):
            self.best[setting] = label, selection

    def say(self, text: str) -> None:
        """A line for the person who looks on."""
        (self._live or self._plain).say(text, "")

    def warn(self, text: str) -> None:
        """A line that asks for attention."""
        (self._live or self._plain).say(text, "warning")

    def seconds_left(self) -> float | None:
        """By the mean duration of the trials that ended; None while that tells nothing.

        None, too, when all that is left has already taken longer than that mean.
        """
        unfinished = self.total - sum(self.ended.values())
        if unfinished <= 0:
            return 0.0
        if not (self._succeeded and self._durations):
            return None
        mean, now, running = sum(self._durations) / len(self._durations), _now(), list(self._running.values())
        work = mean * max(0, unfinished - len(running))
        work += sum(max(0.0, mean - (now - trial.begun)) for trial in running)
        return work / min(self._slots, unfinished) or None

    def _left(self) -> str:
        left = self.seconds_left()
        return "time left unknown" if left is None else f"{clock(left)} left"

    def _best(self, setting: str) -> str:
        if setting not in self.best:
            return ""
        label, selection = self.best[setting]
        return f"best so far {selection:.1%} ({label})"

    def _counts(self) -> str:
        counts = {"done": self.ended["done"], "stopped early": self.ended["stopped"], "failed": self.ended["failed"]}
        shown = {word: n for word, n in counts.items() if n or word == "done"} | {"running": len(self._running)}
        return ", ".join(f"{n} {word}" for word, n in shown.items()) + f" of {self.total}"

    def __rich_console__(self, *_: Any) -> Iterator[RenderableType]:
        """The live view: all trials in two lines, then one for each that runs."""
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        head = Table.grid(padding=(0, 1, 0, 0))
        head.add_row("sweep", ProgressBar(self.total, sum(self.ended.values()), width=16), Text(self._counts()))
        yield head
        yield Text(f"{clock(_now() - self._begun)} elapsed, {self._left()}", no_wrap=True, overflow="crop")
        for setting in list(self.best)[:MOST_SETTINGS]:
            yield Text(self._best(setting), no_wrap=True, overflow="crop")
        rows = Table.grid(padding=(0, 2, 0, 0), expand=True)
        rows.add_column(no_wrap=True, overflow="crop", ratio=2)
        rows.add_column(no_wrap=True, overflow="crop", ratio=1)
        rows.add_column(no_wrap=True, justify="right")
        for trial in list(self._running.values()):  # a copy: the view is drawn by a thread of its own
            rows.add_row(Text(f"> {trial.label}"), Text(trial.stage), clock(_now() - trial.begun))
        yield rows


class _Live:
    """A rich live view of ``view``; messages stand above it."""

    def __init__(self, view: SweepView, stream: TextIO) -> None:
        from rich.console import Console
        from rich.live import Live

        self.console = Console(file=stream, force_terminal=True)
        self.live = Live(
            view,
            console=self.console,
            refresh_per_second=4,
            # a piped standard output is somebody's data: it must not be led to the terminal
            redirect_stdout=sys.stdout.isatty(),
        )
        self.start, self.stop = self.live.start, self.live.stop

    say = Live.say  # of the console alone
