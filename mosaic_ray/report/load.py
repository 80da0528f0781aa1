"""Read runs and sweeps from disk, for a notebook and for the report. Nothing is written or executed."""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
import pandas as pd

from ..config.plugins import load_named
from ..config.resolve import KNOBS, dotted, override, read_toml
from ..config.schema import ExperimentConfig
from ..core.errors import RequestError, RunError
from ..core.serialization import from_json
from ..core.text import visible
from ..core.types import DataFacts, Weights
from ..core.units import size
from ..core.untrusted import MAX_JSON, parse_json, read_regular
from ..runs.provenance import client_keys, joint_keys
from ..runs.summary import Summary
from ..storage.store import OBJECTS, DamagedFile, StageResult, Store
from ..sweeps.results import SCHEMA, read_results
from ..sweeps.space import setting_knobs
from ..sweeps.state import PlanFile
from .comparison import Comparison, compare
from .sweep_table import best_sections
from .text import duration, labels_of, points

_METRIC: dict[str, Any] = {"stage": str, "tag": str, "step": int, "value": (int, float, type(None))}
_Number = Annotated[float, (-1e300, 1e300)]

#: By vector: ``mean`` and ``scale``, a number for each value; scale 0 where it never varies.
Standardisation = dict[str, dict[str, list[float]]]


class NotAvailable(LookupError):
    """Raised for data that a run or sweep does not have; the message gives the reason."""


