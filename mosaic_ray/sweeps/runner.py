"""Run a sweep: check the request, plan its resources, run its trials, write its results."""

from __future__ import annotations

import importlib.metadata
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from ..config.resolve import as_dict, dotted, flatten, override
from ..config.schema import ExperimentConfig
from ..core.errors import RequestError, RunError
from ..tracking.reports import Tracking
from .search import FixedTrials, OptunaSearch, Search, searched_knobs, settings_of
from .space import Choice, SweepPlan, check_space, describe, grid_points, random_points, setting_knobs
from .state import REMEMBERED, PlanFile, SweepState, Trial, make_trials, plan_name

if TYPE_CHECKING:
    from ..execution.ray_session import Resources
    from ..execution.resource_plan import Node, ResourcePlan
    from ..runs.estimate import Hours
    from ..runs.plan import Chain, StageWork
    from .queue import TrialQueue
    from .results import TrialResult

#: A sweep's own defaults: configurations are selected on images that no client trains on.
SWEEP_BASE = {"partition.validation_fraction": 0.1}

SCHEDULERS = ("fifo", "asha")


@dataclass(frozen=True)
class SweepRequest:
    """A sweep as requested. ``config`` is the base that points change, ``space`` the plan's name.

    ``against``: the method that a comparison takes differences to; empty: the default.
    """

    config: ExperimentConfig
    space: str
    plan: SweepPlan
    search: str = ""
    samples: int | None = None
    seeds: tuple[int, ...] = ()
    scheduler: str = "fifo"
    max_concurrent: int | None = None
    against: str = ""


@dataclass(frozen=True)
class Sweep:
    """A checked request with its search and its trials; ``plan_json`` is the content of plan.json.

    ``swept``: names of the knobs that differ between points; ``setting``: the ones that choose data and partition.
    ``note``: a line for the user, empty where there is nothing to say.
    """

    request: SweepRequest
    base: ExperimentConfig
    search: Search
    trials: tuple[Trial, ...]
    plan_json: dict[str, Any]
    swept: tuple[str, ...]
    setting: tuple[str, ...]
    there: Resources | None = None  # what devices were settled by
    note: str = ""
    tracking: Tracking = field(default_factory=Tracking)

    @property
    def configs(self) -> list[ExperimentConfig]:
        """All trial configs. For optuna, those at the bounds of the search space in each setting."""
        return [trial.config for trial in self.trials]


def prepare(request: SweepRequest, config: ExperimentConfig | None = None, there: Resources | None = None) -> Sweep:
    """Check ``request`` as far as that needs neither data nor Ray, and make its trials; ``RequestError`` otherwise.

    ``config`` replaces the base in the trials; plan.json keeps the request's. ``there``: what their devices are settled
    by.
    """
    from ..execution.devices import settle

    plan, base = request.plan, config or request.config
    check_space(request.space, plan)
    search, note, optuna = request.search or plan.search, "", None
    seeds = request.seeds or plan.seeds or (base.seed,)
    samples = request.samples or plan.samples
    if search == "grid":
        if request.samples is not None:
            raise RequestError(f"--samples {samples}: a grid tries every point; --search random takes a number of them")
        points = grid_points(plan)
    elif search == "random":
        points = random_points(plan, samples, base.seed)
        if len(points) < samples:
            note = f"--samples {samples}: the space has only {len(points)} points, and each is tried once"
    else:
        if plan.points:
            raise RequestError(f"--search optuna: space {request.space} lists its points; it takes --search grid")
        points, optuna = _extremes(plan), importlib.metadata.version("optuna")
        note = f"points are chosen by the TPE of optuna {optuna}"
    swept = tuple(dict.fromkeys(name for point in points for name in point))
    decide = partial(settle, there=there) if there else (lambda config: config)
    trials = make_trials(base, points, seeds, settle=decide)
    option = "--scheduler asha" if request.scheduler == "asha" else f"--search {search}"
    learns = option in ("--scheduler asha", "--search optuna")
    if learns and not all(trial.config.partition.validation_fraction for trial in trials):
        raise RequestError(
            f"{option}: it compares trials on validation images; set partition.validation_fraction above 0"
        )
    plan_file = PlanFile(
        space=request.space,
        search=search,
        samples=None if search == "grid" else samples,
        seeds=list(seeds),
        scheduler=request.scheduler,
        knobs={name: describe(domain) for name, domain in plan.knobs.items()},
        points=None if search == "optuna" else [dict(point) for point in points],
        base=as_dict(request.config),
        optuna=optuna,
        preset=request.config.preset or None,
        against=request.against or None,
    )
    chosen: Search = OptunaSearch(plan, samples, seeds, base, decide) if search == "optuna" else FixedTrials(trials)
    setting = setting_knobs(swept)
    return Sweep(request, base, chosen, tuple(trials), plan_file.to_json(), swept, setting, there, note)


