"""Measure the time that a sweep saves: ratios of wall times measured in turn, and counts of computed stages.

    python benchmarks/sweep.py shared --points 6        # the lambda grid against separate `mosaic run --fresh`
    python benchmarks/sweep.py concurrent --repeats 3   # two trials at once against the same two in turn

Storage is a new temporary folder each time, so nothing is found that was not computed in the measurement.
"""

from __future__ import annotations

import itertools
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
import pyarrow.parquet as pq

MOSAIC = [sys.executable, "-m", "mosaic_ray"]
STAGES = ("partition", "warmup", "generators", "prototypes", "teacher", "distill", "control")


def timed(*words: str) -> float:
    """Seconds that a command takes; its own words go to standard error."""
    began = time.perf_counter()
    subprocess.run([*MOSAIC, *words], check=True, stdout=sys.stderr)
    return time.perf_counter() - began


def counts(storage: str) -> dict[str, int]:
    """Trials of the one sweep under ``storage`` that computed each stage."""
    table = pq.read_table(next(Path(storage).glob("sweeps/*/results.parquet")))
    return {stage: sum(not cached for cached in table.column(f"cached_{stage}").to_pylist()) for stage in STAGES}


@click.group()
def main() -> None:
    """Measure a sweep."""


@main.command()
@click.option("--points", default=6, show_default=True, help="Separate runs to measure; 27 is all of the grid.")
@click.option("--preset", default="demo", show_default=True)
def shared(points: int, preset: str) -> None:
    """The 27-point grid of lambdas at one omega and seed, against separate fresh runs of ``points`` of them."""
    grid = list(itertools.product((0.5, 1.0, 2.0), (2.0, 5.0, 10.0), (5.0, 10.0, 15.0)))
    with tempfile.TemporaryDirectory() as storage:
        together = timed("sweep", "--space", "lambdas_grid", "--preset", preset, "--storage", storage)
        computed = counts(storage)
    alone = []
    for lambda_e, lambda_d, lambda_i in grid[:: -(-len(grid) // points)][:points]:
        names = {"lambda_e": lambda_e, "lambda_d": lambda_d, "lambda_i": lambda_i}
        sets = [word for name, value in names.items() for word in ("--set", f"generator.{name}={value}")]
        # the sweep's own validation split, so that both do the same work
        sets += ["--set", "partition.validation_fraction=0.1"]
        with tempfile.TemporaryDirectory() as storage:
            alone.append(timed("run", "--preset", preset, "--fresh", "--storage", storage, *sets))
    separate = statistics.fmean(alone) * len(grid)
    click.echo(f"computed by how many of the 27 trials: {computed}")
    click.echo(
        f"27 points together / 27 fresh runs: {together / separate:.2f} ({together:.0f} s / {separate:.0f} s, "
        f"the latter from {len(alone)} runs of {min(alone):.0f} to {max(alone):.0f} s)"
    )


@main.command()
@click.option("--repeats", default=3, show_default=True)
@click.option("--preset", default="demo", show_default=True)
def concurrent(repeats: int, preset: str) -> None:
    """Two trials with nothing in common but the data (two omegas), at once and in turn, alternating."""
    times: dict[str, list[float]] = {"1": [], "2": []}
    with tempfile.TemporaryDirectory() as folder:
        space = Path(folder) / "two.py"
        space.write_text(
            "from mosaic_ray.sweeps.space import Choice, SweepPlan\n\n\ndef plan():\n"
            "    return SweepPlan('two omegas', knobs={'partition.omega': Choice((0.1, 1.0))})\n"
        )
        for _, width in itertools.product(range(repeats), times):
            with tempfile.TemporaryDirectory() as storage:
                words = ["--space", str(space), "--preset", preset, "--max-concurrent", width, "--storage", storage]
                times[width].append(timed("sweep", *words))
    in_turn, at_once = statistics.median(times["1"]), statistics.median(times["2"])
    shown = "; ".join(f"{width} at once: {', '.join(f'{t:.0f}' for t in found)} s" for width, found in times.items())
    click.echo(f"two at once / in turn: {at_once / in_turn:.2f} (medians of {repeats}: {shown})")


if __name__ == "__main__":
    main()
