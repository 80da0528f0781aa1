"""What Mosaic adds to the work itself, on CPUs: one table of ratios and one JSON file.

    make bench                            # or: python benchmarks/bench.py
    python benchmarks/bench.py --quick    # every measurement at a tiny size: its figures say nothing

Every figure is a median of wall times, and every ratio is of two medians whose times were taken in turn, so that other
jobs on the machine disturb both alike. Images are noise: a step's time does not depend on them.

A round is timed against two processes over pipes that do the same steps and nothing else ("floor"): no failures
handled, no ledger, no checkpoint, no log. Where the package flwr is installed its simulation does the same steps, too.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
from gpu import ROOT, Bench, Sizes
from measured_rows import Row, as_table, watched

HERE = Path(__file__).resolve()
BATCH, LEARNING_RATE, SAMPLES, STEPS = 32, 0.05, 160, 5  # of a client in a round

SMALL = Sizes(
    {"partition.num_clients": 10, "generator.ngf": 16, "generator.ndf": 16},
    images=640, steps=4, few=2, more=6, repeats=5,
)  # fmt: skip
TINY = Sizes(
    {
        "model.width": 4, "generator.ngf": 4, "generator.ndf": 4, "generator.latent_dim": 8, "generator.batch_size": 8,
        "warmup.batch_size": 8, "meta.token_dim": 4, "meta.feedforward": 8, "distill.samples_per_generator": 2,
        "partition.num_clients": 2,
    },
    images=24, steps=1, few=1, more=1, repeats=1,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class OnCpu(Bench):
    """The inputs of the measurements, on the CPU; ``pretend``: at sizes ``TINY``."""

    @property
    def sizes(self) -> Sizes:
        return TINY if self.pretend else SMALL

    @cached_property
    def device(self) -> Any:
        import torch

        return torch.device("cpu")

    @cached_property
    def config(self) -> Any:
        """The small CIFAR-10 schedule in fp32."""
        from mosaic_ray.config.resolve import resolve

        knobs = {"runtime.device": "cpu", "runtime.precision": "fp32", "generator.family": "dcgan"}
        return resolve("cifar10_small+distilled", sets=knobs | self.sizes.knobs | self.knobs)


# --- rounds ----------------------------------------------------------------------------------------------------------


def write_noise(root: Path, clients: int) -> None:
    """Write noise in the four files of Fashion-MNIST under ``root``: ``SAMPLES`` images for each client."""
    import numpy as np

    folder = root / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    for split, count in (("train", clients * SAMPLES), ("t10k", 200)):
        images = np.random.default_rng(count).integers(0, 256, (count, 28, 28), np.uint8)
        for kind, code, array in (("images-idx3", 3, images), ("labels-idx1", 1, np.arange(count) % 10)):
            head = np.array([0x0800 + code, *array.shape], ">i4").tobytes()
            (folder / f"{split}-{kind}-ubyte").write_bytes(head + array.astype(np.uint8).tobytes())


def mosaic_rounds(host: str, clients: int, rounds: int, steps: int) -> dict[str, float]:
    """Run FedAvg as `mosaic run --host` does; return seconds a round, and the driver's CPU seconds a round."""
    import mosaic_ray as mr
    from mosaic_ray.execution.ray_session import RAY_ENVIRONMENT

    os.environ.update(RAY_ENVIRONMENT)
    times: list[tuple[float, float]] = []

    class Clock(mr.Callback):
        def on_round(self, stage: str, done: int, total: int | None) -> None:
            if stage == "warmup":
                used = resource.getrusage(resource.RUSAGE_SELF)
                times.append((time.perf_counter(), used.ru_utime + used.ru_stime))

    with tempfile.TemporaryDirectory(prefix="mb", dir="/tmp") as folder:
        write_noise(Path(folder) / "data", clients)
        os.environ["RAY_TMPDIR"] = folder
        knobs = {
            "data.root": f"{folder}/data", "partition.sampler": "iid", "model.classifier": "small_cnn:build",
            "warmup.num_rounds": rounds, "warmup.local_steps": steps, "warmup.batch_size": BATCH,
            "warmup.lr": LEARNING_RATE, "warmup.weight_decay": 0.0, "finetune.num_rounds": 0,
            "runtime.eval_rounds": 0, "runtime.precision": "fp32",
        }  # fmt: skip
        mr.run(
            "fmnist_small", knobs, method="fedavg", clients=clients, host=host, storage=f"{folder}/s", progress=False,
            callbacks=[Clock()],
        )  # fmt: skip
    return steady(times)


