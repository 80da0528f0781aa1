"""Run trials under Ray Tune, on one pool of client hosts that all of them share.

A trial is an experiment's driver: it holds a little memory and no CPU, so that any number of them can wait for the
pool without blocking one another (``execution.resource_plan`` has the proof). Tune's own checkpoints are never read
back: a sweep resumes from ``SweepState`` and its store.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import ray
from ray import tune
from ray.tune import Callback, FailureConfig, PlacementGroupFactory, RunConfig, TuneConfig, Tuner
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from ..config.resolve import KNOBS, override
from ..config.schema import DataConfig, ExperimentConfig
from ..core.errors import OutOfGpuMemory, RequestError, RunError
from ..core.types import Dataset
from ..execution.backend import start_hosts, started
from ..execution.devices import on_a_gpu, settle
from ..execution.ray_session import RAY_ENVIRONMENT, Resources, own_node
from ..execution.resource_plan import Node, ResourcePlan
from ..runs.plan import graph_of
from ..tracking.reports import Tracking
from .queue import TrialQueue
from .results import HPARAMS_FILE, TrialResult, hparams_file
from .state import SweepState, Trial

#: How often a trial is started again, at its last stored stage, after its process died.
MAX_DEATHS = 2

#: ASHA's time at the end of the stage that makes the model of this role; it halves the trials at times 1, 2, 4, 8 ...
RUNGS = {"initial": 1, "teacher": 2, "distilled": 4, "final": 4}


@dataclass(frozen=True)
class TrialContext:
    """The input that all trials share, sent through Ray's object store. ``datasets`` are references into it."""

    base: ExperimentConfig
    storage: str
    name: str
    session: str | None
    swept: tuple[str, ...]
    datasets: Mapping[DataConfig, Any] = field(default_factory=dict)
    pool: tuple[Any, ...] = ()
    there: Resources | None = None  # what devices are decided by
    strict_health: bool = False
    tracking: Tracking = field(default_factory=Tracking)


def rungs(config: ExperimentConfig) -> dict[str, int]:
    """Return ASHA's time at the end of each stage with a validation accuracy; a closing round adds its number."""
    return {stage.name: RUNGS[stage.role] for stage in graph_of(config) if stage.role in RUNGS}


def run_trial(knobs: dict[str, Any], context: TrialContext) -> None:
    """Run one experiment with ``knobs``, in a process of its own. A failure goes into its summary.json."""
    for name, value in RAY_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    os.environ |= context.tracking.environment
    import torch

    from ..execution.placement import Placement
    from ..runs import runner
    from ..storage.filesystem import write_whole
    from ..storage.store import Store

    torch.set_num_threads(1)
    config = override(context.base, {k: v for k, v in knobs.items() if "." in k or k in KNOBS})
    config = settle(config, context.there) if context.there else config
    swept = {name: knobs[name] for name in context.swept if name in knobs}
    trial = Trial(knobs["trial"], knobs["point"], config.seed, swept, config)
    store = Store(context.storage, fresh=context.session is not None, session=context.session)
    state = SweepState(store, context.name)
    turn = trial.point % max(1, len(context.pool))  # so that trials begin at different hosts
    hosts = Placement(pool=context.pool[turn:] + context.pool[:turn], in_trial=True)

    times = rungs(config)

    def on_metric(tag: str, step: int, value: float) -> None:
        stage, _, leaf = tag.partition("/")
        if leaf == "validation_accuracy" and stage in times:
            tune.report({"score": value, "rung": times[stage] + (step if stage == "finetune" else 0)})

    def finish(folder: Any, summary: dict[str, Any]) -> None:
        result = TrialResult(trial.name, trial.point, trial.seed, swept, summary)
        write_whole(folder / "tensorboard" / HPARAMS_FILE, hparams_file(result, context.swept))

    try:
        summary = runner.execute(
            config, ray.get(context.datasets[config.data]), store, state.folder(trial.name), hosts, progress=None,
            log_file=True, on_metric=on_metric, on_stage=lambda name: tune.report({"stage": name}), finish=finish,
            strict_health=context.strict_health, gpus=context.there.gpus if context.there else 0.0,
            tracking=context.tracking, label=trial.label,
        )  # fmt: skip
        status = summary["status"]
    except RunError as error:  # its summary is written
        status = "starved" if isinstance(error, OutOfGpuMemory) and config.runtime.gpu_share < 1 else "failed"
    except RequestError as error:  # found only with the data, such as a client without images
        state.record(trial, status="failed", error=str(error), stage=None, round=None, client=None)
        status = "failed"
    tune.report({"status": status})


class _Unsaved:
    """Pickles as nothing: Tune saves its parts while it runs, but a sweep resumes from ``SweepState``."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class _Searcher(_Unsaved, Searcher):
    def __init__(self, queue: TrialQueue) -> None:
        super().__init__()
        self._queue = queue

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        try:
            trial = self._queue.next()
        except StopIteration:
            return Searcher.FINISHED  # type: ignore[return-value]  # a string, which Tune compares with
        if trial is None:
            return None
        return {**trial.knobs, "seed": trial.seed, "trial": trial.name, "point": trial.point}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Do nothing: ``_Progress`` reports the end."""

    def save(self, checkpoint_path: str) -> None:
        """Do nothing: see ``_Unsaved``."""

    restore = save


