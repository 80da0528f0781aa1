"""`mosaic export`: a run's model as a file or a folder for others."""

from __future__ import annotations

import click

from ..core.errors import RequestError
from ..core.text import visible


@click.command()
@click.argument("path")
@click.option("--to", default="pt", show_default=True, metavar="pt|onnx|torchscript|hub", help="Format.")
@click.option(
    "--role", default="final", show_default=True, metavar="ROLE",
    help="final, initial, control ...; client:NUMBER or generator:NUMBER.",
)  # fmt: skip
@click.option("--output", metavar="FILE|FOLDER", help="Where it is written.  [default: below models/ in PATH]")
@click.option("--force", is_flag=True, help="Replace what is there.")
@click.option("--push", metavar="OWNER/NAME", help="With --to hub: upload the folder to the Hugging Face Hub.")
def export(path: str, to: str, role: str, output: str | None, force: bool, push: str | None) -> None:
    """Write a model of the run in PATH, checked against the model itself, and print where it lies.

    pt: weights and description, read by torch.load or mosaic_ray.load_model. onnx and torchscript: the whole network
    with its preprocessing, for programs without this package. hub: a folder with a model card. PATH is a run's or a
    trial's folder.
    """
    if push is not None and to != "hub":
        raise RequestError(f"--push {visible(push, '')}: it goes with --to hub")
    from ..report import model_files
    from ..report.load import read_run

    if push is not None:
        model_files.check_name(push)
        model_files.needed("huggingface_hub", "hf", f"--push {push}")
    written = model_files.export(read_run(path), to, role, output, force)
    click.echo(visible(str(written)))
    if push is not None:
        click.echo(model_files.push(written, push))
