"""What a person sees of a sweep: rows, files, the closing table, TensorBoard's HParams, the progress view."""

from __future__ import annotations

import io
import json
import os
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from rich.text import Text

from mosaic_ray.config import KNOBS, ExperimentConfig, as_dict, flatten, override
from mosaic_ray.errors import RequestError, RunError
from mosaic_ray.records import STAGES
from mosaic_ray.report import sweep_view, sweeps
from mosaic_ray.report.sweep_view import SweepView
from mosaic_ray.report.sweeps import (
    NOT_REPRODUCIBLE,
    ROLES,
    SCHEMA,
    TrialResult,
    read_results,
    results_table,
    sweep_table,
    write_hparams,
    write_results,
)

LAMBDA_E, OMEGA = "generator.lambda_e", "partition.omega"


def trial(
    point: int,
    seed: int = 0,
    knobs: dict[str, Any] | None = None,
    *,
    final: float = 0.9,
    control: float = 0.875,
    selection: float | None = 0.5,
    metric: str = "held-out prototypes",
    cached: tuple[str, ...] = (),
    **more: Any,
) -> TrialResult:
    """A finished trial; every stage took 2 s of its own, and one in ``cached`` 64 s of who computed it."""
    knobs = knobs or {}
    stages = {
        name: {"seconds": 2.0, "cached": name in cached, "key": name, "computed_seconds": 64.0 if name in cached else 2}
        for name in STAGES
    }
    summary = {
        "status": "done",
        "accuracy": {"initial": 0.5, "teacher": None, "distilled": 0.625, "final": final, "control": control},
        "validation_accuracy": None,
        "selection": {"metric": metric, "value": selection},
        "stages": stages,
        "communication_bytes": {"uplink": {"weights": 3, "counts": 4}, "downlink": {"weights": 5}},
        "health": [{"code": code} for code in ("teacher.worse", "gan.collapse", "teacher.worse")],
        "config": as_dict(override(ExperimentConfig(), knobs | {"seed": seed})),
    }
    return TrialResult(f"p{point:03}s{seed}", point, seed, knobs, summary | more)


def failed(point: int, seed: int = 0, knobs: dict[str, Any] | None = None, **where: Any) -> TrialResult:
    """As launch writes it: neither accuracy nor stages."""
    where = {"stage": None, "round": None, "client": None} | where
    config = as_dict(override(ExperimentConfig(), (knobs or {}) | {"seed": seed}))
    summary = {"status": "failed", "error": "no memory", "method": "mosaic", "seed": seed, "config": config} | where
    return TrialResult(f"p{point:03}s{seed}", point, seed, knobs or {}, summary)


STOPPED = TrialResult("p004s0", 4, 0, {}, {"status": "stopped"})


def printed(renderable: Any, width: int = 80) -> list[str]:
    stream = io.StringIO()
    Console(file=stream, width=width, color_system=None).print(renderable, crop=False)
    return [line.rstrip() for line in stream.getvalue().splitlines()]


def names_in_order(lines: list[str]) -> list[str]:
    return [match.group() for line in lines if (match := re.match(r"p\d{3}\b", line))]


# ---------------------------------------------------------------- rows


def test_the_schema_does_not_depend_on_the_rows() -> None:
    tables = [results_table(rows) for rows in ([], [trial(0)], [failed(0)], [STOPPED, trial(1, 2)])]
    assert all(table.schema == SCHEMA for table in tables)
    assert all(field.nullable for field in SCHEMA) and len(set(SCHEMA.names)) == len(SCHEMA.names)
    kinds = {int: pa.int64(), float: pa.float64(), bool: pa.bool_(), str: pa.string()}
    for name, knob in KNOBS.items():
        assert SCHEMA.field(name).type == kinds.get(knob.type, pa.string()), name
    assert [name for name in SCHEMA.names if name in KNOBS and name != "seed"] == [n for n in KNOBS if n != "seed"]