def _extremes(plan: SweepPlan) -> list[dict[str, Any]]:
    """Return points with every setting and every two values (of a range: its ends) of the knobs that optuna searches.

    Knobs contradict one another in pairs, and a trial needs the most resources at a bound, so these points show
    every contradiction and the largest need.
    """
    ends = {
        name: domain.values if isinstance(domain, Choice) else (domain.low, domain.high)
        for name, domain in searched_knobs(plan).items()
    }
    first = {name: values[0] for name, values in ends.items()}
    pairs: list[tuple[str, ...]] = [*itertools.combinations(ends, 2)] or [tuple(ends)]
    found = [
        first | dict(zip(names, values, strict=True))
        for names in pairs
        for values in itertools.product(*(ends[name] for name in names))
    ]
    distinct = {repr(point): point for point in found}.values()
    return [{name: (setting | p)[name] for name in plan.knobs} for setting in settings_of(plan) for p in distinct]


def resources_of(sweep: Sweep, nodes: Sequence[Node], storage: str) -> ResourcePlan:
    """Return how many trials and client hosts the sweep runs at once on ``nodes`` (the first is this one)."""
    from ..execution.resource_plan import plan

    local = "://" not in storage or storage.startswith("file:")  # then this node alone reads it
    return plan(
        nodes, sweep.configs, num_trials=sweep.search.total, max_concurrent=sweep.request.max_concurrent,
        trials_on=0 if local else None,
    )  # fmt: skip


def available_nodes(address: str) -> list[Node]:
    """Return the cluster's nodes; for ``local`` this machine, without starting Ray."""
    from ..execution.ray_session import connect, local_resources, nodes
    from ..execution.resource_plan import Node

    if address != "local":
        connect(address)
        return nodes(expect=True)
    found = local_resources()
    return [Node("this machine", found.cpus, found.gpus, found.memory)]


