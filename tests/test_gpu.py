"""Every kind of work on a GPU: the same as on the CPU as far as numbers allow, and the same bits every time.

Each test also runs with the CPU as its device, so that its lines run on every machine; there the figures are equal.
``make gpu-check`` runs those marked ``gpu``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import os
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from helpers import FACTS, TINY, assert_same, make_teacher, stripes, stripes_dataset

from mosaic_ray.config.plugins import strategy_named
from mosaic_ray.config.resolve import override
from mosaic_ray.core.seeding import stream
from mosaic_ray.core.types import Prototypes, Weights
from mosaic_ray.distillation.client_tasks import GeneratorInput, GeneratorTask, PrototypesTask
from mosaic_ray.distillation.generator_training import build_generator, draw, real_batches
from mosaic_ray.distillation.student_training import DistContext, DistillTask, distil, make_task
from mosaic_ray.execution.actor_pool import ActorPool
from mosaic_ray.execution.backend import RayBackend, run_task, start_hosts
from mosaic_ray.execution.determinism import choose_kernels
from mosaic_ray.federated.client import ClientContext, ClientRound, Round, StatisticsTask, TrainTask, initial_models
from mosaic_ray.federated.evaluation import logits_on
from mosaic_ray.federated.local_training import LocalTrainingConfig
from mosaic_ray.federated.static_batch_norm import pooled
from mosaic_ray.runs import runner

PLAN = LocalTrainingConfig(4, 8, 0.05, momentum=0.9)
IMAGES = stripes(60)

on_each_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


@pytest.fixture(autouse=True)
def full_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions in fp32 proper, so that devices can be compared."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def knobs_for(device: str, **knobs: Any) -> Any:
    own = {} if device == "cpu" else {"runtime.device": "cuda", "runtime.gpus_per_client": 1.0}
    return override(TINY, own | {name.replace("__", "."): value for name, value in knobs.items()})


def context_on(device: str, **knobs: Any) -> ClientContext:
    config = knobs_for(device, **knobs)
    choose_kernels(config)
    return ClientContext(config, FACTS, torch.device(device))


def shard_on(context: ClientContext) -> Any:
    return context.shard(IMAGES.images, IMAGES.labels)


def far_apart(left: Weights, right: Weights) -> float:
    """The distance of two sets of arrays, in units of the first one's size."""
    assert left.keys() == right.keys()
    pairs = [(left[name].astype(float), right[name].astype(float)) for name in left]
    size = np.sqrt(sum((a**2).sum() for a, _ in pairs))
    return float(np.sqrt(sum(((a - b) ** 2).sum() for a, b in pairs)) / size)


def difference(left: Weights, right: Weights) -> Weights:
    return {name: right[name].astype(float) - left[name] for name in left}


# --- clients ---------------------------------------------------------------------------------------------------------


def trained(
    device: str, classifier: str = "cnn", plan: LocalTrainingConfig = PLAN, **knobs: Any
) -> tuple[Weights, Any]:
    """The weights that client 1, of half width where the strategy can, began with; and its update."""
    context = context_on(device, model__classifier=classifier, **knobs)
    models = initial_models(context)
    indices = context.federation.indices(1, "warmup", 0)
    start = Round(models, strategy_named(context.config.federation.strategy).initial_state(models))
    update = TrainTask("warmup", 0, plan).run(context, shard_on(context), 1, start, ClientRound(indices))
    return context.federation.submodel(1, models, indices), update


NARROW = {"federation__widths": [1.0, 0.5, 1.0]}


@on_each_device
@pytest.mark.parametrize(
    "strategy, knobs",
    [
        ("fedavg", {}), ("fedprox", {}), ("scaffold", {}), ("fedrolex", NARROW), ("heterofl", NARROW),
        ("feddropout", NARROW), ("heterofl", NARROW | {"federation__masked": True}), ("fedbn", {}), ("fedrs", {}),
        ("fedlc", {}), ("moon", {}), ("ditto", {}), ("local", {}),
    ],
)  # fmt: skip
def test_a_client_trains_with_every_kind_of_strategy(device, strategy, knobs):
    start, here = trained("cpu", federation__strategy=strategy, **knobs)
    _, there = trained(device, federation__strategy=strategy, **knobs)
    moved = difference(start, here.weights)
    assert far_apart(moved, difference(start, there.weights)) < 0.02
    assert there.metrics["loss"] == pytest.approx(here.metrics["loss"], rel=1e-3)
    for left, right in ((here.message, there.message), (here.state, there.state)):
        assert left.keys() == right.keys()
        assert not left or far_apart(left, right) < 0.02