def steady(times: list[tuple[float, float]]) -> dict[str, float]:
    """Return the medians of the differences: seconds and the driver's CPU seconds a round, after the first."""
    wall, cpu = (
        statistics.median(after - before for before, after in itertools.pairwise(column))
        for column in zip(*times, strict=True)
    )
    return {"wall": wall, "cpu": cpu}


class BareClient:
    """The same local training in the plainest loop."""

    def __init__(self, steps: int) -> None:
        import torch
        from small_cnn import build

        torch.set_num_threads(1)
        torch.manual_seed(0)
        self.model, self.steps = build(10, 1, 28, 16), steps
        draws = torch.Generator().manual_seed(0)
        self.images = torch.randint(0, 256, (SAMPLES, 1, 28, 28), dtype=torch.uint8, generator=draws)
        self.labels = torch.arange(SAMPLES) % 10

    def weights(self) -> list[Any]:
        return [parameter.detach().clone().numpy() for parameter in self.model.parameters()]

    def train(self, weights: list[Any]) -> list[Any]:
        """Return the parameters after a client's steps from ``weights``."""
        import torch

        with torch.no_grad():
            for parameter, array in zip(self.model.parameters(), weights, strict=True):
                parameter.copy_(torch.from_numpy(array))
        optimiser = torch.optim.SGD(self.model.parameters(), lr=LEARNING_RATE)
        for step in range(self.steps):
            rows = torch.arange(step * BATCH, (step + 1) * BATCH) % SAMPLES
            images = (self.images[rows].float() / 255 - 0.5) / 0.25
            loss = torch.nn.functional.cross_entropy(self.model(images), self.labels[rows])
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
        return [parameter.detach().numpy() for parameter in self.model.parameters()]


def bare_worker(pipe: Any, clients: int, steps: int) -> None:
    """Answer each message of weights with the sum of ``clients`` clients' results, until None comes."""
    client = BareClient(steps)
    pipe.send("up")
    while (weights := pipe.recv()) is not None:
        sums = [array * 0 for array in weights]
        for _ in range(clients):
            for total, array in zip(sums, client.train(weights), strict=True):
                total += array
        pipe.send(sums)


def bare_rounds(processes: int, clients: int, rounds: int, steps: int) -> dict[str, float]:
    """Run rounds in ``processes`` processes over pipes, or in this one (0); return seconds a round."""
    weights, times = BareClient(steps).weights(), []
    pipes, workers, here = [], [], BareClient(steps)
    for number in range(processes):
        mine, theirs = multiprocessing.Pipe()
        share = len(range(number, clients, processes))
        worker = multiprocessing.get_context("spawn").Process(target=bare_worker, args=(theirs, share, steps))
        worker.start()
        workers.append(worker)
        pipes.append(mine)
        mine.recv()
    for _ in range(rounds):
        for pipe in pipes:
            pipe.send(weights)
        parts = [pipe.recv() for pipe in pipes] or [[a.copy() for a in here.train(weights)] for _ in range(clients)]
        weights = [sum(arrays) / clients for arrays in zip(*parts, strict=True)]
        times.append((time.perf_counter(), 0.0))
    for pipe, worker in zip(pipes, workers, strict=True):
        pipe.send(None)
        worker.join()
    return steady(times)


