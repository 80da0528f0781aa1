"""Watch a run from Python."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..core.types import Finding


class Callback:
    """Watches a run. Override the methods that you need.

    The calls come from the driver, in order, also for stages that are found in the storage. They change no number. An
    exception in one ends the run as any failure does; the same call of ``run`` resumes it.
    """

    def on_stage(self, name: str) -> None:
        """The stage ``name`` begins, or was found in the storage."""

    def on_round(self, stage: str, done: int, total: int | None) -> None:
        """``done`` of a stage's rounds are over, of ``total`` (None: unknown). Cached stages have no such calls."""

    def on_metric(self, tag: str, step: int, value: float) -> None:
        """A scalar, as in metrics.jsonl: its ``tag`` such as ``warmup/accuracy``, and the round or step."""

    def on_finding(self, finding: Finding) -> None:
        """A warning or an error about the run's health, once (docs/HEALTH.md)."""


def tracker_options(callbacks: Sequence[Callback]) -> dict[str, Any]:
    """Return the options of a ``Tracker`` that calls all of ``callbacks``, in order."""

    def call(name: str) -> Any:
        def each(*args: Any) -> None:
            for callback in callbacks:
                getattr(callback, name)(*args)

        return each

    return {name: call(name) for name in ("on_stage", "on_round", "on_metric", "on_finding")} if callbacks else {}
