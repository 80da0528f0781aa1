"""Measure the CPU time that three choices save: the layout of convolutions, keeping freed memory, partial passes.

    python benchmarks/training.py

Each is measured against the way without it, in turn, in the CPU time of this process (user and system), which other
jobs on the machine disturb less than wall time; medians of the pairs' ratios, with their range.
"""

from __future__ import annotations

import copy
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable

import click
import torch
from torch import nn

from mosaic_ray.config.registry import CLASSIFIERS
from mosaic_ray.config.schema import GeneratorConfig, ModelConfig
from mosaic_ray.core.types import DataFacts
from mosaic_ray.execution.malloc import keep_freed
from mosaic_ray.federated.local_training import Shard
from mosaic_ray.federated.static_batch_norm import moments, passes
from mosaic_ray.models.classifiers import build_classifier, norm_depths
from mosaic_ray.models.discriminator import build_discriminator
from mosaic_ray.models.generator import build_generator

FACTS = DataFacts("noise", 10, 3, 32, (0.5,) * 3, (0.25,) * 3)
SHAPE = (FACTS.channels, FACTS.image_size, FACTS.image_size)


def spent(work: Callable[[], object]) -> float:
    """CPU seconds of ``work``, in user mode and in the kernel."""
    before = resource.getrusage(resource.RUSAGE_SELF)
    work()
    after = resource.getrusage(resource.RUSAGE_SELF)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def report(what: str, ways: tuple[Callable[[], object], Callable[[], object]], pairs: int) -> None:
    """One line: the first way's time over the second's."""
    for way in ways:
        way()
    ratios = [spent(ways[0]) / spent(ways[1]) for _ in range(pairs)]
    print(f"{what:52} {statistics.median(ratios):.2f}  ({min(ratios):.2f} to {max(ratios):.2f})", flush=True)


def steps(network: nn.Module, inputs: torch.Tensor, count: int = 5) -> Callable[[], None]:
    """``count`` training steps."""
    optimiser = torch.optim.SGD(network.parameters(), lr=1e-4)

    def work() -> None:
        for _ in range(count):
            optimiser.zero_grad()
            network(inputs).float().square().mean().backward()
            optimiser.step()

    return work


def layouts(pairs: int) -> None:
    """Training steps with convolutions stored by pixel, over the same stored by row."""
    config = GeneratorConfig(ngf=16, ndf=16)
    images = torch.randn(64, *SHAPE)
    makers: dict[str, tuple[nn.Module, torch.Tensor]] = {
        name: (build_classifier(ModelConfig(name), 10, 3, 32), images) for name in CLASSIFIERS
    }
    makers["generator, ngf 16"] = build_generator(config, 3, 32), torch.randn(64, config.latent_dim)
    makers["discriminator, ndf 16"] = build_discriminator(config, 3, 32), images
    for name, (network, inputs) in makers.items():
        by_row = copy.deepcopy(network).to(memory_format=torch.contiguous_format)
        report(f"by pixel / by row: {name}", (steps(network, inputs), steps(by_row, inputs)), pairs)


def statistics_passes(pairs: int) -> None:
    """Exact static batch norm: passes over only the layers that they make exact, over passes that read every layer."""
    for name, count in (("cnn", 1000), ("resnet18", 300)):
        shard = Shard(torch.randint(0, 256, (count, *SHAPE), dtype=torch.uint8), torch.zeros(count, dtype=torch.long))
        model = build_classifier(ModelConfig(name), 10, 3, 32)
        depths = norm_depths(ModelConfig(name), 10, 3, 32)

        def sparing(model=model, shard=shard, depths=depths) -> None:
            for layers in passes(depths):
                moments(model, shard, FACTS, "fp32", layers)

        def every(model=model, shard=shard, depths=depths) -> None:
            for _ in depths:
                moments(model, shard, FACTS, "fp32")

        report(f"sparing / every layer in every pass: {name}", (sparing, every), pairs)


def freed(pairs: int) -> None:
    """A process of its own for each way: the allocator's habits stay."""
    ways = [
        float(subprocess.run([sys.executable, __file__, "--one", way], check=True, capture_output=True).stdout)
        for _ in range(pairs)
        for way in ("kept", "as usual")
    ]
    ratios = [kept / usual for kept, usual in zip(ways[::2], ways[1::2], strict=True)]
    print(
        f"{'freed memory kept / as usual: cnn, widths 1 to 1/8':52} "
        f"{statistics.median(ratios):.2f}  ({min(ratios):.2f} to {max(ratios):.2f})"
    )


def one(way: str) -> None:
    """Return the CPU time of clients of four widths in turn; their buffers have different sizes."""
    if way == "kept":
        keep_freed()
    images = torch.randn(64, *SHAPE)
    clients = [steps(build_classifier(ModelConfig("cnn", width=w), 10, 3, 32), images) for w in (16, 8, 4, 2)]
    for work in clients:
        work()
    print(spent(lambda: [work() for _ in range(3) for work in clients]))


@click.command()
@click.option("--pairs", default=7, show_default=True)
@click.option("--one", "way", hidden=True)
def main(pairs: int, way: str | None) -> None:
    """Run it."""
    torch.set_num_threads(1)
    if way:
        one(way)
        return
    layouts(pairs)
    statistics_passes(pairs)
    freed(pairs)


if __name__ == "__main__":
    main()
