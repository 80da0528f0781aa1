"""The ``mosaic`` command: what may be asked, and who answers. Each command imports what it needs."""

from __future__ import annotations

import contextlib
import json
import sys
from typing import TYPE_CHECKING, Any

import click

from .. import __version__
from ..config import plugins
from ..config.presets import ALGORITHMS, SCALES
from ..config.registry import CLASSIFIERS
from ..config.resolve import to_toml
from ..core.errors import RequestError
from .data import data
from .group import CommandGroup, resume_command
from .options import common_options, listing
from .report import register as register_report
from .request import parse_address, parse_config
from .store import register as register_store
from .study import register as register_studies
from .sweep import register as register_sweeps

if TYPE_CHECKING:
    from rich.console import Console

#: What the doctor's words look like on a terminal.
COLOURS = {"ok": "green", "warning": "yellow", "problem": "red"}


# --- commands --------------------------------------------------------------------------------------------------------


@click.group(cls=CommandGroup, invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="mosaic", message="%(prog)s %(version)s")
@click.pass_context
def mosaic(ctx: click.Context) -> None:
    """Experiments in heterogeneous federated learning, built around Mosaic.

    `mosaic run` alone takes about a minute and needs no download.
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


@mosaic.command()
@common_options("preset", "algorithm", "dataset", "skip_bad", "clients", "omega", "method", "seed", "sets", "config")
@common_options("storage", "name", "address", "host", "strict_health", "fresh", "as_json")
@click.pass_context
def run(
    ctx: click.Context,
    storage: str,
    name: str | None,
    address: str | None,
    strict_health: bool,
    fresh: bool,
    as_json: bool,
    **request: Any,
) -> None:
    """Run one experiment; the same command again resumes it."""
    config, address = parse_config(**request), parse_address(address)
    from ..runs import runner

    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        summary = runner.run(
            config, storage=storage, name=name, address=address, fresh=fresh, command=resume_command(ctx.obj),
            strict_health=strict_health,
        )  # fmt: skip
    if as_json:
        click.echo(json.dumps(summary, indent=2))
    else:
        from ..report.tables import closing_table

        _console().print(closing_table(summary), crop=False)  # long paths stay whole


@mosaic.command()
@common_options("preset", "dataset", "skip_bad", "clients", "omega", "sampler", "seed", "sets", "config")
@click.option("--png", metavar="FILE", help="Where the heat map goes.  [default: below ./mosaic_runs/partitions]")
@click.option("--json", "as_json", is_flag=True, help="Label counts as JSON; a heat map only with --png.")
def partition(png: str | None, as_json: bool, **request: Any) -> None:
    """Show who holds how many samples of which class, and save it as a heat map."""
    config = parse_config(**request)
    from ..data.load import load_dataset
    from ..data.partition import label_counts, skew
    from ..data.partition import partition as deal

    data = load_dataset(config.data)
    num_classes = data.facts.num_classes
    shards = deal(data.train.labels, config.partition, config.seed, num_classes)
    counts = label_counts(data.train.labels, shards, num_classes)
    if png is not None or not as_json:
        from ..report.figures import heatmap

        place = f"./mosaic_runs/partitions/{heatmap.default_name(config)}" if png is None else png
        said = heatmap.skew_in_words(skew(counts), num_classes)
        title = f"{heatmap.heading(config)}\n{said}"
        heatmap.save_png(place, heatmap.partition_heatmap(counts, title, data.class_names))
    if as_json:
        facts = {"sampler": config.partition.sampler, "seed": config.seed}
        sizes = [len(shard) for shard in shards]
        click.echo(json.dumps({"label_counts": counts.tolist(), "client_sizes": sizes} | facts))
    else:
        from ..report.tables import partition_table

        _console().print(partition_table(counts), crop=False)
        click.echo(f"{said}\nheat map {place}")


@mosaic.command()
def presets() -> None:
    """List the presets: scales, and algorithms."""
    listing("Scales", {name: scale.summary for name, scale in SCALES.items()})
    listing("Algorithms", {name: summary for name, (_, summary) in ALGORITHMS.items()})
    click.echo("Join one of each by a plus: mosaic run --preset cifar10_small+reference")


@mosaic.command()
@click.argument("preset")
@common_options("algorithm")
def show(preset: str, algorithm: str | None) -> None:
    """Print PRESET as TOML, every knob with its meaning; `--config` reads it back."""
    click.echo(to_toml(parse_config(preset, algorithm=algorithm), comments=True), nl=False)


@mosaic.command()
def methods() -> None:
    """List the methods, the federated strategies and the networks, installed plug-ins too."""
    for kind in ("methods", "strategies"):
        title = {"methods": "Methods", "strategies": "Federated strategies (join several by a plus)"}[kind]
        listing(title, {name: entry.summary for name, entry in plugins.entries(kind).items()})
    listing("Networks", CLASSIFIERS)
    click.echo("mosaic run --method METHOD --set federation.strategy=STRATEGY --set model.classifier=NETWORK")
    click.echo("Your own: --method module:object or FILE.py:object, and the same for a strategy.")


@mosaic.command()
@click.option("--storage", metavar="PATH|URI", help="Where results would go.  [default: ./mosaic_runs]")
@common_options(
    "preset", "algorithm", "dataset", "skip_bad", "clients", "omega", "method", "host", "seed", "sets", "config"
)
@click.option("--ray", "try_ray", is_flag=True, help="Start Ray (or join --address) as well; takes seconds.")
@click.option("--address", metavar="auto|local|HOST:PORT", help="The Ray cluster for --ray.")
@click.option("--cluster", metavar="FILE.yaml", help="Instead: would the request work on this file's cluster?")
@click.option("--space", metavar="NAME|module:function|FILE.py", help="With --cluster: the request is a sweep.")
@click.pass_context
def doctor(
    ctx: click.Context, storage: str | None, try_ray: bool, address: str | None, cluster: str | None, space: str | None,
    **words: Any,
) -> None:  # fmt: skip
    """Say what this machine (or a cluster's file) has, what would not work, and what to do. Exits with 1 if any."""
    if cluster is not None:
        from ..deploy.cluster_lint import examine_cluster
        from .request import cluster_request

        findings = examine_cluster(cluster, cluster_request(space, words), storage)
    else:
        if space is not None:
            raise RequestError(f"--space {space}: it goes with --cluster FILE.yaml")
        config, address = parse_config(**words), parse_address(address)
        from ..deploy.doctor import examine

        findings = examine(config.data, storage or "./mosaic_runs", address if try_ray else None)
    worst = 0
    for finding in findings:
        mark = click.style(f"{finding.severity:<8}", fg=COLOURS[finding.severity])
        click.echo(f"{mark} {finding.what}: {finding.found}" + (f"; {finding.fix}" if finding.fix else ""))
        worst |= finding.severity == "problem"
    ctx.exit(worst)


def _console() -> Console:
    from rich.console import Console

    return Console(markup=False, emoji=False, highlight=False)


mosaic.add_command(data)
register_sweeps(mosaic)
register_report(mosaic)
register_store(mosaic)
register_studies(mosaic, common_options, resume_command)


def main() -> None:
    """The ``mosaic`` script."""
    mosaic(prog_name="mosaic")
