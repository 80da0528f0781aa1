"""From a checked request to a finished sweep on disk: its plan, its resources, its trials, its results."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..config.resolve import as_dict, override
from ..config.schema import ExperimentConfig
from ..core.errors import RequestError, RunError
from .search import Listed, Optuna, Search, problems, searched
from .space import Choice, SweepPlan, check_space, conditions, describe, grid_points, random_points
from .state import Ledger, PlanFile, Trial, make_trials, plan_name

if TYPE_CHECKING:
    from ..execution.resource_plan import Node, ResourcePlan
    from ..storage.store import Store
    from .console import SweepView
    from .results import TrialResult

#: What a sweep sets where nobody says otherwise: configurations are chosen on images that no client trains on.
SWEEP_BASE = {"partition.validation_fraction": 0.1}

SCHEDULERS = ("fifo", "asha")


@dataclass(frozen=True)
class Request:
    """What was asked for. ``config`` is the base that points change; ``space`` the plan's name."""

    config: ExperimentConfig
    space: str
    plan: SweepPlan
    search: str = ""
    samples: int | None = None
    seeds: tuple[int, ...] = ()
    scheduler: str = "fifo"
    max_concurrent: int | None = None


@dataclass(frozen=True)
class Sweep:
    """A request made definite: who hands out its trials, the trials as far as they are known, and plan.json's facts."""

    request: Request
    base: ExperimentConfig
    search: Search
    trials: tuple[Trial, ...]
    facts: dict[str, Any]
    swept: tuple[str, ...]
    conditions: tuple[str, ...]

    @property
    def configs(self) -> list[ExperimentConfig]:
        """Every trial's config; of optuna's, whose points are not known yet, each condition's with each extreme."""
        return [trial.config for trial in self.trials]


def prepare(request: Request, config: ExperimentConfig | None = None) -> Sweep:
    """Check everything that can be checked without data or Ray; ``RequestError`` otherwise.

    ``config``: the base with what depends on this machine settled; the plan's facts keep the request's own.
    """
    plan, base = request.plan, config or request.config
    check_space(request.space, plan)
    search = request.search or plan.search
    seeds = request.seeds or plan.seeds or (base.seed,)
    samples = request.samples or plan.samples
    if search == "grid":
        if request.samples is not None:
            raise RequestError(f"--samples {samples}: a grid tries every point; --search random takes a number of them")
        points = grid_points(plan)
    elif search == "random":
        points = random_points(plan, samples, base.seed)
    else:
        if plan.points:
            raise RequestError(f"--search optuna: space {request.space} lists its points; it takes --search grid")
        points = _extremes(plan)
    swept = tuple(dict.fromkeys(name for point in points for name in point))
    trials = make_trials(base, points, seeds)
    if request.scheduler == "asha" or search == "optuna":
        _need_selection(request, search, trials)
    facts = PlanFile(
        space=request.space,
        search=search,
        samples=None if search == "grid" else samples,
        seeds=list(seeds),
        scheduler=request.scheduler,
        knobs={name: describe(domain) for name, domain in plan.knobs.items()},
        points=None if search == "optuna" else [dict(point) for point in points],
        base=as_dict(request.config),
    ).to_json()
    chosen: Search = Optuna(plan, samples, seeds, base) if search == "optuna" else Listed(trials)
    return Sweep(request, base, chosen, tuple(trials), facts, swept, conditions(swept))


def _extremes(plan: SweepPlan) -> list[dict[str, Any]]:
    """Every problem with every two values (of a range: its ends) of the knobs that optuna searches.

    Knobs contradict one another in pairs, and what a trial needs is most at an end, so what cannot be is found here.
    """
    ends = {
        name: domain.values if isinstance(domain, Choice) else (domain.low, domain.high)
        for name, domain in searched(plan).items()
    }
    first = {name: values[0] for name, values in ends.items()}
    pairs = list(itertools.combinations(ends, 2)) or [tuple(ends)]
    found = [
        first | dict(zip(names, values, strict=True))
        for names in pairs
        for values in itertools.product(*(ends[name] for name in names))
    ]
    distinct = {repr(point): point for point in found}.values()
    return [{name: (problem | point)[name] for name in plan.knobs} for problem in problems(plan) for point in distinct]


def _need_selection(request: Request, search: str, trials: Sequence[Trial]) -> None:
    """A search that learns needs something to learn from that is not the test set."""
    word = "--scheduler asha" if request.scheduler == "asha" else f"--search {search}"
    blind = next((t for t in trials if not t.config.partition.validation_fraction), None)
    if blind is not None:
        raise RequestError(
            f"{word}: it compares trials on validation images; set partition.validation_fraction above 0"
        )


# --- before it runs --------------------------------------------------------------------------------------------------


