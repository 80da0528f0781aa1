"""Measure the time of a step of each kind of work on this machine, with made-up images, in this process."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence

import numpy as np

from ..config.resolve import override
from ..config.schema import ExperimentConfig
from ..config.validate import check
from ..core.errors import RequestError
from ..core.types import DataFacts, Dataset, ImageSet
from ..data.load import known_facts
from ..execution.placement import Placement
from ..execution.precision import device_of
from ..storage.store import Store
from .earlier import EarlierRun
from .estimate import BY_DATA, SOURCES, Estimate, Like, Rate, amounts, counted, rates
from .plan import graph_of
from .runner import execute
from .summary import StageRecord, Summary

#: Steps of a short pass, the most of a long one, and the seconds that a long pass aims at.
SHORT, LONG, SECONDS = 2, 20, 12.0

#: The most points of a sweep that are calibrated.
MOST_CALIBRATIONS = 3


def estimate_for(configs: Sequence[ExperimentConfig], runs: Sequence[EarlierRun], calibrate: bool) -> Estimate:
    """Return an empty estimate with the times of earlier ``runs``; ``calibrate``: measure what they leave out."""
    usable = []
    for run in runs:
        try:
            graph_of(run.config)
            usable.append(run)
        except RequestError:  # of a plug-in that is gone
            continue
    times, left = rates(usable), MOST_CALIBRATIONS if calibrate else 0
    for config in configs if left else ():
        likes = {counted(s, config, s.work(config))[0] for s in graph_of(config) if any(s.work(config).values())}
        if left and any(like not in times and like[1] not in BY_DATA for like in likes):
            times, left = calibrated(config) | times, left - 1
    return Estimate(times)


def calibrated(config: ExperimentConfig) -> dict[Like, Rate]:
    """Return the seconds per step of a settled ``config``; no times for work that follows from the number of images.

    A run of few steps is done three times: to get warm, short, and longer. What the added steps took is their
    time; where noise hides it, all that the longer run took is. ``RequestError`` if that fails.
    """
    facts = known_facts(config.data)
    if facts is None:
        raise RequestError(
            f"--calibrate: the images of {config.data.name} are not known before they are read, so none can be made up"
        )
    if config.runtime.device != device_of(config).type:
        raise RequestError("--calibrate: clients train on GPUs, and this machine has none that torch can use")
    try:
        began = time.perf_counter()
        _pass(config, facts, SHORT)
        began, short = time.perf_counter(), _pass(config, facts, SHORT)
        more = int(SECONDS * SHORT / (time.perf_counter() - began))
        longer = _pass(config, facts, min(LONG, max(2 * SHORT, more)))
        return _rates(config, short, longer)
    except Exception as error:  # whatever fails, nothing was begun
        text = str(error).strip().splitlines() or [type(error).__name__]
        raise RequestError(f"--calibrate: {text[0]}") from error


def _rates(config: ExperimentConfig, short: EarlierRun, longer: EarlierRun) -> dict[Like, Rate]:
    found = {}
    graphs = [{stage.name: stage for stage in graph_of(run.config)} for run in (short, longer)]
    for stage in graph_of(config):
        work = stage.work(config)
        if not any(work.values()):
            continue
        like, _ = counted(stage, config, work)
        if like[1] in BY_DATA or like in found:
            continue
        less, more = (amounts(graph[stage.name], run) for graph, run in zip(graphs, (short, longer), strict=True))
        if less is None or more is None or more[2] == less[2]:
            continue
        # a student is taught by the images of every client's generator
        many = config.partition.num_clients / longer.config.partition.num_clients if like[0] == "distill" else 1.0
        clients, server, units = (b - a for a, b in zip(less, more, strict=True))
        if clients + server <= 0:
            clients, server, units = more
        found[like] = Rate(max(0.0, clients) / units * many, max(0.0, server) / units * many, SOURCES[1])
    return found


def _pass(config: ExperimentConfig, facts: DataFacts, steps: int) -> EarlierRun:
    small = _small(config, steps)
    images = _made_up(small, facts)
    with tempfile.TemporaryDirectory(prefix="mosaic-") as folder:
        content = execute(
            small, images, Store(folder), "runs/calibration", Placement(), log_file=True, progress=False
        )  # fmt: skip
    stages: Mapping[str, StageRecord] = Summary.from_json(content).stages or {}
    return EarlierRun("", small, stages)


def _small(config: ExperimentConfig, steps: int) -> ExperimentConfig:
    """Return ``config`` with few clients and ``steps`` steps of everything, in this process."""
    knobs = {
        "partition.sampler": "iid", "partition.min_size": 1, "partition.validation_fraction": 0.0,
        "federation.cohort_size": 0, "federation.min_cohort": 0, "federation.drop_rate": 0.0,
        "warmup.num_rounds": 1, "warmup.local_steps": steps, "finetune.num_rounds": 1, "finetune.local_steps": steps,
        "generator.steps": steps, "generator.epochs": 0, "meta.updates": steps,
        "distill.workers": 0, "runtime.host": "serial", "runtime.eval_rounds": 0,
        "rehearsal.trial_rounds": 1, "rehearsal.classes": "all",  # these clients lack no class
    }  # fmt: skip
    knobs |= {"distill.steps": steps} if config.distill.steps else {}
    knobs |= {"generator.classifier_epochs": 0} if config.generator.classifier_source == "fresh" else {}
    everyone = config.partition.num_clients
    for clients in range(min(2, everyone), everyone):
        try:  # networks and widths may need some number of clients
            return check(override(config, knobs | {"partition.num_clients": clients}))
        except RequestError:
            continue
    return check(override(config, knobs))


def _made_up(config: ExperimentConfig, facts: DataFacts) -> Dataset:
    """Return noise in the data set's shape: for each client a batch of every kind, and two images of each class."""
    batch = max(config.warmup.batch_size, config.generator.batch_size, 2 * facts.num_classes)
    draws = np.random.default_rng(0)

    def images(count: int) -> ImageSet:
        shape = (count, facts.channels, facts.image_size, facts.image_size)
        return ImageSet(draws.integers(0, 256, shape, np.uint8), np.arange(count, dtype=np.int64) % facts.num_classes)

    names = tuple(str(label) for label in range(facts.num_classes))
    return Dataset(facts, images(batch * config.partition.num_clients), images(facts.num_classes), names, "noise")
