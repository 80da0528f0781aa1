"""Other projects' trackers: Weights & Biases, MLflow and Trackio, each behind the methods of ``Backend``.

A backend sends nothing over the network unless the user's own settings of that tracker name a server: wandb without a
key runs offline, mlflow and trackio write to a local database. Usage statistics and crash reports are off unless the
user's environment turns them on. A backend is made in the caller's thread, where it imports its tracker; its other
methods are called in one thread of its own.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import netrc
import os
import re
import sys
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol
from urllib.parse import urlsplit

from ..core.errors import RequestError, neighbours

#: Name of the project or experiment, unless the tracker's own variable says otherwise.
PROJECT = "mosaic_ray"

#: Seconds that the end of a run waits for a tracker.
CLOSE_SECONDS = 30.0


class Point(NamedTuple):
    """A value of ``tag`` at ``step``: a number, or an image uint8 [H, W] or [H, W, 3].

    ``time``: seconds since 1970; ``number``: how many points and tables the run sent before.
    """

    tag: str
    step: int
    value: Any
    time: float
    number: int


@dataclass(frozen=True)
class RunInfo:
    """A run as trackers show it. ``kind``: run, sweep, trial or study; ``group``: name of the sweep or study.

    ``config``: values by dotted name. ``parents``: by tracker, the id of the group's own run.
    """

    name: str
    kind: str
    group: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    parents: Mapping[str, str] = field(default_factory=dict)


class Backend(Protocol):
    """One tracker. Any method may raise anything; the tracker is then left alone for the rest of the run.

    ``place``: the server or folder, and the project, as far as they are known before a run begins.
    """

    place: str

    def environment(self) -> dict[str, str]:
        """Return environment variables with which another process reports to the same place."""

    def open(self, info: RunInfo, known: str) -> str:
        """Begin a run, or continue the one with the id ``known`` (empty: none); return the run's id."""

    def configure(self, config: Mapping[str, Any]) -> None:
        """Send the configuration."""

    def write(self, points: Sequence[Point]) -> None:
        """Send points. The same points may come once more after a kill."""

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], number: int) -> None:
        """Send a table; ``number`` as in ``Point``."""

    def close(self, status: str) -> None:
        """End the run, which is done, failed or killed, when all of it has been sent."""


