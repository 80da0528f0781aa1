"""Show a run's progress: ``StageProgress``, with which a stage reports it, and the displays.

A display shows a live row for each stage on a terminal, plain lines elsewhere.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TextIO

from ..core.text import visible
from .notebook import Cell, in_notebook

#: ``[tag, step, value]``; the value is None where it was not finite, so that it survives JSON.
Scalar = list[Any]

_now = time.monotonic

#: Seconds between two looks at what is done inside a unit.
LOOK_SECONDS = 0.2


def clock(seconds: float) -> str:
    """Format ``seconds`` as ``m:ss``, or ``h:mm:ss`` from an hour on."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"


class Output(Protocol):
    """The part of ``tracker.Tracker`` that a stage writes to."""

    display: Quiet
    on_round: Callable[[str, int, int | None], None]

    def scalar(self, stage: str, tag: str, step: int, value: float) -> Scalar: ...
    def replay_scalars(self, stage: str, recorded: Sequence[Scalar]) -> list[Scalar]: ...


class StageProgress:
    """A running stage; made by ``Tracker.stage`` and used in a ``with`` block."""

    def __init__(self, tracker: Output, name: str, total: int | None, unit: str) -> None:
        self._tracker = tracker
        self.name, self.total, self.unit = name, total, unit
        self.recorded: list[Scalar] = []
        self.done = self.resumed_at = 0
        self.position = 0.0  # units that are done, and the share of those under way
        self.note = self.detail = ""
        self.state = "running"  # then done or stopped; cached for a replay
        self._begun, self._ended, self._working = _now(), math.nan, False
        self._looked = self._work_begun = self._begun

    def __enter__(self) -> StageProgress:
        self._begun = self._work_begun = _now()
        self._tracker.display.begin(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._ended = _now()
        self.state = "done" if kind is None else "stopped"
        self._tracker.display.end(self)

    def scalar(self, tag: str, step: int, value: float) -> None:
        """Record one point of the curve ``tag``."""
        self.recorded.append(self._tracker.scalar(self.name, tag, int(step), float(value)))

    def advance(self, n: int = 1, note: str = "") -> None:
        """Count ``n`` more finished units; ``note`` is shown beside them, such as the loss."""
        self.done += n
        self.position = max(self.position, self.done)
        self.note = note or self.note
        self._tracker.display.advance(self)
        if self.unit == "round":
            self._tracker.on_round(self.name, self.done, self.total)

    def resume(self, recorded: Sequence[Scalar], done: int) -> None:
        """Continue from a checkpoint: write its scalars again and count ``done`` units as finished."""
        self.recorded += self._tracker.replay_scalars(self.name, recorded)
        self.done = self.resumed_at = done
        self.position = max(self.position, done)
        if done:
            self._tracker.display.resume(self)

    def begin_work(self) -> None:
        """Count time for the pace from here, at the first call: before, processes were started."""
        if not self._working and self.position <= self.resumed_at:
            self._work_begun = _now()
        self._working = True

    def inside(self, position: float, detail: str) -> None:
        """Show that ``position`` units are done, a fraction counts, and ``detail`` beside the count: ``step 3/9``."""
        self.position, self.detail = max(self.position, position), detail
        if _now() - self._looked >= LOOK_SECONDS:
            self._looked = _now()
            self._tracker.display.inside(self)

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
        fresh, seconds = self.position - self.resumed_at, self.seconds - (self._work_begun - self._begun)
        if fresh <= 0 or seconds <= 0:
            return []
        rate = fresh / seconds
        words = [f"{rate:.3g} {self.unit}/s" if rate >= 1 else f"{1 / rate:.3g} s/{self.unit}"]
        return words if self.total is None else [*words, f"{clock(max(0, self.total - self.position) / rate)} left"]


class Inside:
    """Count steps of a stage's parts (clients, say) while none of them is done.

    Args:
        stage: None: nothing is shown.
        unit: name of a step.
        count: number of parts. A part whose number of steps is unknown counts as the mean of the others.
        units: units of the stage that all parts make together.
    """

    def __init__(self, stage: StageProgress | None, unit: str, count: int = 1, units: float = 0.0) -> None:
        self._stage, self._unit, self._count, self._units = stage, unit, count, units
        self._begun = stage.position if stage else 0.0
        self._done: dict[int, int] = {}
        self._totals: dict[int, int] = {}

    def __call__(self, part: int, done: int, total: int) -> None:
        """Set the steps of ``part`` that are done, of ``total`` (0: unknown)."""
        if self._stage is None:
            return
        self._stage.begin_work()
        if total:
            self._done[part], self._totals[part] = done, total
            self._show()

    def finish(self, part: int) -> None:
        """Count all steps of ``part`` as done."""
        if self._totals:
            mean = round(sum(self._totals.values()) / len(self._totals))
            self._done[part] = self._totals.setdefault(part, mean)
            self._show()

    def _show(self) -> None:
        assert self._stage is not None
        total = round(sum(self._totals.values()) * self._count / len(self._totals))
        done = sum(self._done.values())
        share = min(1.0, done / total)
        self._stage.inside(self._begun + self._units * share, f"{self._unit} {done}/{total}")

    def close(self) -> None:
        """Show no more steps."""
        if self._stage is not None:
            self._stage.detail = ""


class Quiet:
    """Print messages only."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def begin(self, stage: StageProgress) -> None:
        pass

    advance = resume = inside = end = cached = begin

    def say(self, text: str, mark: str) -> None:
        with contextlib.suppress(OSError):  # its reader went away; the run goes on
            self.stream.write(visible(f"{mark}: {text}\n" if mark else f"{text}\n"))
            self.stream.flush()

    def close(self) -> None:
        pass


class Lines(Quiet):
    """Print a line when a stage begins, at its first advance, at each tenth or every ten seconds, and when it ends."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self.tenth: dict[StageProgress, int] = {}  # tenth of the last line, from a stage's first advance on
        self.last = 0.0

    def _line(self, stage: StageProgress, *words: str) -> None:
        self.last = _now()
        self.say(f"{stage.name}: " + ", ".join(word for word in words if word), "")

    def begin(self, stage: StageProgress) -> None:
        self._line(stage, "begins", "" if stage.total is None else stage.count)

    def resume(self, stage: StageProgress) -> None:
        self._line(stage, f"resumed at {stage.count}")

    def advance(self, stage: StageProgress) -> None:
        tenth = 0 if not stage.total else 10 * stage.done // stage.total
        if stage in self.tenth and tenth == self.tenth[stage] and _now() - self.last < 10:
            return
        self.tenth[stage] = tenth
        self._line(stage, stage.count, *stage.pace, stage.note)

    def end(self, stage: StageProgress) -> None:
        self._line(stage, f"{stage.state} after {stage.seconds:.1f} s")

    def cached(self, stage: StageProgress) -> None:
        self.say(f"{stage.name}: cached", "")


class Live(Quiet):
    """Draw a rich live view: a row for each stage, messages above them."""

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, ProgressColumn, Task
        from rich.table import Column
        from rich.text import Text

        class Row(ProgressColumn):
            def __init__(self, words: Callable[[Any], str], **layout: Any) -> None:
                self.words = words
                super().__init__(Column(no_wrap=True, overflow="ellipsis", **layout))

            def render(self, task: Task) -> Text:
                return Text(visible(self.words(task.fields["stage"]), ""))

        super().__init__(stream)
        self.console = Console(file=stream, force_terminal=True)
        ascii_only = self.console.options.ascii_only
        tick = "+" if ascii_only else "✓"
        marks = {"running": ">", "done": tick, "cached": tick, "stopped": "x"}
        self.progress = Progress(
            Row(lambda stage: marks[stage.state]),
            Row(lambda stage: stage.name),
            BarColumn(bar_width=16),
            Row(_status),
            Row(lambda stage: stage.note, ratio=1),
            console=self.console,
            refresh_per_second=4,
            expand=True,
            # a piped standard output is data and must not go to the terminal
            redirect_stdout=sys.stdout.isatty(),
        )
        self.tasks: dict[StageProgress, Any] = {}

    def begin(self, stage: StageProgress) -> None:
        self.tasks[stage] = self.progress.add_task(stage.name, total=stage.total, stage=stage)
        self.draw(at_once=True)

    def advance(self, stage: StageProgress) -> None:
        self.progress.update(self.tasks[stage], completed=stage.position)
        self.draw()

    resume = inside = advance

    def end(self, stage: StageProgress) -> None:
        if stage.state == "done":
            self.progress.update(self.tasks[stage], total=max(stage.done, 1), completed=max(stage.done, 1))
        else:
            self.close()  # restores the terminal before the failure is printed

    def cached(self, stage: StageProgress) -> None:
        self.progress.add_task(stage.name, total=1, completed=1, stage=stage)
        self.draw(at_once=True)

    def draw(self, at_once: bool = False) -> None:
        """Begin to draw; from then on a thread does."""
        if at_once:
            self.progress.start()

    def say(self, text: str, mark: str) -> None:
        self.console.print(line_of(text, mark), soft_wrap=True)

    def close(self) -> None:
        self.progress.stop()


class Notebook(Live):
    """Show the rows of ``Live`` in the output of a notebook's cell, and messages below them."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self.cell, self.lines = Cell(), list[Any]()

    def draw(self, at_once: bool = False) -> None:
        self.cell.show(self.progress, *self.lines, at_once=at_once)

    def end(self, stage: StageProgress) -> None:
        super().end(stage)
        self.draw(at_once=True)

    def say(self, text: str, mark: str) -> None:
        self.lines.append(line_of(text, mark))
        self.draw(at_once=True)

    def close(self) -> None:
        self.draw(at_once=True)


def line_of(text: str, mark: str) -> Any:
    """Return a message as rich text, in the colour of its ``mark``."""
    from rich.text import Text

    style = {"warning": "yellow", "error": "red"}.get(mark, "")
    return Text(visible(f"{mark}: {text}" if mark else text), style=style)


def _status(stage: StageProgress) -> str:
    if stage.state == "running":
        return "  ".join([f"{stage.count} {stage.detail}".strip(), clock(stage.seconds), *stage.pace])
    if stage.state == "done":
        return f"{stage.seconds:.1f} s"
    return stage.state if stage.state == "cached" else f"{stage.count}  {stage.state}"


def is_terminal(stream: TextIO) -> bool:
    """Return whether a live view can be drawn on ``stream``."""
    return stream.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")


def display_on(stream: TextIO, progress: bool | None) -> Quiet:
    """Return a display for ``stream``: live on a terminal or in a notebook, else lines.

    Only messages where ``progress`` is False.
    """
    if progress is False:
        return Quiet(stream)
    if stream is sys.stderr and in_notebook():
        return Notebook(stream)
    return Live(stream) if is_terminal(stream) else Lines(stream)
