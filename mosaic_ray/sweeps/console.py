"""Show the progress of a sweep: a live view on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TextIO

from ..tracking.notebook import Cell, in_notebook
from ..tracking.progress import Quiet, clock, is_terminal, line_of

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live

_now = time.monotonic

#: The live view shows the best trial of so many settings.
MOST_SETTINGS = 4


@dataclass
class _Trial:
    label: str
    begun: float
    stage: str = ""


class SweepView:
    """Shows the progress of ``total`` trials; a context manager.

    ``stream``: None means standard error. ``progress``: False shows messages only. The best so far is shown for each
    setting (each omega, for example), since scores in two settings do not compare.
    """

    def __init__(self, total: int, *, stream: TextIO | None = None, progress: bool | None = None) -> None:
        self._cell = Cell() if stream is None and progress is not False and in_notebook() else None
        stream = sys.stderr if stream is None else stream
        self.total = total
        self.best: dict[str, tuple[str, float]] = {}  # setting -> label and selection
        self.ended = {"done": 0, "stopped": 0, "failed": 0}
        self._running: dict[str, _Trial] = {}
        self._begun, self._slots, self._succeeded = _now(), 1, False
        self._durations: list[float] = []
        self._live: Live | None = None
        self._said: list[RenderableType] = []
        if progress is not False and not self._cell and is_terminal(stream):
            from rich.console import Console
            from rich.live import Live

            # a piped standard output is data, which must not go to the terminal
            console, redirect = Console(file=stream, force_terminal=True), sys.stdout.isatty()
            self._live = Live(self, console=console, refresh_per_second=4, redirect_stdout=redirect)
        self._plain = Quiet(stream)
        self._lines = self._live is None and self._cell is None and progress is not False

    def __enter__(self) -> SweepView:
        self._begun = _now()
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()
        self._draw(at_once=True)

    def _draw(self, at_once: bool = False) -> None:
        if self._cell:
            self._cell.show(self, *self._said, at_once=at_once)

    def begin(self, trial: str, label: str) -> None:
        """Show that ``trial`` starts, for the first time or again."""
        self._running[trial] = _Trial(label, _now())
        self._slots = max(self._slots, len(self._running))
        if self._lines:
            self.say(f"{label}: begins")
        self._draw()

    def stage(self, trial: str, name: str, note: str = "") -> None:
        """Show the stage of ``trial``, with a short ``note`` such as "found"."""
        if trial in self._running:
            self._running[trial].stage = f"{name} {note}".rstrip()
            self._draw()

    def found(self, status: str, selection: float | None, label: str, setting: str = "") -> None:
        """Count a trial that has finished, in this session or an earlier one."""
        self.ended[status] += 1
        best = self.best.get(setting)
        if status == "done" and selection is not None and (best is None or selection > best[1]):
            self.best[setting] = label, selection

    def end(self, trial: str, status: str, selection: float | None, label: str, setting: str = "") -> None:
        """Show that ``trial`` is done, stopped or failed; ``selection`` in [0, 1] ranks the configurations."""
        if ran := self._running.pop(trial, None):
            self._durations.append(_now() - ran.begun)
        self._succeeded |= status != "failed"
        self.found(status, selection, label, setting)
        if self._lines:
            reached = "" if selection is None or status == "failed" else f"selection {selection:.1%}"
            outcome = {"done": reached or "done", "stopped": "stopped early", "failed": "failed"}[status]
            parts = filter(None, (outcome, self._best(setting), self._left()))
            self.say(f"[{sum(self.ended.values())}/{self.total}] {label}: {', '.join(parts)}")
        self._draw()

    def drop(self, trial: str) -> None:
        """Show that ``trial`` ended and is to run again."""
        self._running.pop(trial, None)

    def say(self, text: str, mark: str = "") -> None:
        """Print a line, above the live view; ``mark`` is "warning" or nothing."""
        if self._cell:
            self._said.append(line_of(text, mark))
            self._draw(at_once=True)
        elif self._live:
            self._live.console.print(line_of(text, mark), soft_wrap=True)
        else:
            self._plain.say(text, mark)

    def seconds_left(self) -> float | None:
        """Estimate the seconds left from the mean duration of the finished trials.

        None before a trial has succeeded, and when every remaining trial has already run longer than that mean.
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

    def __rich_console__(self, *_: Any) -> Iterator[RenderableType]:
        """Render the live view: two lines for the sweep, one for each setting's best, one for each running trial."""
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        words = {"done": "done", "stopped": "stopped early", "failed": "failed"}
        counts = [f"{n} {words[status]}" for status, n in self.ended.items() if n or status == "done"]
        counted = Text(f"{', '.join(counts)}, {len(self._running)} running of {self.total}")
        head = Table.grid(padding=(0, 1, 0, 0))
        head.add_row("sweep", ProgressBar(self.total, sum(self.ended.values()), width=16), counted)
        yield head
        yield Text(f"{clock(_now() - self._begun)} elapsed, {self._left()}", no_wrap=True, overflow="crop")
        for setting in list(self.best)[:MOST_SETTINGS]:
            yield Text(self._best(setting), no_wrap=True, overflow="crop")
        rows = Table.grid(padding=(0, 2, 0, 0), expand=True)
        rows.add_column(no_wrap=True, overflow="crop", ratio=2)
        rows.add_column(no_wrap=True, overflow="crop", ratio=1)
        rows.add_column(no_wrap=True, justify="right")
        for trial in list(self._running.values()):  # a copy, since another thread draws the view
            rows.add_row(Text(f"> {trial.label}"), Text(trial.stage), clock(_now() - trial.begun))
        yield rows