@dataclass(frozen=True, repr=False)
class RunReport:
    """A run or a trial of a sweep, which may be unfinished.

    ``summary`` is the content of summary.json (empty before there is one), ``config`` the knobs by section, ``metrics``
    a frame [stage, tag, step, value], ``label_counts`` int64 [clients, classes] or None, ``command`` the command line.
    ``class_names`` [classes] are there where they are more than numbers. ``facts``: shape and constants of the images;
    None in runs of earlier versions. ``standardisation``: by vector, ``pipeline.partition.standardisation``.
    Methods read the store when they are called and raise ``NotAvailable`` with the reason where a result is missing.
    """

    folder: Path
    summary: Summary
    config: dict[str, Any]
    metrics: pd.DataFrame
    label_counts: np.ndarray | None
    command: str | None
    store: Store | None
    class_names: tuple[str, ...] = ()
    facts: DataFacts | None = None
    standardisation: Standardisation = field(default_factory=dict)

    def __repr__(self) -> str:
        reached = {role: value for role, value in (self.summary.accuracy or {}).items() if value is not None}
        words = [f"{role} {reached.pop(role):.4f}" for role in ("final", "control") if role in reached]
        words += [f"gain {points(self.gain)} points"] if self.gain is not None else []
        at_clients = self.summary.client_accuracy.all if self.summary.client_accuracy else {}
        stages, moved = self.summary.stages or {}, self.summary.communication_bytes or {}
        seconds = sum(stage.seconds or 0.0 for stage in stages.values())
        found = Counter(finding.severity for finding in self.summary.health or ())
        clients = "" if self.label_counts is None else f"{len(self.label_counts)} clients, "
        rows = {
            "method": f"{self.summary.method or self.knob('method')}, seed {self.summary.seed}",
            "data": f"{self.knob('data.name')}, {clients}{self.knob('partition.sampler')} sampler",
            "accuracy": ", ".join(words), "others": ", ".join(f"{r} {value:.4f}" for r, value in reached.items()),
            "clients": ", ".join(f"{n} {v['mean']:.4f}" for n, v in at_clients.items() if "mean" in v),
            "time": f"{duration(seconds)}, {sum(s.cached for s in stages.values())} of {len(stages)} stages stored"
                    if stages else "",
            "sent": ", ".join(f"{size(sum(kinds.values()))} {way}" for way, kinds in moved.items()),
            "health": ", ".join(f"{count} {severity}" for severity, count in found.items()),
            "folder": str(self.folder),
        }  # fmt: skip
        lines = [f"  {name:<9} {visible(words, '')}" for name, words in rows.items() if words]
        return "\n".join([f"{type(self).__name__} {visible(self.name, '')}: {self.status}", *lines])

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def class_labels(self) -> dict[int, str]:
        """Return each class's name with its number behind it; empty where classes have numbers alone."""
        return dict(enumerate(labels_of(self.class_names)))

    def class_label(self, label: int) -> str:
        """Return a class's number, behind its name if it has one of its own."""
        return self.class_labels.get(label, str(label))

    @property
    def status(self) -> str:
        """Return done, failed, stopped (by a sweep's scheduler) or unfinished."""
        return self.summary.status or "unfinished"

    def accuracy(self, role: str) -> float | None:
        """Return the test accuracy in [0, 1] of a role's model: one of ``core.types.ROLES``."""
        return (self.summary.accuracy or {}).get(role)

    @property
    def gain(self) -> float | None:
        """Return the final model's accuracy minus the control's, in [-1, 1]."""
        final, control = self.accuracy("final"), self.accuracy("control")
        return None if final is None or control is None else final - control

    def knob(self, name: str) -> Any:
        """Return a knob's value by its dotted name; None where the configuration lacks it."""
        return dotted(self.config).get(name)

    def curve(self, tag: str) -> pd.Series:
        """Return the values of one metric by step, without those that are not numbers."""
        rows = self.metrics[self.metrics["tag"] == tag]
        return pd.Series(rows["value"].to_numpy(), index=rows["step"].to_numpy(), name=tag).dropna()

    def result(self, stage: str) -> StageResult:
        """Return the stored result of a stage."""
        stages = self.summary.stages or {}
        if stage not in stages:
            raise NotAvailable(f"this run has no finished stage {stage}")
        return self._stored(stages[stage].key)

    def arrays(self, stage: str, part: str) -> Weights:
        """Return the arrays of one part of a stage's result."""
        return _load(self.result(stage), part)

    def confusion(self, role: str, split: str = "test") -> np.ndarray:
        """Return int64 [classes, classes]: images by true class (rows) and predicted class."""
        tables = self.arrays("evaluate", "confusion")
        if f"{role}/{split}" not in tables:
            raise NotAvailable(f"nothing was evaluated as {role} on {split} images")
        table = tables[f"{role}/{split}"]
        if table.ndim != 2 or table.shape[0] != table.shape[1]:
            raise NotAvailable(f"the confusion table of {role} is not square")
        return table

    def diagnostic(self, stage: str, name: str, ndim: int) -> np.ndarray:
        """Return one array of a stage's part "diagnostics"."""
        arrays = self.arrays(stage, "diagnostics")
        if name not in arrays or arrays[name].ndim != ndim:
            raise NotAvailable(f"stage {stage} kept no {name.replace('_', ' ')}")
        return arrays[name]

    @cached_property
    def generators(self) -> dict[int, StageResult]:
        """Return client -> its generator's stored result, without failed clients and lost results."""
        stages = self.summary.stages or {}
        if "generators" not in stages:
            raise NotAvailable("this run trained no generators")
        if self.label_counts is None or not {"partition", "warmup"} <= stages.keys():
            raise NotAvailable("the clients' generators cannot be found without the partition")
        try:
            config = override(ExperimentConfig(), self.summary.config or {})
            if config.partition.num_clients != len(self.label_counts):
                raise LookupError("its label counts are of other clients")
            before = {name: record.key for name, record in stages.items()}
            keys = client_keys(config, "generators", self.label_counts.sum(axis=1), before)
        except (RequestError, LookupError) as error:
            raise NotAvailable(f"the clients' generators cannot be found: {error}") from None
        found, why = {}, ""
        for client_id, key in enumerate(keys):
            try:
                found[client_id] = self._stored(key)
            except NotAvailable as absent:
                why = str(absent)
        if found:
            return found
        if joint_keys(config, "generators", keys) != stages["generators"].key:
            why = "the clients' generators were made by another version, which stored them under other keys"
        raise NotAvailable(why)

    def samples(self) -> dict[int, np.ndarray]:
        """Return client -> synthetic images uint8 [N, C, H, W] of its generator."""
        return {k: _images(_load(made, "samples"), 4) for k, made in self.generators.items()}

    def progress(self) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        """Return client -> (steps int64 [T], synthetic images uint8 [T, M, C, H, W] of the same latents at each)."""
        found = {}
        for client_id, made in self.generators.items():
            arrays = _load(made, "progress")
            images, steps = _images(arrays, 5), arrays.get("steps")
            if steps is None or steps.shape != images.shape[:1]:
                raise NotAvailable("the steps at which samples were kept are missing")
            found[client_id] = steps, images
        return found

    def _stored(self, key: str) -> StageResult:
        # not ``Store.get``, which removes damaged results
        if self.store is None:
            raise NotAvailable("there is no store beside this folder; stage results were not copied along")
        if not re.fullmatch("[a-z_]+-[0-9a-f]{8,64}", key):
            raise NotAvailable(f'"{key}" names no stage result')
        try:
            manifest = self.store.manifest(OBJECTS, key)
        except (DamagedFile, RunError) as error:
            raise NotAvailable(f"the stored result {key} cannot be read: {' '.join(map(str, error.args))}") from None
        if manifest is None:
            raise NotAvailable(f"the store no longer holds {key}; the same command makes it again")
        return StageResult(self.store, f"{OBJECTS}/{key}", manifest)


