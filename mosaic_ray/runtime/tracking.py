"""Metrics out: JSON lines and TensorBoard in the run's folder, and what a person sees while a run goes on.

On a terminal there is a live row for each stage; elsewhere there are plain lines on the same stream. Every scalar of a
stage is kept as well, so that the caller can store the curve with the stage's result and replay it when it is cached.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TextIO

import numpy as np

from ..errors import RunError

if TYPE_CHECKING:
    from types import TracebackType

#: ``[tag, step, value]``; the value is None where it was not finite, so that it survives JSON.
Scalar = list[Any]

_SECONDS_BETWEEN_LINES = 10.0
_now = time.monotonic


def image_grid(images: np.ndarray, columns: int) -> np.ndarray:
    """uint8 [N, C, H, W] as one image uint8 [C, H', W'], row by row, white lines of one pixel between."""
    count, channels, height, width = images.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    grid = np.full((channels, rows * (height + 1) - 1, columns * (width + 1) - 1), 255, np.uint8)
    for index, image in enumerate(images):
        top, left = index // columns * (height + 1), index % columns * (width + 1)
        grid[:, top : top + height, left : left + width] = image
    return grid


class Stage:
    """A stage under way; made by ``Tracker.stage`` and used in a ``with`` block."""

    def __init__(self, tracker: Tracker, name: str, total: int | None, unit: str) -> None:
        self._tracker = tracker
        self.name, self.total, self.unit = name, total, unit
        self.recorded: list[Scalar] = []
        self.done = self.resumed_at = 0
        self.note = ""
        self.state = "running"  # then done or stopped
        self._begun, self._ended = _now(), math.nan

    def __enter__(self) -> Stage:
        self._begun = _now()
        self._tracker._display.begin(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended = _now()
        self.state = "done" if kind is None else "stopped"
        self._tracker._display.end(self)

    def scalar(self, tag: str, step: int, value: float) -> None:
        """One point of the curve ``tag``."""
        self.recorded.append(self._tracker._emit(self.name, tag, int(step), float(value)))

    def image(self, tag: str, step: int, array: np.ndarray) -> None:
        """An image uint8 [H, W] or [C, H, W] for TensorBoard."""
        self._tracker.image(tag, step, array)

    def histogram(self, tag: str, step: int, values: np.ndarray) -> None:
        """A histogram of the finite ones of ``values`` (any shape) for TensorBoard."""
        self._tracker.histogram(tag, step, values)

    def advance(self, n: int = 1, note: str = "") -> None:
        """``n`` more units are done; ``note`` is a few words for the person who looks on, such as the loss."""
        self.done += n
        self.note = note or self.note
        self._tracker._display.advance(self)

    def resume(self, recorded: Sequence[Scalar], done: int) -> None:
        """Go on from a checkpoint: its scalars are written out again and ``done`` units count as done."""
        self.recorded += self._tracker._again(self.name, recorded)
        self.done = self.resumed_at = done
        self._tracker._display.resume(self)

    @property
    def seconds(self) -> float:
        """Since the stage began, until it ended."""
        return (_now() if math.isnan(self._ended) else self._ended) - self._begun

    @property
    def count(self) -> str:
        """``round 3/10``, or ``round 3`` where the total is unknown."""
        return f"{self.unit} {self.done}" + ("" if self.total is None else f"/{self.total}")

    @property
    def pace(self) -> list[str]:
        """Rate and time remaining, as far as they are known."""
        fresh, seconds = self.done - self.resumed_at, self.seconds
        if fresh <= 0 or seconds <= 0:
            return []
        rate = fresh / seconds
        words = [f"{rate:.3g} {self.unit}/s" if rate >= 1 else f"{1 / rate:.3g} s/{self.unit}"]
        return words if self.total is None else [*words, f"{_clock(max(0, self.total - self.done) / rate)} left"]


def _clock(seconds: float) -> str:
    """``m:ss``, with hours in front where there are any."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"


class Display(Protocol):
    """What a person sees."""

    def begin(self, stage: Stage) -> None: ...
    def advance(self, stage: Stage) -> None: ...
    def resume(self, stage: Stage) -> None: ...
    def end(self, stage: Stage) -> None: ...
    def cached(self, name: str) -> None: ...
    def say(self, text: str, warning: bool) -> None: ...
    def close(self) -> None: ...