def test_roles_are_those_of_the_evaluation() -> None:
    source = Path(sweeps.__file__).parents[1] / "stages" / "evaluation.py"  # read, for importing it takes seconds
    assert f"\nROLES = {json.dumps(ROLES).replace('[', '(').replace(']', ')')}\n" in source.read_text(encoding="utf-8")


def test_a_row_holds_what_the_summary_says() -> None:
    knobs = {LAMBDA_E: 2.0, "federation.widths": (1.0, 1.0), "warmup.shuffle": False, "meta.updates": 7}
    result = trial(7, 1, knobs, final=0.75, control=0.5, cached=("warmup",), validation_accuracy={"final": 0.25})
    result.summary["stages"]["warmup"]["waited_seconds"] = 3.5
    (row,) = results_table([result]).to_pylist()
    config = flatten(override(ExperimentConfig(), knobs | {"seed": 1}))
    for name, value in config.items():
        assert row[name] == (json.dumps(list(value)) if isinstance(value, tuple) else value), name
    assert row["federation.widths"] == "[1.0, 1.0]" and isinstance(row[LAMBDA_E], float)
    assert (row["trial"], row["point"], row["seed"], row["status"], row["error"]) == ("p007s1", 7, 1, "done", None)
    assert (row["accuracy_final"], row["accuracy_teacher"], row["gain"]) == (0.75, None, 0.25)
    assert (row["validation_final"], row["validation_initial"]) == (0.25, None)
    assert (row["selection_metric"], row["selection"]) == ("held-out prototypes", 0.5)
    assert (row["seconds_warmup"], row["cached_warmup"]) == (64.0, True), "what it cost when it was computed"
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


def test_what_is_not_finite_is_null() -> None:
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
    folder = tmp_path / "sweeps" / "new"
    write_results(table, folder)
    write_results(table, folder)
    assert sorted(os.listdir(folder)) == ["results.csv", "results.parquet"]
    assert read_results(folder / "results.parquet") == table
    read = pc.read_csv(
        folder / "results.csv",
        parse_options=pc.ParseOptions(newlines_in_values=True),
        convert_options=pc.ConvertOptions(
            column_types=SCHEMA, strings_can_be_null=True, quoted_strings_can_be_null=False
        ),
    )
    assert read == table


def test_a_failing_disk_leaves_the_old_results(
    tmp_path: Path, table: pa.Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_results(table, tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in ("results.csv", "results.parquet")}

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match=r"results\.csv: No space left on device"):
        write_results(table.slice(0, 1), tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in before} == before


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    write_results(results_table([trial(point, seed) for point in range(3) for seed in range(2)]), folder)
    return folder / "results.parquet"


@settings(max_examples=60, deadline=None)
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


# ---------------------------------------------------------------- the closing table


def test_the_selection_chooses_and_test_accuracy_does_not() -> None:
    results = [
        trial(0, knobs={LAMBDA_E: 0.5}, final=0.99, selection=0.25),
        trial(1, knobs={LAMBDA_E: 2.0}, final=0.60, selection=0.75),
    ]
    lines = printed(sweep_table(results, (), (LAMBDA_E,)))
    assert names_in_order(lines) == ["p001", "p000"]
    assert "best by held-out prototypes (selection)" in lines
    by_hand = [line.split() for line in lines if line.startswith("p00")]
    assert by_hand == [["p001", "2", "75.0", "60.0", "87.5", "-27.5"], ["p000", "0.5", "25.0", "99.0", "87.5", "+11.5"]]


