"""From a checked configuration to a finished run on disk: storage, data, hosts, progress, files."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from ..config.plugins import load
from ..config.resolve import KNOBS, as_dict, flatten, override, read_toml, to_toml
from ..config.schema import DataConfig, ExperimentConfig
from ..core.errors import RequestError, RunError
from ..core.serialization import from_json
from ..core.types import Dataset, Finding, Weights
from ..storage.filesystem import write_whole
from .summary import StageRecord, Summary, build_summary, versions

if TYPE_CHECKING:
    from ..execution.placement import Placement
    from ..storage.store import Store
    from ..tracking.tracker import Tracker

#: Bytes of a run's or a sweep's name; file systems take 255, and some are ours.
MAX_NAME = 200

#: A damaged stored result is found while it is read; the run then begins again and computes it anew.
MAX_REPAIRS = 5


def default_name(config: ExperimentConfig) -> str:
    """The same request gives the same name, so that the same command resumes."""
    from ..storage.store import stage_key

    changed = {name: value for name, value in flatten(config).items() if value != KNOBS[name].default}
    tail = stage_key("run", 2, changed, []).rpartition("-")[2][:8]
    data = "".join(c if c.isalnum() else "_" for c in config.data.name.rpartition("/")[2])
    method = load("methods", config.method).name
    return f"{data}-{method}-{config.algorithm}-s{config.seed}-{tail}"


def run(
    config: ExperimentConfig,
    *,
    storage: str = "./mosaic_runs",
    name: str | None = None,
    address: str = "local",
    fresh: bool = False,
    command: list[str] | None = None,
    progress: bool | None = None,
    strict_health: bool = False,
) -> dict[str, Any]:
    """Run one experiment and write its files; returns the content of summary.json.

    ``strict_health``: a finding of severity error ends the run right after its stage; it changes no number and no key.
    ``RequestError`` for what the user can mend (before Ray starts), ``RunError`` for a failure met while computing.
    """
    from ..execution.placement import Placement

    check_name(name, "runs")
    dataset, store = prepare(config, storage, address, fresh)
    config = settle_precision(config)
    place = f"runs/{name or default_name(config)}"
    return execute(
        config,
        dataset,
        store,
        place,
        Placement(address),
        command=command,
        progress=progress,
        strict_health=strict_health,
    )


def prepare(config: ExperimentConfig, storage: str, address: str, fresh: bool) -> tuple[Dataset, Store]:
    """The data and the storage; ``RequestError`` where machine, storage, data or networks cannot do what is asked."""
    from ..execution.ray_session import check_room
    from ..storage.store import Store

    check_room(config, address)
    store = Store(storage, fresh=fresh)
    store.check_writable()
    return load_data([config])[config.data], store


def load_data(configs: Sequence[ExperimentConfig]) -> dict[DataConfig, Dataset]:
    """The data sets that experiments read, each once.

    ``RequestError`` where a network cannot take its images: before any is read, if their size is known by then.
    """
    from ..data.load import known_facts, load_dataset
    from .checks import check_models

    known = {config.data: known_facts(config.data) for config in configs}
    for config in configs:
        if (facts := known[config.data]) is not None:
            check_models(config, facts)
    datasets = {data: load_dataset(data) for data in known}
    for config in configs:
        if known[config.data] is None:
            check_models(config, datasets[config.data].facts)
    return datasets


def execute(
    config: ExperimentConfig,
    dataset: Dataset,
    store: Store,
    place: str,
    hosts: Placement,
    *,
    command: list[str] | None = None,
    progress: bool | None = None,
    strict_health: bool = False,
    log_file: bool = False,
    on_metric: Callable[[str, int, float], None] | None = None,
    on_stage: Callable[[str], None] | None = None,
    finish: Callable[[Path, dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """The experiment, and its files in the folder ``place`` of ``store``; returns the content of summary.json.

    ``log_file``: what is said goes to log.txt instead of standard error. ``on_metric`` and ``on_stage`` are the
    tracker's; ``finish(folder, summary)`` may add files of its own.
    Whatever fails ends in a ``RunError`` with its address, and in the folder.
    """
    from ..storage.store import CorruptResult
    from ..tracking.tracker import Tracker

    local = store.local_root
    name = place.rpartition("/")[2]
    folder = local / place if local else Path(tempfile.mkdtemp(prefix="mosaic-")) / name
    _keep_other(folder, config)
    log: dict[str, dict[str, Any]] = {}
    findings: list[Finding] = []
    try:
        write_whole(folder / "config.toml", to_toml(config).encode())
        if command:
            write_whole(folder / "command.txt", (shlex.join(command) + "\n").encode())
        for _ in range(MAX_REPAIRS):
            log.clear()
            findings.clear()
            try:
                with (
                    _log(folder) if log_file else contextlib.nullcontext() as stream,
                    Tracker(
                        folder, progress=progress, stream=stream, on_metric=on_metric, on_stage=on_stage
                    ) as tracker,
                ):
                    store.log = tracker.warn
                    if command:
                        tracker.text("run/command", f"    {shlex.join(command)}")
                    train = str(folder / "train") if local else store.where(f"{place}/train")
                    watched = {"log": log, "findings": findings, "strict": strict_health}
                    summary, student = _run_once(config, dataset, store, tracker, hosts, train, watched)
                break
            except CorruptResult as damaged:  # it went bad after it was looked up
                store.discard(damaged.key)
        else:
            raise RunError(f"stored results under {store.uri} keep being damaged; is the disk sound?")
        summary["paths"] = {"run": str(folder), "tensorboard": str(folder / "tensorboard")}
        if not local:
            summary["paths"] = {"run": store.where(place), "tensorboard": store.where(f"{place}/tensorboard")}
        if finish:
            finish(folder, summary)
        _write_files(folder, summary, student)
    except (RequestError, KeyboardInterrupt):
        raise
    except Exception as error:
        failure = _failure(error, folder, config, log, findings)
        if not local:
            with contextlib.suppress(OSError, RunError):  # the storage may be what failed
                store.upload(folder, place)
        raise failure from (error if failure is not error else None)
    if not local:
        try:
            store.upload(folder, place)
        except OSError as error:
            raise RunError(f"storage {store.uri}: {error}; the run's files are kept in {folder}") from error
        shutil.rmtree(folder.parent)
    return summary


def check_name(name: str | None, below: str) -> None:
    """``RequestError`` unless ``name`` (None: to be chosen here) can name a folder."""
    if name is None:
        return
    if not name or name in {".", ".."} or set(name) & set("/\\\0") or len(os.fsencode(name)) > MAX_NAME:
        raise RequestError(
            f"--name {name}: it names a folder below {below}/, so it has 1 to {MAX_NAME} bytes and holds no / or \\"
        )


def _run_once(
    config: ExperimentConfig,
    dataset: Dataset,
    store: Store,
    tracker: Tracker,
    hosts: Placement,
    train: str,
    watched: Mapping[str, Any],
) -> tuple[dict[str, Any], Weights]:
    """The experiment on its hosts, and the summary of it; ``watched`` are fields of ``Run``, of which ``log`` and
    ``findings`` are filled stage by stage. ``train``: Ray Train's."""
    import torch

    from ..execution.malloc import keep_freed
    from ..federated.client import ClientContext
    from ..pipeline.context import RunContext
    from ..tracking.tensorboard_images import TensorBoardImages
    from .experiment import run_experiment

    keep_freed()
    torch.set_num_threads(config.runtime.driver_threads)
    device = torch.device("cuda" if config.runtime.gpus_per_client and torch.cuda.is_available() else "cpu")
    ctx = RunContext(config, dataset, ClientContext(config, dataset.facts, device), store, tracker, **watched)
    ctx.backend = hosts.backend(config, dataset.facts, ctx.shard, tracker.say)
    ctx.distil = lambda task, report: hosts.distil(task, report, train)
    boards = TensorBoardImages(tracker, config, dataset, ctx.results, ctx.generators)
    boards.begin()
    tracker.before_stage = boards.catch_up
    try:
        results = run_experiment(ctx)
        boards.catch_up()
    finally:
        ctx.backend.close()
    student = results.pop("student")
    return build_summary(config, ctx, results).to_json(), student


