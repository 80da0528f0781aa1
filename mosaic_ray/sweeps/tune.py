"""Many runs under Ray Tune: one pool of client hosts that all trials share, and what follows them.

A trial is an experiment's driver: it holds a little memory and no CPU, so that any number of them queue on the pool
without holding one another up (``execution.resource_plan`` has the proof). Tune's own checkpoints are never read
back: a sweep resumes from its ledger and its store.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import ray
from ray import tune
from ray.tune import Callback, FailureConfig, PlacementGroupFactory, RunConfig, TuneConfig, Tuner
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from ..config.resolve import KNOBS, override
from ..config.schema import DataConfig, ExperimentConfig
from ..core.errors import RequestError, RunError
from ..core.types import Dataset
from ..execution.backend import start_hosts, started
from ..execution.ray_session import RAY_ENVIRONMENT, own_node
from ..execution.resource_plan import Node, ResourcePlan
from .state import Ledger, Trial

#: A trial whose process dies begins again this often, from the last stage that it stored.
MAX_DEATHS = 2

#: Where on the way to its end a trial is when a validation accuracy is known; halving happens at 1, 2, 4, 8, 16 ...
RUNGS = {"warmup": 1, "teacher": 2, "distill": 4, "finetune": 4}


@dataclass(frozen=True)
class Job:
    """What every trial needs beside its own knobs; it travels through Ray's object store."""

    base: ExperimentConfig
    storage: str
    name: str
    session: str | None
    swept: tuple[str, ...]
    datasets: Mapping[DataConfig, Any] = field(default_factory=dict)  # references
    pool: tuple[Any, ...] = ()
    strict_health: bool = False


class Feed(Protocol):
    """Who hands out trials and wants to know of their ends (``sweep_launch.Feed``)."""

    def next(self) -> Trial | None: ...
    def began(self, trial: Trial) -> None: ...
    def entered(self, trial: Trial, stage: str) -> None: ...
    def died(self, trial: Trial) -> None: ...
    def ended(self, trial: Trial) -> None: ...


# --- in a trial's process --------------------------------------------------------------------------------------------


def run_trial(knobs: dict[str, Any], job: Job) -> None:
    """One trial, in its own process: an experiment with ``knobs`` on the pool. Failures go into its summary.json."""
    for name, value in RAY_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import torch

    from ..execution.placement import Placement
    from ..runs import runner
    from ..storage.filesystem import write_whole
    from ..storage.store import Store
    from .results import HPARAMS_FILE, TrialResult, hparams_file

    torch.set_num_threads(1)
    config = override(job.base, {name: value for name, value in knobs.items() if name in KNOBS})
    swept = {name: knobs[name] for name in job.swept if name in knobs}
    trial = Trial(knobs["trial"], knobs["point"], config.seed, swept, config)
    store = Store(job.storage, fresh=job.session is not None, session=job.session)
    ledger = Ledger(store, job.name)
    turn = trial.point % max(1, len(job.pool))  # trials do not all begin at the same host
    hosts = Placement(pool=job.pool[turn:] + job.pool[:turn], in_trial=True)

    def on_metric(tag: str, step: int, value: float) -> None:
        stage, _, leaf = tag.partition("/")
        if leaf == "validation_accuracy" and stage in RUNGS:
            tune.report({"score": value, "rung": RUNGS[stage] + (step if stage == "finetune" else 0)})

    def finish(folder: Any, summary: dict[str, Any]) -> None:
        result = TrialResult(trial.name, trial.point, trial.seed, swept, summary)
        write_whole(folder / "tensorboard" / HPARAMS_FILE, hparams_file(result, job.swept))

    try:
        summary = runner.execute(
            config, ray.get(job.datasets[config.data]), store, ledger.folder(trial.name), hosts, progress=None,
            log_file=True, on_metric=on_metric, on_stage=lambda name: tune.report({"stage": name}), finish=finish,
            strict_health=job.strict_health,
        )  # fmt: skip
        status = summary["status"]
    except RunError:
        status = "failed"  # its summary is written
    except RequestError as error:  # found out only with the data at hand, such as a client left without images
        ledger.record(trial, status="failed", error=str(error), stage=None, round=None, client=None)
        status = "failed"
    tune.report({"status": status})


# --- what Tune asks --------------------------------------------------------------------------------------------------


class _Unsaved:
    """Tune pickles its parts while it runs; what these hold cannot be, and need not: the ledger is what resumes."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class _Points(_Unsaved, Searcher):
    """Tune's view of the feed."""

    def __init__(self, feed: Feed, trials: dict[str, Trial]) -> None:
        super().__init__()
        self._feed, self._trials = feed, trials

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        try:
            trial = self._feed.next()
        except StopIteration:
            return Searcher.FINISHED
        if trial is None:
            return None
        self._trials[trial_id] = trial
        return {**trial.knobs, "seed": trial.seed, "trial": trial.name, "point": trial.point}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """The feed hears of it through ``_Follow``."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing: see ``_Unsaved``."""

    restore = save