def test_mean_and_deviation_over_seeds_are_numpys() -> None:
    draws = np.random.default_rng(0).uniform(0.2, 0.9, (4, 3, 3))
    results = [
        trial(point, seed, {LAMBDA_E: float(point)}, selection=s, final=f, control=c)
        for point in range(4)
        for seed, (s, f, c) in enumerate(draws[point].tolist())
    ]
    lines = printed(sweep_table(results, (), (LAMBDA_E, "seed")))
    means = draws[:, :, 0].mean(axis=1)
    assert names_in_order(lines) == [f"p{point:03}" for point in np.argsort(-means)]
    assert any("mean ± sd of 3 seeds" in line for line in lines)
    for point, values in enumerate(100 * draws):
        selection, final, control = values.T
        cells = [str(point)]
        for column, sign in ((selection, ""), (final, ""), (control, ""), (final - control, "+")):
            cells.append(f"{column.mean():{sign}.1f} ±{column.std(ddof=1):.1f}")
        (line,) = [line for line in lines if line.startswith(f"p{point:03}")]
        assert re.split(r"  +", line)[1:] == cells


def test_points_are_compared_under_equal_conditions() -> None:
    results = [
        trial(3 * place + number, knobs={OMEGA: omega, LAMBDA_E: 0.5 + number}, selection=number / 10 + place / 100)
        for place, omega in enumerate((0.01, 1.0))
        for number in range(3)
    ]
    lines = printed(sweep_table(results, (OMEGA,), (OMEGA, LAMBDA_E)))
    assert names_in_order(lines) == ["p002", "p001", "p000", "p005", "p004", "p003"]
    assert [line for line in lines if "omega" in line] == [
        f"partition.omega = {omega}, best by held-out prototypes (selection)" for omega in ("0.01", "1")
    ]
    ladder = [trial(n, knobs={OMEGA: omega}, selection=omega) for n, omega in enumerate((0.01, 0.1, 1.0))]
    lines = printed(sweep_table(ladder, (OMEGA,), (OMEGA,)))
    assert names_in_order(lines) == ["p000", "p001", "p002"], "harder and easier problems are not ranked"
    assert not any("best" in line for line in lines)


@pytest.mark.parametrize(
    "values, metrics, told",
    [
        ((None, None), ("held-out prototypes",) * 2, "nothing was chosen: selection values are missing"),
        ((0.1, None), ("held-out prototypes",) * 2, "nothing was chosen: selection values are missing"),
        (
            (0.1, 0.9),
            ("validation accuracy", "held-out prototypes"),
            "nothing was chosen: selection metrics differ",
        ),
    ],
)
def test_nothing_is_chosen_by_what_cannot_be_compared(values: Any, metrics: Any, told: str) -> None:
    results = [trial(n, knobs={LAMBDA_E: n + 1.0}, selection=values[n], metric=metrics[n]) for n in (0, 1)]
    lines = printed(sweep_table(results, (), (LAMBDA_E,)))
    assert told in lines and names_in_order(lines) == ["p000", "p001"]


def test_fewer_seeds_are_marked_and_what_is_left_out_is_counted() -> None:
    results = [
        trial(point, seed, {LAMBDA_E: 1.0 + point}, selection=1 - point / 20)
        for point in range(14)
        for seed in range(3)
        if (point, seed) not in {(1, 2), (5, 0), (5, 1)}
    ]
    results += [failed(1, 2, {LAMBDA_E: 2.0}), TrialResult("p005s0", 5, 0, {}, {"status": "stopped"}), failed(20)]
    lines = printed(sweep_table(results, (), (LAMBDA_E,)))
    assert lines[0] == "configurations 15, trials 42: 39 done, 1 stopped early, 2 failed"
    assert [line.split()[0] for line in lines if re.match(r"p\d{3}\*? ", line)] == [
        "p000", "p001*", "p002", "p003", "p004", "p005*", "p006", "p007", "p008", "p009",
    ]  # fmt: skip
    assert "* seeds finished: p001 2, p005 1 of 3" in lines and "and 4 more in results.csv" in lines
    (alone,) = [line for line in lines if line.startswith("p005*")]
    assert "±" not in alone, "one seed has no deviation"