def resources_of(sweep: Sweep, nodes: Sequence[Node], storage: str) -> ResourcePlan:
    """What the sweep may hold at once on ``nodes`` (the first is this one)."""
    from ..execution.resource_plan import plan

    # a local folder is one node's own; so is the folder in which a trial's Train workers leave their checkpoints
    local = "://" not in storage or storage.startswith("file:")
    bound = local or any(config.distill.workers for config in sweep.configs)
    return plan(
        nodes, sweep.configs, num_trials=sweep.search.total, max_concurrent=sweep.request.max_concurrent,
        trials_on=0 if bound else None,
    )  # fmt: skip


def here(address: str) -> list[Node]:
    """The nodes that there will be: this machine, without starting Ray, or those of the cluster at ``address``."""
    from ..execution.ray_session import connect, local_resources, nodes
    from ..execution.resource_plan import Node

    if address != "local":
        connect(address)
        return nodes(expect=True)
    found = local_resources()
    return [Node("this machine", found.cpus, found.gpus, found.memory)]


def dry_run(request: Request, storage: str, name: str | None, address: str) -> list[Any]:
    """What would run, as renderables: trials, the resource plan, work by stage. Needs neither the data nor Ray."""
    from ..report.tables import work_table
    from ..runs.plan import stage_keys, unique_work
    from ..runs.runner import check_name

    check_name(name, "sweeps")
    sweep = prepare(request)
    resources = resources_of(sweep, here(address), storage)
    name = name or plan_name(sweep.facts)
    head = [
        f"sweep {name}: space {request.space}, {sweep.facts['search']} search, {sweep.search.total} trials "
        f"({sweep.search.total // len(sweep.facts['seeds'])} points x {len(sweep.facts['seeds'])} seeds)",
    ]
    if sweep.facts["search"] == "optuna":
        return [*head, *resources.lines(), "its points depend on results, so the work is not known beforehand"]
    chains = [stage_keys(config) for config in sweep.configs]
    return [*head, *resources.lines(), "", work_table(unique_work(chains, sweep.configs))]


# --- while it runs ---------------------------------------------------------------------------------------------------


@dataclass
class Feed:
    """Hands out the trials that have not ended, and keeps the results of all that have."""

    sweep: Sweep
    ledger: Ledger
    view: SweepView
    results: dict[str, TrialResult] = field(default_factory=dict)
    strict_health: bool = False
    _back: list[Trial] = field(default_factory=list)

    def found(self) -> bool:
        """Go through what has ended already; whether anything is left to run."""
        try:
            trial = self.next()
        except StopIteration:
            return False
        assert trial is not None, "nothing is under way, so nothing can be waited for"
        self._back.append(trial)
        return True

    def next(self) -> Trial | None:
        """The next trial to run; None where one must end first; ``StopIteration`` at the end."""
        if self._back:
            return self._back.pop()
        while (trial := self.sweep.search.next()) is not None:
            summary = self.ledger.ended(trial)
            if summary is None or (self.strict_health and _alarmed(summary)):
                return trial
            self._keep(trial, summary)
            self.view.found(summary["status"], _selection(summary), trial.label, self._condition(trial))
        return None

    def began(self, trial: Trial) -> None:
        """See ``sweep.Feed``."""
        self.view.begin(trial.name, trial.label)

    def entered(self, trial: Trial, stage: str) -> None:
        """See ``sweep.Feed``."""
        self.view.stage(trial.name, stage)

    def died(self, trial: Trial) -> None:
        """See ``sweep.Feed``."""
        self.view.warn(f"{trial.label}: its process died; it begins again at its last stored stage")

    def ended(self, trial: Trial) -> None:
        """See ``sweep.Feed``."""
        from .results import HPARAMS_FILE, hparams_file

        summary = self.ledger.summary(trial.name)
        if summary is None:  # it could not even say how it failed; the storage may be what failed
            summary = self.ledger.record(trial, status="failed", error="it left no summary", stage=None)
        kept = self._keep(trial, summary)
        if summary["status"] == "failed":
            self.view.warn(f"{trial.label}: {summary['error']}")
        if summary["status"] != "done":  # a done one wrote its own
            board = f"{self.ledger.folder(trial.name)}/tensorboard"
            self.ledger.store.write(f"{board}/{HPARAMS_FILE}", hparams_file(kept, self.sweep.swept))
        self.view.end(trial.name, summary["status"], _selection(summary), trial.label, self._condition(trial))
        self.write()

    def write(self) -> None:
        """results.parquet and results.csv of what has ended so far."""
        from .results import results_files, results_table

        for name, data in results_files(results_table(self.sorted())).items():
            self.ledger.store.write(f"{self.ledger.place}/{name}", data)

    def sorted(self) -> list[TrialResult]:
        """By point and seed, whatever the order of their ends."""
        return sorted(self.results.values(), key=lambda r: (r.point, r.seed))

    def _condition(self, trial: Trial) -> str:
        return repr([trial.knobs.get(name) for name in self.sweep.conditions])

    def _keep(self, trial: Trial, summary: Mapping[str, Any]) -> TrialResult:
        from .results import TrialResult

        kept = TrialResult(trial.name, trial.point, trial.seed, trial.knobs, summary)
        self.results[trial.name] = kept
        self.sweep.search.ended(trial, _selection(summary))
        return kept


