"""Estimate the hours of a run or a sweep from stage times of earlier runs, or from a calibration.

Estimates are only printed: no result and no key depends on one. docs/howto/how-long.md has the formula.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..config.plugins import load
from ..config.resolve import flatten
from ..config.schema import ExperimentConfig
from ..data.load import known_facts
from ..pipeline.graph import Stage, Work
from ..pipeline.stages import rehearses, rehearses_early
from .earlier import EarlierRun
from .plan import graph_of

#: Units whose size follows from a client's images: their times serve the same data and number of clients only.
BY_DATA = ("epochs", "clients", "models", "draws", "fits")

_RUNTIME = ("runtime.device", "runtime.precision", "runtime.cpus_per_client", "runtime.driver_threads")
_GENERATOR = ("generator.family", "generator.discriminator", "generator.latent_dim", "generator.n[gd]f")
#: Knobs on which the time of one unit depends, by kind of stage; of other kinds it depends on the method's networks.
_COST: dict[str, tuple[str, ...]] = {
    "partition": (),
    "evaluate": ("model.*",),
    "ceiling": ("model.*",),
    "personal": ("model.*",),
    "own_models": ("model.*", "federation.widths"),
    "final_models": ("model.*", "federation.widths", "finetune.adapt_steps", "warmup.batch_size"),
    "server_student": ("model.*", *_GENERATOR, "student.batch_size"),
    "rounds": ("model.*", "federation.strategy", "federation.widths", "warmup.batch_size"),
    "generator": ("model.*", *_GENERATOR, "generator.batch_size"),
    "teacher": ("model.*", "partition.num_clients", "meta.input", "meta.data", "meta.token_dim", "meta.feedforward",
                "meta.batch_size"),
    "distill": ("model.*", "partition.num_clients", *_GENERATOR, "distill.backbone_lr", "distill.workers",
                "distill.samples_per_generator"),
}  # fmt: skip

#: Where times come from.
SOURCES = ("stage times of earlier runs here", "a calibration on this machine")

#: What times are kept by: kind of stage, unit, and the values on which the time of a unit depends.
Like = tuple[Any, ...]


@dataclass(frozen=True)
class Rate:
    """Seconds per unit of work: in client tasks, and on the server; ``source`` is one of ``SOURCES``."""

    clients: float
    server: float
    source: str


def counted(stage: Stage, config: ExperimentConfig, work: Work) -> tuple[Like, int]:
    """Return what the time of a unit of ``work`` depends on, and the number of units."""
    unit = "local steps" if "local steps" in work else next(iter(work))
    kind = stage.kind or stage.name
    kind = "rounds" if kind == "warmup" else kind
    patterns = [*_COST.get(kind, ("model.*", "method")), *_RUNTIME]
    if stage.name == "warmup" and load("methods", config.method).after_round is not None:
        patterns.append("method")  # it works in every round
    rehearsing = stage.name == "finetune" and rehearses(config)
    rehearsing |= stage.name == "warmup" and rehearses_early(config)
    if rehearsing or (stage.name.startswith("trial_") and stage.name != "trial_0"):
        patterns += ["rehearsal.ratio", "rehearsal.classes"]
    same = tuple(
        (name, str(value)) for name, value in flatten(config).items()
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
    )  # fmt: skip
    named, facts = (config.data.name, config.data.image_size, config.data.channels), known_facts(config.data)
    images = (facts.channels, facts.image_size) if facts else named
    data = (*named, config.partition.num_clients) if unit in BY_DATA else ()
    return (kind, unit, images, data, same), work[unit]


def rates(runs: Iterable[EarlierRun]) -> dict[Like, Rate]:
    """Return the seconds per unit in results that ``runs`` computed, each result once.

    Results without ``client_seconds`` do not count: of earlier versions, and of stages that were resumed.
    """
    sums: dict[Like, list[float]] = {}
    seen = set[str]()
    for run in runs:
        for stage in graph_of(run.config):
            found = amounts(stage, run)
            if found is None or run.stages[stage.name].key in seen:
                continue
            seen.add(run.stages[stage.name].key)
            total = sums.setdefault(counted(stage, run.config, _work(stage, run.config))[0], [0.0, 0.0, 0.0])
            total[:] = [a + b for a, b in zip(total, found, strict=True)]
    return {like: Rate(c / units, s / units, SOURCES[0]) for like, (c, s, units) in sums.items() if units}


def amounts(stage: Stage, run: EarlierRun) -> tuple[float, float, int] | None:
    """Return the seconds that clients and server took in a stage of ``run``, and its units; None if not measured."""
    record = run.stages.get(stage.name)
    if record is None or record.cached or record.client_seconds is None:
        return None
    _, units = counted(stage, run.config, _work(stage, run.config))
    if stage.per_client:
        units *= run.config.partition.num_clients - (record.cached_clients or 0)
    spent = (record.seconds or 0.0) - (record.waited_seconds or 0.0)
    return record.client_seconds, max(0.0, spent - record.client_seconds), units


def _work(stage: Stage, config: ExperimentConfig) -> Work:
    return stage.work(config) or {"models": stage.total(config)}


@dataclass
class Estimate:
    """The time of work: seconds in client tasks and on the server, and the stages for which no time is known."""

    times: Mapping[Like, Rate]
    client_seconds: float = 0.0
    server_seconds: float = 0.0
    sources: set[str] = field(default_factory=set)
    missing: dict[str, None] = field(default_factory=dict)

    def add(self, stage: Stage, config: ExperimentConfig, work: Work) -> None:
        """Add the work of one result."""
        if not any(work.values()):
            return
        like, units = counted(stage, config, work)
        rate = self.times.get(like)
        if rate is None:
            self.missing[stage.name] = None
            return
        self.client_seconds += units * rate.clients
        self.server_seconds += units * rate.server
        self.sources.add(rate.source)

    def on(self, actors: float, trials: int = 1, gpus: float = 0.0) -> Hours:
        """Return the hours with ``actors`` clients and ``trials`` trials at once, holding ``gpus`` GPUs."""
        hours = (self.client_seconds / actors + self.server_seconds / trials) / 3600
        return Hours(
            hours, self.client_seconds / 3600, self.server_seconds / 3600, hours * gpus, actors, trials,
            " and ".join(source for source in SOURCES if source in self.sources), tuple(self.missing),
        )  # fmt: skip


CALIBRATE = "--calibrate measures one"


@dataclass(frozen=True)
class Hours:
    """Estimated hours, from start to end; the work in hours of clients and of the server; GPU hours, 0 without GPUs.

    ``missing``: stages whose work is not in it. ``source`` is empty where no time at all is known.
    """

    hours: float
    client_hours: float
    server_hours: float
    gpu_hours: float
    actors: float
    trials: int
    source: str
    missing: tuple[str, ...]

    def line(self, advice: str = CALIBRATE) -> str:
        """Return the estimate as a line of text; ``advice`` says how to get the times that are missing."""
        if not self.source and self.missing:
            return f"hours: no estimate yet, for no earlier run here has such networks and images; {advice}"
        if not self.source:
            return "hours: 0, all results are in the storage"
        at_once = f"{self.actors:.3g} at once" if self.actors != 1 else "one after another"
        trials = f" of {self.trials} trials at once" if self.trials > 1 else ""
        total = _short(self.hours)
        total = total if total == SHORT else f"about {total}"
        parts = [f"hours: {total} ({_short(self.client_hours)} of clients, {at_once}; "]
        parts += [f"{_short(self.server_hours)} on the server{trials})"]
        parts += [f", {_short(self.gpu_hours)} GPU hours"] if self.gpu_hours else []
        parts += [f", by {self.source}"]
        if self.missing:
            how = "" if SOURCES[1] in self.source else f" ({advice})"
            parts.append(f"; not counted, for want of times: {', '.join(self.missing)}{how}")
        return "".join(parts)

    def as_dict(self) -> dict[str, Any] | None:
        """Return the entry ``estimate`` of ``--json``; None where no time is known."""
        return vars(self) if self.source or not self.missing else None


#: Hours too few for a figure.
SHORT = "under 0.01"


def _short(hours: float) -> str:
    if 0 < hours < 0.005:
        return SHORT
    return f"{hours:.3g}" if hours < 100 else f"{hours:,.0f}"


def turns(clients: int, actors: int) -> float:
    """Return how many of ``clients`` are at work at once, on average over a round on ``actors`` actors.

    5 clients on 2 actors take 3 turns, so 5/3 of them are at work.
    """
    return clients / -(-clients // actors)


def clients_at_once(config: ExperimentConfig, actors: int) -> float:
    """Return how many clients of one run are at work at once on ``actors`` (0: in the run's own process)."""
    everyone = config.partition.num_clients
    cohort = min(config.federation.cohort_size or everyone, everyone)
    return turns(cohort, min(actors or 1, cohort))


def gpus_held(config: ExperimentConfig, gpus: float, actors: int, trials: int) -> float:
    """Return how many of ``gpus`` GPUs are held for ``actors`` and ``trials``; 0 on CPUs."""
    if config.runtime.device != "cuda":
        return 0.0
    return float(min(gpus, max(1, math.ceil((actors + trials) * config.runtime.gpu_share - 1e-9))))