def test_stages_are_counted_as_computed_and_found() -> None:
    results = [trial(n, cached=() if n < 2 else STAGES[:5]) for n in range(12)] + [failed(12)]
    lines = printed(sweep_table(results, (), (LAMBDA_E,)))
    rows = {line.split()[0]: line.split()[1:] for line in lines if line.startswith(STAGES)}
    assert list(rows) == list(STAGES)
    assert rows["warmup"] == ["2", "10", "4.0", "640.0"] and rows["distill"] == ["12", "0", "24.0", "0.0"]


def test_failures_are_listed_with_their_address() -> None:
    results = [
        failed(0, stage="warmup", round=4, client=3, error="stage warmup, round 4, client 3: NaN in [red]\nweights"),
        failed(1, error="disk full"),
    ]
    lines = printed(sweep_table(results, (), (LAMBDA_E,)))
    assert lines[0] == "configurations 2, trials 2: 2 failed"
    told = [re.split(r"  +", line) for line in lines if re.match(r"p\d{3}s\d", line)]
    assert told == [
        ["p000s0", "stage warmup, round 4, client 3", "NaN in [red] weights"],
        ["p001s0", "-", "disk full"],
    ]
    many = printed(sweep_table([failed(n) for n in range(30)], (), ()))
    assert "and 18 more in results.csv" in many


def grid() -> list[TrialResult]:
    draws, point, results = random.Random(0), 0, []
    for omega in (0.01, 0.1):
        for _ in range(12):
            knobs = {OMEGA: omega} | {f"generator.lambda_{x}": draws.uniform(0.5, 15) for x in "edi"}
            for seed in range(3):
                value = draws.uniform(0.85, 0.95)
                results.append(trial(point, seed, knobs, selection=value, final=value, control=value - 0.05))
            point += 1
    return results


SWEPT = (OMEGA, *(f"generator.lambda_{x}" for x in "edi"))


def test_it_fits_eighty_columns_and_paths_stay_whole() -> None:
    folder = "/somewhere/" + "far" * 40 + "/sweeps/name"
    lines = printed(sweep_table(grid(), (OMEGA,), SWEPT, folder))
    assert [line for line in lines if len(line) > 80] == [
        f"files   {folder}", f"curves  tensorboard --logdir {folder}",
    ]  # fmt: skip
    (head,) = {line for line in lines if line.startswith("point")}
    assert head.split() == ["point", "lambda_e", "lambda_d", "lambda_i", "selection", "final", "control", "gain"]
    assert not any("\x1b" in line for line in lines)


def test_many_knobs_go_into_one_column_and_names_stay_unambiguous() -> None:
    flips = [{}, {"warmup.lr": 0.5}, {"finetune.lr": 0.25}, {"meta.pool": "sum"}, {"meta.select": False}]
    flips += [{"prototypes.rounds": "all"}, {"generator.drop_class0_bug": True}, {"distill.jsd": "bhattacharyya"}]
    swept = tuple(dict.fromkeys(name for knobs in flips for name in knobs))
    results = [trial(n, knobs=knobs, selection=1 - n / 10) for n, knobs in enumerate(flips)]
    lines = printed(sweep_table(results, (), swept))
    assert max(map(len, lines)) <= 80
    rows = [line.split()[0:1] + line.split()[5:] for line in lines if line.startswith("p00")]
    assert rows == [
        ["p000", "-"], ["p001", "warmup.lr=0.5"], ["p002", "finetune.lr=0.25"], ["p003", "pool=sum"],
        ["p004", "select=false"], ["p005", "rounds=all"], ["p006", "drop_class0_bug=true"],
        ["p007", "jsd=bhattacharyya"],
    ]  # fmt: skip
    assert "where nothing else is said: warmup.lr=0.01, finetune.lr=0.0001, pool=mean" in " ".join(lines)


