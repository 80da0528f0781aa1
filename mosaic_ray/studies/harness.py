"""Run a study: its seeds one after another, its results on disk, its table.

A study uses the same stages as `mosaic run`, so both find each other's results in the store, and a killed command
resumes at its last stored stage.
"""

from __future__ import annotations

import csv
import io
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from ..config.resolve import as_dict, dotted, flatten, override, to_toml, without_share
from ..config.schema import ExperimentConfig
from ..core.seeding import stream
from ..core.text import csv_cell
from ..core.types import Dataset, Weights
from ..storage.hashing import plain, request_name, stage_key

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import RenderableType
    from torch import Tensor

    from ..execution.placement import Placement
    from ..federated.client import ClientContext
    from ..methods.mosaic.client_uploads import Generators
    from ..pipeline.context import RunContext, Shards
    from ..pipeline.rounds import Warmup
    from ..storage.store import StageResult, StageWriter, Store
    from ..tracking.progress import StageProgress
    from ..tracking.tracker import Tracker

#: Images that a network sees at once.
CHUNK = 500

#: One result row: names and plain values. ``Study.by`` and "seed" identify it; list values are per class.
Row = dict[str, Any]


@dataclass(frozen=True)
class StudyContext:
    """The environment of a study: data, storage, progress, client hosts, and the study's own options."""

    dataset: Dataset
    store: Store
    tracker: Tracker
    hosts: Placement
    options: Mapping[str, Any]

    def run(self, config: ExperimentConfig) -> AbstractContextManager[RunContext]:
        """Open a run of ``config``, to compute its stages one by one."""
        from ..runs.runner import open_run

        return open_run(config, self.dataset, self.store, self.tracker, self.hosts)


@dataclass(frozen=True)
class Study:
    """A study: its measurement with one seed, and the layout of its results.

    ``measure(context, config)`` returns a stored result with the rows as facts and arrays as the part "arrays".
    ``columns`` maps a row's numbers to a heading and a format; rows that agree in ``by`` are one column of the table,
    over seeds. ``figure`` draws on an empty figure. ``version`` rises when the mathematics of ``measure`` changes.
    """

    name: str
    measure: Callable[[StudyContext, ExperimentConfig], StageResult]
    by: str
    columns: Mapping[str, tuple[str, str]]
    figure: Callable[[Figure, Sequence[Row], Mapping[str, np.ndarray]], None]
    check: Callable[[ExperimentConfig, Dataset, Mapping[str, Any]], None] = lambda config, dataset, options: None
    version: int = 1


def uploads(run: RunContext) -> tuple[Shards, Warmup, Generators]:
    """Run the stages that studies begin with; return the clients' images, models and generators."""
    from ..methods.mosaic.graph import GENERATORS
    from ..pipeline.partition import deal
    from ..pipeline.rounds import warm_up

    shards, warmup = deal(run), warm_up(run)
    return shards, warmup, run.run(GENERATORS, warmup)


def generated(context: ClientContext, generator: Weights, count: int, *address: str | int) -> Iterator[Tensor]:
    """Yield ``count`` images of a generator in parts, float32 [n, C, H, W] in [-1, 1]; ``address``: of the draws."""
    import torch

    from ..distillation.generator_training import draw, load_generator

    maker = load_generator(context.config.generator, context.facts, generator).to(context.device)
    inputs = draw(maker, count, stream(context.config.seed, *address), context.device)
    for part in zip(*(tensor.split(CHUNK) for tensor in inputs), strict=True):
        with torch.no_grad():
            images = maker(*part).float()
        yield images


def measured(
    run: RunContext,
    study: Study,
    knobs: Mapping[str, Any],
    upstream: Sequence[str],
    compute: Callable[[], tuple[list[Row], dict[str, np.ndarray]]],
) -> StageResult:
    """Store the rows and arrays of ``compute``."""
    name = study.name.replace("-", "_")
    common = {"seed": run.config.seed, "threads": run.config.runtime.driver_threads}

    def work(writer: StageWriter, progress: StageProgress) -> dict[str, Any]:
        rows, arrays = compute()
        writer.add("arrays", arrays)
        progress.advance()
        return {"rows": rows}

    return run.stage(name, stage_key(name, study.version, {**knobs, **common}, upstream), work, total=1, unit="look")