def flower_rounds(clients: int, rounds: int, steps: int) -> dict[str, float]:
    """Run the same rounds with Flower's simulation on two Ray actors; return seconds a round."""
    import flwr as fl

    times: list[tuple[float, float]] = []

    class Client(fl.client.NumPyClient):  # type: ignore[misc, unused-ignore]
        def fit(self, parameters: list[Any], config: Any) -> tuple[list[Any], int, dict[str, Any]]:
            return BareClient(steps).train(parameters), SAMPLES, {}

    class Average(fl.server.strategy.FedAvg):  # type: ignore[misc, unused-ignore]
        def aggregate_fit(self, *args: Any) -> Any:
            found = super().aggregate_fit(*args)
            times.append((time.perf_counter(), 0.0))
            return found

    strategy = Average(
        fraction_evaluate=0.0, min_fit_clients=clients, min_available_clients=clients,
        initial_parameters=fl.common.ndarrays_to_parameters(BareClient(steps).weights()),
    )  # fmt: skip
    config = fl.server.ServerConfig(num_rounds=rounds)
    parts = fl.server.ServerAppComponents(strategy=strategy, config=config)
    fl.simulation.run_simulation(
        server_app=fl.server.ServerApp(server_fn=lambda context: parts),
        client_app=fl.client.ClientApp(client_fn=lambda context: Client().to_client()), num_supernodes=clients,
        backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}, "init_args": {"num_cpus": 2}},
    )  # fmt: skip
    return steady(times)


#: Ways to run rounds of (clients, rounds, local steps).
WAYS: dict[str, Callable[[int, int, int], dict[str, float]]] = {
    "floor": lambda *work: bare_rounds(2, *work),
    "Ray host": lambda *work: mosaic_rounds("ray", *work),
    "one process": lambda *work: bare_rounds(0, *work),
    "serial host": lambda *work: mosaic_rounds("serial", *work),
    "Flower": flower_rounds,
}


def apart(way: str, clients: int, rounds: int, steps: int = STEPS) -> dict[str, float]:
    """Run ``way`` in a process of its own."""
    command = [sys.executable, str(HERE), "--way", way, "--work", f"{clients},{rounds},{steps}"]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE.parent), str(ROOT)]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def in_turn(*ways: Callable[[], dict[str, float]], repeats: int) -> list[dict[str, float]]:
    """Return each way's medians of ``repeats`` runs, taken in turn."""
    runs = [[way() for way in ways] for _ in range(repeats)]
    return [{name: statistics.median(run[name] for run in of) for name in of[0]} for of in zip(*runs, strict=True)]


def few_clients(bench: OnCpu) -> Iterator[Row]:
    """Steady rounds with few clients."""
    return rounds(bench, "rounds", *((2, 3) if bench.pretend else (10, 25)))


def more_clients(bench: OnCpu) -> Iterator[Row]:
    """Steady rounds with more clients."""
    return rounds(bench, "larger rounds", *((4, 3) if bench.pretend else (100, 8)))


def rounds(bench: OnCpu, check: str, clients: int, count: int) -> Iterator[Row]:
    """Steady rounds of FedAvg: this project's two hosts, their floors, and Flower where it is installed."""
    names = [name for name in WAYS if name != "Flower" or find_spec("flwr")]
    ways = [partial(apart, name, clients, count) for name in names]
    found = dict(zip(names, in_turn(*ways, repeats=1 if bench.pretend else 3), strict=True))
    for name in names:
        against = "one process" if name == "serial host" else "floor"
        yield Row(
            check, f"a round of {clients} clients: {name}", found[name]["wall"], "s",
            found[name]["wall"] / found[against]["wall"], against,
        )  # fmt: skip
    driver = 1000 * found["Ray host"]["cpu"] / clients
    yield Row(check, f"CPU time of the driver, a client of {clients} and round", driver, "ms")