def check_trackers(names: Iterable[str]) -> tuple[str, ...]:
    """Return ``names``, each once; ``RequestError`` for one that is unknown or not installed."""
    found = tuple(dict.fromkeys([names] if isinstance(names, str) else names))
    for name in found:
        if name not in BACKENDS:
            raise RequestError(f"--track {name}: unknown tracker; {neighbours(name, BACKENDS)}")
        with contextlib.suppress(ValueError):  # a module without a spec is there
            spec = None if name in sys.modules else importlib.util.find_spec(name)
            # a folder ./wandb, which wandb writes to, looks like a package without a file
            if name not in sys.modules and (spec is None or spec.origin is None):
                raise RequestError(f"--track {name}: it is not installed; pip install 'mosaic-ray[{name}]'")
    return found


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Set environment variables that the user has not set, within the block."""
    added = {name: value for name, value in values.items() if name not in os.environ}
    os.environ |= added
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def _own(prefix: str) -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith(prefix)}


def _by_step(points: Iterable[Point]) -> Iterator[tuple[Point, dict[str, Any]]]:
    """Yield the first point and the values by tag of successive points with one step and different tags."""
    first, values = None, {}
    for point in points:
        if first is not None and (point.step != first.step or point.tag in values):
            yield first, values
            first, values = None, {}
        first = first or point
        values[point.tag] = point.value
    if first is not None:
        yield first, values


class Wandb:
    """Weights & Biases. Rows are numbered by the points before them, so that a row that is sent twice counts once."""

    def __init__(self) -> None:
        with self._quiet():
            import wandb
        self._wandb: Any = wandb
        self._run: Any = None
        self._folder = os.path.abspath(os.environ.get("WANDB_DIR", "."))
        self.place = os.environ.get("WANDB_PROJECT") or PROJECT

    @staticmethod
    def _quiet() -> contextlib.AbstractContextManager[None]:
        return _environment(WANDB_ERROR_REPORTING="false", WANDB_SILENT="true")

    @staticmethod
    @contextlib.contextmanager
    def _without_launch() -> Iterator[None]:
        """Keep ``wandb.init`` from loading W&B Launch, half of its cost, within the block; inputs that the user staged
        for Launch are taken all the same, as those have loaded it.
        """
        from wandb.sdk.wandb_run import Run

        name = "_detect_and_apply_job_inputs"  # private: where it is missing, Launch is loaded
        original = None if "wandb.sdk.launch" in sys.modules else getattr(Run, name, None)
        if original is None:
            yield
            return
        setattr(Run, name, lambda run: None)
        try:
            yield
        finally:
            setattr(Run, name, original)

    def _mode(self) -> str | None:
        """Return the mode in the user's files, or ``offline`` where there is no key either; wandb would ask for one."""
        if any(map(os.environ.get, ("WANDB_MODE", "WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"))):
            return None
        settings = self._wandb.setup().settings
        if settings.api_key or settings.mode != "online":
            return None if settings.mode == "online" else str(settings.mode)
        with contextlib.suppress(OSError, netrc.NetrcParseError):
            if netrc.netrc(os.environ.get("NETRC")).authenticators(urlsplit(settings.base_url).netloc):
                return None
        return "offline"

    def environment(self) -> dict[str, str]:
        mode = self._mode()
        return _own("WANDB_") | {"WANDB_DIR": self._folder} | ({"WANDB_MODE": mode} if mode else {})

    def open(self, info: RunInfo, known: str) -> str:
        with self._quiet(), self._without_launch():
            settings = self._wandb.Settings(
                silent=True, console="off", disable_code=True, disable_git=True, x_disable_stats=True,
                x_save_requirements=False, reinit="create_new", finish_timeout=CLOSE_SECONDS,
                x_transaction_log_flush_interval=1.0,
            )  # fmt: skip
            self._run = self._wandb.init(
                project=self.place, id=known or uuid.uuid4().hex[:12], resume="allow",
                name=info.name[:128], group=info.group[:128] or None, job_type=info.kind, dir=self._folder,
                mode=self._mode(), settings=settings,
            )  # fmt: skip
        self._run.define_metric("*", step_metric="step")
        return str(self._run.id)

    def configure(self, config: Mapping[str, Any]) -> None:
        self._run.config.update(dict(config), allow_val_change=True)

    def write(self, points: Sequence[Point]) -> None:
        for first, values in _by_step(points):
            row = {tag: v if isinstance(v, float) else self._wandb.Image(v) for tag, v in values.items()}
            self._run.log({**row, "step": first.step}, step=first.number, commit=True)

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], number: int) -> None:
        table = self._wandb.Table(columns=list(columns), data=[list(row) for row in rows], allow_mixed_types=True)
        self._run.log({name: table}, step=number, commit=True)

    def close(self, status: str) -> None:
        self._run.finish(exit_code=int(status != "done"))


class Mlflow:
    """MLflow, by its client: neither the active run nor the tracking URI of this process changes."""

    def __init__(self) -> None:
        with _environment(MLFLOW_DISABLE_TELEMETRY="true", MLFLOW_LOGGING_LEVEL="WARNING"):
            import mlflow
            from mlflow import entities
        self._entities = entities
        self.place = _absolute(mlflow.get_tracking_uri())
        self._client: Any = mlflow.MlflowClient(tracking_uri=self.place)
        self._id = ""

    def environment(self) -> dict[str, str]:
        return _own("MLFLOW_") | {"MLFLOW_TRACKING_URI": self.place}

    def open(self, info: RunInfo, known: str) -> str:
        if known:
            self._client.update_run(known, status="RUNNING")
            self._id = known
            return known
        tags = {"mosaic_ray.kind": info.kind, "mlflow.source.name": "mosaic_ray", "mlflow.source.type": "LOCAL"}
        if info.group:
            tags["mosaic_ray.group"] = info.group
        if "mlflow" in info.parents:
            tags["mlflow.parentRunId"] = info.parents["mlflow"]
        self._id = self._client.create_run(self._experiment(), tags=tags, run_name=info.name[:250]).info.run_id
        return self._id

    def _experiment(self) -> str:
        if chosen := os.environ.get("MLFLOW_EXPERIMENT_ID"):
            return chosen
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT
        found = self._client.get_experiment_by_name(name)
        if found is None:
            with contextlib.suppress(Exception):  # another process made it in this moment
                return str(self._client.create_experiment(name))
            found = self._client.get_experiment_by_name(name)
        return str(found.experiment_id)

    def configure(self, config: Mapping[str, Any]) -> None:
        params = [self._entities.Param(_key(name), str(value)[:6000]) for name, value in config.items()]
        for start in range(0, len(params), 100):  # the most in one request
            self._client.log_batch(self._id, params=params[start : start + 100])

    def write(self, points: Sequence[Point]) -> None:
        metrics = [
            self._entities.Metric(_key(point.tag), point.value, round(1000 * point.time), point.step)
            for point in points
            if isinstance(point.value, float)
        ]
        for start in range(0, len(metrics), 500):
            self._client.log_batch(self._id, metrics=metrics[start : start + 500])
        for point in points:
            if not isinstance(point.value, float):
                when = round(1000 * point.time)
                key = _key(point.tag, re.ASCII)  # letters of other scripts are for numbers alone
                self._client.log_image(self._id, point.value, key=key, step=point.step, timestamp=when)

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], number: int) -> None:
        table = {"columns": list(columns), "data": [list(row) for row in rows]}
        self._client.log_text(self._id, json.dumps(table), f"{name}.json")  # ``log_table`` would add to an older one
        shown = json.dumps([{"path": f"{name}.json", "type": "table"}])
        self._client.set_tag(self._id, "mlflow.loggedArtifacts", shown)

    def close(self, status: str) -> None:
        with _environment(MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT="true"):
            self._client.set_terminated(self._id, {"done": "FINISHED", "failed": "FAILED"}.get(status, "KILLED"))


