"""What a GPU does with Mosaic: the tests that need one, and figures, in one table and one JSON file.

    make gpu-check                       # or: python benchmarks/gpu.py
    python benchmarks/gpu.py --pretend   # every measurement at a tiny size on the CPU: its figures say nothing

Every check runs in a process of its own, so one that fails or hangs costs only its own rows. Where something is
compared, the two ways are timed in turn and the figure is the ratio of their medians. Images are noise: a step's time
does not depend on them. Without a GPU every check is skipped.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import click
from measured_rows import Row, as_table, watched

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # a machine may have the packages that Mosaic needs, but not Mosaic itself

#: A row that the projection reads.
AT_ONCE = "{} clients on one GPU at once"

#: Clients with small networks that share a process.
MANY = 100

#: Seconds before the limit at which nothing may compute any more, so that the table is printed in time.
CLOSING_SECONDS = 5.0


@dataclass(frozen=True)
class Sizes:
    """How much is computed: the paper's CIFAR-10 networks, or next to nothing."""

    knobs: dict[str, Any]
    images: int = 5000  # of a client
    steps: int = 30  # of training, in one measurement
    few: int = 10  # steps of generators, teachers and students
    more: int = 40  # steps beyond them, whose time is measured
    repeats: int = 5
    clients: int = 10  # of a round


PAPER_SCALE = Sizes({})
TINY = Sizes(
    {
        "model.width": 4, "generator.ngf": 4, "generator.ndf": 4, "generator.latent_dim": 8, "generator.batch_size": 8,
        "warmup.batch_size": 8, "meta.token_dim": 4, "meta.feedforward": 8, "distill.samples_per_generator": 2,
        "partition.num_clients": 2, "warmup.local_steps": 1,
    },
    images=24, steps=1, few=1, more=1, repeats=1, clients=2,
)  # fmt: skip