class _Quiet:
    """Messages only."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def begin(self, stage: Stage) -> None:
        pass

    advance = resume = end = begin

    def cached(self, name: str) -> None:
        pass

    def say(self, text: str, warning: bool) -> None:
        self.stream.write(("warning: " if warning else "") + text + "\n")
        self.stream.flush()

    def close(self) -> None:
        pass


class _Lines(_Quiet):
    """A line when a stage begins, at its first advance, at each tenth or every ten seconds, and when it ends."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self.tenth: dict[Stage, int] = {}  # of the line before; a stage is in it from its first advance on
        self.last = 0.0

    def _line(self, stage: Stage, *words: str) -> None:
        self.last = _now()
        self.say(f"{stage.name}: " + ", ".join(word for word in words if word), False)

    def begin(self, stage: Stage) -> None:
        self._line(stage, "begins", "" if stage.total is None else stage.count)

    def resume(self, stage: Stage) -> None:
        self._line(stage, f"resumed at {stage.count}")

    def advance(self, stage: Stage) -> None:
        tenth = 0 if not stage.total else 10 * stage.done // stage.total
        if stage in self.tenth and tenth == self.tenth[stage] and _now() - self.last < _SECONDS_BETWEEN_LINES:
            return
        self.tenth[stage] = tenth
        self._line(stage, stage.count, *stage.pace, stage.note)

    def end(self, stage: Stage) -> None:
        self._line(stage, f"{stage.state} after {stage.seconds:.1f} s")

    def cached(self, name: str) -> None:
        self.say(f"{name}: cached", False)


class _Live:
    """A rich live view: a row for each stage, messages above them."""

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, ProgressColumn, Task
        from rich.table import Column
        from rich.text import Text

        class Row(ProgressColumn):
            """``words`` of the row's stage."""

            def __init__(self, words: Callable[[Any], str], **layout: Any) -> None:
                self.words = words
                super().__init__(Column(no_wrap=True, overflow="ellipsis", **layout))

            def render(self, task: Task) -> Text:
                return Text(self.words(task.fields["row"]))

        self.console = Console(file=stream, force_terminal=True)
        ascii_only = self.console.options.ascii_only
        marks = {"running": ">", "done": "+" if ascii_only else "✓", "stopped": "x"}
        self.progress = Progress(
            Row(lambda row: marks["done" if isinstance(row, str) else row.state]),
            Row(lambda row: row if isinstance(row, str) else row.name),
            BarColumn(bar_width=16),
            Row(_status),
            Row(lambda row: "" if isinstance(row, str) else row.note, ratio=1),
            console=self.console,
            refresh_per_second=4,
            expand=True,
            # a piped standard output is somebody's data: it must not be led to the terminal
            redirect_stdout=sys.stdout.isatty(),
        )
        self.tasks: dict[Stage, Any] = {}

    def begin(self, stage: Stage) -> None:
        self.tasks[stage] = self.progress.add_task(stage.name, total=stage.total, row=stage)
        self.progress.start()

    def advance(self, stage: Stage) -> None:
        self.progress.update(self.tasks[stage], completed=stage.done)

    resume = advance

    def end(self, stage: Stage) -> None:
        if stage.state == "done":
            self.progress.update(self.tasks[stage], total=max(stage.done, 1), completed=max(stage.done, 1))
        else:
            self.progress.stop()  # whatever is printed about the failure finds a sane terminal

    def cached(self, name: str) -> None:
        self.progress.add_task(name, total=1, completed=1, row=name)
        self.progress.start()

    def say(self, text: str, warning: bool) -> None:
        from rich.text import Text

        self.console.print(Text(f"warning: {text}", style="yellow") if warning else Text(text), soft_wrap=True)

    def close(self) -> None:
        self.progress.stop()


def _status(row: Stage | str) -> str:
    """What stands behind a stage's bar; a cached stage is its name alone."""
    if isinstance(row, str):
        return "cached"
    if row.state == "done":
        return f"{row.seconds:.1f} s"
    words = [row.count, _clock(row.seconds), *row.pace] if row.state == "running" else [row.count, row.state]
    return "  ".join(words)


def _display(stream: TextIO, progress: bool | None) -> Display:
    if progress is False:
        return _Quiet(stream)
    if stream.isatty() and os.environ.get("TERM") not in ("dumb", "unknown"):
        return _Live(stream)
    return _Lines(stream)


