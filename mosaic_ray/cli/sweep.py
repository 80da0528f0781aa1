"""`mosaic sweep`, `mosaic compare` and `mosaic spaces`: many experiments that share what they have in common."""

from __future__ import annotations

import contextlib
import json
import sys
from typing import TYPE_CHECKING, Any

import click

from ..core.errors import RequestError
from .options import common_options
from .request import parse_address

if TYPE_CHECKING:
    from ..sweeps.runner import DryRun, SweepRequest

_SEEDS = "Repeat every {} with each of these seeds."
_AT_ONCE = click.option("--max-concurrent", metavar="N", help="Trials at once, at most; as many as fit by default.")
_DRY_RUN = click.option(
    "--dry-run", is_flag=True, help="Say what would run, where and how much work it is; run nothing."
)
_PLACE = common_options("storage", "name", "address", "host", "strict_health", "fresh", "as_json")


def register(door: click.Group) -> None:
    """The commands below ``door``."""
    for command in (_sweep, _compare, _spaces):
        door.add_command(command)


@click.command("sweep")
@common_options("preset", "algorithm", "dataset", "skip_bad", "clients", "omega", "method", "seed", "sets", "config")
@click.option(
    "--space",
    default="lambdas_omega",
    show_default=True,
    metavar="NAME|module:function|FILE.py",
    help="What to try; see `mosaic spaces`.",
)
@click.option("--search", metavar="grid|random|optuna", help="How points are chosen; the space has a default.")
@click.option("--samples", metavar="N", help="Points of a random or optuna search.")
@click.option("--seeds", metavar="S,S,...", help=_SEEDS.format("point"))
@click.option("--scheduler", metavar="fifo|asha", default="fifo", show_default=True, help="asha stops weak ones early.")
@_AT_ONCE
@_DRY_RUN
@_PLACE
def _sweep(
    space: str,
    search: str | None,
    samples: str | None,
    seeds: str | None,
    scheduler: str,
    max_concurrent: str | None,
    **words: Any,
) -> None:
    """Run many experiments that share what they have in common; the same command again resumes them."""
    from .request import sweep_request

    place = _place(words)
    request = sweep_request(
        space, words, search=search, samples=samples, seeds=seeds, scheduler=scheduler, max_concurrent=max_concurrent
    )
    _go(request, **place)


@click.command("compare")
@click.option(
    "--methods", default="fedavg,prototype_head,mosaic", show_default=True, metavar="M,M,...",
    help="Methods, optimisers (fedrolex), and methods over optimisers (mosaic+fedrolex).",
)  # fmt: skip
@common_options("preset", "algorithm", "dataset", "skip_bad", "clients", "omega", "sets", "config")
@click.option("--seeds", default="0,1,2", show_default=True, metavar="S,S,...", help=_SEEDS.format("method"))
@_AT_ONCE
@_DRY_RUN
@_PLACE
def _compare(methods: str, seeds: str, max_concurrent: str | None, **words: Any) -> None:
    """Run several methods on the same partitions: one table, mean and spread over the seeds; resumable."""
    from .request import compare_plan, sweep_request

    place, plan = _place(words), compare_plan(methods)
    request = sweep_request("compare", words | {"seed": None}, plan=plan, seeds=seeds, max_concurrent=max_concurrent)
    _go(request, **place)


def _place(words: dict[str, Any]) -> dict[str, Any]:
    """Taken out of ``words``: where a sweep goes and what is done with it; the rest says what is tried."""
    names = "storage", "name", "address", "strict_health", "fresh", "as_json", "dry_run"
    place = {name: words.pop(name) for name in names}
    return place | {"address": parse_address(place["address"])}


def _go(
    request: SweepRequest,
    storage: str,
    name: str | None,
    address: str | None,
    strict_health: bool,
    fresh: bool,
    as_json: bool,
    dry_run: bool,
) -> None:
    from ..sweeps import runner as sweep_runner

    if dry_run and as_json:
        raise RequestError("--json: a dry run has no results to give; leave it, or --dry-run, out")
    if dry_run:
        _show_dry_run(sweep_runner.dry_run(request, storage, name, address))
        return
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        outcome = sweep_runner.run(
            request, storage=storage, name=name, address=address, fresh=fresh, strict_health=strict_health
        )
    if as_json:
        click.echo(json.dumps(outcome.as_dict(), indent=2))
    else:
        from ..report.sweep_table import sweep_table

        _print(sweep_table(outcome.results, outcome.setting, outcome.swept, outcome.place))
    outcome.raise_failures()


def _show_dry_run(found: DryRun) -> None:
    from ..report.tables import work_table

    trials = f"{found.points * found.seeds} trials ({found.points} points x {found.seeds} seeds)"
    lines = [f"sweep {found.name}: space {found.space}, {found.search} search, {trials}", *found.resources]
    if found.work is None:
        lines.append("its points depend on results, so the work is not known beforehand")
    for part in lines if found.work is None else (*lines, "", work_table(found.work)):
        _print(part, soft_wrap=isinstance(part, str))


def _print(part: Any, **how: Any) -> None:
    from rich.console import Console

    Console(markup=False, emoji=False, highlight=False).print(part, crop=False, **how)


@click.command("spaces")
def _spaces() -> None:
    """List the sweep spaces that ship with the package."""
    from ..sweeps.space import list_spaces
    from .options import listing

    listing("Spaces", list_spaces())
    click.echo("mosaic sweep --space NAME; or --space module:function, --space FILE.py with a function plan()")
