"""`mosaic experiment`: small experiments about one part of Mosaic, on the stages of ordinary runs."""

from __future__ import annotations

import contextlib
import json
import shlex
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

import click

from ..config.presets import ALGORITHMS
from .request import parse_address, parse_config, parse_count, parse_seeds

#: The scale that suits a data set on a laptop, where none is named; the demo's for all others.
SCALE_OF = {"mnist": "fmnist_small", "fmnist": "fmnist_small", "svhn": "cifar10_small", "cifar10": "cifar10_small"}
#: Where none are asked for.
SEEDS = (0, 1, 2)

Takes = Callable[..., Callable[[Callable[..., Any]], Callable[..., Any]]]

_SEEDS = click.option("--seeds", metavar="S,S,...", help="Repeat with each of these seeds.  [default: 0,1,2]")


def register(door: click.Group, common_options: Takes, resume: Callable[[list[str]], list[str]]) -> None:
    """The group `experiment` below ``door``; ``common_options`` adds options that other commands have too."""
    group = type(door)("experiment", help=__doc__.partition(": ")[2].capitalize(), invoke_without_command=True)
    group.callback = click.pass_context(lambda ctx: ctx.invoked_subcommand or click.echo(ctx.get_help()))
    place = common_options("storage", "name", "address", "host", "fresh", "as_json")
    alone = common_options("preset", "algorithm", "dataset", "skip_bad", "sets", "config")
    spread = common_options(
        "preset", "algorithm", "dataset", "skip_bad", "clients", "omega", "sampler", "sets", "config"
    )

    @group.command("generator-quality")
    @alone
    @_SEEDS
    @click.option("--steps", metavar="N", help="Generator steps; another spelling of generator.steps.")
    @click.option("--images", metavar="N", help="Images of each kind.  [default: half of those held out, at most 2000]")
    @click.option("--inception", is_flag=True, help="Inception v3's FID as well, where its weights are on the disk.")
    @place
    @click.pass_context
    def generator_quality(
        ctx: click.Context, steps: str | None, images: str | None, inception: bool, **words: Any
    ) -> None:
        """Train a generator on its own; classifier-FID beside real images' floor, IS, coverage, classes, a picture."""
        if steps is not None:
            words["sets"] = (*words["sets"], f"generator.steps={parse_count('steps', steps)}")
        options = {"images": parse_count("images", images), "inception": inception}
        _conduct("generator_quality", resume(ctx.obj), words, options)

    @group.command("moe-weights")
    @spread
    @_SEEDS
    @place
    @click.pass_context
    def moe_weights(ctx: click.Context, **words: Any) -> None:
        """Estimate the experts' weights from synthetic images alone, and compare them with the true ones."""
        _conduct("moe_weights", resume(ctx.obj), words, {})

    @group.command("meta-training")
    @spread
    @_SEEDS
    @place
    @click.pass_context
    def meta_training(ctx: click.Context, **words: Any) -> None:
        """Train the meta model on prototypes, and on synthetic images with two kinds of label; compare the teachers."""
        _conduct("meta_training", resume(ctx.obj), words, {})

    door.add_command(group)


def _conduct(module: str, command: list[str], words: dict[str, Any], options: Mapping[str, Any]) -> None:
    """Run a study as ``words`` ask, and show what came out."""
    places = {name: words.pop(name) for name in ("storage", "name", "address", "fresh")}
    as_json, seeds = words.pop("as_json"), words.pop("seeds")
    places["address"] = parse_address(places["address"])
    preset, scale = words["preset"], SCALE_OF.get(words["dataset"] or "")
    if scale and not words["config"] and (preset is None or preset in ALGORITHMS):
        words["preset"] = f"{scale}+{preset}" if preset else scale
    chosen = parse_seeds(seeds, None) or SEEDS
    study = import_module(f"...studies.{module}", __name__)
    config = parse_config(**words, base=study.BASE)
    from ..studies.harness import run_study, table

    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        found = run_study(
            study.STUDY, config, chosen, options, command=shlex.join(command),
            progress=None if sys.stderr.isatty() else False, **places,
        )  # fmt: skip
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    from rich.console import Console

    console = Console(markup=False, emoji=False, highlight=False)
    console.print(table(study.STUDY, found), crop=False)
    console.print(f"\nfiles   {found['paths']['results']}", crop=False, soft_wrap=True)
