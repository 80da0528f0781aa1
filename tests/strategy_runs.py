"""Runs of federated strategies on the tiny experiment, and the laws that each strategy keeps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from helpers import FACTS, TINY, assert_same, interrupted, stripes
from safetensors.numpy import load_file

from mosaic_ray.config.plugins import strategy_named
from mosaic_ray.config.resolve import override
from mosaic_ray.core.types import ImageSet, Weights
from mosaic_ray.data.transforms import normalise
from mosaic_ray.federated.client import ClientContext
from mosaic_ray.federated.local_training import LocalStart, LocalTrainingConfig, Shard
from mosaic_ray.runs import runner
from mosaic_ray.storage.store import StageResult, Store

QUICK = {"method": "fedavg", "warmup.checkpoint_rounds": 1, "runtime.eval_rounds": 0}

#: Networks without batch norm, and with dropout.
NETWORKS = """
from torch import nn

def plain(num_classes, channels, image_size, width):
    return nn.Sequential(nn.Conv2d(channels, width, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36 * width, num_classes))

def dropping(num_classes, channels, image_size, width):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, num_classes))
"""


def go(folder: Path, strategy: str, knobs: Mapping[str, Any] = {}) -> dict[str, Any]:
    """The summary of a run with ``strategy``."""
    config = override(TINY, QUICK | {"federation.strategy": strategy} | dict(knobs))
    return runner.run(config, storage=str(folder), progress=False)


def student(summary: Mapping[str, Any]) -> Weights:
    return load_file(Path(summary["paths"]["run"]) / "student.safetensors")


def warmed_up(summary: Mapping[str, Any]) -> StageResult:
    """The stored result of the warm-up."""
    storage = Path(summary["paths"]["run"]).parents[1]
    return Store(str(storage)).get(summary["stages"]["warmup"]["key"])


def parts(summary: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """All arrays of the warm-up's result, clients' states among them."""
    result = warmed_up(summary)
    return {f"{part}/{name}": value for part in result.parts for name, value in result.load(part).items()}


def is_fedavg(folder: Path, strategy: str, knobs: Mapping[str, Any] = {}) -> dict[str, Any]:
    """Check that a run ends with FedAvg's student bit for bit, with as many bytes; returns its summary."""
    shared = {name: value for name, value in knobs.items() if name.partition(".")[0] not in strategy.split("+")}
    plain, found = go(folder, "fedavg", shared), go(folder, strategy, knobs)
    assert not found["stages"]["warmup"]["cached"]
    assert_same(student(found), student(plain))
    assert_same(warmed_up(found).load("global"), warmed_up(plain).load("global"))
    return found


def differs(folder: Path, strategy: str, knobs: Mapping[str, Any] = {}) -> None:
    """Check that the strategy is not FedAvg."""
    left, right = (warmed_up(go(folder, word, knobs)).load("global") for word in (strategy, "fedavg"))
    assert any(not np.array_equal(left[name], right[name]) for name in left)


def same_results(left: Mapping[str, Any], right: Mapping[str, Any]) -> None:
    assert_same(student(left), student(right))
    assert_same(parts(left), parts(right))
    assert left.get("personal_accuracy") == right.get("personal_accuracy")
    assert left["client_accuracy"] == right["client_accuracy"]
    assert left["communication"]["measured_over_predicted"] == right["communication"]["measured_over_predicted"] == 1


def resumes(folder: Path, strategy: str, knobs: Mapping[str, Any] = {}) -> dict[str, Any]:
    """Check that a run that is interrupted in its last round resumes with the same bits; returns its summary."""
    knobs = dict(knobs) | {"warmup.num_rounds": 4}
    undisturbed = go(folder / "whole", strategy, knobs)
    with interrupted(in_round=3):
        go(folder / "killed", strategy, knobs)
    resumed = go(folder / "killed", strategy, knobs)
    assert not resumed["stages"]["warmup"]["cached"]
    same_results(resumed, undisturbed)
    return resumed


def same_on_ray(folder: Path, strategy: str, knobs: Mapping[str, Any] = {}) -> None:
    """Check that Ray and the serial host give the same bits; needs the fixture ``ray_up``."""
    serial = go(folder / "serial", strategy, knobs)
    there = go(folder / "ray", strategy, dict(knobs) | {"runtime.host": "ray", "runtime.max_hosts": 2})
    same_results(there, serial)


def start_of(
    context: ClientContext, images: ImageSet, model: Any, plan: LocalTrainingConfig, state: Weights | None = None
) -> tuple[LocalStart, Shard]:
    """The start of a client's local training on ``images``, and its shard."""
    shard = context.shard(images.images, images.labels)
    return LocalStart(context.config, FACTS, 0, 0, plan, model, shard.labels, {}, state or {}), shard


def inputs(images: ImageSet) -> np.ndarray:
    """The images as a network without hidden layers sees them, float64 [n, 64]."""
    import torch

    return normalise(torch.tensor(images.images), FACTS.mean, FACTS.std).flatten(1).double().numpy()


def some(*counts: int) -> ImageSet:
    """Stripes with ``counts`` images of each class."""
    every = stripes(3 * max(counts))
    return every.take(np.concatenate([np.flatnonzero(every.labels == c)[:n] for c, n in enumerate(counts)]))


def named(strategy: str, knobs: Mapping[str, Any] = {}) -> Any:
    """The strategy, and the tiny experiment's configuration with it."""
    return strategy_named(strategy), override(TINY, {"federation.strategy": strategy} | dict(knobs))
