"""MLflow, wandb and Trackio: what they hold after a run, a resumed run and a sweep."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import interrupted, stripes_dataset
from tracked import QUICK, go, logged, state

from mosaic_ray.config.resolve import override
from mosaic_ray.storage.store import Store
from mosaic_ray.sweeps import runner as sweep_runner
from mosaic_ray.sweeps.space import Choice, SweepPlan
from mosaic_ray.tracking import backends, reports
from mosaic_ray.tracking.reports import Tracking

pytestmark = pytest.mark.filterwarnings("ignore")  # those of the trackers


@pytest.fixture(autouse=True)
def stripes_as_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mosaic_ray.data.load.load_dataset", lambda config: stripes_dataset())
    monkeypatch.setattr(reports, "INTERRUPTED_SECONDS", 120.0)
    monkeypatch.setattr(reports, "CLOSE_SECONDS", 120.0)


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


def test_mlflow_takes_images_and_numbers_whose_tags_have_accents(mlflow, tmp_path):
    tracker = backends.Mlflow()
    tracker.open(backends.RunInfo("one", "run"), "")
    image = np.zeros((4, 4), np.uint8)
    tracker.write([backends.Point("t\u00eate", 0, 0.5, 1.0, 0), backends.Point("t\u00eate", 0, image, 1.0, 1)])
    tracker.close("done")
    [run] = runs_of(mlflow, tmp_path.name)
    assert metrics_of(mlflow, run) == {("t\u00eate", 0, 0.5): 1}
    assert any("t_te" in found.path for found in mlflow.list_artifacts(run.info.run_id, "images"))


def test_tags_that_mlflow_refuses_are_changed():
    assert backends._key("a//../b:c/\u00e9\\x1b!") == "a/b_c/\u00e9_x1b_"
    assert backends._key("generator/\u00e9", re.ASCII) == "generator/_"
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
