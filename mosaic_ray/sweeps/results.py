"""Write a sweep's results: one row for each trial as parquet and csv, and TensorBoard's HParams view.

Configurations are selected by ``selection`` (validation images, or held-out prototypes), never by test accuracy.
"""

from __future__ import annotations

import io
import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as pc
import pyarrow.parquet as pq

from ..config.plugins import ALIASES
from ..config.resolve import KNOBS, dotted
from ..core.errors import RequestError
from ..core.text import csv_cell
from ..core.types import ROLES, STAGES
from ..core.untrusted import read_regular

#: The metrics in TensorBoard's HParams view, and the column of each.
HPARAM_METRICS = {
    "selection": "selection", "accuracy/final": "accuracy_final", "accuracy/control": "accuracy_control",
    "accuracy/gain": "gain",
}  # fmt: skip

#: Sorts after the trial's own event file, which TensorBoard therefore reads first.
HPARAMS_FILE = "events.out.tfevents.9999999999.hparams"

#: Bytes of the largest results.parquet that is read.
MOST_BYTES = 1 << 30

Row = dict[str, Any]
Point = list[Row]  # the finished trials of one configuration


@dataclass(frozen=True)
class TrialResult:
    """The result of a trial: ``knobs`` holds the swept ones alone, ``summary`` is the content of summary.json."""

    trial: str
    point: int
    seed: int
    knobs: Mapping[str, Any]
    summary: Mapping[str, Any]


def _type(column: str) -> pa.DataType:
    """Return the type of a knob's column, or of a column of a stage; a list of numbers is stored as JSON text."""
    if column in KNOBS:
        return {int: pa.int64(), float: pa.float64(), bool: pa.bool_()}.get(KNOBS[column].kind, pa.string())
    return pa.bool_() if column.startswith("cached_") else pa.float64()


def _schema() -> pa.Schema:
    """Return the columns of every sweep; an older name of a knob has a column beside the knob's own."""
    whole, number, text, flag = pa.int64(), pa.float64(), pa.string(), pa.bool_()
    older = {knob: name for name, knob in ALIASES.items()}
    columns = {
        "trial": text, "point": whole, "seed": whole, "status": text,
        "error": text, "error_stage": text, "error_round": whole, "error_client": whole,
    }  # fmt: skip
    knobs = (name for knob in KNOBS for name in (knob, older.get(knob, knob)))
    columns |= {name: _type(name) for name in knobs if name not in columns}
    columns |= {f"accuracy_{role}": number for role in ROLES} | {f"validation_{role}": number for role in ROLES}
    columns |= {"selection_metric": text, "selection": number, "gain": number}
    columns |= {f"seconds_{stage}": number for stage in STAGES} | {f"cached_{stage}": flag for stage in STAGES}
    columns |= {"waited_seconds": number, "communication_uplink": whole, "communication_downlink": whole}
    return pa.schema(list((columns | {"health": text}).items()))


SCHEMA = _schema()

#: Columns that depend on time and on cached stages; two sweeps of one plan agree in all others.
NOT_REPRODUCIBLE = (
    *(f"seconds_{stage}" for stage in STAGES), *(f"cached_{stage}" for stage in STAGES), "waited_seconds",
)  # fmt: skip


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _row(result: TrialResult) -> Row:
    """Return a trial's values by column, ``SCHEMA``'s columns first; None where its summary has no value."""
    summary, row = result.summary, Row.fromkeys(SCHEMA.names)
    for name, value in (dict(result.knobs) | dotted(summary.get("config") or {})).items():
        if name in KNOBS:  # a summary of another version may name others
            unsettled = value == "auto" and KNOBS[name].kind in (int, float)
            row[name] = None if unsettled else json.dumps(list(value)) if isinstance(value, list | tuple) else value
    for older, knob in ALIASES.items():
        row[older] = row[knob] = row[older] if row[knob] is None else row[knob]
    row |= {"trial": result.trial, "point": result.point, "seed": result.seed}
    row |= {name: summary.get(name) for name in ("status", "error")}
    row |= {f"error_{name}": summary.get(name) for name in ("stage", "round", "client")}
    for column, kind in (("accuracy", "accuracy"), ("validation", "validation_accuracy")):
        row |= {f"{column}_{role}": _finite((summary.get(kind) or {}).get(role)) for role in ROLES}
    for name, value in (summary.get("personal_accuracy") or {}).items():
        if name != "clients":
            row[f"personal_{name}"] = _finite(value)
    for model, figures in ((summary.get("client_accuracy") or {}).get("all") or {}).items():
        row |= {f"clients_{model}_{name}": _finite(value) for name, value in figures.items()}
    final, control = row["accuracy_final"], row["accuracy_control"]
    row["gain"] = None if final is None or control is None else final - control
    selection = summary.get("selection") or {}
    row |= {"selection_metric": selection.get("metric"), "selection": _finite(selection.get("value"))}
    stages = summary.get("stages") or {}
    row |= {f"seconds_{name}": stage.get("computed_seconds") for name, stage in stages.items()}
    row |= {f"cached_{name}": stage.get("cached") for name, stage in stages.items()}
    if stages:
        row["waited_seconds"] = float(sum(stage.get("waited_seconds") or 0.0 for stage in stages.values()))
    for way, kinds in (summary.get("communication_bytes") or {}).items():
        row[f"communication_{way}"] = sum(kinds.values())
    if "health" in summary:
        row["health"] = ",".join(sorted({finding["code"] for finding in summary["health"]}))
    return row


def result_rows(results: Iterable[TrialResult]) -> list[Row]:
    """Return the rows by point and seed, all with the same names."""
    rows = [_row(result) for result in sorted(results, key=lambda result: (result.point, result.seed))]
    names = dict.fromkeys(name for row in rows for name in row)
    return [{name: row.get(name) for name in names} for row in rows]


