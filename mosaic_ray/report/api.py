"""Read runs and sweeps in a notebook: ``load_run(path)`` and ``load_sweep(path)``, with the report's figures.

``load_model(path)`` reads a model that `mosaic export` wrote.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from ..core.errors import RequestError
from .fragment import html_table, paragraph
from .load import RunReport, SweepReport, read_run, read_sweep
from .text import ROLE_NAMES, percent, points

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .models import ImageClassifier, ImageGenerator, SampleClassifier, SampleGenerator

    Module: TypeAlias = ImageClassifier | ImageGenerator | SampleClassifier | SampleGenerator


class Run(RunReport):
    """A run that can draw the report's figures."""

    def plot(self, name: str, **options: Any) -> Figure:
        """Draw the figure ``name``, such as ``rounds``; ``NotAvailable`` where this run lacks its data."""
        from .figures.run import PLOTS

        return _drawn(PLOTS, name, self, options)

    def model(self, role: str = "final", *, client: int | None = None, generator: int | None = None) -> Module:
        """Return a model as a ``torch.nn.Module`` in eval mode that takes images as the data set has them.

        ``run.model()`` is the final one, ``run.model("initial")`` that of another role, ``run.model(client=3)`` a
        client's own after the warm-up, ``run.model(generator=3)`` a client's generator; ``client:3`` and
        ``generator:3`` name the same. Classifiers map images [N, C, H, W], uint8 or floats in [0, 1], to logits;
        generators map latents, or how many, to images. Samples of several modalities are mappings by name of modality:
        a classifier takes one, ``model({"image": images})``, with what is absent left out; a generator returns one. A
        network of your own is imported by its name.

        Raises:
            RequestError: where the run lacks this model; it names those that there are.
        """
        from .models import model_of

        return model_of(self, role, client, generator)

    def export(
        self, to: str = "pt", role: str = "final", output: str | Path | None = None, *, force: bool = False
    ) -> Path:
        """Write a model as `mosaic export` does (``to``: pt, onnx, torchscript, hub) and return where it lies."""
        from .model_files import export

        return export(self, to, role, output, force)

    def _repr_html_(self) -> str:
        from .html.run import about, verdict
        from .tables import client_rows, subset_rows

        rows = [[role, what, percent(self.accuracy(role)), points(self.gain) if role == "final" else ""]
                for role, what in ROLE_NAMES.items() if self.accuracy(role) is not None]  # fmt: skip
        parts = [paragraph(f"{self.name}: {self.status}", "h4"), paragraph(about(self)), paragraph(verdict(self))]
        bold = [number for number, (role, *_) in enumerate(rows) if role == "final"]
        parts += [html_table(["model", "", "test accuracy", "gain over control"], rows, bold=bold)] if rows else []
        if self.summary.client_accuracy:
            parts.append(html_table(*client_rows(self.summary.client_accuracy)))
        if self.summary.subset_accuracy:
            parts.append(html_table(*subset_rows(self.summary.subset_accuracy)))
        return "\n".join(parts)


class Sweep(SweepReport):
    """A sweep that can draw the report's figures."""

    def trial(self, name: str) -> Run:
        """Read one trial as a run."""
        return load_run(self.trial_folder(name))

    def plot(self, name: str, **options: Any) -> Figure:
        """Draw the figure ``name``, such as ``ladder``; ``response`` takes ``knob=``."""
        from .figures.sweep import PLOTS

        return _drawn(PLOTS, name, self, options)

    def _repr_html_(self) -> str:
        from .html.sweep import about, best_of, verdict

        best = self.best() if self.rows and len(self.done) and not self.comparison else []
        parts = [paragraph(self.name, "h4"), paragraph(about(self)), paragraph(verdict(self, best))]
        if self.comparison:
            return "\n".join([*parts, self.comparison._repr_html_()])
        tables = best_of(self, best).tables
        return "\n".join([*parts, *(html_table(t.heads, t.rows, t.title, [0] if t.best else ()) for t in tables)])


def load_run(path: str | Path) -> Run:
    """Read the run in the folder ``path``; ``RequestError`` where there is none, or its files are damaged."""
    return Run(**vars(read_run(path)))


def load_sweep(path: str | Path) -> Sweep:
    """Read the sweep in the folder ``path``; ``RequestError`` where there is none, or its files are damaged."""
    return Sweep(**vars(read_sweep(path)))


def load_model(path: str | Path, own_code: bool = False) -> Module:
    """Read a model that `mosaic export --to hub` or `--to pt` wrote; ``RequestError`` where there is none.

    ``own_code``: import the function that the file names where the network is a user's own, and call it. Nothing else
    that is read can run code.
    """
    from .models import load_model

    return load_model(path, own_code)


def _drawn(figures: Mapping[str, Callable[..., Figure]], name: str, report: Any, options: dict[str, Any]) -> Figure:
    """Draw a figure that notebooks show: Matplotlib arranges that itself only once pyplot was imported."""
    if name not in figures:
        raise RequestError(f'plot("{name}"): it may be {", ".join(figures)}')
    figure = figures[name](report, **options)
    figure._repr_png_ = partial(_png, figure)  # type: ignore[attr-defined] # what IPython asks an object for
    return figure


def _png(figure: Figure) -> bytes:
    """Return ``figure`` as a PNG file."""
    file = io.BytesIO()
    figure.savefig(file, format="png", bbox_inches="tight", metadata={"Software": None})
    return file.getvalue()
