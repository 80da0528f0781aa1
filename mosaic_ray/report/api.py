"""Read runs and sweeps in a notebook: ``load_run(path)`` and ``load_sweep(path)``, with the report's figures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import RequestError
from .load import RunReport, SweepReport, read_run, read_sweep

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Run(RunReport):
    """A run that can draw the report's figures."""

    def plot(self, name: str, **options: Any) -> Figure:
        """Draw the figure ``name``, such as ``rounds``; ``NotAvailable`` where this run lacks its data."""
        from .figures.run import PLOTS

        return _named(PLOTS, name)(self, **options)


class Sweep(SweepReport):
    """A sweep that can draw the report's figures."""

    def trial(self, name: str) -> Run:
        """Read one trial as a run."""
        return load_run(self.trial_folder(name))

    def plot(self, name: str, **options: Any) -> Figure:
        """Draw the figure ``name``, such as ``ladder``; ``response`` takes ``knob=``."""
        from .figures.sweep import PLOTS

        return _named(PLOTS, name)(self, **options)


def load_run(path: str | Path) -> Run:
    """Read the run in the folder ``path``; ``RequestError`` where there is none, or its files are damaged."""
    return Run(**vars(read_run(path)))


def load_sweep(path: str | Path) -> Sweep:
    """Read the sweep in the folder ``path``; ``RequestError`` where there is none, or its files are damaged."""
    return Sweep(**vars(read_sweep(path)))


def _named(figures: Mapping[str, Any], name: str) -> Any:
    if name not in figures:
        raise RequestError(f'plot("{name}"): it may be {", ".join(figures)}')
    return figures[name]
