"""How many of its client's classes a generator shows: the plain one beside the class-conditional one.

    python benchmarks/coverage.py --dataset fmnist --classes 10,3 --steps 400,800 --ngf 16 --seeds 0,1

One client holds the first ``--classes`` classes: ``--per-class`` images of the first, and with ``--skew R`` fewer of
each next one, down to one in R. Its classifier (``cnn``) is trained on them first. Another one, the judge, is trained
on the whole training set and has no part in the game: it says what the images show to somebody else. ``--dataset made``
is of CIFAR-100's shape, made here as in ``cifar100_scale.py``. Figures are means over seeds; seconds are CPU seconds of
one generator's training.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import click
import numpy as np
import torch
from cifar100_scale import write_cifar100
from torch import nn

from mosaic_ray.config.resolve import override
from mosaic_ray.config.schema import DataConfig, ExperimentConfig
from mosaic_ray.core.seeding import numpy_stream, seeded, stream
from mosaic_ray.core.types import DataFacts, Dataset, ImageSet
from mosaic_ray.data.load import load_dataset
from mosaic_ray.data.transforms import normalise
from mosaic_ray.distillation.generator_training import classifier_view, draw, load_generator, train_generator
from mosaic_ray.federated.local_training import LocalTrainingConfig, Shard, train_locally
from mosaic_ray.models.classifiers import build_classifier
from mosaic_ray.models.state_dict import to_weights

CPU = torch.device("cpu")
HEAD = (
    "kind", "classes", "ngf", "steps", "coverage", "owned mass", "agreement", "coverage, judge", "agreement, judge",
    "parameters", "seconds",
)  # fmt: skip


@dataclass(frozen=True)
class Client:
    """A client that owns the first ``num_classes`` classes."""

    config: ExperimentConfig
    num_classes: int
    images: ImageSet
    classifier: nn.Module

    def measure(self, facts: DataFacts, judge: nn.Module) -> dict[str, float]:
        """A row's figures for this client."""
        knobs, shard = self.config.generator, shard_of(self.images)
        began = time.process_time()
        made = train_generator(
            self.classifier, to_weights(self.classifier), shard, knobs, facts, (self.config.seed, 0), "fp32"
        )
        own = made.figures
        seconds = time.process_time() - began
        generator = load_generator(knobs, facts, made.weights)
        seen = as_judged(generator, judge, self.num_classes, self.config, facts)
        figures = {"coverage": own["coverage"], "owned mass": own["owned_mass"], "seconds": seconds}
        figures |= {"agreement": own["label_agreement"]} if "label_agreement" in own else {}
        return figures | seen | {"parameters": float(sum(p.numel() for p in generator.parameters()))}


def numbers(text: str) -> list[int]:
    """``1,2`` as [1, 2]."""
    return [int(part) for part in text.split(",")]


def made(config: DataConfig, num_train: int = 20_000) -> Dataset:
    """100 classes of 3x32x32 images (or as ``config`` has it), each class a pattern of its own in noise."""
    with tempfile.TemporaryDirectory() as folder:
        write_cifar100(Path(folder), num_train, 2_000)
        return load_dataset(replace(config, name="cifar100", root=folder))


def shard_of(data: ImageSet) -> Shard:
    """On the CPU, copied."""
    return Shard(torch.tensor(data.images), torch.tensor(data.labels))


def trained(config: ExperimentConfig, facts: DataFacts, data: ImageSet, steps: int, what: str) -> nn.Module:
    """A classifier after ``steps`` of SGD on ``data``."""
    with seeded(config.seed, "init", "classifier"):
        model = build_classifier(config.model, facts.num_classes, facts.channels, facts.image_size)
    plan, address = LocalTrainingConfig(steps, 64, 0.05, 1e-4, 0.9), (config.seed, what, 0, 0)
    train_locally(model, shard_of(data), plan, facts, address, "fp32")
    return model


@torch.no_grad()
def accuracy(model: nn.Module, data: ImageSet, facts: DataFacts) -> float:
    """Share of ``data`` that ``model`` names rightly."""
    parts = zip(np.array_split(data.images, 20), np.array_split(data.labels, 20), strict=True)
    seen = [(model(normalise(torch.tensor(x), facts.mean, facts.std)).argmax(1).numpy(), labels) for x, labels in parts]
    return float(np.concatenate([found == labels for found, labels in seen]).mean())


def client_images(data: ImageSet, num_classes: int, per_class: int, skew: float, seed: int) -> ImageSet:
    """A client's images: ``per_class`` of class 0, down to ``per_class / skew`` of its last class."""
    draws, rows = numpy_stream(seed, "coverage"), []
    for label in range(num_classes):
        count = max(2, round(per_class * skew ** (-label / max(num_classes - 1, 1))))
        rows.append(draws.permutation(np.flatnonzero(data.labels == label))[:count])
    return data.take(np.concatenate(rows))