def _alarmed(summary: Mapping[str, Any]) -> bool:
    """Whether an error is among a trial's health findings: with ``strict_health`` it fails, from what is stored."""
    return any(finding["severity"] == "error" for finding in summary.get("health", []))


def _selection(summary: Mapping[str, Any]) -> float | None:
    return (summary.get("selection") or {}).get("value") if summary["status"] == "done" else None


@dataclass(frozen=True)
class Outcome:
    """A finished sweep: where it is, every trial's result, and what its tables group by."""

    name: str
    place: str
    results: list[TrialResult]
    swept: tuple[str, ...]
    conditions: tuple[str, ...]

    @property
    def failed(self) -> list[TrialResult]:
        return [r for r in self.results if r.summary["status"] == "failed"]

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        trials = [
            {"trial": r.trial, "point": r.point, "seed": r.seed, "knobs": dict(r.knobs), "summary": r.summary}
            for r in self.results
        ]
        status = "failed" if self.failed else "done"
        return {"status": status, "name": self.name, "paths": {"sweep": self.place}, "trials": trials}

    def raise_failures(self) -> None:
        """``RunError`` with the list of failed trials, if there are any."""
        if not self.failed:
            return
        which = "; ".join(f"{r.trial} ({r.summary['error']})" for r in self.failed)
        raise RunError(
            f"{len(self.failed)} of {len(self.results)} trials failed: {which}; the others are kept, and the same "
            f"command tries these again; logs are in {self.place}/trials/"
        )


def run(
    request: Request,
    *,
    storage: str = "./mosaic_runs",
    name: str | None = None,
    address: str = "local",
    fresh: bool = False,
    progress: bool | None = None,
    strict_health: bool = False,
) -> Outcome:
    """Run what has not ended of the sweep, and write its results.

    ``RequestError`` before any trial starts; a trial that fails is recorded and the rest go on. With ``strict_health``
    a finding of severity error is such a failure.
    """
    from ..runs.runner import check_name, load_data, settle_precision
    from ..storage.store import Store
    from .console import SweepView
    from .results import read_results

    check_name(name, "sweeps")
    sweep = prepare(request)
    resources_of(sweep, here(address), storage)  # what can never fit is refused here, before Ray
    store = Store(storage)
    store.check_writable()
    settled = settle_precision(request.config)
    ledger = Ledger(store, name or plan_name(sweep.facts))
    with _alone(store, ledger.name):
        datasets = load_data(sweep.configs)
        ledger.begin(sweep.facts, fresh, settled.runtime.precision)
        sweep = prepare(request, override(settled, {"runtime.precision": ledger.precision}))
        if store.local_root and (old := store.local_root / ledger.place / "results.parquet").exists():
            read_results(old)  # refuses what is not whole
        with SweepView(sweep.search.total, progress=progress) as view:
            feed = Feed(sweep, ledger, view, strict_health=strict_health)
            if feed.found():
                _run(feed, datasets, storage, address)
        feed.write()
    return Outcome(ledger.name, store.where(ledger.place), feed.sorted(), sweep.swept, sweep.conditions)


def _run(feed: Feed, datasets: dict[Any, Any], storage: str, address: str) -> None:
    """Ray, the pool, the trials."""
    from ..execution.ray_session import connect, nodes
    from .tune import HalvingByCondition, Job, run_trials

    sweep, ledger, store = feed.sweep, feed.ledger, feed.ledger.store
    connect(address)
    there = nodes(expect=address != "local")
    job = Job(
        sweep.base, str(store.local_root or store.uri), ledger.name, ledger.session, sweep.swept,
        strict_health=feed.strict_health,
    )  # fmt: skip
    halving = None
    if sweep.request.scheduler == "asha":
        names = (*sweep.conditions, "seed")
        halving = HalvingByCondition(names, max(config.finetune.num_rounds for config in sweep.configs))
    run_trials(
        feed, ledger, job, datasets, resources_of(sweep, there, storage), there, say=feed.view.say, warn=feed.view.warn,
        halving=halving,
    )  # fmt: skip


def _alone(store: Store, name: str) -> Any:
    """The right to run the sweep ``name``; two at once would write the same files."""
    lease = store.try_lease(f"sweep-{name}")
    if lease is None:
        raise RequestError(f"--name {name}: that sweep is running already, from another process")
    return lease
