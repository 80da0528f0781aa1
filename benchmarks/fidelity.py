"""What rehearsal gains as synthetic images get better: real images of other clients, blurred, in the generators' place.

    python benchmarks/fidelity.py --preset cifar10_small --omega 0.1 --blur 0,1,2 --rounds 15 --storage ./fidelity

The arm ``blur s`` draws, for each image that a client asks for, a real training image of that class from the client
whose generator would draw it, blurred by a Gaussian of s pixels. So blur 0 is a perfect generator, an upper bound that
no federation may use, and larger blurs are worse ones. ``generators`` are the preset's own, and ``real only`` has no
such images. ``--arm NAME KNOBS`` adds other generators, as ``--arm GAN "generator.family=cgan generator.steps=800"``.
All arms share one warm-up and end with the same head. Accuracies are on test images, for reporting alone.

``domain AUC``: how well a linear classifier tells the drawn images from real ones by the features of the warmed-up
model (0.5: not at all). ``agreement``: the share that an LDA head on those features assigns to the class asked for.
It is below 1 for real images (blur 0), too. ``variety``: total variance of the features, relative to real images of the
same classes. ``cost``: the steps of local training that cost a client as much as its generator.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import click
import numpy as np
import torch

from mosaic_ray.cli.request import parse_config
from mosaic_ray.config.resolve import override
from mosaic_ray.config.schema import ExperimentConfig
from mosaic_ray.core.seeding import numpy_stream
from mosaic_ray.core.types import Dataset, Weights
from mosaic_ray.data.load import load_dataset
from mosaic_ray.data.partition import partition, split_validation
from mosaic_ray.data.transforms import normalise
from mosaic_ray.distillation import rehearsal
from mosaic_ray.distillation.image_quality import domain_auc
from mosaic_ray.execution.placement import Placement
from mosaic_ray.federated.local_training import Shard
from mosaic_ray.models.classifiers import build_classifier
from mosaic_ray.models.state_dict import freeze, load_weights
from mosaic_ray.pipeline.partition import deal
from mosaic_ray.pipeline.rounds import Warmup, warm_up
from mosaic_ray.runs import runner
from mosaic_ray.runs.equal_compute import client_steps
from mosaic_ray.storage.store import Store
from mosaic_ray.tracking.tracker import Tracker

MEASURED = 2_000  # images for domain AUC and agreement


def blurred(images: np.ndarray, sigma: float) -> np.ndarray:
    """Return uint8 ``images`` [N, C, H, W] after a Gaussian blur of ``sigma`` pixels; the same for 0."""
    if not sigma:
        return images
    from torchvision.transforms.v2.functional import gaussian_blur

    size = 2 * int(np.ceil(3 * sigma)) + 1
    return gaussian_blur(torch.from_numpy(images).float(), [size, size], [sigma, sigma]).round().byte().numpy()


def shards_of(config: ExperimentConfig, data: Dataset) -> list[np.ndarray]:
    """Return each client's rows of the training images, as the stage ``partition`` deals them."""
    dealt = partition(data.train.labels, config.partition, config.seed, data.facts.num_classes)
    return split_validation(data.train.labels, dealt, config.partition.validation_fraction, config.seed)[0]


class RealImages:
    """Draws blurred real images of other clients in the place of ``rehearsal.draw_images``."""

    def __init__(self, config: ExperimentConfig, data: Dataset, sigma: float) -> None:
        images, labels = data.train.images, data.train.labels
        self._images, self._sigma, self._seed = images, sigma, config.seed
        self._rows = [
            {int(label): rows[labels[rows] == label] for label in np.unique(labels[rows])}
            for rows in shards_of(config, data)
        ]

    def __call__(
        self, config: Any, facts: Any, shared: Any, places: np.ndarray, labels: np.ndarray, noise: torch.Generator,
        device: torch.device,
    ) -> Shard:  # fmt: skip
        draws = numpy_stream(self._seed, "fidelity", int(torch.randint(2**31, (1,), generator=noise)))
        rows = [
            draws.choice(self._rows[shared.clients[place]][label])
            for place, label in zip(places.tolist(), labels.tolist(), strict=True)
        ]
        images = blurred(np.ascontiguousarray(self._images[rows]), self._sigma)
        return Shard(torch.as_tensor(images, device=device), torch.as_tensor(labels, device=device))


@contextmanager
def drawing(draw: Any) -> Iterator[list[Shard]]:
    """Let clients of this process rehearse with images of ``draw``; collects what the first clients drew."""
    seen: list[Shard] = []
    inner = draw or rehearsal.draw_images

    def watched(*inputs: Any) -> Shard:
        shard = inner(*inputs)
        if sum(map(len, seen)) < MEASURED:
            seen.append(shard)
        return shard

    with mock.patch.object(rehearsal, "draw_images", watched):
        yield seen


def warmed(config: ExperimentConfig, data: Dataset, storage: Path) -> Warmup:
    """Return the warm-up of ``config``, computed or found in ``storage``."""
    with (
        Tracker(None, progress=False) as tracker,
        runner.open_run(config, data, Store(str(storage)), tracker, Placement()) as run,
    ):
        deal(run)
        return warm_up(run)


class Quality(NamedTuple):
    """Domain AUC, label agreement and variety of images; real images have 0.5, less than 1, and 1."""

    auc: float
    agreement: float
    variety: float

    def cells(self) -> str:
        """Return the cells of a table."""
        return f"{self.auc:.2f} | {self.agreement:.1%} | {self.variety:.2f}"