def growth(bench: OnCpu) -> Iterator[Row]:
    """More clients for as many local steps in all: seconds a round on Ray."""
    sizes = (2, 4) if bench.pretend else (10, 100, 1000)
    steps = 2 * sizes[-1]
    ways = [partial(apart, "Ray host", clients, 4, steps // clients) for clients in sizes]
    for clients, found in zip(sizes, times := in_turn(*ways, repeats=1 if bench.pretend else 2), strict=True):
        yield Row(
            "growth", f"a round of {steps:,} local steps on {clients:,} clients", found["wall"], "s",
            found["wall"] / times[0]["wall"], f"{sizes[0]} clients",
        )  # fmt: skip


# --- steps -----------------------------------------------------------------------------------------------------------


def training(bench: OnCpu) -> Iterator[Row]:
    """Local training against a bare loop."""
    for name in ("cnn", "resnet18"):
        one = OnCpu(bench.pretend, {"model.classifier": name})
        weights, shard = one.weights(), one.shard()
        images = one.sizes.steps * one.config.warmup.batch_size
        ours, bare = one.in_turn(one.trains(one.config, weights, shard), one.bare(weights, shard))
        yield Row("training", f"local training: {name}", images / ours, "images/s", bare / ours, "a bare loop")


def many_clients(bench: OnCpu) -> Iterator[Row]:
    """Clients of small networks trained with their weights stacked, against each by itself."""
    count = 2 if bench.pretend else 20
    for size, width in ((8, 4),) if bench.pretend else ((8, 4), (8, 16), (16, 8), (28, 16)):
        knobs = {"model.classifier": "cnn", "model.width": width, "data.image_size": size, "warmup.batch_size": BATCH}
        small = OnCpu(bench.pretend, knobs)
        one, many = small.in_turn(small.of_clients(count, 1), small.of_clients(count, count), repeats=3)
        what = f"{count} clients together: cnn of width {width}, images of {size} pixels"
        yield Row("many clients", what, count / many, "clients/s", one / many, "each by itself")


def generators(bench: OnCpu) -> Iterator[Row]:
    """A generator's step, in steps of the classifier on as many images, and against a bare loop."""
    from mosaic_ray.federated.local_training import LocalTrainingConfig, train_locally

    weights, shard = bench.weights(), bench.shard()

    def classifier(steps: int) -> None:
        plan = LocalTrainingConfig(steps, bench.config.generator.batch_size, bench.config.warmup.lr)
        train_locally(bench.context().classifier(weights), shard, plan, bench.facts, (0, "bench", 0, 0), "fp32")

    for family in ("dcgan", "cgan", "cvae"):
        config = bench.with_knobs(generator__family=family, generator__lambda_i=0.0)
        step, own = bench.per_step(bench.generates(config, weights, shard), classifier)
        yield Row("generators", f"a step: {family}", 1000 * step, "ms", step / own, "a classifier's step")
    config = bench.with_knobs(generator__family="dcgan", generator__lambda_i=0.0)
    step, plain = bench.per_step(bench.generates(config, weights, shard), plain_gan(bench, weights))
    yield Row("generators", "a step: dcgan", 1000 * step, "ms", step / plain, "a bare loop")


def plain_gan(bench: OnCpu, weights: Any) -> Callable[[int], None]:
    """Train a generator against a discriminator and a frozen classifier: the forward and backward passes alone."""
    import torch
    from torch.nn.functional import cross_entropy, softplus

    from mosaic_ray.models.discriminator import build_discriminator
    from mosaic_ray.models.generator import build_generator

    config, shape = bench.config.generator, (bench.facts.channels, bench.facts.image_size)
    real = torch.randn(config.batch_size, shape[0], shape[1], shape[1])

    def work(steps: int) -> None:
        classifier = bench.context().classifier(weights).eval().requires_grad_(False)
        generator, discriminator = build_generator(config, *shape), build_discriminator(config, *shape)
        adams = [torch.optim.Adam(network.parameters()) for network in (generator, discriminator)]
        for _ in range(steps):
            fake = generator(torch.randn(config.batch_size, config.latent_dim))
            loss = softplus(-discriminator(real)).mean() + softplus(discriminator(fake.detach())).mean()
            adams[1].zero_grad(set_to_none=True)
            loss.backward()
            adams[1].step()
            logits = classifier(fake)
            loss = softplus(-discriminator(fake)).mean() + cross_entropy(logits, logits.argmax(1))
            adams[0].zero_grad(set_to_none=True)
            loss.backward()
            adams[0].step()

    return work


def server(bench: OnCpu) -> Iterator[Row]:
    """An update of the meta model, and a distillation step against the plain way."""
    weights, steps = bench.weights(), bench.sizes.few
    [update] = bench.per_step(bench.teaches(weights))
    yield Row("server", "an update of the meta model", 1000 * update, "ms")
    teacher = bench.teaches(weights)(steps)
    maker = bench.generates(bench.config, weights, bench.shard())(steps)
    step, plain = bench.per_step(bench.distils(weights, teacher, maker), plain_distillation(bench, weights, maker))
    yield Row("server", "a distillation step", 1000 * step, "ms", step / plain, "every expert whole, in turn")


def plain_distillation(bench: OnCpu, weights: Any, maker: Any) -> Callable[[int], None]:
    """Distil as a loop over generators would: each class's expert is a whole network that reads every image."""
    import torch

    from mosaic_ray.distillation.generator_training import classifier_view, latents
    from mosaic_ray.models.generator import build_generator
    from mosaic_ray.models.state_dict import load_weights

    config, facts = bench.config, bench.facts
    experts = [bench.context().classifier(weights).eval() for _ in range(facts.num_classes)]
    generator = build_generator(config.generator, facts.channels, facts.image_size)
    load_weights(generator, maker.weights)
    generator.eval()

    def work(steps: int) -> None:
        student = bench.context().classifier(weights).eval()
        optimiser = torch.optim.Adam(student.parameters(), lr=1e-3)
        draws = torch.Generator().manual_seed(0)
        for _ in range(steps):
            with torch.no_grad():
                images = torch.cat([
                    generator(latents(generator, config.distill.samples_per_generator, draws, bench.device))
                    for _ in range(config.partition.num_clients)
                ])  # fmt: skip
                images = classifier_view(images, config.generator.gan_range, facts)
                target = torch.stack([expert(images).softmax(1) for expert in experts]).mean(0)
            loss = torch.nn.functional.kl_div(student(images).log_softmax(1), target, reduction="batchmean")
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()

    return work


# --- whole commands --------------------------------------------------------------------------------------------------


def commands(bench: OnCpu) -> Iterator[Row]:
    """Start-up, and what a run costs when its results are in the storage."""
    python = [sys.executable]
    call = "from mosaic_ray.cli import main; main()"
    env = os.environ | {"PYTHONPATH": str(ROOT)}

    def spent(*words: str) -> float:
        began = time.perf_counter()
        subprocess.run([*python, *words], env=env, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        return time.perf_counter() - began

    def medians(*ways: tuple[str, ...]) -> list[float]:
        times = [[spent(*way) for way in ways] for _ in range(1 if bench.pretend else 5)]
        return [statistics.median(of) for of in zip(*times, strict=True)]

    empty, module, shown = medians(("-c", "pass"), ("-c", "import mosaic_ray"), ("-c", call, "--help"))
    yield Row("commands", "python -c pass", empty, "s")
    yield Row("commands", "import mosaic_ray", module, "s", module / empty, "python -c pass")
    yield Row("commands", "mosaic --help", shown, "s", shown / empty, "python -c pass")
    with tempfile.TemporaryDirectory(prefix="mb", dir="/tmp") as folder:
        words = ["--preset", "demo", "--storage", folder, *(QUICK if bench.pretend else [])]
        first = spent("-c", call, "run", *words)
        again, shown = medians(("-c", call, "run", *words), ("-c", call, "--help"))
        yield Row("commands", "the demo, first time", first, "s")
        yield Row("commands", "the demo, all stages in the storage", again, "s", again / first, "first time")
        stages = sum(1 for place in Path(folder, "objects").iterdir() if place.is_dir())
        yield Row("commands", "a stage that is in the storage", (again - shown) / stages, "s")


def whole_run(bench: OnCpu) -> Iterator[Row]:
    """The small schedule of Fashion-MNIST from the command to its table, and of its stages the longest ones."""
    if not bench.pretend and not Path(os.environ.get("MOSAIC_DATA", ""), "FashionMNIST").is_dir():
        yield Row("whole run", "fmnist_small", status="skipped", note="MOSAIC_DATA has no Fashion-MNIST")
        return
    with tempfile.TemporaryDirectory(prefix="mb", dir="/tmp") as folder:
        preset = ["--preset", "demo", *QUICK] if bench.pretend else ["--preset", "fmnist_small"]
        words = ["run", *preset, "--storage", folder, "--name", "whole"]
        began = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "mosaic_ray", *words], env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        whole = time.perf_counter() - began
        summary = json.loads(Path(folder, "runs", "whole", "summary.json").read_text())
    yield Row("whole run", "fmnist_small", whole, "s")
    taken = {name: stage["seconds"] for name, stage in summary["stages"].items()}
    for name, seconds in sorted(taken.items(), key=lambda item: -item[1])[:5]:
        yield Row("whole run", f"of it: {name}", seconds, "s", seconds / whole, "the run")


QUICK = [
    *("--host", "serial", "--clients", "2"),
    *(word for knob in ("warmup.num_rounds=1", "generator.steps=1", "meta.updates=1", "distill.steps=1",
                        "finetune.num_rounds=1") for word in ("--set", knob)),
]  # fmt: skip

#: The checks in order, each with the seconds that it may take.
CHECKS: dict[str, tuple[Callable[[OnCpu], Iterator[Row]], float]] = {
    "rounds": (few_clients, 900), "larger rounds": (more_clients, 1200), "growth": (growth, 900),
    "training": (training, 300), "many clients": (many_clients, 300), "generators": (generators, 300),
    "server": (server, 300), "commands": (commands, 600), "whole run": (whole_run, 3600),
}  # fmt: skip


@click.command()
@click.option("--out", help="JSON file to write.  [default: bench.json beside this file; quick: none]")
@click.option("--only", help=f"Checks to run, joined by commas: {', '.join(CHECKS)}.")
@click.option("--quick", is_flag=True, help="Run everything at tiny sizes; figures say nothing.")
@click.option("--way", hidden=True)
@click.option("--work", hidden=True)
@click.option("--check", hidden=True)
@click.argument("rows_file", required=False)
def main(
    out: str | None, only: str | None, quick: bool, way: str | None, work: str | None, check: str | None,
    rows_file: str | None,
) -> None:  # fmt: skip
    """Measure Mosaic on this machine's CPUs. Exits with 1 if a check failed."""
    if way and work:  # this process runs these rounds
        click.echo(json.dumps(WAYS[way](*map(int, work.split(",")))))
        return
    if check and rows_file:  # this process is that check's
        import torch

        torch.set_num_threads(1)
        with open(rows_file, "a", encoding="utf-8", buffering=1) as file:
            for row in CHECKS[check][0](OnCpu(quick)):
                file.write(json.dumps(dataclasses.asdict(row)) + "\n")
        return
    names = [name.strip() for name in only.split(",")] if only else list(CHECKS)
    if unknown := set(names) - set(CHECKS):
        raise click.BadParameter(f"{', '.join(sorted(unknown))}: there are {', '.join(CHECKS)}", param_hint="--only")
    rows: list[Row] = []
    for name in names:
        click.echo(name, err=True)
        command = [sys.executable, str(HERE), *(["--quick"] if quick else []), "--check", name]
        rows += watched(name, command, CHECKS[name][1])
    failed = sum(row.status == "failed" for row in rows)
    click.echo(as_table(rows))
    if quick:
        click.echo("Tiny sizes: the figures only show that every check runs.")
    if out or not quick:
        facts = {"quick": quick, "rows": [dataclasses.asdict(row) for row in rows]}
        Path(out or HERE.parent / "bench.json").write_text(json.dumps(facts, indent=1) + "\n")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