def test_a_terminal_without_unicode_can_show_it() -> None:
    raw = io.BytesIO()
    console = Console(file=io.TextIOWrapper(raw, "ascii"), width=100, color_system=None)
    console.print(sweep_table(grid(), (OMEGA,), SWEPT))
    console.file.flush()
    assert b"mean +- sd of 3 seeds" in raw.getvalue()


def test_an_empty_sweep_has_a_table() -> None:
    assert printed(sweep_table([], (OMEGA,), SWEPT)) == ["configurations 0, trials 0: none ended"]


# ---------------------------------------------------------------- TensorBoard


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
        write_hparams(tmp_path / result.trial / "tensorboard", trial(0, final=0.0), swept)
        write_hparams(tmp_path / result.trial / "tensorboard", result, swept)
        files = os.listdir(tmp_path / result.trial / "tensorboard")
        assert max(files) == sweeps.HPARAMS_FILE and len(files) == 1 + (result is not results[0]), "again replaces"

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


# ---------------------------------------------------------------- the view


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(sweep_view, "_now", clock)
    return clock


@pytest.fixture
def tty(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    return Terminal()


def test_plain_lines_tell_begin_and_end_with_the_best_and_the_time_left(clock: Clock) -> None:
    stream = io.StringIO()
    with SweepView(4, stream=stream) as view:
        view.begin("p000s0", "a")
        view.stage("p000s0", "warmup", "found")
        clock.now += 30
        view.end("p000s0", "done", 0.5, "a")
        view.begin("p001s0", "b")
        clock.now += 10
        view.end("p001s0", "failed", None, "b")
        view.warn("b failed")
        view.begin("p002s0", "c")
        clock.now += 20
        view.end("p002s0", "stopped", 0.9, "c")
        view.begin("p003s0", "d")
        view.end("p003s0", "done", 0.75, "d")
    assert stream.getvalue().splitlines() == [
        "a: begins",
        "[1/4] a: selection 50.0%, best so far 50.0% (a), 1:30 left",
        "b: begins",
        "[2/4] b: failed, best so far 50.0% (a), 0:40 left",
        "warning: b failed",
        "c: begins",
        "[3/4] c: stopped early, best so far 50.0% (a), 0:20 left",
        "d: begins",
        "[4/4] d: selection 75.0%, best so far 75.0% (d), 0:00 left",
    ]


def test_time_left_is_unknown_until_something_finished_and_counts_side_by_side(clock: Clock) -> None:
    with SweepView(20, stream=io.StringIO()) as view:
        for _ in range(10):
            view.found("done", 0.9, "old")
        assert view.seconds_left() is None
        view.begin("a", "a")
        view.begin("b", "b")
        clock.now += 5
        view.end("a", "failed", None, "a")
        assert view.seconds_left() is None, "what failed at once tells no pace"
        view.begin("c", "c")
        clock.now += 95
        view.end("b", "done", 0.5, "b")
        # two ended in 52.5 s on average; c has run for 95 s, seven are to come, two at a time
        assert view.seconds_left() == pytest.approx(7 * 52.5 / 2)
        for trial in "defghij":
            view.begin(trial, trial)
            view.end(trial, "done", 0.5, trial)
        assert view.seconds_left() is None, "the last one is overdue"
        view.end("c", "done", None, "c")
        assert view.seconds_left() == 0.0
    lines = view._plain.stream.getvalue().splitlines()
    assert "[11/20] a: failed, best so far 90.0% (old), time left unknown" in lines
    assert lines[-1] == "[20/20] c: done, best so far 90.0% (old), 0:00 left"


def test_the_best_is_told_within_a_condition() -> None:
    with SweepView(3, stream=io.StringIO()) as view:
        view.end("a", "done", 0.9, "easy", "omega 1")
        view.end("b", "done", 0.5, "hard", "omega 0.01")
        view.end("c", "done", 0.4, "harder", "omega 0.01")
    lines = view._plain.stream.getvalue().splitlines()
    assert [line.rpartition("best so far ")[2].partition(",")[0] for line in lines] == [
        "90.0% (easy)", "50.0% (hard)", "50.0% (hard)",
    ]  # fmt: skip


@pytest.mark.parametrize("terminal", [True, False])
def test_without_progress_only_messages_are_shown(tty: Terminal, terminal: bool) -> None:
    stream = tty if terminal else io.StringIO()
    with SweepView(2, stream=stream, progress=False) as view:
        view.begin("a", "a")
        view.stage("a", "warmup")
        view.say("a [red]word")
        view.end("a", "done", 0.5, "a")
        view.warn("take care")
    assert stream.getvalue() == "a [red]word\nwarning: take care\n"


def shown(view: SweepView, stream: Terminal) -> list[str]:
    """What the live view shows now, without the terminal's control codes."""
    stream.truncate(0)
    stream.seek(0)
    assert view._live is not None
    view._live.live.refresh()
    return [line.rstrip() for line in Text.from_ansi(stream.getvalue()).plain.splitlines() if line.strip()]


def test_the_live_view_tells_of_the_sweep_and_of_each_running_trial(clock: Clock, tty: Terminal) -> None:
    with SweepView(18, stream=tty) as view:
        for _ in range(3):
            view.found("done", None, "old")
        view.begin("p003s0", "lambda_e=[bold]1")
        assert shown(view, tty)[1] == "0:00 elapsed, time left unknown"
        clock.now += 60
        view.end("p003s0", "done", 0.875, "lambda_e=[bold]1")
        view.begin("p004s0", "lambda_e=[bold]2")
        view.begin("p005s0", "lambda_e=" + "3" * 100)
        view.stage("p004s0", "warmup", "found")
        clock.now += 30
        view.stage("p004s0", "generators")
        view.stage("p999s0", "warmup")
        head, times, best, first, second = shown(view, tty)
        assert re.sub(r"[━╸╺ ]+", " ", head) == "sweep 4 done, 2 running of 18"
        assert times == "1:30 elapsed, 6:30 left"
        assert best == "best so far 87.5% (lambda_e=[bold]1)"
        assert first.split() == [">", "lambda_e=[bold]2", "generators", "0:30"]
        assert second.startswith("> lambda_e=333") and second.endswith("  0:30") and len(second) <= 80
        view.end("p005s0", "failed", None, "")
        view.end("p004s0", "stopped", 0.99, "")
        head, _, best = shown(view, tty)
        assert head.endswith("4 done, 1 stopped early, 1 failed, 0 running of 18") and "87.5%" in best
        view.say("markup is [red]text")
        view.warn("x" * 300)
    text = tty.getvalue()
    assert "markup is [red]text\n" in text and "warning: " + "x" * 300 in text
    assert "begins" not in text


def test_an_error_leaves_the_terminal_sane(tty: Terminal) -> None:
    hide, show = "\x1b[?25l", "\x1b[?25h"

    def interrupted() -> None:
        with SweepView(2, stream=tty) as view:
            view.begin("a", "a")
            assert tty.getvalue().rindex(hide) > tty.getvalue().rfind(show)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert tty.getvalue().rindex(show) > tty.getvalue().rindex(hide)


def test_a_dumb_terminal_gets_plain_lines(tty: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    with SweepView(2, stream=tty) as view:
        view.begin("a", "a")
    assert tty.getvalue() == "a: begins\n"


def test_a_terminal_without_unicode_gets_the_live_view_too(monkeypatch: pytest.MonkeyPatch, tty: Terminal) -> None:
    monkeypatch.setattr(Terminal, "encoding", "ascii")
    with SweepView(2, stream=tty) as view:
        view.begin("a", "a" * 200)
        view.end("a", "done", 0.5, "b" * 200)
        view.begin("c", "c" * 200)
        assert len(shown(view, tty)) == 4
    assert tty.getvalue().isascii()