class Tracker:
    """The run's one way out for metrics, images and messages; a context manager.

    ``run_dir``: where metrics.jsonl and tensorboard/ are begun anew (a cached stage is replayed into them); None: no
    files. ``progress``: False shows messages only. ``stream``: None means standard error. ``on_metric(tag, step,
    value)`` is called for every scalar, replayed ones too, ``on_stage(name)`` when a stage begins or is found cached.
    Before that, ``between_stages()`` may be set to show what has been stored so far, and TensorBoard's file is brought
    up to date; within a stage that happens every ten seconds.
    """

    between_stages: Callable[[], None] = staticmethod(lambda: None)

    def __init__(
        self,
        run_dir: Path | None,
        *,
        progress: bool | None = None,
        tensorboard: bool = True,
        stream: TextIO | None = None,
        on_metric: Callable[[str, int, float], None] | None = None,
        on_stage: Callable[[str], None] | None = None,
    ) -> None:
        self._run_dir, self._on_metric, self._on_stage = run_dir, on_metric, on_stage or (lambda name: None)
        self._lines: TextIO | None = None
        self._board: Any = None
        if run_dir is not None:
            with self._writing():
                self._open(run_dir, tensorboard)
        self._display = _display(sys.stderr if stream is None else stream, progress)

    def _open(self, run_dir: Path, tensorboard: bool) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        # line-buffered: each metric can be read the moment it is known, and is one write
        self._lines = open(run_dir / "metrics.jsonl", "w", encoding="utf-8", buffering=1)  # noqa: SIM115 (close closes it)
        shutil.rmtree(run_dir / "tensorboard", ignore_errors=True)
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(run_dir / "tensorboard"), flush_secs=10)

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # an error on its way out is the one to tell, not that the last metrics could not be flushed
        with contextlib.suppress(RunError) if kind else contextlib.nullcontext():
            self.close()

    def close(self) -> None:
        """Stop the view and finish the files; again is harmless."""
        self._display.close()
        lines, board, self._lines, self._board = self._lines, self._board, None, None
        with self._writing():
            if lines:
                lines.close()
            if board:
                board.close()

    def stage(self, name: str, total: int | None = None, unit: str = "round") -> Stage:
        """A stage of ``total`` units (None: unknown), to be used in a ``with`` block."""
        self._enter(name)
        return Stage(self, name, total, unit)

    def replay(self, stage_name: str, recorded: Sequence[Scalar]) -> None:
        """A cached stage: its scalars are written out again, and it is shown as cached."""
        self._enter(stage_name)
        self._again(stage_name, recorded)
        self._display.cached(stage_name)

    def _enter(self, stage_name: str) -> None:
        self.between_stages()
        if self._board:
            with self._writing():
                self._board.flush()
        self._on_stage(stage_name)

    @property
    def draws(self) -> bool:
        """Whether images, histograms and texts go anywhere."""
        return self._board is not None

    def scalar(self, stage: str, tag: str, step: int, value: float) -> None:
        """A scalar that no open stage records (a client's curve, kept with that client's result)."""
        self._emit(stage, tag, step, value)

    def image(self, tag: str, step: int, array: np.ndarray) -> None:
        """An image uint8 [H, W] or [C, H, W] for TensorBoard."""
        if self._board:
            with self._writing():
                self._board.add_image(tag, array, step, dataformats="HW" if array.ndim == 2 else "CHW")

    def histogram(self, tag: str, step: int, values: np.ndarray) -> None:
        """A histogram of the finite ones of ``values`` (any shape) for TensorBoard."""
        if self._board and (finite := np.asarray(values)[np.isfinite(values)]).size:
            with self._writing():
                self._board.add_histogram(tag, finite, step)

    def text(self, tag: str, markdown: str) -> None:
        """A text for TensorBoard."""
        if self._board:
            with self._writing():
                self._board.add_text(tag, markdown)

    def layout(self, charts: Mapping[str, Mapping[str, Sequence[Any]]]) -> None:
        """TensorBoard's page of curves that stand together: category -> title -> [kind, tags]."""
        if self._board:
            with self._writing():
                self._board.add_custom_scalars(charts)

    def say(self, text: str) -> None:
        """A line for the person who looks on."""
        self._display.say(text, False)

    def warn(self, text: str) -> None:
        """A line that asks for attention."""
        self._display.say(text, True)

    def _again(self, stage: str, recorded: Sequence[Scalar]) -> list[Scalar]:
        return [self._emit(stage, tag, step, math.nan if value is None else value) for tag, step, value in recorded]

    def _emit(self, stage: str, tag: str, step: int, value: float) -> Scalar:
        """Write one scalar everywhere; returns it as it is recorded."""
        kept = value if math.isfinite(value) else None
        with self._writing():
            if self._lines:
                self._lines.write(json.dumps({"stage": stage, "tag": tag, "step": step, "value": kept}) + "\n")
            if self._board:
                self._board.add_scalar(tag, value, step)
        if self._on_metric:
            self._on_metric(tag, step, value)
        return [tag, step, kept]

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RunError(f"run folder {self._run_dir}: {error.strerror or error}") from error
