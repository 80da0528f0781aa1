"""Compare the images of clients' generators of several kinds, and their cost: a few clients, no closing rounds.

    python benchmarks/generator_quality.py --preset cifar10_small --omega 0.1 --clients 3 --storage ./real-only \\
        --arm CVAE "" --arm GAN "generator.family=cgan generator.steps=800" --pictures ./pictures

Each arm trains the generators of the same clients, evenly spaced by their number of images, beside the same warm-up,
and draws images with the client's own label shares. Two more rows are of images that these clients hold, as they are
and blurred by a Gaussian of one pixel. The columns are those of ``fidelity.py``; figures are means over the clients.

``--score STEPS``: one column more, the test accuracy of a new network that trains on the images of all these clients
alone (classification accuracy score, Ravuri and Vinyals 2019). It needs clients that hold all classes together.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click
import numpy as np
import torch
from fidelity import ImageQuality, Quality, blurred, cost, shards_of, warmed
from PIL import Image

from mosaic_ray.cli.request import parse_config
from mosaic_ray.config.resolve import override
from mosaic_ray.config.schema import ExperimentConfig
from mosaic_ray.core.seeding import seeded, stream
from mosaic_ray.core.types import Dataset
from mosaic_ray.data.image_ops import image_grid
from mosaic_ray.data.load import load_dataset
from mosaic_ray.distillation.client_tasks import GeneratorInput, GeneratorTask
from mosaic_ray.distillation.generator_training import TrainedGenerator, draw, load_generator, to_pixels
from mosaic_ray.federated.client import ClientContext
from mosaic_ray.federated.evaluation import accuracy, confusion, logits_on
from mosaic_ray.federated.local_training import LocalTrainingConfig, Shard, train_locally
from mosaic_ray.models.classifiers import build_classifier
from mosaic_ray.models.state_dict import freeze

PICTURED = 12  # images of a client in a picture


def drawn(config: ExperimentConfig, data: Dataset, client_id: int, made: TrainedGenerator, count: int) -> Shard:
    """Draw ``count`` images with the labels that they were asked for."""
    generator, cpu = load_generator(config.generator, data.facts, made.weights), torch.device("cpu")
    with torch.no_grad():
        z, labels = draw(generator, count, stream(config.seed, "quality", client_id), cpu)
        images = to_pixels(generator(z, labels).float(), config.generator.gan_range, data.facts)
    return Shard(torch.from_numpy(images), labels)


def score(config: ExperimentConfig, data: Dataset, found: Sequence[Shard], steps: int) -> float:
    """Return the test accuracy of a new network after ``steps`` of SGD on these images, all classes equally often."""
    images, labels = (torch.cat([getattr(shard, name) for shard in found]) for name in ("images", "labels"))
    rows = [torch.nonzero(labels == label)[:, 0] for label in labels.unique()]
    most = max(map(len, rows))
    even = torch.cat([part.repeat(-(-most // len(part)))[:most] for part in rows])
    with seeded(config.seed, "quality", "network"):
        facts = data.facts
        network = build_classifier(config.model, facts.num_classes, facts.channels, facts.image_size)
    for rest in range(4):  # the learning rate falls by half after each quarter
        plan = LocalTrainingConfig(steps // 4, 64, 0.02 / 2**rest, 5e-4, 0.9)
        shard, address = Shard(images[even], labels[even]), (config.seed, "quality", rest, 0)
        train_locally(network, shard, plan, facts, address, "fp32")
    logits = logits_on(freeze(network), data.test, facts, torch.device("cpu"), "fp32")
    return float(accuracy(confusion(logits, data.test.labels)))


@click.command()
@click.option("--preset", default="fmnist_small", show_default=True)
@click.option("--dataset", default=None, help="As for mosaic run.")
@click.option("--omega", default=0.1, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--clients", default=3, show_default=True, help="How many of them train.")
@click.option("--images", default=500, show_default=True, help="Of each client.")
@click.option("--arm", "arms", nargs=2, multiple=True, metavar="NAME KNOBS", help="Generators, with changed knobs.")
@click.option("--set", "sets", multiple=True, metavar="KEY=VALUE", help="Any knob, for all arms.")
@click.option("--score", "steps", default=0, show_default=True, help="Steps of a new network on the images alone.")
@click.option("--pictures", default=None, help="A folder for a picture of each arm.")
@click.option("--storage", default="./real-only", show_default=True, help="Of the warm-up.")
def main(
    preset: str, dataset: str | None, omega: float, seed: int, clients: int, images: int,
    arms: tuple[tuple[str, str], ...], sets: tuple[str, ...], steps: int, pictures: str | None, storage: str,
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
    warmup, shards = warmed(config, data, Path(storage)), shards_of(config, data)
    quality = ImageQuality(config, data, warmup.weights)
    by_size = sorted(range(len(shards)), key=lambda k: -len(shards[k]))
    chosen = [by_size[i] for i in np.linspace(0, len(by_size) - 1, clients).round().astype(int)]
    own = {k: Shard(torch.from_numpy(data.train.images[shards[k]]), torch.from_numpy(data.train.labels[shards[k]]))
           for k in chosen}  # fmt: skip
    click.echo(f"clients {', '.join(f'{k} ({len(own[k])} images)' for k in chosen)}\n")
    head = ("images", "domain AUC", "agreement", "variety", "agreement of each client", "cost", "score")
    click.echo(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")

    def show(name: str, found: list[Shard], price: str = "–") -> None:
        parts = [quality.measure(shard) for shard in found]
        mean, each = Quality(*np.mean(parts, 0)), ", ".join(f"{part.agreement:.0%}" for part in parts)
        reached = f"{score(config, data, found, steps):.1%}" if steps else "–"
        click.echo(f"| {name} | {mean.cells()} | {each} | {price} | {reached} |")
        if pictures:
            Path(pictures).mkdir(parents=True, exist_ok=True)
            grid = image_grid(np.concatenate([shard.images[:PICTURED].numpy() for shard in found]), PICTURED)
            Image.fromarray(grid.transpose(1, 2, 0).squeeze()).save(Path(pictures) / f"{name}.png")

    real = []
    for k in chosen:
        rows = torch.randperm(len(own[k]), generator=stream(seed, "quality", "real", k))[:images]
        real.append(Shard(own[k].images[rows], own[k].labels[rows]))
    show("real images", real)
    show("blurred", [Shard(torch.from_numpy(blurred(one.images.numpy(), 1.0)), one.labels) for one in real])
    for name, asked in configs.items():
        context, found = ClientContext(asked, data.facts, torch.device("cpu")), []
        for k in chosen:
            made = GeneratorTask().run(context, own[k], k, warmup.models, GeneratorInput(warmup.client(k)))
            found.append(drawn(asked, data, k, made, images))
        show(name, found, cost(asked))


if __name__ == "__main__":
    main()
