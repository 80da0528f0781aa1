"""`mosaic runs` and `mosaic diff`: find one's way among the runs of a storage."""

from __future__ import annotations

import click

from ..config.registry import STATUSES
from ..core.errors import RequestError
from .options import common_options, print_result
from .request import parse_count

#: Most runs in a table without ``--limit``.
SHOWN = 40


@click.command()
@common_options("storage")
@click.option(
    "--status", "statuses", multiple=True, metavar="STATUS",
    help=f"Only those with this status, one of {', '.join(STATUSES)}; repeatable.",
)  # fmt: skip
@click.option("--dataset", metavar="D", help="Only those on this data set.")
@click.option("--method", metavar="M", help="Only those of this method or strategy.")
@click.option("--sweep", metavar="NAME", help="The trials of this sweep instead.")
@click.option("--limit", metavar="N", help=f"The newest N.  [default: {SHOWN} in the table, else all]")
@click.option("--csv", "as_csv", is_flag=True, help="CSV on standard output, with every role's accuracy.")
@common_options("as_json")
def runs(
    storage: str, statuses: tuple[str, ...], dataset: str | None, method: str | None, sweep: str | None,
    limit: str | None, as_csv: bool, as_json: bool,
) -> None:  # fmt: skip
    """List runs, newest first: status, data, method, test accuracies, hours of computation."""
    count = parse_count("limit", limit)
    if as_csv and as_json:
        raise RequestError("--csv: --json is given as well; give one of them")
    for word in statuses:
        if word not in STATUSES:
            raise RequestError(f"--status {word}: it takes {', '.join(STATUSES)}")
    from ..runs.listing import list_runs, sweeps_of
    from ..storage.store import Store

    store = Store(storage, create=False)
    rows = [
        row for row in list_runs(store, sweep)
        if (not statuses or row.status in statuses)
        and (dataset is None or row.data in (dataset, f"imported:{dataset}"))
        and (method is None or method in (row.method, row.label))
    ]  # fmt: skip
    from ..report.run_tables import run_csv, run_facts, run_list

    if as_csv:
        click.echo(run_csv(rows[:count]), nl=False)
        return
    content = {"storage": store.uri, "runs": [run_facts(row) for row in rows[:count]]} if as_json else {}
    beside, noun = ([], "trial") if sweep else (sweeps_of(store), "run")
    print_result(as_json, content, *run_list(rows, count or SHOWN, beside, noun))


@click.command()
@click.argument("a")
@click.argument("b")
@common_options("storage", "as_json")
def diff(a: str, b: str, storage: str, as_json: bool) -> None:
    """Compare runs A and B: knobs that differ, the first stage with another result and why, accuracies.

    A and B are names of runs, trials as SWEEP/TRIAL, or paths of folders.
    """
    from ..report.run_tables import difference_facts, difference_parts
    from ..runs.difference import difference, find_runs

    found = difference(*find_runs((a, b), storage))
    print_result(as_json, difference_facts(found), *difference_parts(found))
