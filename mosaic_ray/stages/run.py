"""What all stages share: the run, its log, and the look-up in the store."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from ..config import ExperimentConfig
from ..errors import RunError
from ..methods.client_work import Bench
from ..records import Dataset, Finding, ImageSet
from ..runtime.cohort import Cohort, client_threads
from ..runtime.store import StageResult, StageWriter, Store
from ..runtime.tracking import Stage as Progress
from ..runtime.tracking import Tracker

#: Raise a stage's number when its mathematics changes: older results are then computed anew.
VERSIONS = {
    "partition": 1, "warmup": 1, "generator": 1, "generators": 1, "prototypes": 1, "teacher": 1, "distill": 1,
    "rounds": 1, "evaluate": 1,
}  # fmt: skip

Traffic = dict[str, dict[str, int]]
Compute = Callable[[StageWriter, Progress], dict[str, Any]]


def knobs_of(room: Any, *without: str) -> dict[str, Any]:
    """A room's knobs as plain values, less those that do not touch the result."""
    return {name: value for name, value in asdict(room).items() if name not in without}


@dataclass
class Run:
    """What every stage needs, and what the run has gathered so far."""

    config: ExperimentConfig
    dataset: Dataset
    bench: Bench
    store: Store
    tracker: Tracker
    cohort: Cohort = field(init=False)  # set by who launches; asked for nothing before the partition is known
    train_rows: list[np.ndarray] = field(default_factory=list)
    log: dict[str, dict[str, Any]] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    traffic: dict[str, Traffic] = field(default_factory=dict)

    def shard(self, client_id: int) -> ImageSet:
        """A client's training images."""
        return self.dataset.train.take(self.train_rows[client_id])

    def stage(
        self, name: str, key: str, compute: Compute, *, total: int | None = None, unit: str = "round"
    ) -> StageResult:
        """The stored result of ``key``, or ``compute``'s, stored with the curve that it recorded."""
        began = time.perf_counter()
        result = self.store.get(key)
        cached = result is not None
        if result is None:
            try:
                with self.tracker.stage(name, total=total, unit=unit) as progress:
                    writer = self.store.writer(key)
                    facts = compute(writer, progress)
                    facts["seconds"] = time.perf_counter() - began
                    facts["curve"] = [list(row) for row in progress.recorded]
                    result = writer.commit(facts)
            except RunError as error:
                raise error.at(name) from error
            self.store.drop_checkpoint(key)
        else:
            self.tracker.replay(name, [[_own_tag(tag, name), *row] for tag, *row in result.facts["curve"]])
        self.note(name, key, cached, time.perf_counter() - began, result.facts)
        return result

    def note(self, name: str, key: str, cached: bool, seconds: float, facts: Mapping[str, Any]) -> None:
        """Write a stage into the run's log: time, findings, traffic."""
        self.log[name] = {
            "seconds": round(seconds, 3), "cached": cached, "key": key,
            "computed_seconds": round(facts.get("seconds", seconds), 3),
        }  # fmt: skip
        self.traffic[name] = facts.get("communication", {})
        for row in facts.get("findings", []):
            finding = Finding(**row)
            self.findings.append(finding)
            if finding.severity != "info" and not cached:
                whose = f" client {finding.client}" if finding.client >= 0 else ""
                self.tracker.warn(f"{finding.code}{whose}: {finding.message}")


def _own_tag(tag: str, stage: str) -> str:
    """Closing rounds of the student and the control may be one result: say whose curve it is."""
    room, _, leaf = tag.partition("/")
    return f"{stage}/{leaf}" if {room, stage} == {"finetune", "control"} else tag


def numbers_depend_on(config: ExperimentConfig) -> dict[str, Any]:
    """Knobs of the runtime that can show in the last bit of a client's result."""
    device = "cuda" if config.runtime.gpus_per_client else "cpu"
    return {"precision": config.runtime.precision, "threads": client_threads(config), "device": device}
