"""`mosaic store`: what a storage holds, what of it may go, and whether it is sound."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import click

from ..core.errors import RequestError

if TYPE_CHECKING:
    from ..storage.store import Store

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}

_STORAGE = click.option(
    "--storage", default="./mosaic_runs", show_default=True, metavar="PATH|URI", help="Where results lie."
)
_JSON = click.option("--json", "as_json", is_flag=True, help="The same as JSON.")


def register(door: click.Group) -> None:
    """The group `store` below ``door``."""
    group = type(door)("store", help=__doc__.partition(": ")[2].capitalize(), invoke_without_command=True)
    group.callback = click.pass_context(_help)
    for command in (_list, _free, _verify):
        group.add_command(command)
    door.add_command(group)


def _help(ctx: click.Context) -> None:
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


@click.command("ls")
@_STORAGE
@_JSON
def _list(storage: str, as_json: bool) -> None:
    """List stage results: what each is, its size, when it was stored, and which runs and trials use it."""
    store = _open(storage)
    from ..report.store_tables import listed, listing
    from ..runs.provenance import keys_used
    from ..storage.gc import scan

    holdings = scan(store, keys_used)
    _say(store, as_json, lambda: listed(holdings), lambda: listing(holdings))


@click.command("gc")
@_STORAGE
@click.option(
    "--older-than", default="1d", show_default=True, metavar="AGE",
    help="Keep younger results that no run uses yet: 90s, 30m, 12h, 7d.",
)  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Say what would go; remove nothing.")
@_JSON
def _free(storage: str, older_than: str, dry_run: bool, as_json: bool) -> None:
    """Free what no run or trial uses, checkpoints of finished stages, and what killed writers left.

    Never what somebody computes right now, nor, while runs are at work here, results that no finished run names yet.
    What went too early is computed again by the run that needs it.
    """
    age = re.fullmatch("([0-9]{1,6})([smhd])", older_than)
    if not age:
        raise RequestError(f"--older-than {older_than}: it takes a number and s, m, h or d, such as 12h or 7d")
    store = _open(storage)
    from ..report.store_tables import freed, freed_facts
    from ..runs.provenance import keys_used
    from ..storage.gc import collect_garbage

    plan = collect_garbage(store, keys_used, int(age[1]) * _UNITS[age[2]], dry_run=dry_run)
    _say(store, as_json, lambda: freed_facts(plan, dry_run), lambda: freed(plan, dry_run))


@click.command("verify")
@_STORAGE
@_JSON
@click.pass_context
def _verify(ctx: click.Context, storage: str, as_json: bool) -> None:
    """Hash every byte of all results and checkpoints, and list what is damaged. Exits with 1 where something is."""
    store = _open(storage)
    from ..report.store_tables import verdict
    from ..storage.gc import verify

    found = verify(store)
    facts = {"results": found.results, "bytes": found.size, "damaged": found.damaged}
    _say(store, as_json, lambda: facts, lambda: verdict(found))
    ctx.exit(bool(found.damaged))


def _open(storage: str) -> Store:
    from ..storage.store import Store

    return Store(storage, create=False, log=lambda text: click.echo(f"warning: {text}", err=True))


def _say(store: Store, as_json: bool, facts: Callable[[], dict[str, Any]], parts: Callable[[], Sequence[Any]]) -> None:
    if as_json:
        click.echo(json.dumps({"storage": store.uri, **facts()}, indent=2))
        return
    from rich.console import Console

    console = Console(markup=False, emoji=False, highlight=False)
    for part in parts():
        console.print(part, crop=False, soft_wrap=isinstance(part, str))
