"""A sweep's rows and files, and TensorBoard's HParams."""

from __future__ import annotations

import csv
import io
import json
import os
import random
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as pc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trials import LAMBDA_E, OMEGA, STOPPED, failed, trial

from mosaic_ray.config.resolve import KNOBS, flatten, override
from mosaic_ray.config.schema import ExperimentConfig
from mosaic_ray.core.errors import RequestError
from mosaic_ray.core.types import STAGES
from mosaic_ray.sweeps.results import (
    HPARAMS_FILE,
    NOT_REPRODUCIBLE,
    SCHEMA,
    TrialResult,
    hparams_file,
    read_results,
    results_files,
    results_table,
)


def test_the_schema_does_not_depend_on_the_rows() -> None:
    tables = [results_table(rows) for rows in ([], [trial(0)], [failed(0)], [STOPPED, trial(1, 2)])]
    assert all(table.schema == SCHEMA for table in tables)
    assert all(field.nullable for field in SCHEMA) and len(set(SCHEMA.names)) == len(SCHEMA.names)
    kinds = {int: pa.int64(), float: pa.float64(), bool: pa.bool_(), str: pa.string()}
    for name, knob in KNOBS.items():
        assert SCHEMA.field(name).type == kinds.get(knob.kind, pa.string()), name
    own = [name for name in SCHEMA.names if name in KNOBS and name not in ("seed", "federation.optimiser")]
    assert own == [name for name in KNOBS if name != "seed"]
    beside = SCHEMA.names.index("federation.strategy")
    assert SCHEMA.names[beside + 1] == "federation.optimiser"


def test_an_older_name_of_a_knob_has_the_same_values(tmp_path: Path) -> None:
    lost = TrialResult("p002s0", 2, 0, {"federation.optimiser": "fedprox"}, {"status": "failed"})
    old = trial(3)
    old.summary["config"]["federation"]["optimiser"] = old.summary["config"]["federation"].pop("strategy")
    table = results_table([trial(0), trial(1, 0, {"federation.strategy": "fedrolex"}), lost, old])
    names = ["federation.strategy", "federation.optimiser"]
    assert [table[name].to_pylist() for name in names] == [["fedavg", "fedrolex", "fedprox", "fedavg"]] * 2
    for name in names:  # files of versions that had one of them
        (tmp_path / "results.parquet").write_bytes(results_files(table.drop_columns(name))["results.parquet"])
        assert read_results(tmp_path / "results.parquet").select(names) == table.select(names)


def test_swept_knobs_and_stages_of_plugins_have_columns_of_their_own() -> None:
    swept = trial(1, 0, {"federation.strategy": "fedprox", "fedprox.mu": 0.5})
    swept.summary["stages"]["class_means"] = {"cached": True, "key": "k", "computed_seconds": 3.0}
    table = results_table([trial(0), swept])
    assert table.schema.names[: len(SCHEMA)] == SCHEMA.names
    more = {name: table[name].to_pylist() for name in table.schema.names[len(SCHEMA) :]}
    stage = {"seconds_class_means": [None, 3.0], "cached_class_means": [None, True]}
    assert more == {"fedprox.mu": [None, 0.5]} | stage
    assert table.schema.field("fedprox.mu").type == pa.float64()
    plain = trial(0, 0, {"federation.strategy": "fedprox"})
    assert results_table([plain]).schema == SCHEMA, "it is not swept"
    assert hparams_file(trial(0), ["fedprox.mu"]), "a trial without it"


def test_a_row_holds_what_the_summary_says() -> None:
    knobs = {LAMBDA_E: 2.0, "federation.widths": (1.0, 1.0), "warmup.shuffle": False, "meta.updates": 7}
    result = trial(7, 1, knobs, final=0.75, control=0.5, cached=("warmup",), validation_accuracy={"final": 0.25})
    result.summary["stages"]["warmup"]["waited_seconds"] = 3.5
    (row,) = results_table([result]).to_pylist()
    config = flatten(override(ExperimentConfig(), knobs | {"seed": 1}))
    for name, value in config.items():
        unsettled = value == "auto" and KNOBS[name].kind in (int, float)  # a run's summary holds numbers
        expected = json.dumps(list(value)) if isinstance(value, tuple) else None if unsettled else value
        assert row[name] == expected, name
    assert row["federation.widths"] == "[1.0, 1.0]" and isinstance(row[LAMBDA_E], float)
    assert (row["trial"], row["point"], row["seed"], row["status"], row["error"]) == ("p007s1", 7, 1, "done", None)
    assert (row["accuracy_final"], row["accuracy_teacher"], row["gain"]) == (0.75, None, 0.25)
    assert (row["validation_final"], row["validation_initial"]) == (0.25, None)
    assert (row["selection_metric"], row["selection"]) == ("held-out prototypes", 0.5)
    assert (row["seconds_warmup"], row["cached_warmup"]) == (64.0, True), "seconds of the computation"
    assert (row["seconds_distill"], row["cached_distill"], row["waited_seconds"]) == (2.0, False, 3.5)
    assert (row["communication_uplink"], row["communication_downlink"]) == (7, 5)
    assert row["health"] == "gan.collapse,teacher.worse"


