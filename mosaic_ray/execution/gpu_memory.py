"""Find out how much of a GPU's memory one client takes: measured on a GPU, or estimated from shapes.

Neither is part of a key or of a number: both decide only how many clients share a GPU.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..config.client_layout import client_classifiers
from ..config.plugins import strategy_named
from ..config.resolve import override
from ..config.schema import ExperimentConfig
from ..core.errors import RunError
from ..core.seeding import seeded
from ..core.types import DataFacts
from .actor_pool import PATIENCE_FOR_MACHINES, first_line

#: Bytes of a process's CUDA context with cuDNN's and cuBLAS's kernels.
CONTEXT_BYTES = 600 * 2**20

#: Seconds to wait for a GPU of a machine that is up; a whole one may be in use.
PATIENCE_SECONDS = 60.0

#: Clients measured per sweep: those whose estimate is the largest.
MOST_MEASURED = 4

#: Steps of each kind of work while it is measured: enough to record and replay one (``runtime.cuda_graphs``).
STEPS = 5

#: A network of at most so many parameters is built to count its outputs, for an input of at most so many numbers.
MOST_BUILT, MOST_SEEN = 2**25, 2**14

#: Images of which features are computed at once.
CHUNK = 500

#: A client's images, relative to an equal share of the training set: labels are skewed, so some hold more.
LARGEST_SHARD = 4


@dataclass(frozen=True)
class ClientWork:
    """The largest work of one client: its experiment, facts of its data, and its number of images."""

    config: ExperimentConfig
    facts: DataFacts
    samples: int


@dataclass(frozen=True)
class GpuFacts:
    """What a process on a GPU found. ``peak``: bytes that one client takes, 0 if that failed for ``reason``.

    ``usable``: bytes of the GPU that no process of others holds. ``bf16``: whether the GPU computes in it natively.
    """

    peak: int
    usable: int
    bf16: bool
    reason: str = ""


def work_of(config: ExperimentConfig, facts: DataFacts, num_samples: int) -> ClientWork:
    """Return the largest client's work on a training set of ``num_samples`` images."""
    equal = -(-num_samples // config.partition.num_clients)
    return ClientWork(config, facts, max(1, min(num_samples, LARGEST_SHARD * equal)))


def is_out_of_memory(error: BaseException | None) -> bool:
    """Return whether a GPU's memory did not suffice, as torch or a library below it reports it."""
    import torch

    while error is not None:
        if isinstance(error, torch.OutOfMemoryError):
            return True
        if isinstance(error, RuntimeError) and "CUDA" in str(error) and "out of memory" in str(error):
            return True
        if isinstance(error, RuntimeError) and "_STATUS_ALLOC_FAILED" in str(error):
            return True
        error = error.__cause__
    return False


# --- measured --------------------------------------------------------------------------------------------------------


def measure(works: Sequence[ClientWork], kinds: Sequence[str], wait_for_machines: bool) -> list[GpuFacts | None]:
    """Measure ``works`` on one whole GPU of each kind in the cluster that this process has joined.

    ``kinds``: Ray's ``accelerator_type:...`` resources, empty if unknown. Returns what answered in time; None for a GPU
    that torch cannot use there.
    """
    import ray

    task = ray.remote(num_cpus=0, num_gpus=1, max_retries=0, max_calls=1)(measure_here)
    pins: list[dict[str, float]] = [{kind: 1e-3} for kind in kinds] or [{}]
    calls = [task.options(resources=pin).remote(works) for pin in pins]
    patience = PATIENCE_FOR_MACHINES if wait_for_machines else PATIENCE_SECONDS
    done, late = ray.wait(calls, num_returns=len(calls), timeout=patience)
    for call in late:
        ray.cancel(call, force=True)
    found: list[GpuFacts | None] = []
    for call in done:
        try:
            found.append(ray.get(call))
        except Exception as error:
            found.append(GpuFacts(0, 0, False, first_line(error)))
    return found


def measure_here(works: Sequence[ClientWork]) -> GpuFacts | None:
    """Run ``works`` for a few steps on this process's GPU; return what was found, None where torch can use no GPU."""
    import torch

    if not torch.cuda.is_available():
        return None
    torch.set_num_threads(1)
    cuda = torch.cuda
    torch.zeros(1, device="cuda")
    free, total = cuda.mem_get_info()
    bare = total - free  # this process's context, and what other processes hold
    usable, bf16 = total - max(0, bare - CONTEXT_BYTES), cuda.get_device_capability() >= (8, 0)
    peak = 0
    try:
        for work in works:
            if work.config.runtime.precision == "auto":
                precision = {"runtime.precision": "bf16" if bf16 else "fp32"}
                work = replace(work, config=override(work.config, precision))
            for step in steps_of(work, torch.device("cuda")):
                cuda.empty_cache()
                cuda.reset_peak_memory_stats()
                with contextlib.suppress(RunError):  # random images may make training diverge
                    run_twice(step)
                peak = max(peak, cuda.max_memory_reserved())
    except Exception as error:
        if is_out_of_memory(error):
            return GpuFacts(usable, usable, bf16, "one client fills the GPU")
        return GpuFacts(0, usable, bf16, first_line(error))
    free, _ = cuda.mem_get_info()
    grown = max(0, total - free - bare - cuda.memory_reserved())  # kernels that were loaded meanwhile
    return GpuFacts(peak + min(bare, CONTEXT_BYTES) + grown, usable, bf16)


def run_twice(step: Any) -> None:
    """Run a function of ``steps_of``; where the client then keeps a state, run it with that too, as in later rounds."""
    from ..federated.client import ClientRound

    state = getattr(step(), "state", None)
    if state:
        *inputs, own = step.args
        step.func(*inputs, ClientRound(own.indices, state))


def steps_of(work: ClientWork, device: Any) -> Iterator[Any]:
    """Yield functions that do each kind of a client's work for a few steps on random images.

    One client of each network, the widest, trains its classifier; where the method has generators it trains those (with
    the inversion loss too) and makes prototypes.
    """
    import torch

    from ..distillation.client_tasks import GeneratorInput, GeneratorTask, PrototypesTask
    from ..federated.client import ClientContext, ClientRound, Round, TrainTask, initial_models
    from ..federated.local_training import LocalTrainingConfig, Shard

    short = {"generator.steps": STEPS, "generator.epochs": 0, "generator.classifier_epochs": 0}
    config, facts = override(work.config, short), work.facts
    context = ClientContext(config, facts, device)
    federation, warmup = context.federation, config.warmup
    size = (work.samples, *facts.stored_shape)
    images = torch.randint(256, size, dtype=torch.uint8, device=device)
    if facts.modalities:  # random bytes are no tokens
        images.zero_()[..., -len(facts.modalities) :] = 1
    labels = torch.arange(work.samples, device=device) % facts.num_classes
    shard = Shard(images, labels)
    small = Shard(images[: max(1, config.generator.tau - 1)], labels[: max(1, config.generator.tau - 1)])
    models = initial_models(context)
    plan = LocalTrainingConfig(STEPS, warmup.batch_size, warmup.lr, warmup.weight_decay, warmup.momentum)
    start = Round(models, strategy_named(config.federation.strategy).initial_state(models))
    stages = _stages(config)
    for clients in federation.groups.values():
        client_id = max(clients, key=federation.widths.__getitem__)
        indices = federation.indices(client_id, "probe", 0)
        task, together = TrainTask("probe", 0, plan), min(clients_together(config), len(clients))
        if together > 1 and task.alike(context, client_id) is not None:
            several, owns = [client_id] * together, [ClientRound(indices)] * together
            yield functools.partial(task.run_batch, context, [shard] * together, several, start, owns)
        yield functools.partial(task.run, context, shard, client_id, start, ClientRound(indices))
        own = GeneratorInput(federation.submodel(client_id, models, indices), indices)
        if "generators" in stages:
            yield functools.partial(GeneratorTask().run, context, shard, client_id, models, own)
            if config.generator.lambda_i > 0 and len(small) < config.generator.tau:
                yield functools.partial(GeneratorTask().run, context, small, client_id, models, own)
        if "prototypes" in stages:
            chunk = Shard(images[:CHUNK], labels[:CHUNK])
            yield functools.partial(PrototypesTask(0).run, context, chunk, client_id, models, None)


def _stages(config: ExperimentConfig) -> set[str]:
    from ..config.plugins import load

    return {stage.name for stage in load("methods", config.method).graph(config)}


# --- estimated -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Shapes:
    """Bytes in float32: of a network's parameters, and of its layers' outputs for a batch."""

    parameters: int
    outputs: int


def estimated_bytes(work: ClientWork) -> int:
    """Estimate the bytes that one client takes at its peak, context included, from the networks' shapes."""
    config, images = work.config, work.samples * math.prod(work.facts.input_shape)
    nets = [_classifier(config, work.facts, name, config.warmup.batch_size) for name in _names(config)]
    recorded = 2 if config.runtime.cuda_graphs else 1  # a recording keeps memory of its own
    peak = max(4 * net.parameters + 2 * recorded * net.outputs for net in nets)
    if (together := min(clients_together(config), config.partition.num_clients)) > 1:
        peak, images = together * (peak + images), together * images  # each batch's images are copied side by side
    if "generators" in _stages(config):
        pair, batch = _generator_pair(config, work.facts), config.generator.batch_size
        beside = max((_classifier(config, work.facts, name, batch) for name in _names(config)), key=_size)
        peak = max(peak, 4 * pair.parameters + 2 * (2 * pair.outputs + beside.outputs) + beside.parameters)
    return int(peak + images + CONTEXT_BYTES)


def least_bytes(work: ClientWork) -> int:
    """Return bytes that a client's training surely takes: weights and gradients, and half of a batch's activations."""
    nets = [_classifier(work.config, work.facts, name, work.config.warmup.batch_size) for name in _names(work.config)]
    return int(max(2 * net.parameters + net.outputs // 2 for net in nets))


def surely_taken(work: ClientWork) -> dict[str, tuple[tuple[str, ...], int]]:
    """Return the knobs of each kind of a run's work that decide its memory, and bytes that it surely takes.

    Counted are weights with gradients, Adam's moments where Adam trains them, half of the activations of a batch, and
    images that are drawn at once; a batch of real images is no larger than ``work.samples``.
    """
    config, facts, stages = work.config, work.facts, _stages(work.config)
    image, clients = 4 * math.prod(facts.input_shape), config.partition.num_clients
    batch = min(config.warmup.batch_size, max(1, work.samples))
    nets = [_classifier(config, facts, name, batch) for name in _names(config)]
    trained = max(2 * net.parameters + net.outputs // 2 for net in nets)
    found: dict[str, tuple[tuple[str, ...], int]] = {"warmup": (("model.width", "warmup.batch_size"), trained)}
    if "generators" in stages:
        knobs, bank = config.generator, config.generator.family == "condensed"
        made = _bank(config, facts)[0] if bank else _shapes_of_generator(knobs, facts.channels, facts.image_size)
        moments, batches = (4, made.outputs // 2) if knobs.steps or knobs.epochs else (1, 0)
        sizes = ("generator.images_per_class",) if bank else ("generator.latent_dim", "generator.ngf")
        found["generators"] = (*sizes, "generator.batch_size"), moments * made.parameters + batches
        found["all clients' generators"] = (*sizes, "partition.num_clients"), clients * made.parameters
    if "teacher" in stages:
        meta = config.meta
        weights = 4 * 2 * max(1, meta.token_dim) * meta.feedforward
        found["teacher"] = ("meta.token_dim", "meta.feedforward"), 4 * weights if meta.updates else weights
    if "distill" in stages:
        drawn = config.distill.samples_per_generator * clients * image
        found["distill"] = ("distill.samples_per_generator", "partition.num_clients"), drawn
    if config.model.student and "generators" in stages:  # DENSE and Co-Boosting draw no more than a batch at once
        found["server_student"] = ("student.batch_size",), config.student.batch_size * image
    return found


def largest(works: Sequence[ClientWork]) -> list[ClientWork]:
    """Return the works of a sweep with the largest estimates, one of those that differ only in what takes no memory."""
    found: dict[Any, ClientWork] = {}
    for work in works:
        config, knobs = work.config, work.config.generator
        bank = knobs.images_per_class, knobs.image_scale, knobs.matching_channels
        shapes = (knobs.family, knobs.ngf, knobs.ndf, knobs.latent_dim, knobs.batch_size, knobs.discriminator, bank)
        known = (work.facts, config.model, config.federation.strategy, config.federation.widths, config.method)
        runtime = config.runtime.precision, config.runtime.cuda_graphs
        alike = (*known, config.warmup.batch_size, knobs.tau, *runtime, shapes)
        found[alike] = max(work, found.get(alike, work), key=lambda other: other.samples)
    return sorted(found.values(), key=estimated_bytes, reverse=True)[:MOST_MEASURED]


def clients_together(config: ExperimentConfig) -> int:
    """Return the most clients that are trained together; 1 while it is not decided."""
    together = config.runtime.clients_per_batch
    return 1 if isinstance(together, str) else together


def _names(config: ExperimentConfig) -> list[str]:
    return sorted({config.model.classifier, *client_classifiers(config)})


def _size(shapes: _Shapes) -> int:
    return shapes.outputs


def _classifier(config: ExperimentConfig, facts: DataFacts, name: str, batch: int) -> _Shapes:
    return _shapes_of_classifier(config.model, replace(facts, mean=(), std=(), augmentations=()), name, batch)


@functools.lru_cache(maxsize=64)
def _shapes_of_classifier(model: Any, facts: DataFacts, name: str, batch: int) -> _Shapes:
    from ..models.classifiers import build_classifier

    shape = facts.num_classes, facts.channels, facts.image_size
    size = (batch, *facts.input_shape)
    return _shapes(lambda: build_classifier(model, *shape, name, facts.modalities), size)


def _generator_pair(config: ExperimentConfig, facts: DataFacts) -> _Shapes:
    if config.generator.family == "condensed":
        images, network = _bank(config, facts)
        return _Shapes(images.parameters + network.parameters, images.outputs + network.outputs)
    return _shapes_of_pair(config.generator, facts.channels, facts.image_size)


@functools.lru_cache(maxsize=64)
def _shapes_of_pair(knobs: Any, channels: int, image_size: int) -> _Shapes:
    from ..models.discriminator import build_discriminator

    one = _shapes_of_generator(knobs, channels, image_size)
    size = (knobs.batch_size, channels, image_size, image_size)
    other = _shapes(lambda: build_discriminator(knobs, channels, image_size), size)
    return _Shapes(one.parameters + other.parameters, one.outputs + other.outputs)


def _bank(config: ExperimentConfig, facts: DataFacts) -> tuple[_Shapes, _Shapes]:
    """Return all condensed images, and a random network that reads those of a class and a batch of real ones."""
    knobs = config.generator
    images = 4 * facts.num_classes * knobs.images_per_class * math.prod(facts.input_shape) // knobs.image_scale**2
    batch = knobs.images_per_class + knobs.batch_size
    return _Shapes(images, 0), _shapes_of_random_network(knobs.matching_channels, facts, batch)


@functools.lru_cache(maxsize=64)
def _shapes_of_random_network(width: int, facts: DataFacts, batch: int) -> _Shapes:
    from ..distillation.condensation import random_network

    return _shapes(lambda: random_network(facts.channels, width, facts.image_size), (batch, *facts.input_shape))


@functools.lru_cache(maxsize=64)
def _shapes_of_generator(knobs: Any, channels: int, image_size: int) -> _Shapes:
    from ..models.generator import build_generator

    return _shapes(lambda: build_generator(knobs, channels, image_size), (knobs.batch_size, knobs.latent_dim))


def _shapes(build: Any, size: tuple[int, ...]) -> _Shapes:
    """Build a network and run it on inputs of ``size``: without memory, or if it is small, on one input for all.

    Tensors without memory import torch's compiler when a network runs on them, which takes seconds.
    """
    import torch

    from ..models.state_dict import shapes_only

    outputs = 0

    def count(module: Any, inputs: Any, output: Any) -> None:
        nonlocal outputs
        outputs += 4 * output.numel() if isinstance(output, torch.Tensor) else 0

    with shapes_only():
        network = build()
    parameters, times, device = sum(p.numel() for p in network.parameters()), 1, "meta"
    if parameters <= MOST_BUILT and math.prod(size[1:]) <= MOST_SEEN:
        with seeded(0, "memory"):
            network, times, size, device = build().eval(), size[0], (1, *size[1:]), "cpu"
    for module in network.modules():
        if not any(True for _ in module.children()):
            module.register_forward_hook(count)
    with torch.no_grad(), torch.device(device):
        network(torch.zeros(size))
    return _Shapes(4 * parameters, times * outputs)
