"""From a checked configuration to a finished run on disk: storage, data, hosts, progress, files."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shlex
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ..config.fields import shown
from ..config.plugins import load
from ..config.resolve import KNOBS, as_dict, flatten, override, read_toml, to_toml, without_share
from ..config.schema import DataConfig, ExperimentConfig
from ..core.errors import RequestError, RunError
from ..core.health import device_findings
from ..core.serialization import from_json
from ..core.text import visible
from ..core.types import DataFacts, Dataset, Finding, Weights
from ..core.untrusted import kind_of
from ..storage.filesystem import write_whole
from ..storage.hashing import plain, request_name
from ..tracking.callback import Callback, tracker_options
from ..tracking.progress import Quiet
from ..tracking.reports import Tracking
from .listing import lease_of
from .summary import StageRecord, Summary, build_summary, final_table, versions

if TYPE_CHECKING:
    from ..execution.placement import Placement
    from ..execution.ray_session import Resources
    from ..pipeline.context import RunContext
    from ..storage.store import Store
    from ..tracking.tracker import Tracker

T = TypeVar("T")

#: Bytes of a run's or a sweep's name; file systems take 255, and some are ours.
MAX_NAME = 200

#: The files of a run's folder.
FILES = (
    "config.toml", "command.txt", "metrics.jsonl", "log.txt", "label_counts.json", "student.safetensors",
    "summary.json", "error.log",
)  # fmt: skip

#: A damaged stored result is found while it is read; the run then begins again and computes it anew, so often at most.
MAX_REPAIRS = 5


def default_name(config: ExperimentConfig) -> str:
    """Return the default name of a run; the same request gives the same name, so that the same command resumes."""
    changed = {name: value for name, value in flatten(without_share(config)).items() if value != KNOBS[name].default}
    if changed["runtime.device"] == "cpu":  # so that a knob's default is no part of the name
        del changed["runtime.device"]
    words = plain(config.data.name), load("methods", config.method).name, config.algorithm, f"s{config.seed}"
    return request_name("run", 2, changed, *words)


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
    callbacks: Sequence[Callback] = (),
    track: Sequence[str] = (),
) -> dict[str, Any]:
    """Run one experiment and write its files; returns the content of summary.json.

    ``strict_health``: a finding of severity error ends the run right after its stage; it changes no number and no key.
    ``callbacks`` watch the run; ``track`` names trackers that it is reported to (``tracking.reports``).
    ``RequestError`` (before Ray starts) if the request is at fault, ``RunError`` for a failure while computing.
    """
    from ..execution.devices import describe, settle
    from ..execution.placement import Placement

    check_name(name, "runs")
    dataset, store, there = prepare(config, storage, address, fresh)
    there = look_at_devices([config], {config.data: dataset}, there, address)
    asked, config = config, settle(config, there)
    lines = [describe(config, there)] if config.runtime.device == "cuda" else []  # on CPUs a finding says it
    if name is None:
        lines.append(settled_elsewhere(asked, config, store))
    place = f"runs/{name or default_name(config)}"
    with (store.try_lease(lease_of(place)) if store.local_root else None) or nullcontext():  # it shows as running
        return execute(
            config, dataset, store, place, Placement(address), command=command, strict_health=strict_health,
            progress=progress, notes=[config.reason, *lines], gpus=there.gpus, tracking=Tracking(tuple(track)),
            **tracker_options(callbacks),
        )  # fmt: skip


def settled_elsewhere(asked: ExperimentConfig, config: ExperimentConfig, store: Store) -> str:
    """Return a line about a run of the same request for which another machine settled otherwise; empty without one.

    ``asked``: the request, ``config``: what it is here. The other run keeps its own default name.
    """
    choices = {"runtime.device": ("cpu", "cuda"), "runtime.precision": ("fp32", "bf16")}
    before, here = flatten(asked), flatten(config)
    fixed = {"runtime.device"} if before["runtime.gpus_per_client"] != "auto" else set()
    free = [name for name in choices if before[name] == "auto" and name not in fixed]
    for values in itertools.product(*(choices[name] for name in free)):
        other = dict(zip(free, values, strict=True))
        name = default_name(override(without_share(config), other))
        with contextlib.suppress(OSError):  # no folder of a run
            if any(here[knob] != value for knob, value in other.items()) and store.files.names(f"runs/{name}"):
                settled = ", ".join(f"{knob}={value}" for knob, value in other.items() if here[knob] != value)
                return f"runs/{name} is the same request where a machine settled {settled}; --set takes these here too"
    return ""


def prepare(config: ExperimentConfig, storage: str, address: str, fresh: bool) -> tuple[Dataset, Store, Resources]:
    """Load the data, open the storage and look at the devices; ``RequestError`` if one of them does not fit."""
    from ..execution.devices import resources_for
    from ..storage.store import Store

    there = resources_for(config, address)
    store = Store(storage, fresh=fresh)
    store.check_writable()
    return load_data([config])[config.data], store, there


def look_at_devices(
    configs: Sequence[ExperimentConfig], datasets: Mapping[DataConfig, Dataset], there: Resources, address: str
) -> Resources:
    """Return ``there`` with the share of a GPU that the largest client of ``configs``, still with ``auto``, takes."""
    from ..execution.devices import with_measurement
    from ..execution.gpu_memory import work_of
    from ..tracking.tracker import Tracker
    from .checks import check_memory

    works = [work_of(c, datasets[c.data].facts, len(datasets[c.data].train)) for c in configs]
    for work in works:
        check_memory(work.config, work.facts, len(datasets[work.config.data].train), there)
    with Tracker(None, progress=False) as tracker:
        return with_measurement(there, works, address, tracker.say)


def estimate_devices(configs: Sequence[ExperimentConfig], there: Resources) -> Resources:
    """Return ``there`` with a share of a GPU by shapes, as far as these are known without the data."""
    from ..data.load import known_facts
    from ..execution.devices import with_estimate
    from ..execution.gpu_memory import work_of
    from .checks import check_memory

    facts = {config.data: known_facts(config.data) for config in configs}
    for config in configs:
        if (known := facts[config.data]) is not None:
            check_memory(config, known, 0, there)
    if there.gpus < 1:
        return there
    return with_estimate(there, [work_of(c, known, 0) for c in configs if (known := facts[c.data])])


def load_data(configs: Sequence[ExperimentConfig]) -> dict[DataConfig, Dataset]:
    """The data sets that experiments read, each once.

    ``RequestError`` where a network cannot take its images: before any is read, if their size is known by then.
    """
    from ..data.groups import with_groups
    from ..data.load import load_dataset
    from .checks import check_models

    known = check_known(configs)
    sections = {data: [config.partition for config in configs if config.data == data] for data in known}
    datasets = {data: with_groups(load_dataset(data), sections[data]) for data in known}
    for config in configs:
        if known[config.data] is None:
            check_models(config, datasets[config.data].facts)
    return datasets


def check_known(configs: Sequence[ExperimentConfig]) -> dict[DataConfig, DataFacts | None]:
    """Return the facts of the data sets that experiments read, None where these are not known before the data are read.

    ``RequestError`` where a network cannot take images that are known.
    """
    from ..data.load import known_facts
    from .checks import check_models

    known = {config.data: known_facts(config.data) for config in configs}
    for config in configs:
        if (facts := known[config.data]) is not None:
            check_models(config, facts)
    return known


@contextlib.contextmanager
def open_run(
    config: ExperimentConfig, dataset: Dataset, store: Store, tracker: Tracker, hosts: Placement, **fields: Any
) -> Iterator[RunContext]:
    """Open a run of ``config`` with its device, threads and clients; ``fields`` are more fields of ``RunContext``."""
    import torch

    from ..execution.determinism import choose_kernels
    from ..execution.precision import device_of
    from ..federated.client import ClientContext
    from ..pipeline.context import RunContext

    torch.set_num_threads(config.runtime.driver_threads)
    choose_kernels(config)
    client = ClientContext(config, dataset.facts, device_of(config))
    ctx = RunContext(config, dataset, client, store, tracker, **fields)
    ctx.backend, ctx.server = hosts.backend(config, dataset.facts, ctx.shard, tracker.say), hosts.server(config)
    try:
        yield ctx
    finally:
        ctx.release()
        ctx.backend.close()


def with_repairs(store: Store, compute: Callable[[], T]) -> T:
    """Return ``compute()``, which begins again where a stored result that it reads turns out to be damaged."""
    from ..storage.store import CorruptResult

    repairs: dict[str, int] = {}
    while max(repairs.values(), default=0) < MAX_REPAIRS:
        try:
            return compute()
        except CorruptResult as damaged:  # it went bad after it was looked up, or its content is wrong
            repairs[damaged.key] = repairs.get(damaged.key, 0) + 1
            store.log(f"{damaged}; computing it again")
            store.discard(damaged.key)
    raise RunError(f"stored results under {store.uri} keep being damaged; is the disk sound?")


def execute(
    config: ExperimentConfig,
    dataset: Dataset,
    store: Store,
    place: str,
    hosts: Placement,
    *,
    command: list[str] | None = None,
    strict_health: bool = False,
    log_file: bool = False,
    notes: Sequence[str] = (),
    gpus: float = 0.0,
    finish: Callable[[Path, dict[str, Any]], None] | None = None,
    tracking: Tracking | None = None,
    label: str = "",
    **watch: Any,
) -> dict[str, Any]:
    """Run the experiment, write its files into the folder ``place`` of ``store``, and return summary.json's content.

    ``log_file``: messages go to log.txt instead of standard error. ``watch``: options of the ``Tracker``.
    ``notes``: lines to say first. ``gpus``: how many there are.
    ``finish(folder, summary)`` may add files of its own. ``tracking``: where else the run is reported, with ``label``
    beside its name. A failure ends in a ``RunError`` with its address, and in the
    folder.
    """
    from safetensors.numpy import save

    from ..execution.malloc import keep_freed
    from ..pipeline.partition import standardisation
    from ..tracking.tensorboard_images import TensorBoardImages
    from ..tracking.tracker import Tracker
    from .experiment import run_experiment

    local, name = store.local_root, place.rpartition("/")[2]
    folder = local / place if local else Path(tempfile.mkdtemp(prefix="mosaic-")) / name
    notes = [*notes, _keep_other(folder, config)]
    log: dict[str, dict[str, Any]] = {}
    findings: list[Finding] = []

    def compute() -> tuple[dict[str, Any], Weights, dict[str, Any]]:
        log.clear()
        findings.clear()
        with (
            open(folder / "log.txt", "a", encoding="utf-8", buffering=1) if log_file else nullcontext() as stream,
            Tracker(folder, stream=stream, reports=reports, **watch) as tracker,
            open_run(config, dataset, store, tracker, hosts, log=log, findings=findings, strict=strict_health) as ctx,
        ):
            store.log = tracker.warn
            for line in filter(None, notes):
                tracker.say(line)
            ctx.findings += device_findings(config.runtime.device, gpus)
            ctx.warn_of(ctx.findings)
            if command:
                tracker.text("run/command", f"    {shlex.join(command)}")
            ctx.distil = lambda task, report: hosts.distil(
                task, report, store.where(f"{place}/train"), ctx.on_server, ctx.server_hung
            )
            boards = TensorBoardImages(tracker, config, dataset, ctx.results, ctx.generators)
            boards.begin()
            tracker.before_stage = boards.catch_up
            results = run_experiment(ctx)
            boards.catch_up()
            standard = standardisation(ctx)
        student = results.pop("student")
        return build_summary(config, ctx, results).to_json(), student, standard

    def complain(text: str) -> None:
        with open(folder / "log.txt", "a", encoding="utf-8") if log_file else nullcontext(sys.stderr) as stream:
            Quiet(stream).say(text, "warning")

    keep_freed()
    reports = (tracking or Tracking()).open(
        store.files, f"{place}/", f"{name} {label}".strip(), "trial" if label else "run", flatten(config), complain,
        request=flatten(without_share(config)), anew=store.fresh and not label,
    )  # fmt: skip
    try:
        write_whole(folder / "config.toml", to_toml(config).encode())
        if command:
            write_whole(folder / "command.txt", (shlex.join(command) + "\n").encode())
        with reports:
            summary, student, standard = with_repairs(store, compute)
            reports.table("final", *final_table(summary))
        summary["paths"] = {"run": store.where(place), "tensorboard": store.where(f"{place}/tensorboard")}
        if finish:
            finish(folder, summary)
        counts = {"label_counts": summary["label_counts"], "class_names": list(dataset.class_names)}
        counts["data"] = dataset.facts.to_json()
        counts |= {"standardisation": standard} if standard else {}
        write_whole(folder / "label_counts.json", json.dumps(counts).encode())
        write_whole(folder / "student.safetensors", save(student))
        write_whole(folder / "summary.json", (json.dumps(summary, indent=1) + "\n").encode())
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
    named, unfit = visible(name, ""), {".", ".."}
    if not name or name in unfit or set(name) & set("/\\") or named != name or len(os.fsencode(name)) > MAX_NAME:
        raise RequestError(
            f"--name {named}: it names a folder below {below}/, so it has 1 to {MAX_NAME} bytes and holds no / or \\, "
            "and no control character"
        )


def _failure(
    error: Exception, folder: Path, config: ExperimentConfig, log: Mapping[str, Any], findings: Sequence[Finding]
) -> RunError:
    """``error`` as one line with its address; the whole story goes to error.log, and summary.json says "failed"."""
    what = f"{folder}: {error.strerror or error}" if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
    failure = error if isinstance(error, RunError) else RunError(what)
    summary = Summary(
        status="failed", error=str(failure), stage=failure.stage, round=failure.round, client=failure.client,
        method=config.method, seed=config.seed, preset=config.preset or None, config=as_dict(config),
        versions=versions(), stages=from_json(dict[str, StageRecord], log), health=list(findings),
    )  # fmt: skip
    with contextlib.suppress(OSError):  # the disk may be what failed
        write_whole(folder / "error.log", "".join(traceback.format_exception(error)).encode())
        write_whole(folder / "summary.json", (json.dumps(summary.to_json(), indent=1) + "\n").encode())
        failure.add_note(f"log: {folder / 'error.log'}")
    return failure


def _foreign(folder: Path) -> str:
    """Return what is a link, a pipe, a device or a folder in the place of a run's file; empty if nothing is."""
    places = {folder: "a folder"} | {folder / name: "" for name in FILES}
    for place, wanted in (places | {folder / name: "a folder" for name in ("tensorboard", "train")}).items():
        if os.path.lexists(place) and (kind := kind_of(place.lstat().st_mode)) != wanted:
            return f"{place.name} is {kind or 'a file'}"
    return ""


def _keep_other(folder: Path, config: ExperimentConfig) -> str:
    """Make ``folder``; a run there with another configuration is moved aside, never overwritten.

    Returns a line about it, with what differs; empty if nothing was moved.
    """
    old, same, line, differs = folder / "config.toml", False, "", "knobs of another version"
    try:
        with contextlib.suppress(RequestError):  # of a version with other knobs: a different run
            if foreign := _foreign(folder):
                differs = foreign
                raise RequestError(foreign)
            found = override(ExperimentConfig(), read_toml(old)) if old.exists() else config
            there, here = flatten(without_share(found)), flatten(without_share(config))
            changed = [f"{name}={shown(there.get(name))}" for name in here if there.get(name) != here[name]]
            same, differs = there == here, ", ".join(changed[:3]) or differs
        if not same:
            asides = (folder.with_name(f"{folder.name}.{number}") for number in itertools.count(1))
            aside = next(aside for aside in asides if not aside.exists())
            folder.rename(aside)
            line = f"another run had the name {folder.name} ({differs}); it is now called {aside.name}"
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RequestError(f"--storage: {folder} cannot be made: {error.strerror or error}") from None
    return line
