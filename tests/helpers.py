"""A tiny experiment that tests share: 8x8 images of 3 classes that a small network learns in moments."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from mosaic_ray.config.resolve import override
from mosaic_ray.config.schema import ExperimentConfig
from mosaic_ray.core.types import DataFacts, Dataset, ImageSet, Prototypes, Weights
from mosaic_ray.distillation.client_tasks import GeneratorInput, GeneratorTask, PrototypesTask
from mosaic_ray.distillation.teacher import TeacherState
from mosaic_ray.distillation.teacher_training import class_experts, fit_teacher
from mosaic_ray.federated.client import ClientContext, TrainTask
from mosaic_ray.federated.local_training import Shard

FACTS = DataFacts("stripes", 3, 1, 8, (0.4,), (0.35,))

TINY = override(
    ExperimentConfig(),
    {
        "partition.num_clients": 3,
        "partition.omega": 0.3,
        "model.width": 4,
        "warmup.num_rounds": 3,
        "warmup.local_steps": 3,
        "warmup.batch_size": 16,
        "warmup.lr": 0.05,
        "generator.ngf": 4,
        "generator.ndf": 4,
        "generator.latent_dim": 8,
        "generator.steps": 6,
        "generator.batch_size": 16,
        "generator.tau": 100,
        "prototypes.k": 4,
        "meta.token_dim": 6,
        "meta.feedforward": 16,
        "meta.updates": 10,
        "meta.batch_size": 16,
        "distill.steps": 10,
        "distill.check_steps": 5,
        "finetune.num_rounds": 2,
        "finetune.local_steps": 3,
        "runtime.host": "serial",
        "runtime.precision": "fp32",
        "runtime.eval_rounds": 1,
        "runtime.driver_threads": 1,
    },
)


def stripes(count: int, seed: int = 0) -> ImageSet:
    """Return noisy images with a bright stripe; its place is the class."""
    draws = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    images = draws.integers(0, 120, (count, 1, 8, 8)).astype(np.uint8)
    for row, label in enumerate(labels):
        images[row, 0, 1 + 2 * label : 3 + 2 * label] += np.uint8(120)
    return ImageSet(images, labels.astype(np.int64))


def stripes_dataset() -> Dataset:
    """240 training and 60 test images."""
    return Dataset(FACTS, stripes(240), stripes(60, 1), ("top", "middle", "bottom"), "stripes")


@contextlib.contextmanager
def small_ray(num_cpus: int) -> Iterator[Any]:
    """Start a Ray for one test module, with ``num_cpus`` CPUs."""
    import ray

    from mosaic_ray.execution.ray_session import RAY_ENVIRONMENT

    os.environ.update({name: os.environ.get(name, value) for name, value in RAY_ENVIRONMENT.items()})
    ray.init(
        address="local", num_cpus=num_cpus, include_dashboard=False, log_to_driver=False, logging_level="ERROR",
        _temp_dir=f"/tmp/mr{os.getpid()}",
    )  # fmt: skip
    try:
        yield ray
    finally:
        ray.shutdown()


def shard_of(images: ImageSet) -> Shard:
    """A client's shard on the CPU."""
    return Shard(torch.tensor(images.images), torch.tensor(images.labels))


def assert_same(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> None:
    """Check that all arrays are equal bit for bit."""
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype, name
        assert np.array_equal(left[name], right[name], equal_nan=True), name


class Linear(torch.nn.Module):
    """A network without batch norm, for which averaging and SGD commute."""

    def __init__(self) -> None:
        super().__init__()
        self.head = torch.nn.Linear(64, 3)

    def forward(self, images):
        return self.head(images.flatten(1))


@contextlib.contextmanager
def interrupted(in_round: int, phase: str = "") -> Iterator[None]:
    """Interrupt the block as by Ctrl-C, at the first client's training in this round (of this phase, if given)."""
    train = TrainTask.run

    def broken(task, *inputs):
        if task.round_num == in_round and phase in ("", task.phase):
            raise KeyboardInterrupt
        return train(task, *inputs)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(TrainTask, "run", broken)
        yield


#: Client tasks by name.
TASKS = {"train": TrainTask, "generate": GeneratorTask, "prototypes": PrototypesTask}


def generate(context: ClientContext, shard: Shard, client_id: int, start: Weights, weights: Weights) -> Any:
    """A client's generator beside its model ``weights``; the discriminator begins with the global model ``start``."""
    return GeneratorTask().run(context, shard, client_id, {"cnn": start}, GeneratorInput(weights))


def make_teacher(
    config: ExperimentConfig, facts: DataFacts, start: Weights, clients: Any, counts: Any, found: Prototypes,
    progress: Any, sources: Any = (), device: str | torch.device = "cpu", channels: Any = None,
) -> tuple[TeacherState, dict[str, float]]:  # fmt: skip
    """Class experts and their meta model."""
    experts, index = class_experts(config, start, clients, counts, channels)
    context = ClientContext(config, facts, torch.device(device))
    return fit_teacher(context, start, experts, index, found, progress, sources)


def prototypes(context: ClientContext, shard: Shard, client_id: int, weights: Weights) -> Prototypes:
    """A client's prototypes under the global model ``weights``."""
    return PrototypesTask(0).run(context, shard, client_id, {"cnn": weights}, None)
