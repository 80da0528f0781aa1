"""What clients' generators of several kinds draw, and what they cost: a few clients, no rounds after the warm-up.

    python benchmarks/generator_quality.py --preset cifar10_small --omega 0.1 --clients 3 --storage ./real-only \\
        --arm CVAE "" --arm GAN "generator.family=cgan generator.steps=800" --pictures ./pictures

Each arm trains the generators of the same clients, evenly spaced by their number of images, beside the same warm-up,
and draws images with the client's own label shares. The first row is of images that clients hold.

``domain AUC`` and ``agreement`` are those of ``fidelity.py``: how well a linear classifier tells the images from real
ones of the same classes (0.5: not at all), and the share that an LDA head of all real images assigns to the class asked
for. ``variety``: total variance of features, relative to a client's real images. ``cost``: as many steps of local
training cost a client the same.
"""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np
import torch
from fidelity import ImageQuality, cost, shards_of
from PIL import Image

from mosaic_ray.cli.request import parse_config
from mosaic_ray.config.resolve import override
from mosaic_ray.config.schema import ExperimentConfig
from mosaic_ray.core.seeding import stream
from mosaic_ray.core.types import Dataset
from mosaic_ray.data.load import load_dataset
from mosaic_ray.distillation.client_tasks import GeneratorInput, GeneratorTask
from mosaic_ray.distillation.generator_training import TrainedGenerator, draw, load_generator, to_pixels
from mosaic_ray.execution.placement import Placement
from mosaic_ray.federated.client import ClientContext
from mosaic_ray.federated.local_training import Shard
from mosaic_ray.pipeline.partition import deal
from mosaic_ray.pipeline.rounds import Warmup, warm_up
from mosaic_ray.runs import runner
from mosaic_ray.storage.store import Store
from mosaic_ray.tracking.tracker import Tracker

PICTURED = 12  # images of a client in a picture


def warmed(config: ExperimentConfig, data: Dataset, storage: str) -> Warmup:
    """Return the warm-up of ``config``, computed or found in ``storage``."""
    with (
        Tracker(None, progress=False) as tracker,
        runner.open_run(config, data, Store(storage), tracker, Placement()) as run,
    ):
        deal(run)
        return warm_up(run)


def drawn(config: ExperimentConfig, data: Dataset, client_id: int, made: TrainedGenerator, count: int) -> Shard:
    """Draw ``count`` images with the labels that they were asked for."""
    generator, cpu = load_generator(config.generator, data.facts, made.weights), torch.device("cpu")
    with torch.no_grad():
        z, labels = draw(generator, count, stream(config.seed, "quality", client_id), cpu)
        images = to_pixels(generator(z, labels).float(), config.generator.gan_range, data.facts)
    return Shard(torch.from_numpy(images), labels)


def save(path: Path, rows: list[np.ndarray]) -> None:
    """Save rows of images uint8 [n, C, H, W] as one PNG, three times as large."""
    image = np.concatenate([np.concatenate(list(row.transpose(0, 2, 3, 1)), 1) for row in rows])
    picture = Image.fromarray(image.squeeze())
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.resize((3 * picture.width, 3 * picture.height), Image.Resampling.NEAREST).save(path)


@click.command()
@click.option("--preset", default="fmnist_small", show_default=True)
@click.option("--dataset", default=None, help="As for mosaic run.")
@click.option("--omega", default=0.1, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--clients", default=3, show_default=True, help="How many of them train.")
@click.option("--images", default=500, show_default=True, help="Of each client.")
@click.option("--arm", "arms", nargs=2, multiple=True, metavar="NAME KNOBS", help="Generators, with changed knobs.")
@click.option("--set", "sets", multiple=True, metavar="KEY=VALUE", help="Any knob, for all arms.")
@click.option("--pictures", default=None, help="A folder for a picture of each arm.")
@click.option("--storage", default="./real-only", show_default=True, help="Of the warm-up.")
def main(
    preset: str, dataset: str | None, omega: float, seed: int, clients: int, images: int,
    arms: tuple[tuple[str, str], ...], sets: tuple[str, ...], pictures: str | None, storage: str,
) -> None:  # fmt: skip
    """Print a row for each arm as it ends."""
    torch.set_num_threads(1)

    def read(words: str = "") -> ExperimentConfig:
        asked = {"omega": str(omega), "seed": str(seed), "sets": (*sets, *words.split())}
        own = {"runtime.host": "serial", "runtime.device": "cpu", "runtime.precision": "fp32", "runtime.eval_rounds": 0}
        return override(parse_config(preset=preset, dataset=dataset, **asked), own)

    config = read()
    data = load_dataset(config.data)
    configs = {name: read(words) for name, words in arms}
    warmup, shards = warmed(config, data, storage), shards_of(config, data)
    quality = ImageQuality(config, data, Path(storage))
    by_size = sorted(range(len(shards)), key=lambda k: -len(shards[k]))
    chosen = [by_size[i] for i in np.linspace(0, len(by_size) - 1, clients).round().astype(int)]
    own = {k: Shard(torch.from_numpy(data.train.images[shards[k]]), torch.from_numpy(data.train.labels[shards[k]]))
           for k in chosen}  # fmt: skip
    said = ", ".join(f"{k} ({len(own[k])} images)" for k in chosen)
    click.echo(f"clients {said}\n\n| images | domain AUC | agreement | variety | cost |\n|---|---|---|---|---|")

    def show(name: str, found: list[Shard], variety: str, price: str) -> None:
        parts = [quality.measure(shard) for shard in found]
        auc, agreement = np.mean(parts, 0)
        if pictures:
            save(Path(pictures) / f"{name}.png", [shard.images[:PICTURED].numpy() for shard in found])
        each = ", ".join(f"{value:.0%}" for _, value in parts)
        click.echo(f"| {name} | {auc:.2f} | {agreement:.1%} ({each}) | {variety} | {price} |")

    real = []
    for k in chosen:
        rows = torch.randperm(len(own[k]), generator=stream(seed, "quality", "real", k))[:images]
        real.append(Shard(own[k].images[rows], own[k].labels[rows]))
    show("real images", real, "1", "–")
    for name, asked in configs.items():
        context, found, variety = ClientContext(asked, data.facts, torch.device("cpu")), [], []
        for k in chosen:
            made = GeneratorTask().run(context, own[k], k, warmup.models, GeneratorInput(warmup.client(k)))
            found.append(drawn(asked, data, k, made, images))
            variety.append(made.figures["variety"])
        show(name, found, f"{np.mean(variety):.2f}", cost(asked))


if __name__ == "__main__":
    main()