@dataclass(frozen=True)
class Bench:
    """The inputs of the measurements; ``pretend``: on the CPU, at sizes ``TINY``. ``knobs``: changes of it."""

    pretend: bool = False
    knobs: dict[str, Any] = field(default_factory=dict)

    @property
    def sizes(self) -> Sizes:
        return TINY if self.pretend else PAPER_SCALE

    @cached_property
    def device(self) -> Any:
        import torch

        return torch.device("cpu" if self.pretend else "cuda")

    @cached_property
    def config(self) -> Any:
        """The paper's CIFAR-10 run on a GPU in bf16, whatever the machine has."""
        from mosaic_ray.config.resolve import resolve

        knobs = {"runtime.device": "cuda", "runtime.gpus_per_client": 1.0, "runtime.precision": "bf16"}
        knobs |= {"generator.epochs": 0, "generator.family": "dcgan"} | self.sizes.knobs
        return resolve("cifar10+distilled", sets=knobs | self.knobs)

    def with_knobs(self, **knobs: Any) -> Any:
        """``bench.with_knobs(generator__steps=5)``."""
        from mosaic_ray.config.resolve import override

        return override(self.config, {name.replace("__", "."): value for name, value in knobs.items()})

    @cached_property
    def facts(self) -> Any:
        from mosaic_ray.data.load import known_facts

        return known_facts(self.config.data)

    def context(self, config: Any = None) -> Any:
        from mosaic_ray.execution.determinism import choose_kernels
        from mosaic_ray.federated.client import ClientContext

        choose_kernels(config or self.config)
        return ClientContext(config or self.config, self.facts, self.device)

    def images(self, seed: int = 0) -> Any:
        """One client's images: noise, of every class."""
        import numpy as np

        from mosaic_ray.core.types import ImageSet

        draws, side = np.random.default_rng(seed), self.facts.image_size
        images = draws.integers(0, 256, (self.sizes.images, self.facts.channels, side, side), np.uint8)
        return ImageSet(images, np.arange(self.sizes.images) % self.facts.num_classes)

    def shard(self) -> Any:
        images = self.images()
        return self.context().shard(images.images, images.labels)

    def weights(self) -> Any:
        from mosaic_ray.federated.client import initial_weights

        return initial_weights(self.context())

    def seconds(self, work: Callable[[], object]) -> float:
        """Wall time of ``work`` until the device is done."""
        import torch

        wait = torch.cuda.synchronize if self.device.type == "cuda" else lambda: None
        wait()
        began = time.perf_counter()
        work()
        wait()
        return time.perf_counter() - began

    def in_turn(self, *ways: Callable[[], object], repeats: int = 0) -> list[float]:
        """Median seconds of each way, timed in turn after one round that warms up."""
        for way in ways:
            way()
        rounds = [[self.seconds(way) for way in ways] for _ in range(repeats or self.sizes.repeats)]
        return [statistics.median(times) for times in zip(*rounds, strict=True)]

    def per_step(self, *ways: Callable[[int], object]) -> list[float]:
        """Median seconds of one step more, of each way: what does not grow with the steps falls out."""
        few, more = self.sizes.few, self.sizes.more
        runs = [lambda way=way, steps=steps: way(steps) for way in ways for steps in (few, few + more)]
        times = self.in_turn(*runs, repeats=max(1, self.sizes.repeats - 2))
        return [(long - short) / more for short, long in zip(times[::2], times[1::2], strict=True)]

    def trains(self, config: Any, weights: Any, shard: Any, by_row: bool = False) -> Callable[[], Any]:
        """Local training as a client does it; it returns the model."""
        import torch

        from mosaic_ray.federated.local_training import LocalTrainingConfig, train_locally
        from mosaic_ray.federated.recorded_steps import record_cuda_graph

        warmup = config.warmup
        plan = LocalTrainingConfig(self.sizes.steps, warmup.batch_size, warmup.lr, warmup.weight_decay, warmup.momentum)

        def work() -> Any:
            model = self.context(config).classifier(weights)
            model = model.to(memory_format=torch.contiguous_format) if by_row else model
            record = record_cuda_graph if config.runtime.cuda_graphs and self.device.type == "cuda" else None
            precision, address = config.runtime.precision, (0, "bench", 0, 0)
            train_locally(model, shard, plan, self.facts, address, precision, record=record)
            return model

        return work

    def bare(self, weights: Any, shard: Any) -> Callable[[], None]:
        """The same number of steps in the plainest loop: the fastest kernels, channels_last, no augmentation."""
        import torch

        from mosaic_ray.data.transforms import normalise

        warmup = self.config.warmup
        config = self.with_knobs(runtime__deterministic=False)

        def work() -> None:
            model = self.context(config).classifier(weights).to(memory_format=torch.channels_last).train()
            optimiser = torch.optim.SGD(model.parameters(), lr=warmup.lr, weight_decay=warmup.weight_decay)
            for _ in range(self.sizes.steps):
                rows = torch.randint(len(shard), (warmup.batch_size,), device=self.device)
                images = normalise(shard.images[rows], self.facts.mean, self.facts.std)
                images = images.clone(memory_format=torch.channels_last)
                with torch.autocast(self.device.type, torch.bfloat16, enabled=config.runtime.precision == "bf16"):
                    loss = torch.nn.functional.cross_entropy(model(images), shard.labels[rows])
                optimiser.zero_grad(set_to_none=True)
                loss.backward()
                optimiser.step()

        return work

    def of_clients(self, count: int, together: int) -> Callable[[], None]:
        """Local training of ``count`` clients with equally many images, ``together`` at once (1: each by itself)."""
        from mosaic_ray.federated.batched_training import train_together
        from mosaic_ray.federated.local_training import LocalTrainingConfig, train_locally

        weights, shard = self.weights(), self.shard()
        warmup, precision = self.config.warmup, self.config.runtime.precision
        plan = LocalTrainingConfig(self.sizes.few, warmup.batch_size, warmup.lr, warmup.weight_decay, warmup.momentum)

        def work() -> None:
            context = self.context()
            for first in range(0, count, together):
                clients = range(first, min(count, first + together))
                models = [context.classifier(weights) for _ in clients]
                addresses = [(0, "bench", 0, client) for client in clients]
                if together == 1:
                    train_locally(models[0], shard, plan, self.facts, addresses[0], precision)
                else:
                    train_together(models, [shard] * len(models), plan, self.facts, addresses, precision)

        return work

    def generates(self, config: Any, weights: Any, shard: Any) -> Callable[[int], Any]:
        """A generator's training of so many steps; it returns the generator."""
        from mosaic_ray.distillation.generator_training import train_generator

        def work(steps: int) -> Any:
            knobs = dataclasses.replace(config.generator, steps=steps)
            model = self.context(config).classifier(weights)
            return train_generator(model, weights, shard, knobs, self.facts, (0, 0), config.runtime.precision)

        return work

    @cached_property
    def prototypes(self) -> Any:
        """Noise in the place of every client's prototypes."""
        import numpy as np

        from mosaic_ray.core.types import Prototypes

        classes, k = self.facts.num_classes, self.config.prototypes.k
        count = self.config.partition.num_clients * classes * k
        size = self.weights()["head.weight"].shape[1]
        vectors = np.random.default_rng(0).normal(size=(count, size)).astype(np.float32)
        rows = np.arange(count)
        return Prototypes(vectors, rows % classes, np.ones(count, np.float32), rows // (classes * k))

    def teaches(self, weights: Any) -> Callable[[int], Any]:
        """The teacher's training of so many updates; it returns the teacher."""
        import numpy as np

        from mosaic_ray.distillation.teacher_training import class_experts, fit_teacher

        clients = self.config.partition.num_clients
        counts = np.ones((clients, self.facts.num_classes), np.int64)

        def work(updates: int) -> Any:
            config = self.with_knobs(meta__updates=updates, meta__patience=0)
            models = [(k, weights) for k in range(clients)]
            experts = class_experts(config, weights, models, counts)
            context = self.context(config)
            return fit_teacher(context, weights, *experts, self.prototypes, lambda step, metrics: None)[0]

        return work

    def distils(self, weights: Any, teacher: Any, generator: Any) -> Callable[[int], Any]:
        """A distillation of so many steps; it returns the student's weights."""
        import numpy as np

        from mosaic_ray.distillation.student_training import DistContext, distil, make_task

        clients = self.config.partition.num_clients

        def work(steps: int) -> Any:
            config = self.with_knobs(distill__steps=steps)
            self.context(config)
            task = make_task(
                config, self.facts, weights, teacher, (generator.weights,) * clients, [generator.figures] * clients,
                np.full(clients, self.sizes.images), self.prototypes,
            )  # fmt: skip
            return distil(task, self.device, DistContext(), lambda step, metrics: None)[0]

        return work


# --- the checks: each yields its rows as they are measured ----------------------------------------------------------


def machine(bench: Bench) -> Iterator[Row]:
    """Say what is measured."""
    import torch

    cores = f"{os.cpu_count()} CPU cores, Python {sys.version.split()[0]}, torch {torch.__version__}"
    if bench.device.type == "cpu":
        yield Row("machine", f"a pretended GPU: {cores}")
        return
    from mosaic_ray.execution.precision import has_native_bf16

    card = torch.cuda.get_device_properties(0)
    what = f"{card.name}, {cores}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
    yield Row("machine", what, card.total_memory / 2**30, "GiB", note="" if has_native_bf16(True) else "no native bf16")


def tests(bench: Bench) -> Iterator[Row]:
    """Run the tests that are marked ``gpu``."""
    if importlib.util.find_spec("pytest") is None:
        yield Row("tests", "pytest -m gpu", status="skipped", note="pytest is not installed")
        return
    with tempfile.TemporaryDirectory() as folder:
        xml = Path(folder) / "tests.xml"
        words = ["-q", "-m", "gpu", "-p", "no:cacheprovider", f"--junitxml={xml}"]
        subprocess.run([sys.executable, "-m", "pytest", *words], cwd=ROOT, stdout=sys.stderr, check=False)
        cases = list(ET.parse(xml).getroot().iter("testcase"))
    count = {"passed": 0, "skipped": 0, "failed": 0}
    for case in cases:
        tags = {part.tag for part in case}
        outcome = "failed" if tags & {"failure", "error"} else "skipped" if "skipped" in tags else "passed"
        count[outcome] += 1
        if outcome == "failed":
            yield Row("tests", str(case.get("name")), status="failed", note=str(case.get("classname")))
    whole = "passed" if count["passed"] else "skipped"
    note = ", ".join(f"{number} {outcome}" for outcome, number in count.items() if number) or "none found"
    yield Row(
        "tests", "pytest -m gpu", count["passed"], f"of {len(cases)} passed", note=note,
        status="failed" if count["failed"] or not cases else whole,
    )  # fmt: skip


def same_bits(bench: Bench) -> Iterator[Row]:
    """Compute everything twice, at full size: the bits must be equal."""
    import numpy as np

    weights, shard, steps = bench.weights(), bench.shard(), bench.sizes.few
    from mosaic_ray.models.state_dict import to_weights

    trained = bench.trains(bench.config, weights, shard)
    generates = bench.generates(bench.config, weights, shard)
    generator, teacher = generates(steps), bench.teaches(weights)(steps)
    ways: dict[str, Callable[[], Any]] = {
        "local training": lambda: to_weights(trained()),
        "generator": lambda: generates(steps).weights,
        "teacher": lambda: bench.teaches(weights)(steps).meta,
        "distillation": lambda: bench.distils(weights, teacher, generator)(steps),
    }
    for what, way in ways.items():
        first, second = way(), way()
        differ = [name for name in first if not np.array_equal(first[name], second[name], equal_nan=True)]
        yield Row(
            "same bits", f"{what} twice", len(first) - len(differ), f"of {len(first)} arrays equal",
            status="failed" if differ else "passed", note=", ".join(differ[:3]),
        )  # fmt: skip


def training(bench: Bench) -> Iterator[Row]:
    """Local training of the paper's ResNet-18 against a bare loop, and what each choice costs."""
    weights, shard = bench.weights(), bench.shard()
    images = bench.sizes.steps * bench.config.warmup.batch_size
    usual = bench.trains(bench.config, weights, shard)
    ours, bare = bench.in_turn(usual, bench.bare(weights, shard))
    yield Row("training", "bare loop, bf16, channels_last", images / bare, "images/s")
    yield Row("training", "local training, ResNet-18, bf16", images / ours, "images/s", bare / ours, "bare loop")
    for what, knobs, by_row in (
        ("runtime.deterministic=false", {"runtime__deterministic": False}, False),
        ("convolutions stored by row", {}, True),
        ("convolutions stored by row, runtime.deterministic=false", {"runtime__deterministic": False}, True),
        ("fp32", {"runtime__precision": "fp32"}, False),
        ("runtime.cuda_graphs=true", {"runtime__cuda_graphs": True}, False),
    ):
        other = bench.trains(bench.with_knobs(**knobs), weights, shard, by_row)
        ours, changed = bench.in_turn(usual, other)
        yield Row("training", f"the same with {what}", images / changed, "images/s", ours / changed, "local training")


def many_clients(bench: Bench) -> Iterator[Row]:
    """Many clients with small networks in one process: each by itself, and with their weights stacked."""
    knobs = {"model.classifier": "cnn"} | ({} if bench.pretend else {"model.width": 16})
    small, count = Bench(bench.pretend, knobs), 2 if bench.pretend else MANY
    sizes = (1, 2) if bench.pretend else (1, 8, 32, MANY)
    one, *many = small.in_turn(*(small.of_clients(count, size) for size in sizes), repeats=1 if bench.pretend else 3)
    width = small.config.model.width
    yield Row("many clients", f"{count} clients (cnn, width {width}), each by itself", count / one, "clients/s")
    for size, seconds in zip(sizes[1:], many, strict=True):
        what = f"the same with runtime.clients_per_batch={size}"
        yield Row("many clients", what, count / seconds, "clients/s", one / seconds, "each by itself")
    weights, shard = small.weights(), small.shard()
    usual, graphs = (
        small.trains(small.with_knobs(runtime__cuda_graphs=recorded), weights, shard) for recorded in (False, True)
    )
    plain, recorded = small.in_turn(usual, graphs)
    images = small.sizes.steps * small.config.warmup.batch_size
    yield Row(
        "many clients", f"one client of {small.sizes.steps} steps with runtime.cuda_graphs=true", images / recorded,
        "images/s", plain / recorded, "without",
    )  # fmt: skip


def generator(bench: Bench) -> Iterator[Row]:
    """A generator's step: discriminator, generator, and the classifier's terms."""
    weights, shard = bench.weights(), bench.shard()
    plain = bench.with_knobs(generator__lambda_i=0.0)
    inverting = bench.with_knobs(generator__tau=bench.sizes.images + 1)
    usual = bench.generates(plain, weights, shard)
    for what, config in (
        ("inversion loss", inverting),
        ("conditional", bench.with_knobs(generator__lambda_i=0.0, generator__conditional=True)),
        ("fp32", bench.with_knobs(generator__lambda_i=0.0, runtime__precision="fp32")),
        ("runtime.deterministic=false", bench.with_knobs(generator__lambda_i=0.0, runtime__deterministic=False)),
    ):
        one, other = bench.per_step(usual, bench.generates(config, weights, shard))
        if what == "inversion loss":
            yield Row("generator", "generator step", 1000 * one, "ms")
        yield Row("generator", f"the same with {what}", 1000 * other, "ms", other / one, "generator step")


def server(bench: Bench) -> Iterator[Row]:
    """An update of the meta model, and a distillation step."""
    weights, steps = bench.weights(), bench.sizes.few
    [update] = bench.per_step(bench.teaches(weights))
    yield Row("server", "meta model update", 1000 * update, "ms")
    teacher = bench.teaches(weights)(steps)
    maker = bench.generates(bench.config, weights, bench.shard())(steps)
    [step] = bench.per_step(bench.distils(weights, teacher, maker))
    yield Row("server", "distillation step", 1000 * step, "ms")


def clients(bench: Bench) -> Iterator[Row]:
    """The clients of a round on one GPU at once, against one after another: both on Ray actors."""
    import ray
    import torch

    from mosaic_ray.execution.actor_pool import ActorPool, ClientFailure
    from mosaic_ray.execution.backend import RayBackend, start_hosts
    from mosaic_ray.execution.ray_session import RAY_ENVIRONMENT
    from mosaic_ray.federated.client import ClientRound, Round, TrainTask
    from mosaic_ray.federated.local_training import LocalTrainingConfig

    count = bench.sizes.clients
    config = bench.with_knobs(partition__num_clients=count, runtime__gpus_per_client=1 / (count + 1))
    share = config.runtime.gpus_per_client
    plan = LocalTrainingConfig(config.warmup.local_steps, config.warmup.batch_size, config.warmup.lr)
    weights = bench.weights()
    os.environ.update(RAY_ENVIRONMENT | {"PYTHONPATH": str(ROOT)})
    with tempfile.TemporaryDirectory(prefix="mg", dir="/tmp") as folder:
        ray.init(
            address="local", num_cpus=count + 1, num_gpus=1, include_dashboard=False, log_to_driver=False,
            logging_level="ERROR", _temp_dir=folder,
            runtime_env={"worker_process_setup_hook": clients_on_the_cpu} if bench.pretend else {},
        )  # fmt: skip
        try:

            def backend(actors: int) -> RayBackend:
                needs, counts = {"CPU": 1.0, "GPU": share}, {"": actors}
                return RayBackend(config, bench.facts, bench.images, lambda: ActorPool(start_hosts(needs, counts)))

            def rounds(backend: RayBackend) -> Callable[[], None]:
                task, start = TrainTask("bench", 0, plan), Round({config.model.classifier: weights})

                def work() -> None:
                    for _, update in backend.map(task, range(count), start, lambda k: ClientRound()):
                        if isinstance(update, ClientFailure):
                            raise update.error

                return work

            used = [torch.cuda.mem_get_info()] if bench.device.type == "cuda" else []
            many, one = backend(count), backend(1)
            at_once = rounds(many)
            at_once()
            if used:
                used.append(torch.cuda.mem_get_info())
                each = (used[0][0] - used[1][0]) / count / 2**30
                yield Row("clients", "GPU memory that a client actor keeps", each, "GiB")
            together, in_turn = bench.in_turn(at_once, rounds(one))
            yield Row("clients", f"{count} clients one after another", count / in_turn, "clients/s")
            yield Row(
                "clients", AT_ONCE.format(count), count / together, "clients/s", in_turn / together,
                "one after another",
            )  # fmt: skip
        finally:
            ray.shutdown()


def clients_on_the_cpu() -> None:
    """In a Ray worker of a pretended GPU: a client actor that has a share of it trains on the CPU."""
    from mosaic_ray.execution import backend

    backend.take_device = lambda share: "cpu"


def projection(rows: list[Row], bench: Bench) -> list[Row]:
    """The hours of the paper-scale CIFAR-10 run on this GPU, from the rows that were measured, with the formula."""
    from mosaic_ray.config.resolve import resolve
    from mosaic_ray.distillation.generator_training import num_steps
    from mosaic_ray.runs.plan import graph_of

    figures = {row.what: (row.figure, row.ratio) for row in rows if row.figure}
    needed = (AT_ONCE.format(bench.sizes.clients), "generator step", "meta model update", "distillation step")
    if absent := [what for what in needed if what not in figures]:
        return [Row("projection", "paper-scale CIFAR-10", status="skipped", note=f"not measured: {', '.join(absent)}")]
    (a_second, speedup), (generator, _), (update, _), (step, _) = (figures[what] for what in needed)
    config = resolve("cifar10+distilled")
    work = {stage.name: stage.work(config) for stage in graph_of(config)}
    client_rounds = sum(work[name]["client rounds"] for name in ("warmup", "finetune", "control"))
    clients = config.partition.num_clients
    steps = clients * num_steps(config.generator, 50_000 // clients)
    hours = {
        "rounds": client_rounds / a_second / 3600,
        "generators": steps * generator / 1000 / speedup / 3600,
        "teacher": config.meta.updates * update / 1000 / 3600,
        "distillation": config.distill.steps * step / 1000 / 3600,
    }
    formula = (
        f"hours = ({client_rounds:,} client rounds / {a_second:.3g} clients/s + {steps:,} generator steps x "
        f"{generator:.3g} ms / {speedup:.2f} at once + {config.meta.updates} updates x {update:.3g} ms + "
        f"{config.distill.steps} distillation steps x {step:.3g} ms) / 3600; left out: prototypes, evaluation, start"
    )
    found = [Row("projection", f"paper-scale CIFAR-10: {what}", each, "h") for what, each in hours.items()]
    return [*found, Row("projection", "paper-scale CIFAR-10: the run", sum(hours.values()), "h", note=formula)]


#: The checks in order, each with the largest share of the limit that it may take.
CHECKS: dict[str, tuple[Callable[[Bench], Iterator[Row]], float]] = {
    "machine": (machine, 0.2), "tests": (tests, 0.6), "training": (training, 0.3), "clients": (clients, 0.3),
    "many clients": (many_clients, 0.2), "generator": (generator, 0.25), "server": (server, 0.25),
    "same bits": (same_bits, 0.3),
}  # fmt: skip


# --- running them ----------------------------------------------------------------------------------------------------


def run_check(name: str, pretend: bool, rows: Path) -> None:
    """Run one check in this process, and append each row to the file ``rows`` once it is known."""
    import torch

    torch.set_num_threads(1)  # as the driver and a client of a run
    with open(rows, "a", encoding="utf-8", buffering=1) as file:
        for row in CHECKS[name][0](Bench(pretend)):
            file.write(json.dumps(asdict(row)) + "\n")


@click.command()
@click.option("--out", help="JSON file to write.  [default: gpu.json beside this file; pretended: none]")
@click.option("--limit-s", default=480.0, show_default=True, help="Seconds after which everything stops.")
@click.option("--only", help=f"Checks to run, joined by commas: {', '.join(CHECKS)}.")
@click.option("--pretend", is_flag=True, help="Run everything at tiny sizes on the CPU; figures say nothing.")
@click.option("--check", hidden=True)
@click.argument("rows_file", required=False)
def main(
    out: str | None, limit_s: float, only: str | None, pretend: bool, check: str | None, rows_file: str | None
) -> None:
    """Check and measure Mosaic on this machine's GPU. Exits with 1 if a check failed."""
    if check and rows_file:  # this process is that check's
        run_check(check, pretend, Path(rows_file))
        return
    names = [name.strip() for name in only.split(",")] if only else list(CHECKS)
    if unknown := set(names) - set(CHECKS):
        raise click.BadParameter(f"{', '.join(sorted(unknown))}: there are {', '.join(CHECKS)}", param_hint="--only")
    began = time.monotonic()
    import torch

    able = pretend or torch.cuda.is_available()
    rows: list[Row] = []
    for name in names:
        left = limit_s - CLOSING_SECONDS - (time.monotonic() - began)
        if not able:
            rows.append(Row(name, name, status="skipped", note="it needs a GPU that torch can use"))
        elif left < 1:
            rows.append(Row(name, name, status="skipped", note=f"the limit of {limit_s:g} s was reached"))
        else:
            click.echo(f"{time.monotonic() - began:4.0f} s  {name}", err=True)
            try:
                command = [sys.executable, __file__, *(["--pretend"] if pretend else []), "--check", name]
                rows += watched(name, command, min(left, CHECKS[name][1] * limit_s))
            except KeyboardInterrupt:
                rows.append(Row(name, name, status="failed", note="interrupted"))
                break
    if able:
        rows += projection(rows, Bench(pretend))
    failed, seconds = sum(row.status == "failed" for row in rows), round(time.monotonic() - began, 1)
    click.echo(as_table(rows))
    click.echo(f"\n{len(rows)} rows, {failed} failed, {seconds:g} s")
    if pretend:
        click.echo("A pretended GPU: the figures only show that every check runs.")
    facts = {"pretended": pretend, "seconds": seconds, "limit_s": limit_s, "rows": [asdict(row) for row in rows]}
    if out or not pretend:
        Path(out or ROOT / "benchmarks" / "gpu.json").write_text(json.dumps(facts, indent=1) + "\n")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