@torch.no_grad()
def as_judged(
    generator: nn.Module, judge: nn.Module, num_classes: int, config: ExperimentConfig, facts: DataFacts
) -> dict[str, float]:
    """Return coverage and agreement by the second classifier, on twenty images a class and 1,000 at least."""
    count, asked, seen = max(1000, 20 * num_classes), [], []
    drawn = draw(generator, count, stream(config.seed, "coverage/judge"), CPU)
    for part in zip(*(tensor.split(500) for tensor in drawn), strict=True):
        seen.append(judge(classifier_view(generator(*part), config.generator.gan_range, facts)).argmax(1))
        asked += part[1:]
    found = torch.cat(seen)
    shares = torch.bincount(found, minlength=facts.num_classes)[:num_classes] / count
    figures = {"coverage, judge": float((shares >= min(0.01, 0.1 / num_classes)).float().mean())}
    return figures | ({"agreement, judge": float((torch.cat(asked) == found).float().mean())} if asked else {})


def rows(
    dataset: Dataset, base: ExperimentConfig, classes: list[int], steps: list[int], ngf: list[int], seeds: list[int],
    kinds: list[str], per_class: int, skew: float, classifier_steps: int, judge_steps: int,
) -> Iterator[list[str]]:  # fmt: skip
    """The table's rows."""
    facts, test = dataset.facts, dataset.test
    judge = trained(base, facts, dataset.train, judge_steps, "judge")
    click.echo(f"judge: {accuracy(judge, test, facts):.1%} of test images", err=True)
    for num_classes in classes:
        clients, own = [], test.take(np.flatnonzero(test.labels < num_classes))
        for seed in seeds:
            config = override(base, {"seed": seed})
            data = client_images(dataset.train, num_classes, per_class, skew, seed)
            clients.append(Client(config, num_classes, data, trained(config, facts, data, classifier_steps, "client")))
            reached = accuracy(clients[-1].classifier, own, facts)
            click.echo(f"{num_classes} classes, seed {seed}: {len(data)} images, classifier {reached:.1%}", err=True)
        for width, count, kind in itertools.product(ngf, steps, kinds):
            knobs_now = {
                "generator.ngf": width, "generator.ndf": width, "generator.steps": count,
                "generator.conditional": kind == "conditional",
            }  # fmt: skip
            found = [
                Client(override(c.config, knobs_now), num_classes, c.images, c.classifier).measure(facts, judge)
                for c in clients
            ]
            mean = {name: float(np.mean([figures[name] for figures in found])) for name in found[0]}
            shares = [f"{mean[name]:.2f}" if name in mean else "–" for name in HEAD[4:9]]
            yield [kind, str(num_classes), str(width), str(count), *shares, *(f"{mean[n]:,.0f}" for n in HEAD[9:])]


@click.command()
@click.option("--dataset", default="digits", show_default=True, help="A data.name, or made.")
@click.option("--classes", default="10", show_default=True)
@click.option("--steps", default="400,800", show_default=True)
@click.option("--ngf", default="16", show_default=True, help="Of the generator, and ndf of its discriminator.")
@click.option("--seeds", default="0", show_default=True)
@click.option("--kinds", default="plain,conditional", show_default=True)
@click.option("--per-class", default=300, show_default=True)
@click.option("--skew", default=1.0, show_default=True)
@click.option("--classifier-steps", default=200, show_default=True)
@click.option("--judge-steps", default=400, show_default=True)
@click.option("--set", "sets", multiple=True, help="KEY=VALUE: knobs of the client and its generator.")
def main(
    dataset: str, classes: str, steps: str, ngf: str, seeds: str, kinds: str, per_class: int, skew: float,
    classifier_steps: int, judge_steps: int, sets: tuple[str, ...],
) -> None:  # fmt: skip
    """Print a Markdown table."""
    torch.set_num_threads(1)
    base = override(ExperimentConfig(), dict(text.split("=", 1) for text in sets), text=True)
    loaded = made(base.data) if dataset == "made" else load_dataset(replace(base.data, name=dataset))
    click.echo("| " + " | ".join(HEAD) + " |\n" + "|---" * len(HEAD) + "|")
    for row in rows(
        loaded, base, numbers(classes), numbers(steps), numbers(ngf), numbers(seeds), kinds.split(","), per_class,
        skew, classifier_steps, judge_steps,
    ):  # fmt: skip
        click.echo("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