class _Progress(_Unsaved, Callback):
    def __init__(self, queue: TrialQueue) -> None:
        self._queue = queue

    def on_trial_start(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        self._queue.start(trial.config["trial"])

    def on_trial_result(self, iteration: int, trials: list, trial: Any, result: dict[str, Any], **info: Any) -> None:
        self._queue.report(trial.config["trial"], result)

    def on_trial_recover(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        self._queue.restart(trial.config["trial"])

    def on_trial_complete(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        self._queue.finish(trial.config["trial"])

    def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        reason = "no reason given"
        with contextlib.suppress(OSError, TypeError), open(trial.error_file, encoding="utf-8") as file:
            reason = [reason, *filter(None, map(str.strip, file))][-1]
        times = f"the trial's process died {MAX_DEATHS + 1} times"
        self._queue.fail(trial.config["trial"], f"{times}; the last time: {reason}")


class HalvingBySetting(FIFOScheduler):
    """ASHA within each setting (same omega, same seed): across settings it would only keep the easiest one."""

    def __init__(self, setting: Sequence[str], num_rounds: int) -> None:
        """``setting``: knobs that trials must agree in to be compared; ``num_rounds``: the most closing rounds."""
        super().__init__()
        self._setting, self._last_rung = setting, RUNGS["final"] + num_rounds
        self._halvings: dict[Any, ASHAScheduler] = {}
        self._of: dict[str, ASHAScheduler] = {}

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        setting = tuple(repr(trial.config.get(name)) for name in self._setting)
        if setting not in self._halvings:
            self._halvings[setting] = ASHAScheduler(
                time_attr="rung", metric="score", mode="max", max_t=self._last_rung + 1, grace_period=1,
                reduction_factor=2, stop_last_trials=False,
            )  # fmt: skip
        self._of[trial.trial_id] = self._halvings[setting]
        self._of[trial.trial_id].on_trial_add(tune_controller, trial)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if "score" not in result or "status" in result or result["rung"] >= self._last_rung:
            return TrialScheduler.CONTINUE  # to stop a trial at its last round would save nothing
        return self._of[trial.trial_id].on_trial_result(tune_controller, trial, result)


def run_trials(
    queue: TrialQueue,
    context: TrialContext,
    datasets: dict[DataConfig, Dataset],
    resources: ResourcePlan,
    nodes: Sequence[Node],
    halving: HalvingBySetting | None = None,
    fewer: Callable[[ResourcePlan], tuple[Resources, ResourcePlan] | None] = lambda resources: None,
) -> None:
    """Run every trial of ``queue`` within ``resources``; Ray is joined already, ``nodes[0]`` is this node.

    ``datasets`` is emptied: the object store holds them from here on. Trials that run out of GPU memory run again, with
    the resources that ``fewer`` returns: fewer clients share a GPU. If it returns None, they have failed.
    """
    os.environ |= {
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # our own event files say more
        "TUNE_DISABLE_SIGINT_HANDLER": "1",
    }
    for name in ("ray.tune", "ray.air"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # the queue reports each failure in one line
    context = replace(context, datasets={name: ray.put(datasets.pop(name)) for name in list(datasets)})
    while True:
        _run_within(queue, context, resources, nodes, halving)
        if not queue.starved:
            return
        again = fewer(resources)
        if again is None:
            queue.give_up()
            if not queue.has_unfinished():
                return
        else:
            there, resources = again
            context = replace(context, there=there)
            share = on_a_gpu(resources.host.get("GPU") or resources.trial["GPU"])
            queue.view.say(f"out of GPU memory: {_count(queue)} again, with {share}", "warning")
            queue.run_again()


def _count(queue: TrialQueue) -> str:
    count = len(queue.starved)
    return f"{count} trials run" if count > 1 else "1 trial runs"


def _run_within(
    queue: TrialQueue,
    context: TrialContext,
    resources: ResourcePlan,
    nodes: Sequence[Node],
    halving: HalvingBySetting | None,
) -> None:
    """Run trials on a pool of client hosts until none is left, or one has run out of GPU memory."""
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(resources.concurrent)
    counts: Counter[str] = Counter()
    for node, count in zip(nodes, resources.hosts, strict=True):
        counts["" if node.to_come else node.name] += count
    later = counts.pop("", 0)  # pending actors make the autoscaler start their machines
    here = start_hosts(resources.host, counts) if any(counts.values()) else []
    coming = start_hosts(resources.host, {"": later}) if later else []
    pool = [*here, *coming]  # empty where clients run inside their trial
    try:
        up = started(here) if here else []
        if len(up) < len(here):
            queue.view.say(f"{len(up)} of {len(here)} client hosts could start; other jobs use the rest", "warning")
        wait = f", {later} more as the cluster's machines come" if later else ""
        queue.view.say(f"Ray is up: {len(up)} client hosts{wait}, {resources.concurrent} trials at once")
        up += coming
        context = replace(context, pool=tuple(up))
        pinned = own_node() if resources.trials_on is not None and len(nodes) > 1 else {}
        trainable = tune.with_resources(
            tune.with_parameters(run_trial, context=context), PlacementGroupFactory([{**resources.trial, **pinned}])
        )
        Tuner(
            trainable,
            tune_config=TuneConfig(
                search_alg=_Searcher(queue),
                scheduler=halving or FIFOScheduler(),
                num_samples=-1,
                max_concurrent_trials=resources.concurrent,
                reuse_actors=halving is None,  # a stopped trial's thread may still run
                trial_name_creator=lambda trial: trial.config["trial"],
                trial_dirname_creator=lambda trial: trial.config["trial"],
            ),
            run_config=RunConfig(
                name="tune",
                storage_path=queue.state.store.where(queue.state.place),
                verbose=0,
                callbacks=[_Progress(queue)],
                failure_config=FailureConfig(max_failures=MAX_DEATHS),
            ),
        ).fit()
    finally:
        for host in pool:
            ray.kill(host)
