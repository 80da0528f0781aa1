"""`mosaic report`: one HTML file about a run, a sweep or a trial."""

from __future__ import annotations

import click


@click.command()
@click.argument("path")
@click.option("--out", metavar="FILE", help="File to write.  [default: report.html in the folder]")
def report(path: str, out: str | None) -> None:
    """Write one self-contained page about the results in PATH, and print the page's path.

    PATH is a run's, a sweep's or a trial's folder, or a storage that holds only one run or sweep. An unfinished or
    failed run is shown as far as it got.
    """
    from ..report.html.render import write_report

    click.echo(write_report(path, out))
