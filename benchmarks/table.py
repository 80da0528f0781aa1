"""Runs one preset over methods, omegas and seeds, and prints the table of accuracies (mean ± sd, and each seed's).

    python benchmarks/table.py --preset fmnist_small --omegas 0.1,0.01 --seeds 0,1,2 --storage ./mosaic_runs

Every cell is an ordinary ``mosaic run``, so stored results are not computed again. Accuracies are on
test images, for reporting alone.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys

import click

ROLES = ("initial", "teacher", "distilled", "final", "control")


def summary(words: list[str]) -> dict:
    """The summary of one ``mosaic run``; progress goes to standard error."""
    command = [sys.executable, "-m", "mosaic_ray", "run", *words, "--json"]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


def cell(values: list[float | None], digits: int = 1) -> str:
    """``71.7 ± 2.0`` in per cent, a dash where there is nothing."""
    found = [100 * v for v in values if v is not None]
    if not found:
        return "–"
    spread = f" ± {statistics.stdev(found):.{digits}f}" if len(found) > 1 else ""
    return f"{statistics.mean(found):.{digits}f}{spread}"


@click.command()
@click.option("--preset", default="demo", show_default=True)
@click.option("--methods", default="mosaic,prototype_head", show_default=True)
@click.option("--omegas", default="0.1", show_default=True)
@click.option("--seeds", default="0,1,2", show_default=True)
@click.option("--storage", default="./mosaic_runs", show_default=True)
@click.option("--set", "sets", multiple=True, help="Passed on to every run.")
def main(preset: str, methods: str, omegas: str, seeds: str, storage: str, sets: tuple[str, ...]) -> None:
    """Print a Markdown table."""
    head = ["omega", "method", *ROLES, "final − control", "each seed's final − control"]
    click.echo("| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|")
    for omega in omegas.split(","):
        for method in methods.split(","):
            runs = []
            for seed in seeds.split(","):
                words = ["--preset", preset, "--omega", omega, "--method", method, "--seed", seed, "--storage", storage]
                runs.append(summary([*words, *(w for s in sets for w in ("--set", s))])["accuracy"])
            gains = [r["final"] - r["control"] for r in runs]
            row = [omega, method, *(cell([r[role] for r in runs]) for role in ROLES), cell(gains)]
            click.echo("| " + " | ".join([*row, ", ".join(f"{100 * g:+.1f}" for g in gains)]) + " |")


if __name__ == "__main__":
    main()
