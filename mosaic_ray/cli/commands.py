"""The ``mosaic`` group and its commands about one run. Each command imports the package when it is called."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from typing import TYPE_CHECKING, Any

import click

from .. import __version__
from ..config.presets import ALGORITHMS, GENERIC, SCALES, scale_named
from ..config.registry import CLASSIFIERS
from ..config.resolve import to_toml
from ..core.errors import RequestError
from ..core.text import visible
from .data import data
from .export import export
from .group import CommandGroup, resume_command
from .options import (
    GRID,
    RunOptions,
    common_options,
    listing,
    print_parts,
    print_plan,
    print_result,
    refuse_idle_address,
    run_options,
    stdout_for_json,
)
from .request import cluster_request, gpus_at, parse_address, parse_config, parse_count
from .runs import diff, runs
from .store import store
from .study import experiment
from .sweep import compare, spaces, sweep

if TYPE_CHECKING:
    from pathlib import Path

#: The colours of the doctor's severities on a terminal.
COLOURS = {"ok": "green", "warning": "yellow", "problem": "red"}


@click.group(cls=CommandGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="mosaic", message="%(prog)s %(version)s")
def mosaic() -> None:
    """Experiments in heterogeneous federated learning, built around Mosaic.

    `mosaic run` alone takes about a minute and needs no download.
    """


@mosaic.command()
@common_options(
    "preset", "algorithm", "dataset", "skip_bad", "clients", "omega", "method", "seed", "sets", "config", "host"
)
@run_options("strict_health", "dry_run", "calibrate")
@click.pass_context
def run(ctx: click.Context, place: RunOptions, **typed: Any) -> None:
    """Run one experiment; the same command again resumes it."""
    config = parse_config(has_gpus=gpus_at(place.address), **typed)
    refuse_idle_address(ctx, place, config.runtime.host)
    from ..report.tables import closing_table, work_table
    from ..runs import runner

    if place.dry_run:
        from ..deploy.capacity import fit_of_run
        from ..runs.dry_run import dry_run

        found = dry_run(config, place.storage, place.name, place.address, place.fresh, place.calibrate)
        print_plan(
            place, found.as_dict(), found.hours, lambda nodes: fit_of_run(found.config, nodes).used,
            *found.lines(), config.schedule, "", work_table(found.work), "",
        )  # fmt: skip
        return
    with stdout_for_json(place.as_json):
        summary = runner.run(
            config, storage=place.storage, name=place.name, address=place.address, fresh=place.fresh,
            command=resume_command(ctx.obj), strict_health=place.strict_health, track=place.track,
        )  # fmt: skip
    print_result(place.as_json, summary, closing_table(summary))


@mosaic.command()
@common_options("preset", "dataset", "skip_bad", "clients", "omega", "sampler", "seed", "sets", "config")
@click.option("--png", metavar="FILE", help="File of the heat map.  [default: below ./mosaic_runs/partitions]")
@click.option("--json", "as_json", is_flag=True, help="Label counts as JSON; a heat map only with --png.")
def partition(png: str | None, as_json: bool, **typed: Any) -> None:
    """Show each client's number of samples by class, and save it as a heat map."""
    config = parse_config(**typed)
    from ..config.client_layout import client_modalities
    from ..data.groups import with_groups
    from ..data.load import load_dataset
    from ..data.partition import label_counts, skew
    from ..data.partition import partition as deal

    data = with_groups(load_dataset(config.data), [config.partition])
    num_classes = data.facts.num_classes
    shards = deal(data.train.labels, config.partition, config.seed, num_classes, data.groups)
    counts = label_counts(data.train.labels, shards, num_classes)
    names = [modality.name for modality in data.facts.modalities]
    modalities = client_modalities(config, names) if len(names) > 1 or config.partition.modalities else ()
    if png is not None or not as_json:
        from ..report.figures import heatmap

        place = f"./mosaic_runs/partitions/{heatmap.default_name(config)}" if png is None else png
        skewness = heatmap.skew_in_words(skew(counts), num_classes)
        title = f"{heatmap.heading(config)}\n{skewness}"
        held = {name: [name in own for own in modalities] for name in names if modalities}
        heatmap.save_png(place, heatmap.partition_heatmap(counts, title, data.class_names, held))
    if as_json:
        found = {"label_counts": counts.tolist(), "client_sizes": [len(shard) for shard in shards]}
        found |= {"modalities": modalities} if modalities else {}
        click.echo(json.dumps(found | {"sampler": config.partition.sampler, "seed": config.seed}))
    else:
        from ..report.tables import partition_table

        print_parts(partition_table(counts, modalities))
        click.echo(f"{skewness}\nheat map {place}")


@mosaic.command()
def presets() -> None:
    """List the presets: scales, and algorithms."""
    every = {**SCALES, **{name: scale_named(name) for name in GENERIC}}
    listing("Scales", {name: scale.summary for name, scale in every.items()})
    listing("Algorithms", {name: summary for name, (_, summary) in ALGORITHMS.items()})
    click.echo("Join one of each by a plus: mosaic run --preset cifar10_small+reference")