class HalvingByCondition(FIFOScheduler):
    """ASHA within each condition (same omega, same seed ...): across conditions it would only keep the easy problem."""

    def __init__(self, conditions: Sequence[str], num_rounds: int) -> None:
        """``conditions``: knobs that set the problem; ``num_rounds``: closing rounds, at most."""
        super().__init__()
        self._conditions, self._last_rung = conditions, RUNGS["finetune"] + num_rounds
        self._halvings: dict[Any, ASHAScheduler] = {}
        self._of: dict[str, ASHAScheduler] = {}

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        condition = tuple(repr(trial.config.get(name)) for name in self._conditions)
        if condition not in self._halvings:
            self._halvings[condition] = ASHAScheduler(
                time_attr="rung", metric="score", mode="max", max_t=self._last_rung + 1, grace_period=1,
                reduction_factor=2, stop_last_trials=False,
            )  # fmt: skip
        self._of[trial.trial_id] = self._halvings[condition]
        self._of[trial.trial_id].on_trial_add(tune_controller, trial)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if "score" not in result or "status" in result or result["rung"] >= self._last_rung:
            return TrialScheduler.CONTINUE  # stopped at its last round, a trial would save nothing and tell nothing
        return self._of[trial.trial_id].on_trial_result(tune_controller, trial, result)


class _Follow(_Unsaved, Callback):
    """Tells the feed what becomes of its trials, and writes down the ends that a trial could not."""

    def __init__(self, feed: Feed, ledger: Ledger, trials: dict[str, Trial]) -> None:
        self._feed, self._ledger, self._trials = feed, ledger, trials
        self._last: dict[str, dict[str, Any]] = {}

    def on_trial_start(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        self._last[trial.trial_id] = {}
        self._feed.began(self._trials[trial.trial_id])

    def on_trial_result(self, iteration: int, trials: list, trial: Any, result: dict[str, Any], **info: Any) -> None:
        news = {name: result[name] for name in ("stage", "score", "rung", "status") if name in result}
        self._last[trial.trial_id] |= news
        if "stage" in news:
            self._feed.entered(self._trials[trial.trial_id], news["stage"])

    def on_trial_recover(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        self._feed.died(self._trials[trial.trial_id])

    def on_trial_complete(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        mine, last = self._trials[trial.trial_id], self._last[trial.trial_id]
        if "status" not in last:  # the scheduler ended it
            self._ledger.record(
                mine, status="stopped", stage=last.get("stage"),
                selection={"metric": "validation accuracy", "value": last.get("score")}, rung=last.get("rung"),
            )  # fmt: skip
        self._feed.ended(mine)

    def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        mine, last = self._trials[trial.trial_id], self._last.get(trial.trial_id, {})
        reason = next((line for line in reversed(_error_of(trial).splitlines()) if line.strip()), "no reason given")
        self._ledger.record(
            mine, status="failed", stage=last.get("stage"), round=None, client=None,
            error=f"the trial's process died {MAX_DEATHS + 1} times; the last time: {reason.strip()}",
        )  # fmt: skip
        self._feed.ended(mine)


def _error_of(trial: Any) -> str:
    try:
        with open(trial.error_file, encoding="utf-8") as file:
            return file.read()
    except (OSError, TypeError):
        return ""


# --- the whole -------------------------------------------------------------------------------------------------------


def run_trials(
    feed: Feed,
    ledger: Ledger,
    job: Job,
    datasets: dict[DataConfig, Dataset],
    resources: ResourcePlan,
    nodes: Sequence[Node],
    *,
    say: Callable[[str], None],
    warn: Callable[[str], None],
    halving: HalvingByCondition | None = None,
) -> None:
    """Everything that ``feed`` hands out, as ``resources`` has it; Ray is joined already, ``nodes[0]`` is this one.

    ``datasets`` is emptied: the object store holds them from here on.
    """
    os.environ |= {
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # our own event files say more
        "TUNE_DISABLE_SIGINT_HANDLER": "1",
        "TUNE_MAX_PENDING_TRIALS_PG": str(resources.concurrent),
    }
    for name in ("ray.tune", "ray.air"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # each failure is told by the ledger, in one line
    trials: dict[str, Trial] = {}
    counts: dict[str, int] = {}
    for node, count in zip(nodes, resources.hosts, strict=True):
        place = "" if node.to_come else node.name
        counts[place] = counts.get(place, 0) + count
    later = counts.pop("", 0)  # asking for them makes their machines come
    here = start_hosts(resources.host, counts) if any(counts.values()) else []
    coming = start_hosts(resources.host, {"": later}) if later else []
    pool = [*here, *coming]  # empty where clients run inside their trial
    try:
        up = started(here) if here else []
        if len(up) < len(here):
            warn(f"{len(up)} of {len(here)} client hosts could start; other jobs hold the cluster's room")
        wait = f", {later} more as the cluster's machines come" if later else ""
        say(f"Ray is up: {len(up)} client hosts{wait}, {resources.concurrent} trials at once")
        up += coming
        references = {name: ray.put(datasets.pop(name)) for name in list(datasets)}  # this process needs them no more
        job = replace(job, pool=tuple(up), datasets=references)
        pinned = own_node() if resources.trials_on is not None and len(nodes) > 1 else {}
        trainable = tune.with_resources(
            tune.with_parameters(run_trial, job=job), PlacementGroupFactory([{**resources.trial, **pinned}])
        )
        Tuner(
            trainable,
            tune_config=TuneConfig(
                search_alg=_Points(feed, trials),
                scheduler=halving or FIFOScheduler(),
                num_samples=-1,
                max_concurrent_trials=resources.concurrent,
                reuse_actors=halving is None,  # a stopped trial's thread may still be at work
                trial_name_creator=lambda trial: trial.config["trial"],
                trial_dirname_creator=lambda trial: trial.config["trial"],
            ),
            run_config=RunConfig(
                name="tune",
                storage_path=ledger.store.where(ledger.place),
                verbose=0,
                callbacks=[_Follow(feed, ledger, trials)],
                failure_config=FailureConfig(max_failures=MAX_DEATHS),
            ),
        ).fit()
    finally:
        for host in pool:
            ray.kill(host)
