"""`mosaic store`: list, free and verify the results in a storage."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from ..core.text import visible
from .group import CommandGroup, say
from .options import common_options, print_result
from .request import parse_age

if TYPE_CHECKING:
    from ..storage.store import Store


@click.group(cls=CommandGroup)
def store() -> None:
    """List, free and verify the results in a storage."""


@store.command("ls")
@common_options("storage", "as_json")
def list_results(storage: str, as_json: bool) -> None:
    """List stage results: key, size, the time it was stored, and the runs and trials that use it."""
    opened = _open(storage)
    from ..report.store_tables import listed, listing
    from ..runs.provenance import keys_used
    from ..storage.gc import scan

    inventory = scan(opened, keys_used)
    print_result(as_json, {"storage": opened.uri, **listed(inventory)}, *listing(inventory))


@store.command("gc")
@common_options("storage", "as_json")
@click.option(
    "--older-than", default="1d", show_default=True, metavar="AGE",
    help="Keep younger results that no run uses yet: 90s, 30m, 12h, 7d.",
)  # fmt: skip
@click.option("--dry-run", is_flag=True, help="List what would be removed; remove nothing.")
def free_results(storage: str, older_than: str, dry_run: bool, as_json: bool) -> None:
    """Remove results that no run or trial uses, checkpoints of finished stages, and files of killed writers.

    Results that a process computes right now stay. While runs are active in this storage, so do results that no
    finished run names. A run that needs a removed result computes it again.
    """
    age = parse_age(older_than)
    opened = _open(storage)
    from ..report.store_tables import freed, freed_facts
    from ..runs.provenance import keys_used
    from ..storage.gc import collect_garbage

    plan = collect_garbage(opened, keys_used, age, dry_run=dry_run)
    print_result(as_json, {"storage": opened.uri, **freed_facts(plan, dry_run)}, *freed(plan, dry_run))


@store.command("verify")
@common_options("storage", "as_json")
@click.pass_context
def verify_results(ctx: click.Context, storage: str, as_json: bool) -> None:
    """Hash every byte of all results and checkpoints, and list the damaged ones. Exits with 1 if there are any."""
    opened = _open(storage)
    from ..report.store_tables import verdict
    from ..storage.gc import verify

    found = verify(opened)
    counts = {"results": found.results, "bytes": found.size, "damaged": found.damaged}
    print_result(as_json, {"storage": opened.uri, **counts}, *verdict(found))
    ctx.exit(bool(found.damaged))


def _open(storage: str) -> Store:
    from ..storage.store import Store

    return Store(storage, create=False, log=lambda text: say(f"warning: {visible(text)}"))
