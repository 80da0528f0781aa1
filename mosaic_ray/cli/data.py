"""The ``mosaic data`` commands: list data sets, download one, import your own."""

from __future__ import annotations

import click

from ..core.text import visible
from .group import CommandGroup
from .options import common_options, listing
from .request import parse_age, parse_config


@click.group(cls=CommandGroup)
def data() -> None:
    """List data sets, fetch one, or take in your own."""


@data.command("list")
@common_options("sets", "config")
def list_data(sets: tuple[str, ...], config: str | None) -> None:
    """List the data sets, and how much of each is on the disk."""
    knobs = parse_config(sets=sets, config=config).data
    from ..data.catalog import overview
    from ..data.paths import data_root

    listing(f"Data sets, looked for under {data_root(knobs)}", overview(knobs))
    click.echo("mosaic data fetch NAME; or your own: mosaic data import --from FOLDER|PARQUET NAME")


@data.command("fetch")
@click.argument("name")
@common_options("sets", "config")
def fetch_data(name: str, sets: tuple[str, ...], config: str | None) -> None:
    """Download the data set NAME, or go on where a download broke off."""
    knobs = parse_config(sets=sets, config=config).data
    from ..data.catalog import fetch_dataset

    click.echo(fetch_dataset(name, knobs))


@data.command("import")
@click.option("--from", "source", required=True, metavar="FOLDER|PARQUET", help="Where images or parquet files lie.")
@click.argument("name")
@common_options("skip_bad", "sets", "config")
def import_data(source: str, name: str, skip_bad: str | None, sets: tuple[str, ...], config: str | None) -> None:
    """Decode your own images, once, into a data set called NAME.

    FOLDER holds train/CLASS/IMAGE and test/CLASS/IMAGE; PARQUET is a folder of train*.parquet and test*.parquet. Images
    of several sizes need --set data.image_size=64 or another.
    """
    knobs = parse_config(skip_bad=skip_bad, sets=sets, config=config).data
    from ..data.catalog import import_dataset

    click.echo(import_dataset(source, name, knobs))


@data.command("clean")
@click.option(
    "--older-than", default="30d", show_default=True, metavar="AGE",
    help="Keep copies that were read since: 90s, 30m, 12h, 7d.",
)  # fmt: skip
@click.option("--dry-run", is_flag=True, help="List what would be removed; remove nothing.")
@common_options("sets", "config")
def clean_copies(older_than: str, dry_run: bool, sets: tuple[str, ...], config: str | None) -> None:
    """Remove decoded copies of images that were not read for a while.

    A run that needs a removed copy decodes the images again. Downloaded and imported data sets stay.
    """
    age, knobs = parse_age(older_than), parse_config(sets=sets, config=config).data
    from ..data.catalog import clean

    for line in clean(knobs, age, dry_run):
        click.echo(visible(line, ""))
