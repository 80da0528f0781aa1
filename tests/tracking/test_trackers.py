"""Other projects' trackers: what they hold after a run, a resumed run and a sweep, and runs whose tracker fails."""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import pytest
from cli_runner import ask, refusal, refused_by
from helpers import TINY, interrupted, stripes_dataset

import mosaic_ray as mr
from mosaic_ray.config.registry import TRACKERS
from mosaic_ray.config.resolve import flatten, override
from mosaic_ray.runs import runner
from mosaic_ray.storage.store import Store
from mosaic_ray.studies.harness import run_study
from mosaic_ray.sweeps import runner as sweep_runner
from mosaic_ray.sweeps.space import Choice, SweepPlan
from mosaic_ray.tracking import backends, reports
from mosaic_ray.tracking.backends import Point, RunInfo, check_trackers
from mosaic_ray.tracking.reports import Tracking

pytestmark = pytest.mark.filterwarnings("ignore")  # those of the trackers

QUICK = override(TINY, {"method": "fedavg", "warmup.checkpoint_rounds": 1})


@pytest.fixture(autouse=True)
def stripes_as_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mosaic_ray.data.load.load_dataset", lambda config: stripes_dataset())
    monkeypatch.setattr(reports, "INTERRUPTED_SECONDS", 120.0)
    monkeypatch.setattr(reports, "CLOSE_SECONDS", 120.0)


def go(storage: Path, *track: str, config=QUICK, **options: Any) -> dict[str, Any]:
    return runner.run(config, storage=str(storage), progress=False, track=track, **options)


def logged(summary: dict[str, Any]) -> Counter[tuple[str, int, float]]:
    """The scalars of metrics.jsonl."""
    lines = (Path(summary["paths"]["run"]) / "metrics.jsonl").read_text().splitlines()
    return Counter((line["tag"], line["step"], line["value"]) for line in map(json.loads, lines))


def state(summary: dict[str, Any], tracker: str) -> dict[str, Any]:
    return json.loads((Path(summary["paths"]["run"]) / f"{tracker}.json").read_text())


# --- a tracker in memory ---------------------------------------------------------------------------------------------


class Memory:
    """Keeps what it gets, by run. The method that ``fails`` raises; ``slow``: seconds that ``write`` takes."""

    runs: ClassVar[dict[str, dict[str, Any]]] = {}
    fails: str = ""
    slow: float = 0.0
    place = "memory"

    def __init__(self) -> None:
        self._check("init")

    def _check(self, method: str) -> None:
        if method == self.fails:
            raise RuntimeError(f"{method}\nfails \x1b[31m")

    def environment(self) -> dict[str, str]:
        self._check("environment")
        return {"MEMORY": "1"}

    def open(self, info: RunInfo, known: str) -> str:
        self._check("open")
        self._of = known or f"run{len(self.runs)}"
        new = {"info": info, "points": [], "tables": {}, "ends": [], "opened": 0}
        self._run = self.runs.setdefault(self._of, new)
        self._run["opened"] += 1
        return self._of

    def configure(self, config: Any) -> None:
        self._check("configure")
        self._run["config"] = dict(config)

    def write(self, points: Any) -> None:
        time.sleep(self.slow)
        self._check("write")
        self._run["points"] += points

    def table(self, name: str, columns: Any, rows: Any, number: int) -> None:
        self._check("table")
        self._run["tables"][name] = [columns, rows, number]

    def close(self, status: str) -> None:
        self._check("close")
        self._run["ends"].append(status)


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> type[Memory]:
    monkeypatch.setattr(Memory, "runs", {})
    monkeypatch.setitem(backends.BACKENDS, "memory", Memory)
    monkeypatch.setitem(sys.modules, "memory", ModuleType("memory"))
    return Memory


def numbers(points: list[Point]) -> Counter[tuple[str, int, float]]:
    return Counter((p.tag, p.step, None if math.isnan(p.value) else p.value) for p in points if type(p.value) is float)


