"""Metrics out: JSON lines and TensorBoard in the run's folder, and the stages that a display shows (``displays``).

Every scalar of a stage is kept as well, so that the caller can store the curve with the stage's result and replay it
when it is cached.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np

from ..core.errors import RunError
from .console import display_on
from .progress import Scalar, Stage

if TYPE_CHECKING:
    from types import TracebackType


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
        self._display = display_on(sys.stderr if stream is None else stream, progress)

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
        self._display.say(text, "")

    def warn(self, text: str, severity: str = "warning") -> None:
        """A line that asks for attention, marked by its ``severity``: warning or error."""
        self._display.say(text, severity)

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