def results_table(results: Iterable[TrialResult]) -> pa.Table:
    """Return one row for each trial, by point and seed, in the columns of ``SCHEMA``.

    Swept knobs of plug-ins, and stages that a method adds, have columns after those. The seconds of a cached stage are
    the time it took the trial that computed it.
    """
    results = list(results)
    rows, swept = result_rows(results), {name for result in results for name in result.knobs}
    more = [name for name in next(iter(rows), ()) if name not in SCHEMA.names and (name in swept or name not in KNOBS)]
    return pa.Table.from_pylist(rows, schema=pa.schema([*SCHEMA, *((name, _type(name)) for name in more)]))


def final_table(results: Iterable[TrialResult], swept: Sequence[str]) -> tuple[list[str], list[list[Any]]]:
    """Return columns and rows of what trackers show of a sweep: its trials, their swept knobs, their accuracies."""
    rows = result_rows(results)
    named = ["trial", "point", "seed", *(name for name in swept if name != "seed"), "status", "selection", "gain"]
    named += [f"{kind}_{role}" for kind in ("accuracy", "validation") for role in ROLES]
    columns = [name for name in named if any(row.get(name) is not None for row in rows)]
    return columns, [[row.get(name) for name in columns] for row in rows]


def results_files(table: pa.Table) -> dict[str, bytes]:
    """Return the content of results.csv and results.parquet."""
    shown, as_csv, as_parquet = table, pa.BufferOutputStream(), pa.BufferOutputStream()
    for place, column in enumerate(table.schema):
        if pa.types.is_string(column.type):
            cells = [None if cell is None else csv_cell(cell) for cell in table[place].to_pylist()]
            shown = shown.set_column(place, column, pa.array(cells, column.type))
    pc.write_csv(shown, as_csv)
    pq.write_table(table, as_parquet, write_page_checksum=True)
    return {"results.csv": as_csv.getvalue().to_pybytes(), "results.parquet": as_parquet.getvalue().to_pybytes()}


def read_results(path: Path) -> pa.Table:
    """Read results.parquet, an older version's too; ``RequestError`` where it is damaged or no sweep's."""
    try:
        data = read_regular(path, MOST_BYTES)
    except OSError as error:
        raise RequestError(f"{path}: {error.strerror or error}") from None
    try:
        table = pq.read_table(pa.BufferReader(data), page_checksum_verification=True)
        table.validate(full=True)
    except (OSError, ValueError, pa.ArrowException):
        table = pa.table({})
    if not {"trial", "point", "seed", "status"} <= set(table.column_names):
        raise RequestError(
            f"{path}: damaged, half written or no sweep's results; remove it and give the same command again "
            "(it is made again from the trials), or add --fresh"
        )
    for pair in ALIASES.items():
        for there, missing in (pair, pair[::-1]):
            if there in table.column_names and missing not in table.column_names:
                table = table.append_column(missing, table[there])
    return table


def hparams_file(result: TrialResult, swept: Sequence[str]) -> bytes:
    """Return the event file ``HPARAMS_FILE``: the trial as a session of TensorBoard's HParams view.

    Every trial holds the same experiment (knobs and metrics with their types), since TensorBoard reads only the first.
    """
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2

    row, now = _row(result), time.time()
    number, text = api_pb2.DATA_TYPE_FLOAT64, api_pb2.DATA_TYPE_STRING
    types = {int: number, float: number, bool: api_pb2.DATA_TYPE_BOOL}
    knobs = list(dict.fromkeys([*swept, "seed"]))
    experiment = api_pb2.Experiment(
        hparam_infos=[
            api_pb2.HParamInfo(name=name, type=types.get(KNOBS[name].kind, text), differs=True) for name in knobs
        ],
        metric_infos=[api_pb2.MetricInfo(name=api_pb2.MetricName(tag=tag)) for tag in HPARAM_METRICS],
    )
    start = plugin_data_pb2.SessionStartInfo(start_time_secs=now)
    for name in knobs:
        if (value := row.get(name)) is not None:
            kind = {bool: "bool_value", str: "string_value"}.get(type(value), "number_value")
            setattr(start.hparams[name], kind, value)
    status = api_pb2.STATUS_FAILURE if row["status"] == "failed" else api_pb2.STATUS_SUCCESS
    end = plugin_data_pb2.SessionEndInfo(status=status, end_time_secs=now)

    content = {
        metadata.EXPERIMENT_TAG: plugin_data_pb2.HParamsPluginData(experiment=experiment),
        metadata.SESSION_START_INFO_TAG: plugin_data_pb2.HParamsPluginData(session_start_info=start),
        metadata.SESSION_END_INFO_TAG: plugin_data_pb2.HParamsPluginData(session_end_info=end),
    }
    summaries = [
        Summary.Value(tag=tag, metadata=metadata.create_summary_metadata(data), tensor=metadata.NULL_TENSOR)
        for tag, data in content.items()
    ]
    reached = {tag: row[column] for tag, column in HPARAM_METRICS.items() if row[column] is not None}
    summaries += [Summary.Value(tag=tag, simple_value=value) for tag, value in reached.items()]
    return event_file(Summary(value=summaries))


def event_file(summary: Any) -> bytes:
    """Return an event file of TensorBoard that holds one ``summary``."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.summary.writer.record_writer import RecordWriter

    file, now = io.BytesIO(), time.time()
    writer = RecordWriter(file)
    writer.write(Event(wall_time=now, file_version="brain.Event:2").SerializeToString())
    writer.write(Event(wall_time=now, summary=summary).SerializeToString())
    return file.getvalue()
