"""`mosaic report`: one HTML file about a run, a sweep or a trial."""

from __future__ import annotations

import click


def register(door: click.Group) -> None:
    """The command `report` below ``door``."""
    door.add_command(_report)


@click.command("report")
@click.argument("path")
@click.option("--out", metavar="FILE", help="Where the page goes.  [default: report.html in the folder]")
def _report(path: str, out: str | None) -> None:
    """Write one self-contained page about what lies in PATH, and print where it is.

    PATH is a run's, a sweep's or a trial's folder, or a storage that holds only one run or sweep. What has not
    finished, or has failed, is shown as far as it got.
    """
    from ..report.html.render import write_report

    click.echo(write_report(path, out))