def run_study(
    study: Study,
    config: ExperimentConfig,
    seeds: Sequence[int],
    options: Mapping[str, Any],
    *,
    storage: str = "./mosaic_runs",
    name: str | None = None,
    address: str = "local",
    fresh: bool = False,
    command: str = "",
    progress: bool | None = None,
    track: Sequence[str] = (),
) -> dict[str, Any]:
    """Measure with every seed and write results.json, results.csv, figure.png and config.toml; returns results.json.

    Its ``keys`` name the stage results that it used, which `mosaic store gc` keeps. ``track`` names trackers: the study
    is a run there, and so is each seed.

    ``RequestError`` before anything starts, ``RunError`` for a failure met while computing.
    """
    from ..execution.devices import describe, settle
    from ..execution.placement import Placement
    from ..runs.runner import check_name, look_at_devices, prepare, with_repairs
    from ..tracking.reports import Tracking
    from ..tracking.tracker import Tracker

    check_name(name, "experiments")
    dataset, store, there = prepare(config, storage, address, fresh)
    study.check(config, dataset, options)
    config = settle(config, look_at_devices([config], {config.data: dataset}, there, address))
    request = as_dict(override(without_share(config), {"seed": 0})) | {"seeds": list(seeds), "options": dict(options)}
    place = f"experiments/{name or request_name('study', 1, request, study.name, plain(config.data.name))}"
    tracking, group = Tracking(tuple(track)), place.rpartition("/")[2]
    where, values = (store.files, f"{place}/"), dotted({"study": study.name, **request})
    with (
        Tracker(None, progress=progress) as tracker,
        tracking.open(*where, group, "study", values, tracker.warn, anew=fresh) as reports,
    ):
        trackers = tracking.within(reports, group)

        def measured(config: ExperimentConfig) -> StageResult:
            if tracker.reports:
                tracker.reports.begin_again()
            return study.measure(context, config)

        store.log = tracker.warn
        for line in filter(None, [config.reason, describe(config, there)]):
            tracker.say(line)
        context = StudyContext(dataset, store, tracker, Placement(address), options)
        configs = [override(config, {"seed": seed}) for seed in seeds]
        results = []
        for config in configs:
            prefix = f"{place}/seed{config.seed}."
            with trackers.open(
                store.files, prefix, f"seed {config.seed}", "run", flatten(config), tracker.warn, anew=fresh
            ) as tracker.reports:
                results.append(with_repairs(store, partial(measured, config)))
        seeded = zip(seeds, results, strict=True)
        rows: list[Row] = [{"seed": seed, **row} for seed, r in seeded for row in r.facts["rows"]]
        columns = list(dict.fromkeys(name for row in rows for name in row))
        cells = [[row.get(name) for name in columns] for row in rows]
        shown = [[json.dumps(cell) if isinstance(cell, list) else cell for cell in row] for row in cells]
        reports.table("results", columns, shown)
    found = {
        "study": study.name, "command": command, "seeds": list(seeds), "options": dict(options),
        "summary": over_seeds(rows, study), "rows": rows, "config": as_dict(config),
        "paths": {"results": store.where(place)}, "keys": sorted(store.used),
    }  # fmt: skip
    title = f"{study.name}: {config.data.name}, seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"
    files = {
        "config.toml": to_toml(config).encode(),
        "results.csv": as_csv(rows).encode(),
        "figure.png": _png(title, lambda figure: study.figure(figure, rows, results[0].load("arrays"))),
        "results.json": (json.dumps(found, indent=1) + "\n").encode(),  # last, so that it marks a complete folder
    }
    for file, data in files.items():
        store.write(f"{place}/{file}", data)
    return found


def over_seeds(rows: Sequence[Row], study: Study) -> list[dict[str, Any]]:
    """Return a row for each value of ``study.by``: mean, sd (n - 1) and number of the values over seeds."""
    lines = []
    for value in dict.fromkeys(row[study.by] for row in rows):
        line: dict[str, Any] = {study.by: value}
        for column in study.columns:
            values = [row[column] for row in rows if row[study.by] == value and row.get(column) is not None]
            line[column] = {
                "mean": float(np.mean(values)) if values else None,
                "sd": float(np.std(values, ddof=1)) if len(values) > 1 else None,
                "seeds": len(values),
            }
        lines.append(line)
    return lines


def as_csv(rows: Sequence[Row]) -> str:
    """Return the rows as CSV; a list has a column for each entry."""
    flat = []
    for row in rows:
        line: Row = {}
        for name, value in row.items():
            line |= {f"{name}_{i}": v for i, v in enumerate(value)} if isinstance(value, list) else {name: value}
        line = {name: csv_cell(value) if isinstance(value, str) else value for name, value in line.items()}
        flat.append(line)
    out = io.StringIO()
    writer = csv.DictWriter(out, list(dict.fromkeys(name for line in flat for name in line)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return out.getvalue()


def table(study: Study, found: Mapping[str, Any]) -> RenderableType:
    """Lay out the summary of ``found`` for a terminal: mean ± sd over the seeds."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    shown = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 0, 0, 1))
    shown.add_column(Text(f"seeds {', '.join(map(str, found['seeds']))}"), no_wrap=True)
    for line in found["summary"]:
        shown.add_column(Text(line[study.by]), justify="right", overflow="fold")
    for name, (heading, form) in study.columns.items():
        shown.add_row(Text(heading), *(Text(in_words(line[name], form)) for line in found["summary"]))
    return shown


def in_words(value: Mapping[str, Any], form: str) -> str:
    """Return ``mean ± sd`` in the format ``form``; a dash where there is no value."""
    if value["mean"] is None:
        return "–"
    return f"{value['mean']:{form}}" + ("" if value["sd"] is None else f" ± {value['sd']:{form.lstrip('+')}}")


def _png(title: str, draw: Callable[[Figure], None]) -> bytes:
    """Return the PNG of a figure that ``draw`` fills; uses no global state of matplotlib."""
    from matplotlib import style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with style.context("default"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)  # a name in another script
        figure = Figure((11, 4.2), dpi=110, layout="constrained")
        FigureCanvasAgg(figure)
        figure.suptitle(title, size=11, parse_math=False)
        draw(figure)
        out = io.BytesIO()
        figure.savefig(out, format="png")
    return out.getvalue()