def test_failed_and_stopped_trials_have_rows_too() -> None:
    unsettled = TrialResult("p005s0", 5, 0, {LAMBDA_E: 2.0}, {"status": "failed", "error": "driver lost"})
    rows = results_table([unsettled, failed(0, stage="generators", client=3), STOPPED]).to_pylist()
    assert [row["trial"] for row in rows] == ["p000s0", "p004s0", "p005s0"]
    first = rows[0]
    assert (first["status"], first["error"], first["error_stage"]) == ("failed", "no memory", "generators")
    assert (first["error_round"], first["error_client"]) == (None, 3)
    assert first[LAMBDA_E] == 1.0 and first["accuracy_final"] is None and first["gain"] is None
    assert first["cached_warmup"] is None and first["waited_seconds"] is None and first["health"] is None
    assert rows[1]["status"] == "stopped" and rows[1][LAMBDA_E] is None
    assert rows[2][LAMBDA_E] == 2.0, "a trial without a configuration still has its swept knobs"


def test_text_in_the_csv_is_no_formula_and_numbers_stay_numbers() -> None:
    table = results_table([failed(2, error="=cmd|' /C calc'!x\x1b", stage="warmup"), trial(0, final=-0.5)])
    rows = list(csv.DictReader(io.StringIO(results_files(table)["results.csv"].decode())))
    assert rows[1]["error"] == r"'=cmd|' /C calc'!x\x1b" and rows[0]["accuracy_final"] == "-0.5"
    assert table["error"].to_pylist()[1].endswith("\x1b")  # parquet keeps it


def test_values_that_are_not_finite_are_null() -> None:
    (row,) = results_table([trial(0, final=float("nan"), selection=float("inf"))]).to_pylist()
    assert row["accuracy_final"] is row["gain"] is row["selection"] is None


def test_rows_are_sorted_by_point_and_seed_as_numbers() -> None:
    results = [trial(point, seed) for point in (0, 2, 10, 1000) for seed in (0, 2, 10)]
    shuffled = random.Random(0).sample(results, len(results))
    assert results_table(shuffled)["trial"].to_pylist() == [result.trial for result in results]


def test_sweeps_of_one_plan_differ_in_times_and_sharing_alone() -> None:
    left, right = (
        results_table([trial(0, cached=cached), trial(1, cached=STAGES)]) for cached in ((), ("warmup", "teacher"))
    )
    assert left != right and left.drop_columns(NOT_REPRODUCIBLE) == right.drop_columns(NOT_REPRODUCIBLE)
    other = results_table([trial(0, final=0.91), trial(1, cached=STAGES)])
    assert left.drop_columns(NOT_REPRODUCIBLE) != other.drop_columns(NOT_REPRODUCIBLE)


# ---------------------------------------------------------------- files


@pytest.fixture
def table() -> pa.Table:
    error = 'a "comma",\na newline and ü'
    return results_table([trial(0), trial(1, 3, {LAMBDA_E: 0.1}), failed(2, error=error, stage="warmup"), STOPPED])


def test_results_can_be_read_back(tmp_path: Path, table: pa.Table) -> None:
    files = results_files(table)
    assert list(files) == ["results.csv", "results.parquet"]
    (tmp_path / "results.parquet").write_bytes(files["results.parquet"])
    assert read_results(tmp_path / "results.parquet") == table
    read = pc.read_csv(
        io.BytesIO(files["results.csv"]),
        parse_options=pc.ParseOptions(newlines_in_values=True),
        convert_options=pc.ConvertOptions(
            column_types=SCHEMA, strings_can_be_null=True, quoted_strings_can_be_null=False
        ),
    )
    assert read == table


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "results.parquet"
    table = results_table([trial(point, seed) for point in range(3) for seed in range(2)])
    path.write_bytes(results_files(table)["results.parquet"])
    return path


@settings(max_examples=60)
@given(st.floats(0, 1, exclude_max=True))
def test_half_written_results_are_refused_in_one_line(whole: Path, share: float) -> None:
    path = whole.with_name("half.parquet")
    data = whole.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(RequestError, match=re.escape(f"{path}: damaged, half written")) as refused:
        read_results(path)
    assert "remove it" in str(refused.value) and "--fresh" in str(refused.value) and "\n" not in str(refused.value)


def test_a_flipped_bit_in_the_numbers_is_found(whole: Path) -> None:
    data = bytearray(whole.read_bytes())
    path = whole.with_name("flipped.parquet")
    found = 0
    for place in range(60, 600, 20):
        data[place] ^= 16
        path.write_bytes(data)
        try:
            assert read_results(path) == read_results(whole)
        except RequestError:
            found += 1
        data[place] ^= 16
    assert found > 10


