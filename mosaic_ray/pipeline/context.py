"""What all stages share: the run, its log, and the look-up in the store."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..config.schema import ExperimentConfig
from ..core.errors import RequestError, RunError
from ..core.health import format_finding
from ..core.types import Dataset, Finding, ImageSet
from ..execution.actor_pool import ClientFailure
from ..execution.backend import ClientBackend, Own, no_own
from ..execution.malloc import give_back
from ..federated.client import ClientContext
from ..storage.locks import Lease
from ..storage.store import StageResult, StageWriter, Store
from ..tracking.progress import Stage as Progress
from ..tracking.tracker import Tracker

#: Between two looks at what another run computes. A look is cheap: there is no manifest yet.
POLL_SECONDS = 0.2

Traffic = dict[str, dict[str, int]]
Compute = Callable[[StageWriter, Progress], dict[str, Any]]


@dataclass
class FailedClients:
    """Clients whose work failed for good in one stage, and what is said of them."""

    stage: str
    rounds: dict[int, int] = field(default_factory=dict)  # client -> how often it was left out
    reasons: dict[int, str] = field(default_factory=dict)

    def note(self, client_id: int, missing: ClientFailure) -> None:
        self.rounds[client_id] = self.rounds.get(client_id, 0) + 1
        self.reasons[client_id] = missing.error.message

    def facts(self) -> list[list[Any]]:
        """For a checkpoint; ``FailedClients.of`` reads them."""
        return [[client_id, count, self.reasons[client_id]] for client_id, count in self.rounds.items()]

    @staticmethod
    def of(stage: str, facts: Sequence[Sequence[Any]]) -> FailedClients:
        """What ``facts`` wrote down."""
        return FailedClients(stage, {k: count for k, count, _ in facts}, {k: reason for k, _, reason in facts})

    def findings(self) -> list[Finding]:
        """One a client."""
        return [
            Finding(
                "client.failed", "warning", self.stage,
                f"left out {'once' if count == 1 else f'{count} times'}, the last time for {self.reasons[client_id]}",
                client_id, float(count),
            )
            for client_id, count in sorted(self.rounds.items())
        ]  # fmt: skip


@dataclass
class Run:
    """What every stage needs, and what the run has gathered so far; ``strict``: an error among findings ends it."""

    config: ExperimentConfig
    dataset: Dataset
    context: ClientContext
    store: Store
    tracker: Tracker
    cohort: ClientBackend = field(init=False)  # set by who launches; asked for nothing before the partition is known
    train_rows: list[np.ndarray] = field(default_factory=list)
    results: dict[str, StageResult] = field(default_factory=dict)  # of stages that are done
    generators: dict[int, StageResult] = field(default_factory=dict)  # by client, once all are there
    log: dict[str, dict[str, Any]] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    traffic: dict[str, Traffic] = field(default_factory=dict)
    strict: bool = False
    _told: set[Finding] = field(default_factory=set)

    def shard(self, client_id: int) -> ImageSet:
        """A client's training images."""
        return self.dataset.train.take(self.train_rows[client_id])

    def ask(
        self,
        work: str,
        clients: Sequence[int],
        common: Mapping[str, Any],
        own: Own = no_own,
        *,
        failed_clients: FailedClients,
        max_missing: int | None = None,
        **how: Any,
    ) -> Iterator[tuple[int, Any]]:
        """(client, answer) of the clients that answer; ``how`` as ``ClientBackend.ask`` has it.

        Up to ``max_missing`` clients (None: ``failure_budget``) that fail for good are added to ``failed_clients``; the
        next failure raises its ``RunError``.
        """
        max_missing = self.failure_budget(len(clients)) if max_missing is None else max_missing
        for client_id, answer in self.cohort.ask(work, clients, common, own, **how):
            if not isinstance(answer, ClientFailure):
                yield client_id, answer
                continue
            if not max_missing:
                raise answer.error
            max_missing -= 1
            failed_clients.note(client_id, answer)

    def failure_budget(self, asked: int) -> int:
        """How many of ``asked`` clients may fail to answer: no more than a cohort may lack (``min_cohort``)."""
        section = self.config.federation
        return max(0, min(asked, section.cohort_size or asked) - section.min_cohort) if section.min_cohort else 0

    def stage(
        self, name: str, key: str, compute: Compute, *, total: int | None = None, unit: str = "round"
    ) -> StageResult:
        """The stored result of ``key``, or ``compute``'s, stored with the curve that it recorded.

        Of several runs that miss it one computes and the others wait; when that one fails or dies, another goes on.
        """
        began = time.perf_counter()
        found, waited = self.get_or_wait(name, key)
        if isinstance(found, StageResult):
            result = found
            self.tracker.replay(name, [[_own_tag(tag, name), *row] for tag, *row in result.facts["curve"]])
        else:
            with found:
                try:
                    with self.tracker.stage(name, total=total, unit=unit) as progress:
                        writer = self.store.writer(key)
                        facts = compute(writer, progress)
                        facts["seconds"] = time.perf_counter() - began - waited
                        facts["curve"] = [list(row) for row in progress.recorded]
                        result = writer.commit(facts)
                except RequestError:
                    raise
                except RunError as error:
                    raise error.at(name) from error
                except Exception as error:
                    raise RunError(f"{type(error).__name__}: {error}", stage=name) from error
                self.store.drop_checkpoint(key)
                give_back()
        self.results[name] = result
        self.note(name, key, result is found, time.perf_counter() - began, result.facts, waited)
        return result

    def get_or_wait(self, name: str, key: str) -> tuple[StageResult | Lease, float]:
        """The result under ``key``, or the sole right to compute it, and the seconds that others were waited for."""
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
        """Write a stage into the run's log: time (``waited`` for others is part of ``seconds``), findings, traffic."""
        self.log[name] = {
            "seconds": round(seconds, 3), "cached": cached, "key": key,
            "computed_seconds": round(facts.get("seconds", seconds - waited), 3),
        }  # fmt: skip
        if waited:
            self.log[name]["waited_seconds"] = round(waited, 3)
        self.traffic[name] = facts.get("communication", {})
        found = [Finding(**row) for row in facts.get("findings", [])]
        self.findings += found
        if not cached:
            self.warn_of(found)
        for code in dict.fromkeys(finding.code for finding in found):
            self.tracker.text(f"health/{code}", "\n\n".join(map(_markdown, (f for f in found if f.code == code))))
        worst = next((finding for finding in found if finding.severity == "error"), None)
        if self.strict and worst:
            raise RunError(
                f"{format_finding(worst)}; --strict-health stops here, the same command without it goes on from here",
                stage=name, client=worst.client if worst.client >= 0 else None,
            )  # fmt: skip

    def warn_of(self, findings: Iterable[Finding]) -> None:
        """Say what asks for attention, each once."""
        for finding in findings:
            if finding.severity != "info" and finding not in self._told:
                self._told.add(finding)
                whose = f" client {finding.client}" if finding.client >= 0 else ""
                advice = f"; {finding.advice}" if finding.advice else ""
                self.tracker.warn(f"{finding.code}{whose}: {finding.message}{advice}", finding.severity)

    @property
    def alarmed(self) -> bool:
        """Whether an error was found already: of what follows from it nothing need be said."""
        return any(finding.severity == "error" for finding in self.findings)


def known(figures: Mapping[str, float]) -> dict[str, float | None]:
    """Figures as they can be stored: None where one is not finite."""
    return {name: float(value) if math.isfinite(value) else None for name, value in figures.items()}


def _markdown(finding: Finding) -> str:
    whose = f", client {finding.client}" if finding.client >= 0 else ""
    advice = f" *{finding.advice}*" if finding.advice else ""
    return f"**{finding.severity}**, {finding.stage}{whose}: {finding.message}.{advice}"


def _own_tag(tag: str, stage: str) -> str:
    """Closing rounds of the student and the control may be one result: say whose curve it is."""
    section, _, leaf = tag.partition("/")
    return f"{stage}/{leaf}" if {section, stage} == {"finetune", "control"} else tag