@on_each_device
@pytest.mark.parametrize("classifier", ["resnet18", "mobilenet"])
def test_a_client_trains_other_networks(device, classifier):
    start, here = trained("cpu", classifier)
    _, there = trained(device, classifier)
    assert far_apart(difference(start, here.weights), difference(start, there.weights)) < 0.05


@pytest.mark.gpu
@pytest.mark.parametrize("classifier", ["cnn", "resnet18", "mobilenet"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_recorded_steps_give_the_same_bits(classifier, precision):
    plan = dataclasses.replace(PLAN, steps=12)
    taken, recorded = (
        trained("cuda", classifier, plan, runtime__precision=precision, runtime__cuda_graphs=graphs)[1]
        for graphs in (False, True)
    )
    assert_same(taken.weights, recorded.weights)
    assert taken.metrics == recorded.metrics


@on_each_device
def test_bf16_is_near_fp32(device):
    start, here = trained(device)
    _, there = trained(device, runtime__precision="bf16")
    assert 0 < far_apart(difference(start, here.weights), difference(start, there.weights)) < 0.3
    assert there.metrics["loss"] == pytest.approx(here.metrics["loss"], rel=0.05)


def generated(device: str, **knobs: Any) -> Any:
    context = context_on(device, **knobs)
    models = initial_models(context)
    return GeneratorTask().run(context, shard_on(context), 1, models, GeneratorInput(models["cnn"]))


@on_each_device
@pytest.mark.parametrize(
    "knobs",
    [
        {"generator__lambda_i": 0.0},
        {"generator__tau": 1000},  # with the inversion loss
        {"generator__conditional": True},
        {"generator__discriminator": "shared_trunk"},
        {"generator__family": "cvae", "generator__lr": 2e-4},
        {"generator__family": "condensed", "generator__lr": 1e-3, "generator__least_images": 1},
        {"generator__classifier_source": "fresh", "generator__classifier_epochs": 1, "generator__gan_augment": True},
    ],
    ids=["plain", "inversion", "conditional", "shared trunk", "cvae", "condensed", "fresh classifier"],
)
def test_a_client_trains_every_kind_of_generator(device, knobs):
    here, there = generated("cpu", **knobs), generated(device, **knobs)
    step, *losses = here.curve[0]
    assert there.curve[0] == pytest.approx([step, *losses], rel=1e-3, abs=1e-4)
    assert far_apart(here.weights, there.weights) < 0.05
    assert there.samples.shape == here.samples.shape


@on_each_device
@pytest.mark.parametrize("knobs", [{}, {"prototypes__samples": 40, "prototypes__augment": True}])
def test_prototypes_have_the_same_class_means(device, knobs):
    def means(device: str) -> np.ndarray:
        context = context_on(device, **knobs)
        found = PrototypesTask(0).run(context, shard_on(context), 1, initial_models(context), None)
        rows = [found.labels == c for c in range(3)]
        return np.stack([np.average(found.vectors[r], axis=0, weights=found.sizes[r]) for r in rows])

    here = means("cpu")
    np.testing.assert_allclose(means(device), here, rtol=1e-4, atol=1e-5 * np.abs(here).max())


@on_each_device
def test_batch_norm_statistics_of_all_images_are_the_same(device):
    def statistics(device: str) -> Weights:
        context = context_on(device)
        models = initial_models(context)
        layers = {"cnn": [name for part in context.federation.statistics_passes("cnn") for name in part]}
        return pooled([StatisticsTask(layers).run(context, shard_on(context), 1, models, None)])

    assert far_apart(statistics("cpu"), statistics(device)) < 1e-4


# --- the server ------------------------------------------------------------------------------------------------------


def taught(device: str, **knobs: Any) -> tuple[Any, DistillTask]:
    """A teacher of three clients, and the distillation that it begins; generators and prototypes come from the CPU."""
    context = context_on(device, **knobs)
    weights, makers, found = uploads()
    counts = np.full((3, 3), 20)
    teacher, _ = make_teacher(
        context.config, FACTS, weights, [(k, weights) for k in range(3)], counts, found, lambda update, metrics: None,
        [(k, weights, maker.weights) for k, maker in enumerate(makers)], context.device,
    )  # fmt: skip
    generators = tuple(maker.weights for maker in makers)
    figures = [maker.figures for maker in makers]
    return teacher, make_task(context.config, FACTS, weights, teacher, generators, figures, counts.sum(1), found)


@cache
def uploads() -> tuple[Weights, list[Any], Prototypes]:
    context = context_on("cpu")
    models = initial_models(context)
    shard, weights = shard_on(context), models["cnn"]
    makers = [GeneratorTask().run(context, shard, k, models, GeneratorInput(weights)) for k in range(3)]
    return weights, makers, Prototypes.concatenate(
        [PrototypesTask(0).run(context, shard, k, models, None) for k in range(3)]
    )


@on_each_device
@pytest.mark.parametrize("data", ["prototypes", "synthetic", "synthetic_vote"])
def test_the_teacher_is_the_same(device, data):
    knobs = {"meta__data": data, "meta__dropout": 0.0}  # dropout draws differ between devices
    (here, _), (there, _) = taught("cpu", **knobs), taught(device, **knobs)
    assert_same({"index": here.index} | here.experts[0], {"index": there.index} | there.experts[0])
    assert far_apart(here.meta, there.meta) < 0.05


@on_each_device
@pytest.mark.parametrize(
    "knobs",
    [
        {},
        {"distill__backbone_lr": 1e-3, "distill__student_bn": "train"},
        {"meta__input": "full", "meta__init": "random"},
    ],
    ids=["head", "whole student", "full experts"],
)
def test_a_distillation_ends_near_the_same_student(device, knobs):
    _, task = taught("cpu", **knobs)
    losses: dict[str, list[float]] = {"cpu": [], device: []}

    def student(device: str) -> Weights:
        losses[device] = []
        work = dataclasses.replace(task, config=knobs_for(device, distill__check_steps=1, **knobs))
        return distil(work, torch.device(device), DistContext(), lambda _, m: losses[device].append(m["loss"]))[0]

    here, there = student("cpu"), student(device)
    assert losses[device][0] == pytest.approx(losses["cpu"][0], rel=1e-3)
    assert far_apart(difference(task.student, here), difference(task.student, there)) < 0.05


@on_each_device
def test_the_same_logits(device):
    def logits(device: str) -> np.ndarray:
        context = context_on(device)
        return logits_on(context.classifier(initial_models(context)["cnn"]).eval(), IMAGES, FACTS, context.device)

    np.testing.assert_allclose(logits(device), logits("cpu"), atol=1e-4)


# --- random streams --------------------------------------------------------------------------------------------------


@on_each_device
def test_devices_start_from_the_same_weights_batches_and_latents(device):
    def drawn(device: str) -> list[torch.Tensor]:
        context = context_on(device, generator__conditional=True)
        shard, knobs = shard_on(context), context.config.generator
        weights = [torch.tensor(array) for array in initial_models(context)["cnn"].values()]
        real = [part for batch in real_batches(shard, knobs, FACTS, (0, 1), 9) for part in batch]
        maker = build_generator(knobs, FACTS.channels, FACTS.image_size, FACTS.num_classes).to(context.device)
        return [*weights, *real, *draw(maker, 33, stream(0, "test"), context.device)]

    for here, there in zip(drawn("cpu"), drawn(device), strict=True):
        assert torch.equal(here, there.cpu())


@pytest.mark.gpu
def test_the_first_draws_of_a_process_are_those_of_later_ones():
    """CUDA starts within the first block that seeds; its streams must not be those of the process."""
    first = initial_models(context_on("cuda"))["cnn"]
    torch.rand(5, device="cuda")
    assert_same(first, initial_models(context_on("cuda"))["cnn"])


# --- the same bits ---------------------------------------------------------------------------------------------------


@on_each_device
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("classifier", ["cnn", "resnet18"])
def test_training_twice_gives_the_same_bits(device, classifier, precision):
    (_, first), (_, second) = (trained(device, classifier, runtime__precision=precision) for _ in range(2))
    assert_same(first.weights, second.weights)


@on_each_device
@pytest.mark.parametrize("conditional", [False, True])
def test_a_generator_twice_gives_the_same_bits(device, conditional):
    first, second = (generated(device, generator__tau=1000, generator__conditional=conditional) for _ in range(2))
    assert_same(first.weights, second.weights)


@on_each_device
def test_a_teacher_and_a_student_twice_give_the_same_bits(device):
    (first, task), (second, _) = (taught(device, meta__data="synthetic") for _ in range(2))
    assert_same(first.meta, second.meta)
    students = [distil(task, torch.device(device), DistContext(), lambda *_: None)[0] for _ in range(2)]
    assert_same(*students)


@pytest.mark.gpu
def test_no_operation_lacks_a_deterministic_kernel():
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for strategy in ("scaffold", "fedprox", "ditto"):
            trained("cuda", federation__strategy=strategy)
        generated("cuda", generator__tau=1000)
        _, task = taught("cuda")
        distil(task, torch.device("cuda"), DistContext(), lambda *_: None)
    assert [str(w.message) for w in said if "deterministic" in str(w.message)] == []


@on_each_device
def test_a_whole_run_twice_gives_the_same_bits(device, tmp_path, monkeypatch):
    monkeypatch.setattr("mosaic_ray.data.load.load_dataset", lambda config: stripes_dataset())
    config = knobs_for(device)
    runs = [runner.run(config, storage=str(tmp_path / str(n)), progress=False) for n in range(2)]
    assert runs[0]["accuracy"] == runs[1]["accuracy"]
    assert all(0 <= runs[0]["accuracy"][role] <= 1 for role in ("initial", "distilled", "final"))
    first, second = ((tmp_path / str(n)).rglob("student.safetensors") for n in range(2))
    assert next(first).read_bytes() == next(second).read_bytes()


# --- on Ray ----------------------------------------------------------------------------------------------------------


ray_warns = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning")


@contextlib.contextmanager
def ray_with_a_gpu(cpus: int, pretended: bool) -> Iterator[None]:
    """A Ray with this machine's first GPU; ``pretended``: with one that is not there, whose clients use the CPU."""
    import ray

    from mosaic_ray.execution.ray_session import RAY_ENVIRONMENT

    def clients_on_the_cpu() -> None:
        from mosaic_ray.execution import backend

        backend.take_device = lambda share: "cpu"

    os.environ.update({name: os.environ.get(name, value) for name, value in RAY_ENVIRONMENT.items()})
    ray.init(
        address="local", num_cpus=cpus, num_gpus=1, include_dashboard=False, log_to_driver=False,
        logging_level="ERROR", _temp_dir=f"/tmp/mr{os.getpid()}",
        runtime_env={"worker_process_setup_hook": clients_on_the_cpu} if pretended else {},
    )  # fmt: skip
    try:
        yield
    finally:
        ray.shutdown()
        gc.collect()  # here, where Ray's unfinished processes are no error


@pytest.mark.ray
@ray_warns
@pytest.mark.parametrize(
    "device, a_gpu",
    [
        *(pytest.param("cpu", share, marks=pytest.mark.slow) for share in (1, 4)),
        *(pytest.param("cuda", share, marks=pytest.mark.gpu) for share in (1, 4, 10)),
    ],
)  # fmt: skip
def test_actors_that_share_a_gpu_give_the_bits_of_one_process(device, a_gpu):
    config = knobs_for("cuda", partition__num_clients=10, runtime__gpus_per_client=1 / a_gpu)
    models = initial_models(ClientContext(config, FACTS, torch.device("cpu")))
    task = TrainTask("warmup", 0, PLAN)
    arrays = IMAGES.images, IMAGES.labels
    alone = {k: run_task(config, FACTS, device, task, k, arrays, Round(models), ClientRound()) for k in range(10)}
    with ray_with_a_gpu(a_gpu, pretended=device == "cpu"):
        needs = {"CPU": 1.0, "GPU": 1 / a_gpu}
        backend = RayBackend(config, FACTS, lambda k: IMAGES, lambda: ActorPool(start_hosts(needs, {"": a_gpu})))
        found = dict(backend.map(task, range(10), Round(models), lambda k: ClientRound()))
    assert list(found) == list(range(10))
    for client_id, update in found.items():
        assert_same(update.weights, alone[client_id].weights)


@pytest.mark.ray
@ray_warns
@pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=pytest.mark.gpu)]
)
def test_one_train_worker_gives_the_student_of_this_process(device, tmp_path):
    """On a GPU the worker joins an NCCL group of one."""
    from mosaic_ray.execution.ray_train import distil_here, distil_on_ray

    _, task = taught(device)
    task = dataclasses.replace(task, config=knobs_for(device, distill__workers=1, runtime__host="ray"))
    steps: list[int] = []
    report: Callable[[int, Any], None] = lambda step, metrics: steps.append(step)  # noqa: E731
    with ray_with_a_gpu(4, pretended=device == "cpu"):
        there = distil_on_ray(task, report, str(tmp_path))
    assert steps == [5, 10]
    assert_same(there[0], distil_here(context_on(device), task, report=report)[0])