def test_a_tracker_gets_what_metrics_jsonl_has_and_a_repeated_run_sends_nothing(memory, tmp_path):
    summary = go(tmp_path, "memory")
    [run] = memory.runs.values()
    assert numbers(run["points"]) == logged(summary)
    assert [point.number for point in run["points"]] == list(range(len(run["points"])))
    assert {p.tag for p in run["points"] if type(p.value) is not float} >= {"partition/label_counts"}
    chosen = {name: value for name, value in flatten(QUICK).items() if value != "auto"}
    assert run["config"].keys() == flatten(QUICK).keys() and run["config"].items() >= chosen.items()
    columns, rows, _ = run["tables"]["final"]
    assert [row[:2] for row in rows] == [[n, v] for n, v in summary["accuracy"].items() if v is not None]
    assert columns[:2] == ["model", "accuracy"] and run["ends"] == ["done"]
    assert (run["info"].kind, run["info"].name) == ("run", Path(summary["paths"]["run"]).name)

    again = go(tmp_path, "memory")
    assert all(stage["cached"] for stage in again["stages"].values())
    assert memory.runs == {"run0": run} and run["opened"] == 1


def test_tracking_changes_no_number_no_key_and_no_name(memory, tmp_path):
    tracked, plain = go(tmp_path / "a", "memory"), go(tmp_path / "b")
    assert Path(tracked["paths"]["run"]).name == Path(plain["paths"]["run"]).name
    for found in (tracked, plain):
        found["stages"] = {name: stage["key"] for name, stage in found["stages"].items()}
        del found["paths"], found["communication"]
    assert tracked == plain


def test_a_run_that_failed_is_open_again_when_it_goes_on_and_ends_as_done_without_a_new_point(memory, tmp_path):
    def reported() -> Any:
        return Tracking(("memory",)).open(Store(str(tmp_path)).files, "x/", "n", "run", {}, print)

    with pytest.raises(RuntimeError, match="stopped"), reported() as to:
        to.scalar("a", 1, 2.0)
        raise RuntimeError("stopped")
    [run] = memory.runs.values()
    for opened in (2, 2):  # a run that is done is left alone
        with reported() as to:
            to.scalar("a", 1, 2.0)
        assert (run["ends"], run["opened"], len(run["points"])) == (["failed", "done"], opened, 1)


def test_an_interrupted_run_goes_on_in_the_same_run_and_a_fresh_one_does_not(memory, tmp_path):
    with interrupted(in_round=2):
        go(tmp_path, "memory")
    [run] = memory.runs.values()
    assert run["ends"] == ["killed"] and run["points"] and not run["tables"]
    summary = go(tmp_path, "memory")
    assert numbers(run["points"]) == logged(summary)
    assert memory.runs == {"run0": run} and run["ends"] == ["killed", "done"] and run["tables"]
    go(tmp_path, "memory", fresh=True)
    assert list(memory.runs) == ["run0", "run1"] and numbers(memory.runs["run1"]["points"]) == logged(summary)


def test_a_failed_run_is_one_in_the_tracker(memory, tmp_path):
    with pytest.raises(mr.RunError, match="diverged"):
        go(tmp_path, "memory", config=override(QUICK, {"warmup.lr": 1e9, "warmup.weight_decay": 1e9}))
    assert memory.runs["run0"]["ends"] == ["failed"]