@dataclass(frozen=True, repr=False)
class SweepReport:
    """A sweep, which may be unfinished: ``results`` has a row per trial (``sweeps.results.SCHEMA``).

    ``swept``: dotted names of the knobs that the plan varies; ``conditions``: those among them that define the
    problem. Configurations are compared within each value of the conditions.
    """

    folder: Path
    plan: PlanFile
    results: pd.DataFrame
    rows: list[dict[str, Any]]
    swept: tuple[str, ...]
    conditions: tuple[str, ...]

    def __repr__(self) -> str:
        ended = ", ".join(f"{count} {status}" for status, count in self.results["status"].value_counts().items())
        head = f"{type(self).__name__} {visible(self.name, '')}: {len(self.rows)} trials ({ended})"
        return f"{head}\n  swept   {', '.join(self.swept)}\n  folder  {visible(str(self.folder), '')}"

    @property
    def name(self) -> str:
        return self.folder.name

    @cached_property
    def varying(self) -> tuple[str, ...]:
        """Return the knobs of ``swept`` that took more than one value."""
        return tuple(name for name in self.swept if len({row[name] for row in self.rows}) > 1)

    @cached_property
    def done(self) -> pd.DataFrame:
        """Return the rows of finished trials."""
        return self.results[self.results["status"] == "done"]

    def best(self) -> list[tuple[str, list[str], list[list[dict[str, Any]]]]]:
        """Return (title, knobs to show, configurations as rows of their finished trials, best first) by condition."""
        return best_sections(self.rows, self.conditions, self.swept)

    @cached_property
    def comparison(self) -> Comparison | None:
        """Return the methods of a `mosaic compare` side by side; None for any other sweep."""
        if self.plan.space != "compare" or not all("method" in point for point in self.plan.points or [{}]):
            return None
        config = None
        with contextlib.suppress(RequestError):  # another version's
            config = override(ExperimentConfig(), self.plan.base) if self.plan.base else None
        return compare(self.rows, self.plan.points or [], config, self.plan.against or "")

    def trial_folder(self, name: str) -> Path:
        """Return the folder of one trial; ``RequestError`` where it has none."""
        folder = self.folder / "trials" / name
        if name not in set(self.results["trial"]) or not folder.is_dir():
            raise RequestError(f'{self.folder}: it has no files of a trial "{name}"')
        return folder


