"""Measure the time of decoding a data set of JPEGs, beside a plain Pillow pool, and of opening its copy.

    python benchmarks/decode.py --images 100000 --repeats 3

Makes JPEGs of 64x64 in Tiny-ImageNet's layout (200 classes, about 2 kB each), then decodes them alternately with a
pool of processes that does nothing but ``Image.open(path).convert("RGB")`` to an array, thrown away, and with
``load_dataset``, which lists the files, decodes, checks, writes and maps them. Both use all cores, and find the files
in the page cache. CPU seconds are of all processes; on a shared machine they vary less.
The last line is an opening in a process that has just started, its imports not counted.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
from PIL import Image

from mosaic_ray.config.schema import DataConfig
from mosaic_ray.core.machine import num_cpus
from mosaic_ray.data.load import load_dataset

CLASSES = 200
OPEN = (
    "import sys, time; from mosaic_ray.data.load import load_dataset; from mosaic_ray.config.schema import DataConfig; "
    "start = time.perf_counter(); load_dataset(DataConfig(name='tiny_imagenet', root=sys.argv[1])); "
    "print(time.perf_counter() - start)"
)


def picture(seed: int) -> bytes:
    """A JPEG of soft forms and some grain."""
    draws = np.random.default_rng(seed)
    forms = Image.fromarray(draws.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((64, 64))
    grain = draws.normal(0, 8, (64, 64, 1))
    buffer = io.BytesIO()
    Image.fromarray((np.asarray(forms) + grain).clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=80)
    return buffer.getvalue()


def write(root: Path, images: int) -> None:
    """``images`` for training and a tenth for the test set; 1,000 pictures take turns."""
    base = root / "tiny-imagenet-200"
    pictures = [picture(seed) for seed in range(1000)]
    wnids = [f"n{number:08}" for number in range(CLASSES)]
    for number, wnid in enumerate(wnids):
        folder = base / "train" / wnid / "images"
        folder.mkdir(parents=True)
        for index in range(images // CLASSES):
            content = pictures[(number * 7 + index) % len(pictures)]
            (folder / f"{wnid}_{index}.JPEG").write_bytes(content)
    (base / "val" / "images").mkdir(parents=True)
    lines = []
    for index in range(images // 10):
        (base / "val" / "images" / f"val_{index}.JPEG").write_bytes(pictures[index % len(pictures)])
        lines.append(f"val_{index}.JPEG\t{wnids[index % CLASSES]}\t0\t0\t63\t63\n")
    (base / "val" / "val_annotations.txt").write_text("".join(lines))
    (base / "wnids.txt").write_text("\n".join(wnids))


def bare_decode(path: str) -> None:
    """Decode one image, as the pool does."""
    np.asarray(Image.open(path).convert("RGB"))


def bare_pool(paths: list[str], cores: int) -> None:
    """Return the seconds of the plain pool: the ratio's denominator."""
    with multiprocessing.get_context("fork").Pool(cores) as pool:
        for _ in pool.imap_unordered(bare_decode, paths, chunksize=256):
            pass
        pool.close()
        pool.join()  # so that its CPU seconds are counted


def ours(root: Path) -> None:
    """Return the seconds of ``load_dataset``: the ratio's numerator."""
    load_dataset(DataConfig(name="tiny_imagenet", root=str(root)))


def measured(work: Callable[..., None], *arguments: object) -> tuple[float, float]:
    """Seconds on the clock, and CPU seconds of this process and of those that have ended below it."""
    start, before = time.perf_counter(), sum(os.times()[:4])
    work(*arguments)
    return time.perf_counter() - start, sum(os.times()[:4]) - before


def opening(root: Path) -> float:
    """Seconds."""
    return float(subprocess.run([sys.executable, "-c", OPEN, str(root)], capture_output=True, check=True).stdout)


@click.command()
@click.option("--images", default=100_000, show_default=True, help="Training images; a tenth comes on top.")
@click.option("--repeats", default=3, show_default=True)
@click.option("--place", help="Folder for the images; temporary by default.")
def main(images: int, repeats: int, place: str | None) -> None:
    """Print each pair, and the ratio of the medians."""
    cores = num_cpus()
    with tempfile.TemporaryDirectory(dir=place) as folder:
        root = Path(folder)
        write(root, images)
        paths = sorted(map(str, root.rglob("*.JPEG")))
        click.echo(f"{len(paths)} images of {Path(paths[0]).stat().st_size} bytes, {cores} cores")
        rows = []
        for _ in range(repeats):
            shutil.rmtree(root / "decoded", ignore_errors=True)
            rows.append(measured(bare_pool, paths, cores) + measured(ours, root))
            click.echo("bare pool {:.2f} s ({:.2f} of CPU), load_dataset {:.2f} s ({:.2f} of CPU)".format(*rows[-1]))
        bare, bare_cpu, whole, whole_cpu = (statistics.median(column) for column in zip(*rows, strict=True))
        click.echo(f"medians {bare:.2f} s, {whole:.2f} s; ratio {whole / bare:.2f}, of CPU {whole_cpu / bare_cpu:.2f}")
        seconds = statistics.median(opening(root) for _ in range(max(3, repeats)))
        click.echo(f"opening: {seconds:.3f} s")


if __name__ == "__main__":
    main()
