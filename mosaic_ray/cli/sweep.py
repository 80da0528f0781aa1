"""`mosaic sweep`, `mosaic compare` and `mosaic spaces`: many experiments that share their common stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from .options import GRID, RunOptions, common_options, listing, print_plan, print_result, run_options, stdout_for_json
from .request import compare_plan, gpus_at, own_knobs, reference, sweep_request

if TYPE_CHECKING:
    from ..execution.resource_plan import Node
    from ..report.comparison import Comparison
    from ..sweeps.runner import Outcome, SweepRequest

_SEEDS = "Repeat every {} with each of these seeds."
_AT_ONCE = click.option("--max-concurrent", metavar="N", help="The most trials at once; as many as fit by default.")


@click.command()
@common_options(
    "preset", "algorithm", "dataset", "skip_bad", "clients", "omega", "method", "seed", "sets", "config", "host"
)
@click.option(
    "--space", default="lambdas_omega", show_default=True, metavar="NAME|module:function|FILE.py",
    help="The space to search; see `mosaic spaces`.",
)  # fmt: skip
@GRID
@click.option("--search", metavar="grid|random|optuna", help="How points are chosen; the space has a default.")
@click.option("--samples", metavar="N", help="Points of a random or optuna search.")
@click.option("--seeds", metavar="S,S,...", help=_SEEDS.format("point"))
@click.option("--scheduler", metavar="fifo|asha", default="fifo", show_default=True, help="asha stops weak ones early.")
@_AT_ONCE
@run_options("strict_health", "dry_run", "calibrate")
@click.pass_context
def sweep(
    ctx: click.Context, space: str | None, grid: tuple[str, ...], search: str | None, samples: str | None,
    seeds: str | None, scheduler: str, max_concurrent: str | None, place: RunOptions, **typed: Any,
) -> None:  # fmt: skip
    """Run many experiments that share their common stages; the same command again resumes them."""
    if grid and ctx.get_parameter_source("space") is ParameterSource.DEFAULT:
        space = None
    request = sweep_request(
        space, typed, gpus_at(place.address), grid=grid, search=search, samples=samples, seeds=seeds,
        scheduler=scheduler,
        max_concurrent=max_concurrent,
    )  # fmt: skip
    _run(request, place)


@click.command()
@click.option(
    "--methods", default="fedavg,prototype_head,mosaic", show_default=True, metavar="M,M,...",
    help="Methods, strategies (fedrolex), and methods over strategies (mosaic+fedrolex).",
)  # fmt: skip
@common_options("preset", "algorithm", "dataset", "skip_bad", "clients", "omega", "sets", "config", "host")
@click.option("--seeds", default="0,1,2", show_default=True, metavar="S,S,...", help=_SEEDS.format("method"))
@click.option(
    "--equal-compute", is_flag=True, help="Add fedavg with as many more rounds as generators or longer steps cost."
)
@click.option("--omegas", metavar="W,W,...", help="Compare at each of these values of --omega.")
@click.option(
    "--for", "own", nargs=2, multiple=True, metavar="M KEY=VALUE",
    help="A knob of one of the methods alone; repeatable.",
)  # fmt: skip
@click.option(
    "--against", metavar="M", help="The method that differences are taken to.  [default: fedavg, or else the first]"
)
@_AT_ONCE
@run_options("strict_health", "dry_run", "calibrate")
def compare(
    methods: str, seeds: str, equal_compute: bool, omegas: str | None, own: tuple[tuple[str, str], ...],
    against: str | None, max_concurrent: str | None, place: RunOptions, **typed: Any,
) -> None:  # fmt: skip
    """Run several methods on the same partitions: one table with paired differences, for a paper; resumable."""
    plan, has_gpus = compare_plan(methods, omegas, own_knobs(own)), gpus_at(place.address)
    request = sweep_request("compare", typed, has_gpus, plan=plan, seeds=seeds, max_concurrent=max_concurrent)
    request = replace(request, against=reference(methods, against))
    if equal_compute:
        from ..runs.equal_compute import with_controls

        request = replace(request, plan=replace(plan, points=with_controls(request.config, plan.points)))
    _run(request, place)


@click.command()
def spaces() -> None:
    """List the sweep spaces that ship with the package."""
    from ..sweeps.space import list_spaces

    listing("Spaces", list_spaces())
    click.echo("mosaic sweep --space NAME; or --space module:function, --space FILE.py with a function plan()")


def _run(request: SweepRequest, place: RunOptions) -> None:
    from ..deploy.capacity import fit_of_sweep
    from ..execution.devices import of_nodes
    from ..report.sweep_table import sweep_table
    from ..report.tables import work_table
    from ..sweeps import runner

    if place.dry_run:
        found = runner.dry_run(request, place.storage, place.name, place.address, place.fresh, place.calibrate)
        trials = f"{found.points * found.seeds} trials ({found.points} points x {found.seeds} seeds)"
        head = f"sweep {found.name}: space {found.space}, {found.search} search, {trials}, "
        head += f"algorithm {request.config.algorithm}"
        unknown = "its points depend on results, so the work is not known beforehand"
        work = [unknown] if found.work is None else ["", work_table(found.work)]
        work += ["", found.distinct] if found.distinct else []

        def used_of(nodes: Sequence[Node]) -> Mapping[str, int]:
            sweep = runner.prepare(request, there=of_nodes(nodes, place.address))
            return fit_of_sweep(runner.resources_of(sweep, nodes, place.storage)).used

        lines = head, *found.resources, request.config.schedule, *work, ""
        print_plan(place, found.as_dict(), found.hours, used_of, *lines)
        return
    with stdout_for_json(place.as_json):
        outcome = runner.run(
            request, storage=place.storage, name=place.name, address=place.address, fresh=place.fresh,
            strict_health=place.strict_health, track=place.track,
        )  # fmt: skip
    methods = compared(request, outcome, place.storage) if request.space == "compare" else None
    table = sweep_table(outcome.results, outcome.setting, outcome.swept, outcome.place, methods)
    print_result(place.as_json, outcome.as_dict(), table)
    outcome.raise_failures()


def compared(request: SweepRequest, outcome: Outcome, storage: str) -> Comparison:
    """Return the table of a comparison, and write its files beside the results."""
    from ..report.comparison import compare
    from ..report.export import files
    from ..storage.store import Store
    from ..sweeps.results import result_rows

    found = compare(result_rows(outcome.results), request.plan.points, request.config, request.against)
    store = Store(storage)
    for name, data in files(found).items():
        store.write(f"sweeps/{outcome.name}/{name}", data)
    return found
