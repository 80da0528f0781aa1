"""The context that all stages of a run share: configuration, data, store, clients, results and findings."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Concatenate, TypeVar

import numpy as np

from ..config.schema import ExperimentConfig
from ..core.errors import RequestError, RunError
from ..core.health import HUNG_CLIENT, HUNG_SERVER, format_finding
from ..core.types import Dataset, Finding, ImageSet
from ..distillation.student_training import DistillTask
from ..execution.actor_pool import ClientFailure
from ..execution.backend import ClientBackend
from ..execution.malloc import give_back
from ..execution.server import Server
from ..execution.watch import MapEvents
from ..federated.client import Batch, ClientContext, OnPart, Task, batches_of
from ..storage.locks import Lease
from ..storage.store import CorruptResult, StageResult, StageWriter, Store
from ..tracking.progress import StageProgress
from ..tracking.tracker import Tracker
from .graph import KeyInputs, Stage, load_function
from .stored import check_facts, check_part

#: Seconds between two checks for a result that another run computes. A check is cheap: there is no manifest yet.
POLL_SECONDS = 0.2

B = TypeVar("B")
P = TypeVar("P")
R = TypeVar("R")

Traffic = dict[str, dict[str, int]]
#: Runs a distillation task, reporting (step, metrics); returns the student, figures and the curve.
DistilHost = Callable[[DistillTask, Callable[[int, Mapping[str, float]], None]], Any]
#: What a stage stores beside arrays: plain values, fit for JSON.
Facts = dict[str, Any]
Compute = Callable[[StageWriter, StageProgress], Facts]


@dataclass
class FailedClients:
    """Clients with work that failed for good in one stage, and the findings about them."""

    stage: str
    rounds: dict[int, int] = field(default_factory=dict)  # client -> number of failures
    reasons: dict[int, str] = field(default_factory=dict)

    def note(self, client_id: int, missing: ClientFailure) -> None:
        """Add a failure."""
        self.rounds[client_id] = self.rounds.get(client_id, 0) + 1
        self.reasons[client_id] = missing.error.message

    def facts(self) -> list[list[Any]]:
        """Return plain values for a checkpoint; ``FailedClients.of`` reads them."""
        return [[client_id, count, self.reasons[client_id]] for client_id, count in self.rounds.items()]

    @staticmethod
    def of(stage: str, facts: Sequence[Sequence[Any]]) -> FailedClients:
        """Restore an object from the values of ``facts``."""
        return FailedClients(stage, {k: count for k, count, _ in facts}, {k: reason for k, _, reason in facts})

    def findings(self) -> list[Finding]:
        """Return one finding for each client."""
        return [
            Finding(
                "client.failed", "warning", self.stage,
                f"left out {'once' if count == 1 else f'{count} times'}, the last time for {self.reasons[client_id]}",
                client_id, float(count),
            )
            for client_id, count in sorted(self.rounds.items())
        ]  # fmt: skip


@dataclass(frozen=True)
class Shards:
    """Each client's rows of the training set, for training and for validation; training label counts int64 [K, C]."""

    key: str
    train: list[np.ndarray]
    validation: list[np.ndarray]
    counts: np.ndarray

    @property
    def sizes(self) -> np.ndarray:
        """Return the training samples of each client, int64 [K]."""
        return np.asarray(self.counts.sum(1))