@pytest.mark.parametrize("method", ["init", "open", "configure", "write", "table", "close"])
def test_a_tracker_that_fails_anywhere_is_warned_of_once_and_the_run_goes_on(
    memory, method, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(memory, "fails", method)
    monkeypatch.setattr(reports, "GATHER_SECONDS", 0.0)
    summary = go(tmp_path, "memory")
    assert summary["status"] == "done"
    lines = [line for line in capsys.readouterr().err.splitlines() if "tracker" in line]
    assert lines == [
        rf"warning: tracker memory: RuntimeError: {method} fails \x1b[31m; the run goes on without it"
    ]


def test_a_tracker_that_does_not_answer_is_left_behind(memory, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(memory, "slow", 30.0)
    monkeypatch.setattr(reports, "CLOSE_SECONDS", 0.2)
    assert go(tmp_path, "memory")["status"] == "done"
    assert "tracker memory: it did not take everything in time; the run goes on" in capsys.readouterr().err


@pytest.mark.parametrize(
    "damage", [b"", b"\x00", b"[]", b'{"request": 1}', b'{"run": "../x"}', b'{"number": -1}', b'{"sending": [1]}', None]
)
def test_a_record_that_anybody_wrote_begins_a_new_run(memory, damage, tmp_path):
    summary = go(tmp_path, "memory")
    path = Path(summary["paths"]["run"]) / "memory.json"
    good = json.loads(path.read_text())
    path.write_bytes(json.dumps(good | json.loads(damage)).encode() if damage and damage[:1] == b"{" else damage or b"")
    if damage is None:
        path.unlink()
        path.symlink_to(tmp_path / "elsewhere")
        (tmp_path / "elsewhere").write_text(json.dumps(good))
    again = go(tmp_path, "memory")
    assert list(memory.runs) == ["run0", "run1"]
    assert numbers(memory.runs["run1"]["points"]) == logged(again)
    if damage is None:
        assert json.loads((tmp_path / "elsewhere").read_text()) == good


def test_what_a_kill_left_unknown_is_sent_again_as_the_same_points(memory, tmp_path):
    files = Store(str(tmp_path)).files

    def log(again: bool) -> None:
        with Tracking(("memory",)).open(files, "x/", "x", "run", {"seed": 0}, print) as to:
            to.scalar("a/b", 1, 0.5)
            if again:
                to.scalar("a/b", 2, math.inf)

    log(again=False)
    [first] = memory.runs["run0"]["points"]
    place = tmp_path / "x" / "memory.json"
    kept = json.loads(place.read_text())
    killed = kept | {"steps": {}, "number": 0, "sending": [["a/b", 1, 0.5, first.time]]}
    place.write_text(json.dumps(killed))
    log(again=True)
    points = memory.runs["run0"]["points"]
    assert points[:2] == [first, first] and math.isnan(points[2].value) and points[2].number == 1
    assert len(points) == 3 and memory.runs["run0"]["opened"] == 2


def test_names_and_tags_of_users_are_escaped(memory, tmp_path):
    with Tracking(("memory",), group="g\x1b").open(
        Store(str(tmp_path)).files, "x/", "n\n\u202e", "run", {"k\x07": "v\x9b"}, print
    ) as to:
        to.scalar("t\x1b", 0, 1)
        to.image("i\u2028", 0, np.zeros((1, 2, 3), np.uint8))
        to.table("final", ["c\r"], [["x\x00", 1.0]])
    [run] = memory.runs.values()
    assert (run["info"].name, run["info"].group, run["config"]) == ("n\\n\\u202e", "g\\x1b", {"k\\x07": "v\\x9b"})
    assert [p.tag for p in run["points"]] == ["t\\x1b", "i\\u2028"] and run["points"][1].value.shape == (2, 3)
    assert run["tables"]["final"][:2] == [["c\\r"], [["x\\x00", 1.0]]]


def test_a_study_is_a_run_and_its_seeds_are_runs_below_it(memory, tmp_path):
    from mosaic_ray.studies import moe_weights

    config = override(TINY, moe_weights.BASE | {"warmup.num_rounds": 1, "warmup.local_steps": 2})
    found = run_study(
        moe_weights.STUDY, config, (0, 1), {}, storage=str(tmp_path), name="n", progress=False, track=("memory",)
    )
    whole, *seeds = memory.runs.values()
    assert (whole["info"].kind, whole["info"].name, whole["info"].group) == ("study", "n", "")
    assert len(whole["tables"]["results"][1]) == len(found["rows"]) and not whole["points"]
    assert [run["info"].name for run in seeds] == ["seed 0", "seed 1"]
    assert all(run["info"].group == "n" and run["info"].parents == {"memory": "run0"} for run in seeds)
    assert all(max(numbers(run["points"]).values()) == 1 for run in seeds)
    assert [run["ends"] for run in memory.runs.values()] == [["done"]] * 3


# --- requests --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", ["run", "sweep --space smoke", "compare", "experiment moe-weights", "run --dry-run"])
def test_an_unknown_tracker_is_refused_in_one_line(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = refusal(ask(*words.split(), "--track", "wandb2"))
    assert line == 'mosaic: error: --track wandb2: unknown tracker; did you mean "wandb"?\n'
    assert not list(tmp_path.iterdir())


def test_the_names_that_shells_complete_are_the_trackers():
    assert tuple(backends.BACKENDS) == TRACKERS


def test_a_tracker_that_is_not_installed_is_refused_with_its_extra(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name in backends.BACKENDS:
        monkeypatch.delitem(sys.modules, name, raising=False)
        line = f"--track {name}: it is not installed; pip install 'mosaic-ray[{name}]'"
        assert refused_by(check_trackers, [name]) == line
        monkeypatch.chdir(tmp_path)
        assert refusal(ask("run", "--track", name)) == f"mosaic: error: {line}\n"
        for call in (mr.run, mr.sweep, mr.compare):
            assert refused_by(lambda call=call, name=name: call(track=(name,))) == line
    assert not list(tmp_path.iterdir())


def test_the_folder_that_wandb_writes_is_not_taken_for_wandb(tmp_path, monkeypatch):
    (tmp_path / "wandb").mkdir()
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert "is not installed" in refused_by(check_trackers, ["wandb"])


def test_each_tracker_is_taken_once(memory):
    assert check_trackers(["memory", "memory"]) == check_trackers("memory") == ("memory",)


@pytest.mark.parametrize(
    "content", ["raise ImportError('no\\nway')", "raise SystemExit(3)", "def __getattr__(name): 1 / 0"]
)
@pytest.mark.parametrize("name", list(backends.BACKENDS))
def test_a_module_that_fails_everywhere_is_warned_of_once(name, content, tmp_path, monkeypatch, capsys):
    for module in [m for m in sys.modules if m.partition(".")[0] == name]:
        monkeypatch.delitem(sys.modules, module)
    (tmp_path / "lib" / name).mkdir(parents=True)
    (tmp_path / "lib" / name / "__init__.py").write_text(content)
    monkeypatch.syspath_prepend(tmp_path / "lib")
    assert check_trackers([name]) == (name,)
    summary = go(tmp_path / "s", name)
    sys.modules.pop(name, None)  # the undoing of what was deleted above brings the real one back
    assert summary["accuracy"] == go(tmp_path / "t")["accuracy"]
    [line] = [line for line in capsys.readouterr().err.splitlines() if "tracker" in line]
    assert line.startswith(f"warning: tracker {name}: ") and line.endswith("; the run goes on without it")


# --- MLflow ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """MLflow's own server on a free port."""
    for name in ("mlflow", "aiohttp", "flask", "graphene"):  # mlflow-skinny has no server
        pytest.importorskip(name)
    folder = tmp_path_factory.mktemp("mlflow")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["server", "--backend-store-uri", f"sqlite:///{folder}/m.db", "--artifacts-destination", f"{folder}/files"]
    quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with subprocess.Popen(
        [sys.executable, "-m", "mlflow", *words, "--host", "127.0.0.1", "--port", str(port), "--workers", "1"],
        cwd=folder, env=os.environ | quiet, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as process:  # fmt: skip
        address = f"http://127.0.0.1:{port}"
        try:
            for _ in range(600):
                if process.poll() is not None:
                    pytest.skip("MLflow's server does not start here")
                try:
                    urllib.request.urlopen(f"{address}/health", timeout=5).close()
                    break
                except OSError:
                    time.sleep(0.2)
            yield address
        finally:
            os.killpg(process.pid, signal.SIGTERM)


@pytest.fixture(params=["server", "sqlite"])
def mlflow(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """MLflow's client of a server or a database, which MLFLOW_TRACKING_URI names."""
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    found = pytest.importorskip("mlflow")
    uri = f"sqlite:///{tmp_path}/m.db" if request.param == "sqlite" else request.getfixturevalue("server")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", tmp_path.name)
    monkeypatch.chdir(tmp_path)  # where artifacts of a database go
    return found.MlflowClient(tracking_uri=uri)


def runs_of(mlflow: Any, name: str) -> list[Any]:
    experiment = mlflow.get_experiment_by_name(name)
    return mlflow.search_runs([experiment.experiment_id], order_by=["attributes.start_time ASC"])


def metrics_of(mlflow: Any, run: Any) -> Counter[tuple[str, int, float]]:
    return Counter(
        (metric.key, metric.step, None if math.isnan(metric.value) else metric.value)
        for tag in run.data.metrics
        for metric in mlflow.get_metric_history(run.info.run_id, tag)
    )


def test_mlflow_holds_the_run_also_one_that_was_interrupted(mlflow, tmp_path, capsys):
    with interrupted(in_round=2):
        go(tmp_path / "s", "mlflow")
    [run] = runs_of(mlflow, tmp_path.name)
    assert run.info.status == "KILLED" and sum(metrics_of(mlflow, run).values()) > 0
    summary = go(tmp_path / "s", "mlflow")
    [run] = runs_of(mlflow, tmp_path.name)
    assert run.info.run_id == state(summary, "mlflow")["run"] and run.info.status == "FINISHED"
    assert run.info.run_name == Path(summary["paths"]["run"]).name
    assert metrics_of(mlflow, run) == logged(summary)
    assert run.data.tags["mlflow.source.name"] == "mosaic_ray"
    assert run.data.params["partition.omega"] == "0.3" and run.data.params["method"] == "fedavg"
    table = json.loads(Path(mlflow.download_artifacts(run.info.run_id, "final.json", str(tmp_path))).read_text())
    assert table["columns"][:2] == ["model", "accuracy"]
    assert ["final", summary["accuracy"]["final"]] in [row[:2] for row in table["data"]]
    assert not capsys.readouterr().out
    images = [file.path for file in mlflow.list_artifacts(run.info.run_id, "images") if file.path.endswith(".png")]
    assert sum("partition" in path for path in images) == 1


@pytest.mark.ray
@pytest.mark.parametrize("mlflow", ["sqlite"], indirect=True)
def test_trials_are_runs_of_mlflow_below_the_sweeps_and_a_group_of_wandb(mlflow, offline, tmp_path, ray_up):
    plan = SweepPlan("two", knobs={"partition.omega": Choice((0.3, 3.0))})
    request = sweep_runner.SweepRequest(override(QUICK, {"partition.validation_fraction": 0.2}), "t", plan)
    outcome = sweep_runner.run(
        request, storage=str(tmp_path / "s"), name="n\u00e9", progress=False, track=("mlflow", "wandb")
    )
    runs = {run.info.run_name: run for run in runs_of(mlflow, tmp_path.name)}
    sweep = runs.pop("n\u00e9")
    assert sweep.data.tags["mosaic_ray.kind"] == "sweep" and sweep.info.status == "FINISHED"
    path = mlflow.download_artifacts(sweep.info.run_id, "results.json", str(tmp_path))
    table = json.loads(Path(path).read_text())
    omegas = [dict(zip(table["columns"], row, strict=True))["partition.omega"] for row in table["data"]]
    assert omegas == [0.3, 3.0]
    assert len(runs) == 2
    for result, run in zip(outcome.results, [runs[name] for name in sorted(runs)], strict=True):
        assert run.info.run_name.startswith(f"{result.trial} ") and run.info.status == "FINISHED"
        assert run.data.tags["mlflow.parentRunId"] == sweep.info.run_id
        assert run.data.tags["mosaic_ray.group"] == "n\u00e9"
        wanted = logged(result.summary)
        assert metrics_of(mlflow, run) == wanted
        ident = state(result.summary, "wandb")["run"]
        assert scalars_of(rows_of(offline, ident), {tag for tag, _, _ in wanted}) == wanted
        [path] = files_of(offline, ident)
        [begun] = [record.run for record in records(path) if record.HasField("run")]
        assert (begun.run_group, begun.job_type) == ("n\u00e9", "trial")


@pytest.mark.parametrize("mlflow", ["sqlite"], indirect=True)
def test_a_run_that_was_killed_goes_on_in_its_run_of_mlflow(mlflow, tmp_path):
    knobs = ["warmup.num_rounds=60", "warmup.local_steps=2", "warmup.checkpoint_rounds=1", "finetune.num_rounds=1"]
    words = ["run", "--method", "fedavg", "--host", "serial", "--clients", "3", "--track", "mlflow", "--json"]
    words += [word for knob in (*knobs, "model.width=4", "runtime.eval_rounds=1") for word in ("--set", knob)]
    command = [sys.executable, "-m", "mosaic_ray", *words, "--storage", str(tmp_path / "s")]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None:  # until something was sent
            [*records] = (tmp_path / "s").glob("runs/*/mlflow.json")
            if records and json.loads(records[0].read_text())["steps"]:
                process.kill()
            time.sleep(0.05)
    assert process.returncode == -signal.SIGKILL, "it ended before anything was sent"
    [run] = runs_of(mlflow, tmp_path.name)
    assert sum(metrics_of(mlflow, run).values()) > 0
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    [run] = runs_of(mlflow, tmp_path.name)
    assert metrics_of(mlflow, run) == logged(json.loads(done.stdout)) and run.info.status == "FINISHED"


def test_tags_that_mlflow_refuses_are_changed():
    assert backends._key("a//../b:c/\u00e9\\x1b!") == "a/b_c/\u00e9_x1b_"
    assert backends._absolute("sqlite:///x.db") == f"sqlite:///{os.getcwd()}/x.db"
    assert backends._absolute("./mlruns") == Path("mlruns").resolve().as_uri()
    for uri in ("sqlite:////a/x.db", "http://h:5000", "databricks", "file:///a", "postgresql+psycopg2://h/d"):
        assert backends._absolute(uri) == uri


# --- wandb -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of wandb's offline runs."""
    pytest.importorskip("wandb").teardown()  # it has read its settings
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_PROJECT", "p")
    return tmp_path / "wandb"


def records(path: Path) -> Iterator[Any]:
    """Yield the records of a .wandb file: LevelDB's log format after seven bytes, protocol buffers inside."""
    from wandb.proto.wandb_internal_pb2 import Record as Logged

    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        size, kind, left = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6], 32768 - at % 32768
        if left < 7 or not kind:
            at += left
            continue
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # a whole record, or its last part
            yield Logged.FromString(whole)
            whole = b""


def files_of(offline: Path, ident: str = "") -> list[Path]:
    """The files of all offline runs, or of one, in order; wandb's own process may write a file's end late."""
    files = sorted(offline.glob(f"offline-run-*{ident}/*.wandb"))
    for path in files:
        for _ in range(300):
            if any(record.HasField("exit") for record in records(path)):
                break
            time.sleep(0.1)
    return files


def rows_of(offline: Path, ident: str = "") -> list[dict[str, Any]]:
    """The rows of history of all offline runs, or of one, in order, by tag."""
    rows = []
    for path in files_of(offline, ident):
        for record in records(path):
            if record.HasField("history"):
                items = record.history.item
                rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return rows


def scalars_of(rows: list[dict[str, Any]], tags: set[str]) -> Counter[tuple[str, int, float]]:
    found = Counter((tag, row["step"], row[tag]) for row in rows for tag in tags & row.keys())
    return Counter({(tag, step, value if type(value) is float or value is None else float(value)): count
                    for (tag, step, value), count in found.items()})  # fmt: skip


def test_wandbs_offline_files_hold_the_run_also_one_that_was_interrupted(offline, tmp_path):
    with interrupted(in_round=2):
        go(tmp_path / "s", "wandb")
    assert rows_of(offline)
    summary = go(tmp_path / "s", "wandb")
    folders = [path for path in offline.glob("offline-run-*") if path.is_dir()]
    ident = state(summary, "wandb")["run"]
    # of two folders of one second the later one gets a number behind the run's name
    assert {path.name.split("-")[3] for path in folders} == {ident} and len(folders) == 2
    rows, wanted = rows_of(offline), logged(summary)
    assert scalars_of(rows, {tag for tag, _, _ in wanted}) == wanted
    steps = [row["_step"] for row in rows]
    assert steps == sorted(set(steps))
    assert any("partition/label_counts/path" in row for row in rows)
    assert any("final/nrows" in row for row in rows)
    [begun] = [r.run for path in files_of(offline) for r in records(path) if r.HasField("run")][:1]
    assert (begun.project, begun.display_name) == ("p", Path(summary["paths"]["run"]).name)
    configured = {u.key: json.loads(u.value_json) for path in files_of(offline)
                  for r in records(path) if r.HasField("config") for u in r.config.update}  # fmt: skip
    assert configured["partition.omega"] == 0.3 and configured["method"] == "fedavg"
    assert list(offline.glob("offline-run-*/files/media/images/partition/*.png"))


def test_wandb_groups_a_sweeps_runs_and_stays_offline_without_a_key(offline, tmp_path, monkeypatch):
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    with Tracking(("wandb",), group="g").open(Store(str(tmp_path)).files, "x/", "t1", "trial", {}, print) as to:
        assert to.environment()["WANDB_MODE"] == "offline"
        to.scalar("a", 1, 2.0)
    [path] = files_of(offline)
    [begun] = [record.run for record in records(path) if record.HasField("run")]
    assert (begun.run_group, begun.job_type, begun.display_name) == ("g", "trial", "t1")
    import wandb

    assert wandb.run is None and "WANDB_ERROR_REPORTING" not in os.environ


def test_wandb_loads_launch_only_where_the_user_has(offline, tmp_path):
    code = (
        "import sys; from mosaic_ray.tracking.backends import RunInfo, Wandb\n"
        "to = Wandb(); to.open(RunInfo('n', 'run'), ''); print('wandb.sdk.launch' in sys.modules); to.close('done')\n"
        "from wandb.sdk.wandb_run import Run; found = []; own = Run._detect_and_apply_job_inputs\n"
        "import wandb.sdk.launch; Run._detect_and_apply_job_inputs = lambda run: found.append(run)\n"
        "to = Wandb(); to.open(RunInfo('n', 'run'), ''); to.close('done'); print(own.__name__, len(found))"
    )
    repo = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=repo)
    assert done.stdout.split() == ["False", "_detect_and_apply_job_inputs", "1"]


# --- Trackio ---------------------------------------------------------------------------------------------------------

TRACKIO = """
import sys; sys.path.insert(0, "tests"); import helpers, json
from mosaic_ray.config.resolve import override
from mosaic_ray.data import load; from mosaic_ray.runs import runner; from mosaic_ray.tracking import reports
load.load_dataset = lambda config: helpers.stripes_dataset()
reports.INTERRUPTED_SECONDS = 120.0
config = override(helpers.TINY, {"method": "fedavg", "warmup.checkpoint_rounds": 1})
def go(): return runner.run(config, storage=sys.argv[1], progress=False, track=("trackio",))
with helpers.interrupted(in_round=2): go()
print(go()["paths"]["run"])
from trackio.sqlite_storage import SQLiteStorage
[run] = SQLiteStorage.get_run_records("mosaic_ray")
print(json.dumps([run, SQLiteStorage.get_logs("mosaic_ray", run["name"], run_id=run["id"])], default=str))
"""


def test_trackio_holds_the_run_also_one_that_was_interrupted_and_prints_nothing(tmp_path):
    pytest.importorskip("trackio")
    done = subprocess.run(
        [sys.executable, "-c", TRACKIO, str(tmp_path / "s")], capture_output=True, text=True,
        cwd=Path(__file__).parents[2], env=os.environ | {"TRACKIO_DIR": str(tmp_path / "t")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    folder, found = done.stdout.splitlines()
    run, logs = json.loads(found)
    assert run["name"].startswith(Path(folder).name)
    wanted = logged({"paths": {"run": folder}})
    tags = {tag for tag, _, _ in wanted}
    assert Counter((tag, log["step"], log[tag]) for log in logs for tag in tags & log.keys()) == wanted
    assert any("partition/label_counts" in log for log in logs) and any("final" in log for log in logs)