def _load(result: StageResult, part: str) -> Weights:
    if part not in result.parts:
        raise NotAvailable(f"its stage kept no {part}; an older version made it, or another method")
    try:
        return result.load(part)
    except RunError as error:
        raise NotAvailable(str(error)) from None


def _images(arrays: Weights, ndim: int) -> np.ndarray:
    images = arrays.get("images")
    if images is None or images.dtype != np.uint8 or images.ndim != ndim or images.shape[-3] not in (1, 3):
        raise NotAvailable("the stored samples are no images of one or three channels")
    return images


def find(path: str | Path) -> tuple[str, Path]:
    """Return "run" or "sweep", and its folder; ``RequestError`` where ``path`` is neither.

    ``path``: the folder of a run, a trial or a sweep, or a storage that holds exactly one run or sweep.
    """
    if "://" in str(path):
        raise RequestError(f"{path}: a report is made from files on a disk; copy the run's folder here first")
    folder = Path(path).expanduser().absolute()
    if not folder.is_dir():
        raise RequestError(f"{path}: there is no such folder; name a run's, a sweep's or a trial's")
    if (folder / "plan.json").is_file():
        return "sweep", folder
    if any((folder / name).is_file() for name in ("summary.json", "config.toml", "metrics.jsonl")):
        return "run", folder
    held = [found for kind in ("runs", "sweeps") for found in sorted((folder / kind).glob("*")) if found.is_dir()]
    if len(held) == 1:
        return find(held[0])
    if held:
        names = [f"{found.parent.name}/{found.name}" for found in held]
        shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        raise RequestError(f"{path}: it holds {len(names)} runs and sweeps; name one of {shown}")
    raise RequestError(f"{path}: no run or sweep lies there (neither summary.json nor config.toml nor plan.json)")


def read_run(path: str | Path) -> RunReport:
    """Read the run in folder ``path``; ``RequestError`` where there is none or a file is damaged."""
    found, folder = find(path)
    if found != "run":
        raise RequestError(f"{path}: that is a sweep; load_sweep reads it, or name one of its trials")
    summary = _checked(Summary, folder / "summary.json")
    toml = folder / "config.toml"
    config = summary.config or (read_toml(toml) if toml.is_file() else {})
    above = next((above for above in list(folder.parents)[:4] if (above / OBJECTS).is_dir()), None)
    counts, facts = _label_counts(folder, summary), _facts(folder)
    return RunReport(
        folder, summary, config, _metrics(folder / "metrics.jsonl"), counts, read_text(folder / "command.txt"),
        Store(above, create=False) if above else None, () if counts is None else _class_names(folder, counts.shape[1]),
        facts, _standardisation(folder, facts) if facts else {},
    )  # fmt: skip


def read_sweep(path: str | Path) -> SweepReport:
    """Read the sweep in folder ``path``; ``RequestError`` where there is none or a file is damaged."""
    found, folder = find(path)
    if found != "sweep":
        raise RequestError(f"{path}: that is a run; load_run reads it")
    plan = _checked(PlanFile, folder / "plan.json")
    results = folder / "results.parquet"
    rows = read_results(results).to_pylist() if os.path.lexists(results) else []
    points = [plan.knobs] if plan.points is None else plan.points
    with contextlib.suppress(RequestError):  # knobs of plug-ins that are not at hand are left out
        for named in (dotted(plan.base or {}), *points):
            load_named(named)
    swept = tuple(dict.fromkeys(name for point in points for name in point if name in KNOBS and name != "seed"))
    names = list(dict.fromkeys([*SCHEMA.names, *next(iter(rows), ()), *swept]))
    rows = [{name: row.get(name) for name in names} for row in rows]
    return SweepReport(folder, plan, pd.DataFrame(rows, columns=names), rows, swept, setting_knobs(swept))


T = TypeVar("T", Summary, PlanFile)


def _checked(kind: type[T], path: Path) -> T:
    try:
        return kind.from_json(_json(path))
    except ValueError as error:
        why = f"its {error} is not what a run or sweep writes"
        raise RequestError(f"{path}: {why}; the same command writes it again") from None


