"""`mosaic experiment`: small experiments about one part of Mosaic, on the stages of ordinary runs."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from importlib import import_module
from typing import Any

import click

from .group import CommandGroup, resume_command
from .options import RunOptions, common_options, print_result, refuse_idle_address, run_options, stdout_for_json
from .request import ConfigOptions, gpus_at, parse_config, parse_count, parse_seeds

#: The default of --seeds.
SEEDS = (0, 1, 2)

_SEEDS = click.option("--seeds", metavar="S,S,...", help="Repeat with each of these seeds.  [default: 0,1,2]")
_PARTITIONED = common_options(
    "preset", "algorithm", "dataset", "skip_bad", "clients", "omega", "sampler", "sets", "config", "host"
)


@click.group(cls=CommandGroup)
def experiment() -> None:
    """Small experiments about one part of Mosaic, on the stages of ordinary runs."""


@experiment.command("generator-quality")
@common_options("preset", "algorithm", "dataset", "skip_bad", "sets", "config", "host")
@_SEEDS
@click.option("--steps", metavar="N", help="Generator steps; another spelling of generator.steps.")
@click.option("--images", metavar="N", help="Images of each kind.  [default: half of those held out, at most 2000]")
@click.option("--inception", is_flag=True, help="Add Inception v3's FID; its weights must be on the disk.")
@run_options()
@click.pass_context
def generator_quality(
    ctx: click.Context, seeds: str | None, steps: str | None, images: str | None, inception: bool, place: RunOptions,
    **typed: Any,
) -> None:  # fmt: skip
    """Train a generator on its own; report classifier-FID (of real images too), IS, coverage and a picture."""
    if steps is not None:
        typed["sets"] = (*typed["sets"], f"generator.steps={parse_count('steps', steps)}")
    options = {"images": parse_count("images", images), "inception": inception}
    _run_study(ctx, "generator_quality", seeds, place, typed, options)


@experiment.command("moe-weights")
@_PARTITIONED
@_SEEDS
@run_options()
@click.pass_context
def moe_weights(ctx: click.Context, seeds: str | None, place: RunOptions, **typed: Any) -> None:
    """Estimate the experts' weights from synthetic images alone, and compare them with the true ones."""
    _run_study(ctx, "moe_weights", seeds, place, typed, {})


@experiment.command("meta-training")
@_PARTITIONED
@_SEEDS
@run_options()
@click.pass_context
def meta_training(ctx: click.Context, seeds: str | None, place: RunOptions, **typed: Any) -> None:
    """Train the meta model on prototypes, and on synthetic images with two kinds of label; compare the teachers."""
    _run_study(ctx, "meta_training", seeds, place, typed, {})


@experiment.command("generator-worth")
@_PARTITIONED
@_SEEDS
@click.option(
    "--equal-compute", is_flag=True, help="Add fedavg with as many more rounds as the generators cost the clients."
)
@run_options()
@click.pass_context
def generator_worth(
    ctx: click.Context, seeds: str | None, equal_compute: bool, place: RunOptions, **typed: Any
) -> None:
    """Rehearse in the closing rounds with trained generators, untrained ones (a placebo) and none; compare in pairs."""
    _run_study(ctx, "generator_worth", seeds, place, typed, {"equal_compute": equal_compute})


def _run_study(
    ctx: click.Context, name: str, seeds: str | None, place: RunOptions, typed: ConfigOptions,
    options: Mapping[str, Any],
) -> None:  # fmt: skip
    """Run the study in the module ``name`` with its own ``options``, and print its results."""
    chosen = parse_seeds(seeds, None) or SEEDS
    study = import_module(f"...studies.{name}", __name__)
    config = parse_config(study.BASE, has_gpus=gpus_at(place.address), **typed)
    refuse_idle_address(ctx, place, config.runtime.host)
    from ..studies.harness import run_study, table

    with stdout_for_json(place.as_json):
        found = run_study(
            study.STUDY, config, chosen, options, storage=place.storage, name=place.name, address=place.address,
            fresh=place.fresh, command=shlex.join(resume_command(ctx.obj)),
            progress=None if sys.stderr.isatty() else False, track=place.track,
        )  # fmt: skip
    print_result(place.as_json, found, table(study.STUDY, found), f"\nfiles   {found['paths']['results']}")