@dataclass(frozen=True)
class DryRun:
    """The plan of a sweep. ``work`` is by stage; None for optuna, because its points depend on results.

    ``distinct``: a line about the distinct sets of generators, where their number does not follow from the points.
    """

    name: str
    space: str
    search: str
    points: int
    seeds: int
    resources: list[str]
    work: list[StageWork] | None
    hours: Hours | None = None
    distinct: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return the output of ``--json``."""
        plan = {name: value for name, value in vars(self).items() if name != "hours"}
        return {
            **plan, "work": self.work and [vars(row) for row in self.work],
            "estimate": self.hours and self.hours.as_dict(),
        }  # fmt: skip


def dry_run(
    request: SweepRequest, storage: str, name: str | None, address: str, fresh: bool = False, calibrate: bool = False
) -> DryRun:
    """Return the trials and the work of a sweep. Needs neither the data nor Ray."""
    from ..execution.devices import describe, of_nodes, settle
    from ..runs.calibrate import estimate_for
    from ..runs.earlier import read_earlier
    from ..runs.estimate import gpus_held
    from ..runs.plan import unique_work
    from ..runs.runner import check_known, check_name, estimate_devices

    check_name(name, "sweeps")
    nodes = available_nodes(address)
    sweep = prepare(request)
    there = estimate_devices(sweep.configs, _shared(of_nodes(nodes, address), sweep))
    sweep = prepare(request, there=there)
    resources = resources_of(sweep, nodes, storage)
    check_known(sweep.configs)
    lines = resources.lines()
    if line := describe(settle(request.config, there), there):
        lines.insert(0, line)
    search, seeds, work, hours = sweep.plan_json["search"], len(sweep.plan_json["seeds"]), None, None
    distinct = ""
    if search != "optuna":
        earlier = read_earlier(storage, fresh)
        estimate = estimate_for(sweep.configs, earlier.runs, calibrate)
        hosts, trials = sum(resources.hosts), resources.concurrent
        chains = [earlier.chain(config) for config in sweep.configs]
        work = unique_work(chains, sweep.configs, earlier, estimate.add)
        if {"generator.lambda_i", "generator.inversion_scale", "generator.tau"}.intersection(sweep.swept):
            distinct = _distinct(chains, all(earlier.sizes(config) for config in sweep.configs))
        gpus = max(gpus_held(c, sum(node.gpus for node in nodes), hosts, trials) for c in sweep.configs)
        hours = estimate.on(hosts or trials, trials, gpus)
    name, points = name or plan_name(sweep.plan_json), sweep.search.total // seeds
    notes = [sweep.note] if sweep.note else []
    return DryRun(name, request.space, search, points, seeds, [*notes, *lines], work, hours, distinct)


def _distinct(chains: Sequence[Chain], sizes_known: bool) -> str:
    """Return the line about the distinct sets of generators of trials that vary the inversion loss."""
    asked = [tuple(chain["generators"]) for chain in chains if "generators" in chain]
    if not asked:
        return ""
    why = "clients with generator.tau samples or more never meet the inversion loss"
    if sizes_known:
        return f"distinct sets of generators: {len(set(asked))} for {len(asked)} trials; {why}"
    return (
        f"distinct sets of generators: at most {len(set(asked))} for {len(asked)} trials; {why}, and how many samples "
        "clients have is not known before the images are dealt"
    )


@dataclass(frozen=True)
class Outcome:
    """A finished sweep: its folder, every trial's result, and the names of swept knobs (see ``Sweep``)."""

    name: str
    place: str
    results: list[TrialResult]
    swept: tuple[str, ...]
    setting: tuple[str, ...]

    @property
    def failed(self) -> list[TrialResult]:
        return [r for r in self.results if r.summary["status"] == "failed"]

    def as_dict(self) -> dict[str, Any]:
        """Return the output of ``--json``."""
        status, trials = "failed" if self.failed else "done", [vars(result) for result in self.results]
        return {"status": status, "name": self.name, "paths": {"sweep": self.place}, "trials": trials}

    def raise_failures(self) -> None:
        """Raise ``RunError`` with the list of failed trials, if there are any."""
        if not self.failed:
            return
        failures = "; ".join(f"{r.trial} ({r.summary['error']})" for r in self.failed)
        raise RunError(
            f"{len(self.failed)} of {len(self.results)} trials failed: {failures}; the others are kept, and the same "
            f"command tries these again; logs are in {self.place}/trials/"
        )


