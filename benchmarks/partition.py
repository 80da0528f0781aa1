"""Measure each sampler's time on CIFAR-10-sized labels, and the partition that it makes.

    python benchmarks/partition.py --repeats 3

50,000 labels of 10 equal classes in random order; defaults but for what the table names (a repair after 200 draws where
a client stays too small). Seconds are of one core, the median of the repeats, each with a seed of its own.
"""

from __future__ import annotations

import statistics
import time

import click
import numpy as np

from mosaic_ray.config.schema import PartitionConfig
from mosaic_ray.data.partition import SAMPLERS, label_counts, partition, skew

#: Clients, omega, and the seconds that ``reference`` and ``dirichlet`` should stay below.
CASES = ((10, 0.1, None), (100, 0.01, 1.0), (1000, 0.1, 5.0))


@click.command()
@click.option("--repeats", default=3, show_default=True)
def main(repeats: int) -> None:
    """Print a Markdown table."""
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 5000))
    head = ["sampler", "clients", "omega", "seconds", "at most", "skew, nats", "sizes"]
    click.echo("| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|")
    for sampler in SAMPLERS:
        for clients, omega, limit in CASES:
            config, times = PartitionConfig(num_clients=clients, omega=omega, sampler=sampler), []
            for seed in range(repeats):
                began = time.perf_counter()
                shards = partition(labels, config, seed, 10)
                times.append(time.perf_counter() - began)
            counts = label_counts(labels, shards, 10)
            sizes = counts.sum(axis=1)
            wanted = f"{limit:g}" if limit and sampler in ("reference", "dirichlet") else ""
            row = [sampler, str(clients), f"{omega:g}", f"{statistics.median(times):.3f}", wanted]
            row += [f"{skew(counts):.2f}", f"{sizes.min()} to {sizes.max()}"]
            click.echo("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