def _absolute(uri: str) -> str:
    """Return a tracking URI that means the same in any working directory."""
    head, slashes, path = uri.partition("sqlite:///")
    if slashes and not head:
        return uri if path[:1] in ("/", ":", "") else f"sqlite:///{os.path.abspath(path)}"
    return uri if re.match(r"[\w+-]+:|databricks|uc$", uri) else Path(uri).resolve().as_uri()


def _key(tag: str, letters: re.RegexFlag = re.UNICODE) -> str:
    """Return ``tag`` with the characters that MLflow takes, and no empty or dotted part of a path."""
    words = re.sub(r"[^/\w.\- ]", "_", tag, flags=letters).split("/")
    return "/".join(part for part in words if part.strip("."))[:250] or "_"


class Trackio:
    """Trackio. Its context variables, such as the current run, belong to the thread that calls these methods."""

    def __init__(self) -> None:
        import trackio
        from trackio import run, utils

        self._trackio, self._talkers = trackio, (trackio, run, utils)
        self._run: Any = None
        self._folder = str(Path(utils.TRACKIO_DIR).resolve())
        self._project = os.environ.get("TRACKIO_PROJECT") or PROJECT
        self.place = f"{self._folder} {self._project}"

    def environment(self) -> dict[str, str]:
        return _own("TRACKIO_") | {"TRACKIO_DIR": self._folder}

    @contextlib.contextmanager
    def _quiet(self) -> Iterator[None]:
        """Keep what Trackio prints from standard output, and its ``trackio.config`` as it was, within the block."""
        before = self._trackio.config
        for module in self._talkers:
            module.print = lambda *words, **options: None
        try:
            yield
        finally:
            for module in self._talkers:
                del module.print
            self._trackio.config = before

    def open(self, info: RunInfo, known: str) -> str:
        name = known or f"{info.name[:100]} {uuid.uuid4().hex[:8]}"
        with self._quiet():
            self._run = self._trackio.init(
                self._project, name, group=info.group or None, resume="allow",
                config=dict(info.config), embed=False, auto_log_cpu=False, auto_log_gpu=False,
            )  # fmt: skip
        return name

    def configure(self, config: Mapping[str, Any]) -> None:
        """Do nothing: ``open`` gave it."""

    def write(self, points: Sequence[Point]) -> None:
        for first, values in _by_step(points):
            row = {tag: v if isinstance(v, float) else self._trackio.Image(v) for tag, v in values.items()}
            self._run.log(row, step=first.step)

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], number: int) -> None:
        import pandas as pd

        self._run.log({name: self._trackio.Table(dataframe=pd.DataFrame(list(rows), columns=list(columns)))}, step=0)

    def close(self, status: str) -> None:
        with self._quiet():
            self._run.finish()


#: By name of option, module and extra.
BACKENDS: dict[str, type[Wandb] | type[Mlflow] | type[Trackio]] = {
    "wandb": Wandb, "mlflow": Mlflow, "trackio": Trackio,
}  # fmt: skip