@dataclass
class RunContext:
    """Inputs of all stages, and the run's results so far; ``strict``: an error among findings ends the run.

    ``backend`` runs client tasks, ``distil`` hosts the distillation loop, ``server`` the rest of the server's work
    (None: this process); the caller that makes the context sets them.
    """

    config: ExperimentConfig
    dataset: Dataset
    client_context: ClientContext
    store: Store
    tracker: Tracker
    backend: ClientBackend = field(init=False)
    distil: DistilHost = field(init=False)
    server: Server | None = None
    shards: Shards = field(init=False)  # set by the stage partition
    keys: dict[str, str] = field(default_factory=dict)  # by stage, as far as they are known
    results: dict[str, StageResult] = field(default_factory=dict)  # of stages that are done
    generators: dict[int, StageResult] = field(default_factory=dict)  # by client, once all are there
    log: dict[str, dict[str, Any]] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    traffic: dict[str, Traffic] = field(default_factory=dict)
    strict: bool = False
    held_back: float = 0.0  # share of their images that clients leave out of all tasks
    _warned: set[Finding] = field(default_factory=set)

    @property
    def client_seconds(self) -> float:
        """Return the seconds that client tasks of this run took so far, all together."""
        return self.backend.seconds if hasattr(self, "backend") else 0.0

    def shard(self, client_id: int) -> ImageSet:
        """Return a client's training images."""
        return self.dataset.train.take(self.shards.train[client_id])

    def with_config(self, config: ExperimentConfig) -> RunContext:
        """Return this context under another configuration: the same data, clients and results, keys of its own."""
        other = copy.copy(self)
        other.config, other.keys = config, dict(self.keys)
        other.client_context = ClientContext(config, self.dataset.facts, self.client_context.device)
        return other

    def holding_back(self, share: float) -> RunContext:
        """Return this context for trials, in which clients hold a ``share`` of their images back from every task."""
        other = copy.copy(self)
        other.held_back = share
        return other

    def inputs(self) -> KeyInputs:
        """Return the inputs of keys, beside upstream keys."""
        sizes = [int(size) for size in self.shards.sizes] if hasattr(self, "shards") else None
        groups = {sampler: groups.digest for sampler, groups in self.dataset.groups.items()}
        return KeyInputs(self.config, self.dataset.identity, self.dataset.facts, sizes, groups)

    def client_keys(self, stage: Stage) -> tuple[str, ...]:
        """Return a stage's key for each client, or its only key."""
        return stage.keys(self.inputs(), self.keys)

    def run(self, stage: Stage, *inputs: Any) -> Any:
        """Run a declared stage: call the function that its ``compute`` names with this context and ``inputs``."""
        return load_function(stage.compute)(self, stage, *inputs)

    def find_or_compute(self, stage: Stage, compute: Compute) -> StageResult:
        """Return the stored result of a declared stage with one key, or compute and store it."""
        [key] = self.client_keys(stage)
        result = self.stage(stage.name, key, compute, total=stage.total(self.config), unit=stage.unit)
        return result if stage.compute and not stage.compute.startswith("mosaic_ray.") else self.checked(result)

    def checked(self, result: StageResult) -> StageResult:
        """Return ``result``, whose ``load`` from now on raises ``CorruptResult`` for arrays of another form."""
        result.check = partial(check_part, self.client_context.federation, self.dataset)
        return result

    def on_server(
        self,
        function: Callable[Concatenate[ClientContext, ...], R],
        *args: Any,
        report: Callable[[int, Mapping[str, float]], None] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> R:
        """Return ``function(context, *args)``, computed on a GPU worker where clients run on GPUs of Ray, else here.

        ``function`` stands at the top of a module, and its result depends on its arguments alone; ``context.device``
        is the device to compute on. An iterator among ``args`` is sent item by item. With ``report`` the function takes
        the keyword ``report``, and calls it with rising steps: report(step, metrics). ``progress``, which the context
        passes on, is called in this process alone. A worker that called ``report`` or ``context.progress`` and then
        does not for ``runtime.client_timeout`` seconds is taken for hung.
        """
        more = {"report": report} if report else {}
        if self.server is None:
            context = replace(self.client_context, progress=progress) if progress else self.client_context
            return function(context, *args, **more)
        found: R = self.server.call(function, self.client_context, args, report, self.backend.release, self.server_hung)
        return found

    def server_hung(self, seconds: float) -> None:
        """Record that a worker of the server's work gave no sign of life for ``seconds`` and was killed."""
        message = f"its worker gave no sign of life for {seconds:.0f} s and was killed; the work is done again"
        self.add_findings([HUNG_SERVER.finding(message, seconds, stage=self.tracker.stage_name)])

    def release(self) -> None:
        """Give the resources of client actors and of the server's worker back, until they are needed again."""
        self.backend.release()
        if self.server:
            self.server.release()

    def map(
        self,
        task: Task[B, P, R],
        clients: Sequence[int],
        broadcast: B,
        per_client: Callable[[int], P],
        *,
        failed_clients: FailedClients,
        max_missing: int | None = None,
        ordered: bool = True,
        cost: Callable[[int], float] | None = None,
        units: float = 1.0,
        label: str = "",
    ) -> Iterator[tuple[int, R]]:
        """Yield (client, result) of the clients that succeed; arguments as in ``ClientBackend.map``.

        Clients of which ``runtime.clients_per_batch`` asks it are worked on together, as far as the task allows it.
        ``units``: units of the running stage that all clients' work makes. ``label``: what is shown before their steps.
        Up to ``max_missing`` clients (None: ``failure_budget``) that fail for good are added to ``failed_clients``; the
        next failure raises its ``RunError``.
        """
        max_missing = self.failure_budget(len(clients)) if max_missing is None else max_missing
        task = OnPart(task, self.held_back) if self.held_back else task
        members = batches_of(task, self.client_context, clients)
        inside = self.tracker.inside(f"{label} {task.unit}".strip(), len(members), units)

        def hung(client_id: int, seconds: float) -> None:
            message = f"its actor gave no sign of life for {seconds:.0f} s and was killed; its work is done again"
            self.add_findings([HUNG_CLIENT.finding(message, seconds, client=client_id, stage=failed_clients.stage)])

        def step(first: int, done: int, total: int) -> None:
            inside(first, done * len(members[first]), total * len(members[first]))

        events = MapEvents(step, hung)
        if len(members) == len(clients):
            found = self.backend.map(task, clients, broadcast, per_client, ordered=ordered, cost=cost, events=events)
        else:
            found = self._map_batches(Batch(task, members), clients, broadcast, per_client, ordered, cost, events)
        for client_id, result in found:
            if client_id in members:
                inside.finish(client_id)
            if not isinstance(result, ClientFailure):
                yield client_id, result
                continue
            if not max_missing:
                raise result.error
            max_missing -= 1
            failed_clients.note(client_id, result)
        inside.close()

    def _map_batches(
        self,
        batch: Batch[Any, Any, Any],
        clients: Sequence[int],
        broadcast: Any,
        per_client: Callable[[int], Any],
        ordered: bool,
        cost: Callable[[int], float] | None,
        events: MapEvents,
    ) -> Iterator[tuple[int, Any]]:
        """Yield (client, result) of the clients of all batches, in client order where ``ordered``."""
        members, each = batch.members, cost or (lambda client_id: 0.0)
        found = self.backend.map(
            batch, list(members), broadcast, lambda first: [per_client(k) for k in members[first]], ordered=ordered,
            cost=lambda first: sum(map(each, members[first])), events=events,
        )  # fmt: skip
        waiting: dict[int, Any] = {}
        turn = sorted(clients)
        for first, results in found:
            for place, client_id in enumerate(members[first]):
                result = results if isinstance(results, ClientFailure) else results[place]
                waiting[client_id] = ClientFailure(result, 1) if isinstance(result, RunError) else result
            while waiting and (not ordered or turn[0] in waiting):
                client_id = turn.pop(0) if ordered else next(iter(waiting))
                yield client_id, waiting.pop(client_id)

    def failure_budget(self, asked: int) -> int:
        """How many of ``asked`` clients may fail to answer: no more than a cohort may lack (``min_cohort``)."""
        section = self.config.federation
        return max(0, min(asked, section.cohort_size or asked) - section.min_cohort) if section.min_cohort else 0

    def stage(
        self, name: str, key: str, compute: Compute, *, total: int | None = None, unit: str = "round"
    ) -> StageResult:
        """Return the stored result of ``key``; else compute it and store it with the curve that it recorded.

        If several runs need it at once, one computes and the others wait; if that one fails or dies, another goes on.
        """
        began, before = time.perf_counter(), self.client_seconds
        found, waited = self.get_or_wait(name, key)
        if isinstance(found, StageResult):
            result = found
            with result.read_as():
                check_facts(result.facts)
            self.tracker.replay(name, [[own_tag(tag, name), *row] for tag, *row in result.facts["curve"]])
        else:
            with found:
                progress = None  # where a callback fails as the stage begins
                try:
                    with self.tracker.stage(name, total=total, unit=unit) as progress:
                        writer = self.store.writer(key)
                        facts = compute(writer, progress)
                        facts["seconds"] = time.perf_counter() - began - waited
                        if not progress.resumed_at:
                            facts["client_seconds"] = self.client_seconds - before
                        facts["curve"] = [list(row) for row in progress.recorded]
                        result = writer.commit(facts)
                except RequestError:
                    raise
                except RunError as error:
                    raise error.at(name) from error
                except Exception as error:
                    if progress and progress.resumed_at:  # its checkpoint may be wrong: begin again, once
                        raise CorruptResult(key, "checkpoint", f"{type(error).__name__}: {error}", name) from error
                    raise RunError(f"{type(error).__name__}: {error}", stage=name) from error
                self.store.drop_checkpoint(key)
                give_back()
        self.results[name], self.keys[name] = result, key
        self.note(name, key, result is found, time.perf_counter() - began, result.facts, waited)
        return result

    def get_or_wait(self, name: str, key: str) -> tuple[StageResult | Lease, float]:
        """Return the result under ``key`` or the lease to compute it, and the seconds spent waiting for other runs."""
        began, waited = time.perf_counter(), 0.0
        while (found := self.store.get_or_lease(key)) is None:
            if not waited:
                self.tracker.say(f"{name}: waiting for another run that computes it")
            time.sleep(POLL_SECONDS)
            waited = time.perf_counter() - began
        return found, waited

    def note(
        self, name: str, key: str, cached: bool, seconds: float, facts: Mapping[str, Any], waited: float = 0.0
    ) -> None:
        """Record a stage in the run's log: time (``seconds`` includes ``waited``), findings and traffic."""
        self.log[name] = {
            "seconds": round(seconds, 3), "cached": cached, "key": key,
            "computed_seconds": round(facts.get("seconds", seconds - waited), 3),
        }  # fmt: skip
        if waited:
            self.log[name]["waited_seconds"] = round(waited, 3)
        if not cached and "client_seconds" in facts:
            self.log[name]["client_seconds"] = round(facts["client_seconds"], 3)
        self.traffic[name] = facts.get("communication", {})
        found = [Finding.from_json(row) for row in facts.get("findings", [])]
        self.add_findings(found, warn=not cached)
        worst = next((finding for finding in found if finding.severity == "error"), None)
        if self.strict and worst:
            raise RunError(
                f"{format_finding(worst)}; --strict-health stops here, the same command without it goes on from here",
                stage=name, client=worst.client if worst.client >= 0 else None,
            )  # fmt: skip

    def add_findings(self, found: Sequence[Finding], warn: bool = True) -> None:
        """Record findings, in TensorBoard too; ``warn`` of them unless that was done before."""
        self.findings += found
        if warn:
            self.warn_of(found)
        for code in dict.fromkeys(finding.code for finding in found):
            self.tracker.text(f"health/{code}", "\n\n".join(map(_markdown, (f for f in found if f.code == code))))

    def warn_of(self, findings: Iterable[Finding]) -> None:
        """Warn of each finding above info once."""
        for finding in findings:
            if finding.severity != "info" and finding not in self._warned:
                self._warned.add(finding)
                client = f" client {finding.client}" if finding.client >= 0 else ""
                self.tracker.on_finding(finding)
                advice = f"; {finding.advice}" if finding.advice else ""
                self.tracker.warn(f"{finding.code}{client}: {finding.message}{advice}", finding.severity)

    @property
    def alarmed(self) -> bool:
        """Whether an error was found already, so that its consequences need no findings of their own."""
        return any(finding.severity == "error" for finding in self.findings)


def known(figures: Mapping[str, float]) -> dict[str, float | None]:
    """Return figures that JSON can hold: None where one is not finite."""
    return {name: float(value) if math.isfinite(value) else None for name, value in figures.items()}


def _markdown(finding: Finding) -> str:
    client = f", client {finding.client}" if finding.client >= 0 else ""
    advice = f" *{finding.advice}*" if finding.advice else ""
    return f"**{finding.severity}**, {finding.stage}{client}: {finding.message}.{advice}"


def own_tag(tag: str, stage: str) -> str:
    """Rename a tag to the current stage: student and control can share one cached result of closing rounds."""
    section, _, leaf = tag.partition("/")
    return f"{stage}/{leaf}" if {section, stage} == {"finetune", "control"} else tag