def run(
    request: SweepRequest,
    *,
    storage: str = "./mosaic_runs",
    name: str | None = None,
    address: str = "local",
    fresh: bool = False,
    progress: bool | None = None,
    strict_health: bool = False,
    track: Sequence[str] = (),
) -> Outcome:
    """Run the trials that have not finished, and write the results. ``track`` names trackers that get them.

    ``RequestError`` before any trial starts; a trial that fails is recorded and the rest go on. With ``strict_health``
    a finding of severity error is such a failure.
    """
    from ..execution.devices import describe, of_nodes, settle
    from ..runs.runner import check_name, load_data, look_at_devices
    from ..storage.store import Store
    from .console import SweepView
    from .journal import Journal
    from .queue import TrialQueue
    from .results import final_table, read_results

    check_name(name, "sweeps")
    nodes = available_nodes(address)
    sweep = prepare(request)
    there = _shared(of_nodes(nodes, address), sweep)
    settle(request.config, there)  # refuses a device that is not there
    resources_of(prepare(request, there=there), nodes, storage)  # refuses a plan that cannot fit, before Ray starts
    store = Store(storage)
    store.check_writable()
    state = SweepState(store, name or plan_name(sweep.plan_json))
    lease = store.try_lease(f"sweep-{state.name}")
    if lease is None:
        raise RequestError(f"--name {state.name}: that sweep is running already, from another process")
    with lease:
        datasets = load_data(sweep.configs)
        there = look_at_devices(sweep.configs, datasets, there, address)
        here = flatten(settle(request.config, there))
        state.begin(sweep.plan_json, fresh, {name: here[knob] for name, knob in REMEMBERED.items()})
        base, there, notes = as_begun(request, state, there)
        sweep = prepare(request, base, there)
        if store.local_root and (old := store.local_root / state.place / "results.parquet").exists():
            read_results(old)  # refuses a damaged file
        with SweepView(sweep.search.total, progress=progress) as view:
            for line in filter(None, [base.reason, *notes, describe(settle(base, there), there), sweep.note]):
                view.say(line)
            journal = Journal(state, request.plan, sweep.setting, view.say)
            queue = TrialQueue(sweep.search, state, view, sweep.swept, sweep.setting, strict_health, journal)
            tracking, plan = Tracking(tuple(track)), dotted(sweep.plan_json)
            if queue.has_unfinished():
                with tracking.open(
                    store.files, f"{state.place}/", state.name, "sweep", plan, partial(view.say, mark="warning"),
                ) as reports:  # fmt: skip
                    sweep = replace(sweep, tracking=tracking.within(reports, state.name))
                    _run_trials(sweep, queue, datasets, storage, address)
                    reports.table("results", *final_table(queue.results.values(), sweep.swept))
        queue.write()
    results = sorted(queue.results.values(), key=lambda r: (r.point, r.seed))
    return Outcome(state.name, store.where(state.place), results, sweep.swept, sweep.setting)


def _shared(there: Resources, sweep: Sweep) -> Resources:
    """Return ``there`` as all trials share it."""
    total = sweep.search.total
    return replace(there, runs=min(total, sweep.request.max_concurrent or total))


def as_begun(
    request: SweepRequest, state: SweepState, there: Resources
) -> tuple[ExperimentConfig, Resources, list[str]]:
    """Return base and resources with which a resumed sweep goes on with the keys that it began with, and lines.

    ``RequestError`` where it began on GPUs and ``there`` are none.
    """
    from ..execution.devices import settle

    here, begun = settle(request.config, there).runtime, state.settled
    notes = []
    if begun["device"] != here.device:
        if begun["device"] == "cuda":
            raise RequestError(
                f"--name {state.name}: that sweep began on GPUs, and there are none here; go on where there are some, "
                "or take another --name, or --fresh"
            )
        notes.append("the sweep began on CPUs and goes on there; --fresh begins it anew on GPUs")
        there = replace(there, gpus=0.0)
        here = settle(request.config, there).runtime
    if begun["precision"] != here.precision:
        notes.append(f"the sweep began in {begun['precision']} and goes on in it; here {here.precision} is usual")
    return override(request.config, {"runtime.precision": begun["precision"]}), there, notes


def _run_trials(sweep: Sweep, queue: TrialQueue, datasets: dict[Any, Any], storage: str, address: str) -> None:
    from ..execution.devices import halved
    from ..execution.ray_session import connect, nodes
    from .tune import HalvingBySetting, TrialContext, run_trials

    state, store = queue.state, queue.state.store
    connect(address)
    machines = nodes(expect=address != "local")
    context = TrialContext(
        sweep.base, str(store.local_root or store.uri), state.name, state.session, sweep.swept,
        there=sweep.there, strict_health=queue.strict_health, tracking=sweep.tracking,
    )  # fmt: skip
    halving = None
    if sweep.request.scheduler == "asha":
        num_rounds = max(config.finetune.num_rounds for config in sweep.configs)
        halving = HalvingBySetting((*sweep.setting, "seed"), num_rounds)

    def fewer(resources: ResourcePlan) -> tuple[Resources, ResourcePlan] | None:
        """Return resources with half as many clients a GPU, if there may be fewer."""
        share = resources.host.get("GPU") or resources.trial["GPU"]
        if sweep.there is None or halved(share) == share:
            return None
        there = replace(sweep.there, least_share=halved(share))
        try:
            return there, resources_of(prepare(sweep.request, sweep.base, there), machines, storage)
        except RequestError:  # nothing else would fit beside a client
            return None

    run_trials(queue, context, datasets, resources_of(sweep, machines, storage), machines, halving, fewer)