def _json(path: Path) -> dict[str, Any]:
    text = read_text(path)
    try:
        return {} if text is None else parse_json(text)
    except ValueError:
        why = "it is not whole, or not of a run or sweep; the same command writes it again"
        raise RequestError(f"{path}: {why}") from None


def read_text(path: Path, limit: int = MAX_JSON) -> str | None:
    try:
        return read_regular(path, limit).decode().strip()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, UnicodeDecodeError) as error:
        why = (error.strerror or error) if isinstance(error, OSError) else "it is no text"
        raise RequestError(f"{path}: it cannot be read: {why}") from None


def _metrics(path: Path) -> pd.DataFrame:
    """Return metrics.jsonl as a frame; its last line may be incomplete in a running or killed run."""
    lines = (read_text(path, 4 * MAX_JSON) or "").splitlines()
    rows: list[Mapping[str, Any]] = []
    for number, line in enumerate(lines, 1):
        try:
            row = parse_json(line)
            sound = all(isinstance(row[name], kind) for name, kind in _METRIC.items()) and abs(row["step"]) < 2**63
            sound = sound and abs(row["value"] or 0.0) < math.inf
        except (ValueError, KeyError):
            sound = False
        if sound:
            rows.append(row)
        elif number < len(lines):
            raise RequestError(f"{path}: line {number} is no metric; the same command writes the file again")
    frame = pd.DataFrame(rows, columns=list(_METRIC))
    return frame.astype({"step": "int64", "value": "float64"})


def _label_counts(folder: Path, summary: Summary) -> np.ndarray | None:
    rows = summary.label_counts or _json(folder / "label_counts.json").get("label_counts")
    if rows is None:
        return None
    try:
        counts: np.ndarray = np.array(rows, dtype=np.int64)
    except (ValueError, TypeError, OverflowError):
        counts = np.empty(0)
    if counts.ndim != 2 or not counts.size or (counts < 0).any():
        raise RequestError(f"{folder}: its label counts are no table of whole numbers, clients by classes")
    return counts


def _class_names(folder: Path, num_classes: int) -> tuple[str, ...]:
    """Return the names of a run's classes; none where it kept none, or numbers alone."""
    names = _json(folder / "label_counts.json").get("class_names")
    if not isinstance(names, list) or len(names) != num_classes or names == [str(c) for c in range(num_classes)]:
        return ()
    return tuple(map(str, names))


def _facts(folder: Path) -> DataFacts | None:
    kept = _json(folder / "label_counts.json").get("data")
    try:
        return None if kept is None else DataFacts.from_json(kept)
    except ValueError as error:
        why = f"its data.{error} is not what a run writes; the same command writes it again"
        raise RequestError(f"{folder / 'label_counts.json'}: {why}") from None


def _standardisation(folder: Path, facts: DataFacts) -> Standardisation:
    kept = _json(folder / "label_counts.json").get("standardisation")
    try:
        return {} if kept is None else check_standardisation(kept, facts)
    except ValueError as error:
        why = f"its {error} is not what a run writes; the same command writes it again"
        raise RequestError(f"{folder / 'label_counts.json'}: {why}") from None


def check_standardisation(given: Any, facts: DataFacts) -> Standardisation:
    """Return how vectors are standardised, as it was read from JSON; ``ValueError`` where it does not fit ``facts``."""
    found: Standardisation = from_json(dict[str, dict[str, list[_Number]]], given, "standardisation")
    sizes = {modality.name: modality.size for modality in facts.modalities if modality.kind == "vector"}
    fits = found.keys() == sizes.keys() and all(
        part.keys() == {"mean", "scale"} and all(len(values) == sizes[name] for values in part.values())
        and min(part["scale"]) >= 0 for name, part in found.items()
    )  # fmt: skip
    if not fits:
        raise ValueError("standardisation")
    return found