def test_other_files_are_refused_with_their_reason(tmp_path: Path) -> None:
    path = tmp_path / "results.parquet"
    with pytest.raises(RequestError, match=r"results\.parquet: No such file"):
        read_results(path)
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"trial": ["p000s0"], "point": [0]}), path)
    with pytest.raises(RequestError, match="no sweep's results"):
        read_results(path)


def hparams_of(logdir: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The experiment and the session groups, as TensorBoard's own plugin answers its page."""
    from tensorboard.backend.event_processing import data_provider, plugin_event_multiplexer
    from tensorboard.plugins import base_plugin
    from tensorboard.plugins.hparams import hparams_plugin
    from werkzeug.test import Client

    events = plugin_event_multiplexer.EventMultiplexer()
    events.AddRunsFromDirectory(str(logdir))
    events.Reload()
    provider = data_provider.MultiplexerDataProvider(events, str(logdir))
    apps = hparams_plugin.HParamsPlugin(base_plugin.TBContext(data_provider=provider)).get_plugin_apps()
    asked = {"startIndex": 0, "sliceSize": 1000}
    asked["allowedStatuses"] = ["STATUS_UNKNOWN", "STATUS_SUCCESS", "STATUS_FAILURE", "STATUS_RUNNING"]
    answers = [
        Client(apps[route]).post("/", json=body) for route, body in (("/experiment", {}), ("/session_groups", asked))
    ]
    assert [answer.status_code for answer in answers] == [200, 200]
    return answers[0].get_json(), answers[1].get_json()


@pytest.mark.filterwarnings("ignore:html5lib's sanitizer:DeprecationWarning")  # TensorBoard's own, as it is imported
def test_tensorboard_shows_every_trial_with_its_knobs_and_metrics(tmp_path: Path) -> None:
    from torch.utils.tensorboard import SummaryWriter

    swept = (LAMBDA_E, OMEGA, "meta.select", "meta.pool", "federation.widths", "meta.updates")
    results = [
        trial(
            point,
            seed,
            {LAMBDA_E: 0.5 + point, OMEGA: 0.1, "meta.select": point == 1, "meta.pool": "sum", "meta.updates": point},
            final=0.5 + point / 8 + seed / 64,
            selection=point / 16,
        )
        for point in range(3)
        for seed in range(2)
    ]
    results += [failed(3, 0, {LAMBDA_E: 9.0}), TrialResult("p004s0", 4, 0, {LAMBDA_E: 0.5}, {"status": "stopped"})]
    for result in results[1:]:  # the first is written where no curve is
        with SummaryWriter(str(tmp_path / result.trial / "tensorboard")) as board:
            board.add_scalar("student/accuracy", 0.25, 7)
    for result in results:
        board = tmp_path / result.trial / "tensorboard"
        board.mkdir(parents=True, exist_ok=True)
        (board / HPARAMS_FILE).write_bytes(hparams_file(result, swept))
        assert max(os.listdir(board)) == HPARAMS_FILE, "its place is after the curves"

    experiment, answer = hparams_of(tmp_path)
    types = {info["name"]: info["type"] for info in experiment["hparamInfos"]}
    number, text = "DATA_TYPE_FLOAT64", "DATA_TYPE_STRING"
    assert types == {
        LAMBDA_E: number, OMEGA: number, "meta.select": "DATA_TYPE_BOOL", "meta.pool": text, "federation.widths": text,
        "meta.updates": number, "seed": number,
    }  # fmt: skip
    tags = ["selection", "accuracy/final", "accuracy/control", "accuracy/gain"]
    assert [info["name"]["tag"] for info in experiment["metricInfos"]] == tags

    groups = {group["name"].split("/")[0]: group for group in answer["sessionGroups"]}
    assert list(groups) == [result.trial for result in results] and answer["totalSize"] == len(results)
    for result in results[:6]:
        group = groups[result.trial]
        flat = flatten(override(ExperimentConfig(), {**result.knobs, "seed": result.seed}))
        assert group["hparams"] == {name: flat[name] for name in (*swept, "seed")} | {"federation.widths": "[1.0]"}
        (session,) = group["sessions"]
        accuracy = result.summary["accuracy"]
        expected = [accuracy["final"], accuracy["control"], accuracy["final"] - accuracy["control"]]
        found = {value["name"]["tag"]: value["value"] for value in session["metricValues"]}
        assert found == pytest.approx(dict(zip(tags, [result.point / 16, *expected], strict=True)), abs=1e-7)
        assert session["status"] == "STATUS_SUCCESS"
    (session,) = groups["p003s0"]["sessions"]
    assert session["status"] == "STATUS_FAILURE" and not session.get("metricValues")
    assert groups["p003s0"]["hparams"][LAMBDA_E] == 9.0
    assert groups["p004s0"]["hparams"] == {LAMBDA_E: 0.5, "seed": 0.0}