class ImageQuality:
    """Measures drawn images by the features of the warmed-up model ``weights``."""

    def __init__(self, config: ExperimentConfig, data: Dataset, weights: Weights) -> None:
        from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

        facts = data.facts
        network = build_classifier(config.model, facts.num_classes, facts.channels, facts.image_size)
        self._network, self._facts, self._seed = freeze(load_weights(network, weights)), facts, config.seed
        rows = numpy_stream(config.seed, "fidelity", "features").permutation(len(data.train))[: 10 * MEASURED]
        features, self._labels = self._features(data.train.images[rows]), data.train.labels[rows]
        self._real = features
        self._head = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=0.01).fit(features, self._labels)

    def _features(self, images: np.ndarray) -> np.ndarray:
        parts = torch.tensor(images).split(500)
        with torch.no_grad():
            found = [self._network.features(normalise(p, self._facts.mean, self._facts.std)).numpy() for p in parts]
        return np.concatenate(found)

    def measure(self, shard: Shard) -> Quality:
        """Compare drawn images with as many real ones of the same labels."""
        features, labels = self._features(shard.images.numpy()), shard.labels.numpy()
        draws = numpy_stream(self._seed, "fidelity", "matched")
        real = self._real[[draws.choice(np.flatnonzero(self._labels == label)) for label in labels.tolist()]]
        agreement = float((self._head.predict(features) == labels).mean())
        variety = float(features.var(0).sum() / real.var(0).sum())
        return Quality(domain_auc(real, features, self._seed), agreement, variety)


def cost(config: ExperimentConfig) -> str:
    """Return what the generators of ``config`` cost a client, in steps of local training, or a dash if it has none."""
    with_them, without = (client_steps(override(config, own)) for own in ({}, {"generator.steps": 0}))
    return "–" if with_them is None or without is None or with_them == without else f"{with_them - without:.0f}"


@click.command()
@click.option("--preset", default="fmnist_small", show_default=True)
@click.option("--dataset", default=None, help="As for mosaic run.")
@click.option("--omega", default=0.1, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--blur", default="0,1,2", show_default=True, help="Pixels; empty: none of these arms.")
@click.option("--generators/--no-generators", default=True, show_default=True, help="The preset's own generators.")
@click.option("--arm", "others", nargs=2, multiple=True, metavar="NAME KNOBS", help="Generators with other knobs.")
@click.option("--rounds", default=15, show_default=True, help="Closing rounds.")
@click.option("--weight", default=1.0, show_default=True, help="Of the loss on synthetic images.")
@click.option("--set", "sets", multiple=True, metavar="KEY=VALUE", help="Any knob.")
@click.option("--storage", default="./fidelity", show_default=True, help="A folder; each arm has one below it.")
def main(
    preset: str, dataset: str | None, omega: float, seed: int, blur: str, generators: bool,
    others: tuple[tuple[str, str], ...], rounds: int, weight: float, sets: tuple[str, ...], storage: str,
) -> None:  # fmt: skip
    """Print a row for each arm as it ends."""
    torch.set_num_threads(1)
    knobs = {
        "runtime.host": "serial", "runtime.device": "cpu", "runtime.precision": "fp32", "runtime.eval_rounds": 0,
        "finetune.num_rounds": rounds, "rehearsal.candidates": (),
    }  # fmt: skip

    def read(own: tuple[str, ...] = ()) -> ExperimentConfig:
        words = {"omega": str(omega), "seed": str(seed), "sets": (*sets, *own)}
        return override(parse_config(preset=preset, dataset=dataset, **words), knobs)

    config = read()
    data = load_dataset(config.data)
    arms: dict[str, tuple[Any, ExperimentConfig]] = {"real only": (None, override(config, {"method": "lda_head"}))}
    for sigma in filter(None, blur.split(",")):
        own = override(config, {"generator.steps": 0, "rehearsal.weight": weight})
        arms[f"blur {sigma}"] = RealImages(config, data, float(sigma)), own
    for name, words in (*((("generators", ""),) if generators else ()), *others):
        arms[name] = None, override(read(tuple(words.split())), {"rehearsal.weight": weight})

    head = ("images", "test accuracy", "over real only", "domain AUC", "agreement", "variety", "cost")
    click.echo(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    base, floor, quality_of = Path(storage) / "real-only", 0.0, None
    for name, (draw, asked) in arms.items():
        place = Path(storage) / name.replace(" ", "-")
        if place != base and not place.exists():
            shutil.copytree(base, place)  # the warm-up
        with drawing(draw) as seen:
            found = runner.run(asked, storage=str(place), name=f"s{seed}-w{omega}")["accuracy"]["final"]
        quality_of = quality_of or ImageQuality(asked, data, warmed(asked, data, base).weights)
        floor = floor or found
        kept, quality = place / f"quality-s{seed}-w{omega}.txt", "– | – | –"
        if seen:
            drawn = Shard(torch.cat([shard.images for shard in seen]), torch.cat([shard.labels for shard in seen]))
            kept.write_text(quality_of.measure(drawn).cells())
        if kept.exists():  # written when the stored result was computed
            quality = kept.read_text()
        click.echo(f"| {name} | {found:.1%} | {100 * (found - floor):+.1f} | {quality} | {cost(asked)} |")


if __name__ == "__main__":
    main()