@mosaic.command()
@click.argument("preset", required=False)
@common_options("algorithm", "dataset", "clients")
@click.option("--schema", is_flag=True, help="Print instead the JSON Schema of such files, for an editor.")
@click.pass_context
def show(ctx: click.Context, preset: str | None, schema: bool, **typed: Any) -> None:
    """Print PRESET as TOML, every knob with its meaning; `--config` reads it back."""
    if schema:
        if given := [word for word in (preset, *typed.values()) if word is not None]:
            raise RequestError(f"--schema: it holds for every preset, so it goes without {given[0]}")
        from ..config.json_schema import json_schema

        click.echo(json.dumps(json_schema(), indent=1))
        return
    if preset is None:
        raise click.UsageError("Missing argument 'PRESET'.", ctx)
    click.echo(to_toml(parse_config(preset=preset, **typed), comments=True), nl=False)


@mosaic.command()
@click.argument("name", required=False)
@click.option("--bibtex", is_flag=True, help="Print the papers of NAME, or of all, as BibTeX.")
def methods(name: str | None, bibtex: bool) -> None:
    """List the methods and strategies with what each needs of its clients, and the networks; or describe NAME.

    NAME is a method, a strategy or a plug-in, as in `mosaic compare --methods`. Installed plug-ins are listed, too.
    """
    from .methods import TITLES, bibtex_of, described, every, find, needs

    found = every() if name is None else find(name)
    if bibtex:
        click.echo(bibtex_of(found))
        return
    if name is not None:
        for entry in found:
            listing(*described(entry))
        return
    for kind, title in TITLES.items():
        rows = {entry.word: f"{entry.summary}. {needs(entry)}" for entry in found if entry.kind == kind}
        listing(title, rows)
    listing("Networks", CLASSIFIERS)
    click.echo("mosaic run --method METHOD --set federation.strategy=STRATEGY --set model.classifier=NETWORK")
    click.echo("Your own: --method module:object or FILE.py:object, and the same for a strategy.")


@mosaic.command()
@click.argument("path")
@click.option("--out", metavar="FILE", help="File to write.  [default: report.html in the folder]")
@click.option(
    "--watch", is_flag=False, flag_value="5", metavar="[SECONDS]",
    help="After PATH: write the page again, every 5 seconds or as given, until the run or sweep ends, or Ctrl-C.",
)  # fmt: skip
def report(path: str, out: str | None, watch: str | None) -> None:
    """Write one self-contained page about the results in PATH, and print the page's path.

    PATH is a run's, a sweep's or a trial's folder, or a storage that holds only one run or sweep. An unfinished or
    failed run is shown as far as it got.
    """
    seconds = parse_count("watch", watch)
    from ..report.html import render

    def begun(written: Path) -> None:
        if render.stdout_at(written) is None:
            click.echo(visible(str(written)))
            sys.stdout.flush()

    if seconds is None:
        begun(render.write_report(path, out))
    else:
        render.watch(path, out, seconds, begun)


@mosaic.command()
@click.option("--storage", metavar="PATH|URI", help="Where results would go.  [default: ./mosaic_runs]")
@common_options(
    "preset", "algorithm", "dataset", "skip_bad", "clients", "omega", "method", "host", "seed", "sets", "config"
)
@click.option("--ray", "try_ray", is_flag=True, help="Start Ray (or join --address) as well; takes seconds.")
@click.option("--address", metavar="auto|local|HOST:PORT", help="The Ray cluster for --ray.")
@click.option("--cluster", metavar="FILE.yaml", help="Check instead whether the request works on this file's cluster.")
@click.option("--space", metavar="NAME|module:function|FILE.py", help="With --cluster: the request is a sweep.")
@GRID
@click.pass_context
def doctor(
    ctx: click.Context, storage: str | None, try_ray: bool, address: str | None, cluster: str | None, space: str | None,
    grid: tuple[str, ...], **typed: Any,
) -> None:  # fmt: skip
    """Check this machine (or a cluster's file) and say how to fix each problem. Exits with 1 if there is one."""
    if cluster is not None:
        from ..deploy.cluster_lint import examine_cluster

        findings = examine_cluster(cluster, cluster_request(space, grid, typed, cluster), storage)
    else:
        if space is not None or grid:
            option = f"--grid {grid[0]}" if space is None else f"--space {space}"
            raise RequestError(f"{option}: it goes with --cluster FILE.yaml")
        typed["preset"] = typed["preset"] or "demo"  # of all that is asked, only the data root is looked at
        config, address = parse_config(**typed), parse_address(address)
        from ..deploy.doctor import examine

        findings = examine(config.data, storage or "./mosaic_runs", address if try_ray else None)
    worst = 0
    for finding in findings:
        mark = click.style(f"{finding.severity:<8}", fg=COLOURS[finding.severity])
        text = f"{finding.what}: {finding.found}" + (f"; {finding.fix}" if finding.fix else "")
        click.echo(f"{mark} {visible(text)}")
        worst |= finding.severity == "problem"
    ctx.exit(worst)


@mosaic.command()
@click.argument("shell")
def completion(shell: str) -> None:
    """Print the script with which SHELL (bash, zsh or fish) completes commands, options and their values.

    In ~/.bashrc: eval "$(mosaic completion bash)"
    """
    from .complete import script

    click.echo(script(shell), nl=False)


for command in (data, sweep, compare, spaces, runs, diff, store, experiment, export):
    mosaic.add_command(command)


def main() -> None:
    """Run the ``mosaic`` script."""
    if "_MOSAIC_COMPLETE" in os.environ:  # a shell asks
        from .complete import answer

        status = answer(mosaic)
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os._exit(status)  # Python's own end takes a tenth of the time, and there is nothing to tidy up
    mosaic(prog_name="mosaic")
