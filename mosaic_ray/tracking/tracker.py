"""``Tracker`` writes a run's metrics to JSON lines and TensorBoard, and its progress to a display (``progress``).

A stage also keeps its scalars, so that the caller can store them with the stage's result and replay them when the
result is found in the store.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from ..core.errors import RunError
from ..core.text import visible
from ..core.types import Finding
from .progress import Inside, Scalar, StageProgress, display_on
from .reports import Reports


class Tracker:
    """Writes metrics, images and messages of one run; a context manager.

    ``run_dir``: the folder in which metrics.jsonl and tensorboard/ are written anew (cached stages are replayed into
    them); None: no files. ``progress``: False shows messages only. ``stream``: None means standard error.
    ``on_metric(tag, step, value)`` is called for every scalar, replayed ones too, ``on_stage(name)`` when a stage
    begins or is found cached, ``on_round(stage, done, total)`` after each round, ``on_finding(finding)`` for each
    finding that is warned of. ``reports`` gets scalars and images, for other projects' trackers. Before a stage the
    tracker calls ``before_stage()``, which a caller may set, and flushes TensorBoard's file; within a stage it is
    flushed every ten seconds.
    """

    before_stage: Callable[[], None] = staticmethod(lambda: None)

    def __init__(
        self,
        run_dir: Path | None,
        *,
        progress: bool | None = None,
        tensorboard: bool = True,
        stream: TextIO | None = None,
        on_metric: Callable[[str, int, float], None] | None = None,
        on_stage: Callable[[str], None] | None = None,
        on_round: Callable[[str, int, int | None], None] = lambda stage, done, total: None,
        on_finding: Callable[[Finding], None] = lambda finding: None,
        reports: Reports | None = None,
    ) -> None:
        self.on_round, self.on_finding, self.reports = on_round, on_finding, reports
        if reports:
            reports.begin_again()
        self._run_dir, self._on_metric, self._on_stage = run_dir, on_metric, on_stage or (lambda name: None)
        self._lines: TextIO | None = None
        self._board: Any = None
        if run_dir is not None:
            with self._writing():
                run_dir.mkdir(parents=True, exist_ok=True)
                # line-buffered: each metric is one write and can be read at once; ``close`` closes it
                self._lines = open(run_dir / "metrics.jsonl", "w", encoding="utf-8", buffering=1)  # noqa: SIM115
                shutil.rmtree(run_dir / "tensorboard", ignore_errors=True)
                if tensorboard:
                    from torch.utils.tensorboard import SummaryWriter

                    self._board = SummaryWriter(str(run_dir / "tensorboard"), flush_secs=10)
        self.display = display_on(sys.stderr if stream is None else stream, progress)
        self._stage: StageProgress | None = None

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # an error in the block matters more than a failure to flush the last metrics
        with contextlib.suppress(RunError) if kind else contextlib.nullcontext():
            self.close()

    def close(self) -> None:
        """Stop the display and close the files; a second call does nothing."""
        self.display.close()
        lines, board, self._lines, self._board = self._lines, self._board, None, None
        with self._writing():
            if lines:
                lines.close()
            if board:
                board.close()

    def stage(self, name: str, total: int | None = None, unit: str = "round") -> StageProgress:
        """Begin a stage of ``total`` units (None: unknown), in a ``with`` block."""
        self._enter(name)
        self._stage = StageProgress(self, name, total, unit)
        return self._stage

    @property
    def stage_name(self) -> str:
        """Return the name of the stage that began last; empty before the first."""
        return self._stage.name if self._stage else ""

    def inside(self, unit: str, count: int = 1, units: float = 0.0) -> Inside:
        """Return a counter of steps for the stage that is running, see ``Inside``; it shows nothing between stages."""
        return Inside(self._stage if self._stage and self._stage.state == "running" else None, unit, count, units)

    def replay(self, stage_name: str, recorded: Sequence[Scalar]) -> None:
        """Write the scalars of a cached stage again, and show it as cached."""
        self._enter(stage_name)
        self.replay_scalars(stage_name, recorded)
        stage = StageProgress(self, stage_name, None, "")
        stage.state = "cached"
        self.display.cached(stage)

    def _enter(self, stage_name: str) -> None:
        self.before_stage()
        self._to_board("flush")
        if self.reports:
            self.reports.complain(self.warn)
        self._on_stage(stage_name)

    @property
    def draws(self) -> bool:
        """Return whether images, histograms and texts are written."""
        return self._board is not None or bool(self.reports)

    def image(self, tag: str, step: int, array: np.ndarray) -> None:
        """Write an image uint8 [H, W] or [C, H, W] to TensorBoard and ``reports``."""
        if self.reports:
            self.reports.image(tag, step, array)
        self._to_board("add_image", tag, array, step, dataformats="HW" if array.ndim == 2 else "CHW")

    def histogram(self, tag: str, step: int, values: np.ndarray) -> None:
        """Write a histogram of ``values`` (any shape) to TensorBoard: of those below 1e20, where its last bin ends."""
        if (found := np.asarray(values)[np.abs(values) < 1e20]).size:
            self._to_board("add_histogram", tag, found, step)

    def text(self, tag: str, markdown: str) -> None:
        """Write a text to TensorBoard."""
        self._to_board("add_text", tag, markdown)

    def layout(self, charts: Mapping[str, Mapping[str, Sequence[Any]]]) -> None:
        """Set TensorBoard's page of combined charts: category -> title -> [kind, tags]."""
        self._to_board("add_custom_scalars", charts)

    def say(self, text: str) -> None:
        """Print a line."""
        self.display.say(text, "")

    def warn(self, text: str, severity: str = "warning") -> None:
        """Print a line that is marked by its ``severity``: warning or error."""
        self.display.say(text, severity)

    def replay_scalars(self, stage: str, recorded: Sequence[Scalar]) -> list[Scalar]:
        """Write recorded scalars again, and return them."""
        return [self.scalar(stage, tag, step, math.nan if value is None else value) for tag, step, value in recorded]

    def scalar(self, stage: str, tag: str, step: int, value: float) -> Scalar:
        """Write one scalar to all files and to ``on_metric``; return it as it is recorded."""
        kept = value if math.isfinite(value) else None
        with self._writing():
            if self._lines:
                self._lines.write(json.dumps({"stage": stage, "tag": tag, "step": step, "value": kept}) + "\n")
        self._to_board("add_scalar", tag, value, step)
        if self.reports:
            self.reports.scalar(tag, step, value)
        if self._on_metric:
            self._on_metric(tag, step, value)
        return [tag, step, kept]

    def _to_board(self, method: str, *args: Any, **options: Any) -> None:
        """Call a method of TensorBoard's writer, if there is one; its first argument may be a tag."""
        if self._board:
            args = tuple(visible(word, "") if isinstance(word, str) else word for word in args[:1]) + args[1:]
            with self._writing():
                getattr(self._board, method)(*args, **options)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RunError(f"run folder {self._run_dir}: {error.strerror or error}") from error