def _failure(
    error: Exception, folder: Path, config: ExperimentConfig, log: Mapping[str, Any], findings: Sequence[Finding]
) -> RunError:
    """``error`` as one line with its address; the whole story goes to error.log, and summary.json says "failed"."""
    if isinstance(error, RunError):
        failure = error
    elif isinstance(error, OSError):
        failure = RunError(f"{folder}: {error.strerror or error}")
    else:
        failure = RunError(f"{type(error).__name__}: {error}")
    summary = Summary(
        status="failed", error=str(failure), stage=failure.stage, round=failure.round, client=failure.client,
        method=config.method, seed=config.seed, config=as_dict(config), versions=versions(),
        stages=from_json(dict[str, StageRecord], log), health=list(findings),
    )  # fmt: skip
    with contextlib.suppress(OSError):  # the disk may be what failed
        write_whole(folder / "error.log", "".join(traceback.format_exception(error)).encode())
        write_whole(folder / "summary.json", (json.dumps(summary.to_json(), indent=1) + "\n").encode())
        failure.add_note(f"log: {folder / 'error.log'}")
    return failure


def settle_precision(config: ExperimentConfig) -> ExperimentConfig:
    """``auto`` becomes bf16 where the device that clients train on has it natively, else fp32; it is recorded."""
    if config.runtime.precision != "auto":
        return config
    from ..execution.precision import has_native_bf16

    native = has_native_bf16(cuda=bool(config.runtime.gpus_per_client))
    return override(config, {"runtime.precision": "bf16" if native else "fp32"})


def _keep_other(folder: Path, config: ExperimentConfig) -> None:
    """A run of the same name with another configuration is moved aside, never overwritten."""
    try:
        old = folder / "config.toml"
        if old.exists() and override(ExperimentConfig(), read_toml(old)) != config:
            number = 1
            while (aside := folder.with_name(f"{folder.name}.{number}")).exists():
                number += 1
            folder.rename(aside)
        folder.mkdir(parents=True, exist_ok=True)
    except RequestError:  # an older config.toml that this version cannot read: a different run
        folder.rename(folder.with_name(f"{folder.name}.{os.getpid()}"))
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RequestError(f"--storage: {folder} cannot be made: {error.strerror or error}") from None


def _log(folder: Path) -> TextIO:
    return open(folder / "log.txt", "a", encoding="utf-8", buffering=1)


def _write_files(folder: Path, summary: dict[str, Any], student: Any) -> None:
    from safetensors.numpy import save

    try:
        write_whole(folder / "label_counts.json", json.dumps({"label_counts": summary["label_counts"]}).encode())
        write_whole(folder / "student.safetensors", save(student))
        write_whole(folder / "summary.json", (json.dumps(summary, indent=1) + "\n").encode())
    except OSError as error:
        raise RunError(f"{folder}: {error.strerror or error}") from error
