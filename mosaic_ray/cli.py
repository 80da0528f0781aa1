"""The ``mosaic`` command: what may be asked, and who answers. Each command imports what it needs."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from . import __version__
from .config import to_toml
from .errors import RequestError, RunError, neighbours
from .options import listing, takes
from .presets import ALGORITHMS, CLASSIFIERS, METHODS, OPTIMISERS, SCALES
from .report_cli import register as register_report
from .store_cli import register as register_store
from .study_cli import register as register_studies
from .sweep_cli import register as register_sweeps
from .words import address_of, config_of

if TYPE_CHECKING:
    from rich.console import Console

#: What the doctor's words look like on a terminal.
COLOURS = {"ok": "green", "warning": "yellow", "problem": "red"}


class Door(click.Group):
    """A group that ends every failure in one line on standard error.

    Exit status: 2 a wrong request, 1 a failed run, 130 interrupted.
    """

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click's, with the neighbours of an unknown name."""
        if not args[0].startswith("-") and args[0] not in self.commands:
            raise RequestError(f'unknown command "{args[0]}"; {neighbours(args[0], self.commands)}')
        return super().resolve_command(ctx, args)

    def main(  # type: ignore[override]  # click's overloads tell apart a mode that is fixed here
        self, args: Sequence[str] | None = None, prog_name: str | None = None, **extra: Any
    ) -> Any:
        """Parse, run, exit."""
        words = list(sys.argv[1:] if args is None else args)
        with contextlib.suppress(ValueError):  # not the main thread: no signal arrives there
            signal.signal(signal.SIGTERM, signal.default_int_handler)  # schedulers' word is Ctrl-C's to us
        try:
            extra |= {"standalone_mode": False, "obj": words}
            status = super().main(words, prog_name or "mosaic", **extra) or 0
        except click.ClickException as error:
            status = _complain(error.format_message(), 2)
        except RequestError as error:
            status = _complain(str(error), 2)
        except RunError as error:
            status = _complain("; ".join([str(error), *getattr(error, "__notes__", [])]), 1)
        except (click.Abort, KeyboardInterrupt):
            resumes = words[:1] in (["run"], ["sweep"], ["compare"], ["experiment"])
            resume = f"; to resume: {shlex.join(resume_command(words))}" if resumes else ""
            click.echo(f"mosaic: interrupted{resume}", err=True)
            status = 130
        sys.exit(status)


def _complain(message: str, status: int) -> int:
    click.echo(f"mosaic: error: {' '.join(message.split())}", err=True)
    return status


def resume_command(words: Sequence[str]) -> list[str]:
    """The command line that continues ``words``, as this user reaches the command."""
    script = sys.argv[0]
    if os.path.basename(script) != "mosaic":  # `python -m mosaic_ray`, `python cli.py`: as it was typed
        program = sys.orig_argv[: len(sys.orig_argv) - len(sys.argv) + 1]
    else:
        program = ["mosaic" if shutil.which("mosaic") == os.path.abspath(script) else script]
    return [*program, *(w for w in words if w != "--fresh")]


# --- commands --------------------------------------------------------------------------------------------------------


@click.group(cls=Door, invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="mosaic", message="%(prog)s %(version)s")
@click.pass_context
def mosaic(ctx: click.Context) -> None:
    """Experiments in heterogeneous federated learning, built around Mosaic.

    `mosaic run` alone takes about a minute and needs no download.
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


@mosaic.command()
@takes("preset", "algorithm", "dataset", "skip_bad", "clients", "omega", "method", "seed", "sets", "config")
@takes("storage", "name", "address", "host", "strict_health", "fresh", "as_json")
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
    config, address = config_of(**request), address_of(address)
    from . import launch

    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        summary = launch.run(
            config, storage=storage, name=name, address=address, fresh=fresh, command=resume_command(ctx.obj),
            strict_health=strict_health,
        )  # fmt: skip
    if as_json:
        click.echo(json.dumps(summary, indent=2))
    else:
        from .report.tables import closing_table

        _console().print(closing_table(summary), crop=False)  # long paths stay whole


@mosaic.command()
@takes("preset", "dataset", "skip_bad", "clients", "omega", "sampler", "seed", "sets", "config")
@click.option("--png", metavar="FILE", help="Where the heat map goes.  [default: below ./mosaic_runs/partitions]")
@click.option("--json", "as_json", is_flag=True, help="Label counts as JSON; a heat map only with --png.")
def partition(png: str | None, as_json: bool, **request: Any) -> None:
    """Show who holds how many samples of which class, and save it as a heat map."""
    config = config_of(**request)
    from .data.datasets import load_dataset
    from .data.partition import label_counts, skew
    from .data.partition import partition as deal

    data = load_dataset(config.data)
    num_classes = data.facts.num_classes
    shards = deal(data.train.labels, config.partition, config.seed, num_classes)
    counts = label_counts(data.train.labels, shards, num_classes)
    if png is not None or not as_json:
        from .report import heatmap

        place = f"./mosaic_runs/partitions/{heatmap.default_name(config)}" if png is None else png
        said = heatmap.skew_in_words(skew(counts), num_classes)
        title = f"{heatmap.heading(config)}\n{said}"
        heatmap.save_png(place, heatmap.partition_heatmap(counts, title, data.class_names))
    if as_json:
        facts = {"sampler": config.partition.sampler, "seed": config.seed}
        sizes = [len(shard) for shard in shards]
        click.echo(json.dumps({"label_counts": counts.tolist(), "client_sizes": sizes} | facts))
    else:
        from .report.tables import partition_table

        _console().print(partition_table(counts), crop=False)
        click.echo(f"{said}\nheat map {place}")


@mosaic.group(cls=Door, invoke_without_command=True)
@click.pass_context
def data(ctx: click.Context) -> None:
    """List data sets, fetch one, or take in your own."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


@data.command("list")
@takes("sets", "config")
def list_data(**request: Any) -> None:
    """Say what each data set is, and what of it is on the disk."""
    config = config_of(**request).data
    from .data.catalogue import overview
    from .data.places import data_root

    listing(f"Data sets, looked for under {data_root(config)}", overview(config))
    click.echo("mosaic data fetch NAME; or your own: mosaic data import --from FOLDER|PARQUET NAME")


@data.command("fetch")
@click.argument("name")
@takes("sets", "config")
def fetch_data(name: str, **request: Any) -> None:
    """Download the data set NAME, or go on where a download broke off."""
    config = config_of(**request).data
    from .data.catalogue import bring

    click.echo(bring(name, config))


@data.command("import")
@click.option("--from", "source", required=True, metavar="FOLDER|PARQUET", help="Where images or parquet files lie.")
@click.argument("name")
@takes("skip_bad", "sets", "config")
def import_data(source: str, name: str, **request: Any) -> None:
    """Decode your own images, once, into a data set called NAME.

    FOLDER holds train/CLASS/IMAGE and test/CLASS/IMAGE; PARQUET is a folder of train*.parquet and test*.parquet. Images
    of several sizes need --set data.image_size=64 or another.
    """
    config = config_of(**request).data
    from .data.catalogue import take_in

    click.echo(take_in(source, name, config))


@mosaic.command()
def presets() -> None:
    """List the presets: scales, and algorithms."""
    listing("Scales", {name: scale.summary for name, scale in SCALES.items()})
    listing("Algorithms", {name: summary for name, (_, summary) in ALGORITHMS.items()})
    click.echo("Join one of each by a plus: mosaic run --preset cifar10_small+reference")


@mosaic.command()
@click.argument("preset")
@takes("algorithm")
def show(preset: str, algorithm: str | None) -> None:
    """Print PRESET as TOML, every knob with its meaning; `--config` reads it back."""
    click.echo(to_toml(config_of(preset, algorithm=algorithm), comments=True), nl=False)


@mosaic.command()
def methods() -> None:
    """List the methods, the federated optimisers and the networks."""
    listing("Methods", {name: summary for name, (_, summary) in METHODS.items()})
    listing("Federated optimisers", {name: facts.summary for name, facts in OPTIMISERS.items()})
    listing("Networks", CLASSIFIERS)
    click.echo("mosaic run --method METHOD --set federation.optimiser=OPTIMISER --set model.classifier=NETWORK")


@mosaic.command()
@click.option("--storage", metavar="PATH|URI", help="Where results would go.  [default: ./mosaic_runs]")
@takes("preset", "algorithm", "dataset", "skip_bad", "clients", "omega", "method", "host", "seed", "sets", "config")
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
        from .asking import asked_of
        from .runtime.cluster_checks import examine_cluster

        findings = examine_cluster(cluster, asked_of(space, words), storage)
    else:
        if space is not None:
            raise RequestError(f"--space {space}: it goes with --cluster FILE.yaml")
        config, address = config_of(**words), address_of(address)
        from .runtime.doctor import examine

        findings = examine(config.data, storage or "./mosaic_runs", address if try_ray else None)
    worst = 0
    for finding in findings:
        mark = click.style(f"{finding.severity:<8}", fg=COLOURS[finding.severity])
        click.echo(f"{mark} {finding.what}: {finding.found}" + (f"; {finding.mend}" if finding.mend else ""))
        worst |= finding.severity == "problem"
    ctx.exit(worst)


def _console() -> Console:
    from rich.console import Console

    return Console(markup=False, emoji=False, highlight=False)


register_sweeps(mosaic)
register_report(mosaic)
register_store(mosaic)
register_studies(mosaic, takes, resume_command)


def main() -> None:
    """The ``mosaic`` script."""
    mosaic(prog_name="mosaic")
