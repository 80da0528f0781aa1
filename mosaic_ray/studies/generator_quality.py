"""`mosaic experiment generator-quality`: measure how far the images of one generator are from real ones.

One client holds everything: a classifier is trained on it, then the client's generator beside that classifier, as in
any run. Images held out from the client (``partition.validation_fraction``, never test images) are cut into two
disjoint halves: one stands for real images, and the distance between both is the floor, the distance of real images.

Two classifiers give the features. ``own`` is the one that steered the generator, which may have fitted it too well;
``judge`` has the same training from another start and took no part, so it is the one to trust.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..config.resolve import override
from ..config.schema import ExperimentConfig
from ..core.errors import RequestError
from ..core.seeding import derive, numpy_stream
from ..core.types import Dataset, Weights
from .harness import Row, Study, StudyContext, generated, measured, uploads

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..federated.client import ClientContext
    from ..pipeline.context import RunContext
    from ..storage.store import StageResult

#: Defaults below --config and --set: one client, and a well trained classifier.
BASE: dict[str, Any] = {
    "algorithm": "distilled",
    "partition.num_clients": 1, "partition.sampler": "iid", "partition.validation_fraction": 0.2,
    "warmup.num_rounds": 30, "warmup.local_steps": 20, "runtime.eval_rounds": 0,
}  # fmt: skip

#: Images of each kind where no number is asked for.
MOST_IMAGES, FEWEST_IMAGES = 2000, 20


def num_images(config: ExperimentConfig, dataset: Dataset, asked: int | None) -> int:
    """Return the number of images of each kind: ``asked``, or half of the held-out ones (2000 at most)."""
    half = int(len(dataset.train) * config.partition.validation_fraction) // 2
    if half < FEWEST_IMAGES:
        raise RequestError(
            f"partition.validation_fraction = {config.partition.validation_fraction:g}: of {len(dataset.train)} images "
            f"that leaves {2 * half} real ones to compare with; {2 * FEWEST_IMAGES} or more are needed"
        )
    if asked is not None and not FEWEST_IMAGES <= asked <= half:
        raise RequestError(
            f"--images {asked}: it may be {FEWEST_IMAGES} to {half}, half of the images that are held out; "
            "partition.validation_fraction says how many are"
        )
    return asked or min(half, MOST_IMAGES)


def check(config: ExperimentConfig, dataset: Dataset, options: Mapping[str, Any]) -> None:
    """``RequestError`` unless one client holds everything and enough images are held out."""
    from ..distillation.image_quality import inception_weights
    from ..models.generator import check_image_size

    if config.partition.num_clients != 1:
        raise RequestError(
            f"partition.num_clients = {config.partition.num_clients}: in this experiment one client holds everything"
        )
    check_image_size(dataset.facts.image_size)
    num_images(config, dataset, options["images"])
    if options["inception"]:
        inception_weights()


def measure(context: StudyContext, config: ExperimentConfig) -> StageResult:
    """Train a classifier, a generator and a second classifier; measure the images with both classifiers."""
    from ..distillation.image_quality import inception_weights
    from ..pipeline.rounds import warm_up

    with context.run(config) as run:
        shards, warmup, generators = uploads(run)
    other = override(config, {"seed": derive(config.seed, "quality", "judge") % 2**30})
    with context.run(other) as apart:  # the same images, another start and order
        apart.shards, apart.keys["partition"] = shards, shards.key
        judge = warm_up(apart)
    count = num_images(config, context.dataset, context.options["images"])
    held = numpy_stream(config.seed, "quality", "real").permutation(shards.validation[0])
    halves = [context.dataset.train.images[rows] for rows in (held[:count], held[count : 2 * count])]
    inception = bool(context.options["inception"])

    def compute() -> tuple[list[Row], dict[str, np.ndarray]]:
        images = run.on_server(_pixels, generators.weights()[0], count)
        classifiers = {"own": warmup.weights, "judge": judge.weights}
        rows = [_scores(run, name, weights, images, halves) for name, weights in classifiers.items()]
        if inception:
            found = _distances(inception_weights(), images, halves, str(run.client_context.device))
            rows.append({"classifier": "inception"} | found)
        return rows, {"images": images[:100]}

    return measured(run, STUDY, {"images": count, "inception": inception}, [generators.key, judge.key], compute)


def _pixels(context: ClientContext, generator: Weights, count: int) -> np.ndarray:
    """Return ``count`` images of the generator, uint8."""
    from ..distillation.generator_training import to_pixels

    scale, facts = context.config.generator.gan_range, context.facts
    parts = generated(context, generator, count, "quality", "images")
    return np.concatenate([to_pixels(part, scale, facts) for part in parts])


def _distances(features: Any, images: np.ndarray, halves: Sequence[np.ndarray], device: str) -> Row:
    """Return the distance of ``images`` from real ones, its floor, and their ratio."""
    from ..distillation.image_quality import frechet_distance

    distance, floor = (frechet_distance(features, halves[0], other, device) for other in (images, halves[1]))
    return {"num_images": len(images), "fid": distance, "floor": floor, "ratio": distance / floor if floor else None}


def _scores(run: RunContext, name: str, weights: Weights, images: np.ndarray, halves: Sequence[np.ndarray]) -> Row:
    from ..federated.evaluation import accuracy
    from ..pipeline.evaluate import table_of

    row = {"classifier": name} | run.on_server(_scored, weights, images, halves)
    return row | {"test_accuracy": accuracy(table_of(run, weights, run.dataset.test))}


def _scored(context: ClientContext, weights: Weights, images: np.ndarray, halves: Sequence[np.ndarray]) -> Row:
    from ..distillation import image_quality as quality

    facts, device, seed = context.facts, str(context.device), context.config.seed
    features = quality.Network(context.classifier(weights), facts)
    logits = quality.Network(context.classifier(weights), facts, logits=True)
    score, spread = quality.inception_score(logits, images, seed, device)
    shares = quality.class_shares(quality.predicted(logits, images, device), facts.num_classes)
    return _distances(features, images, halves, device) | {
        "inception_score": score, "inception_score_sd": spread,
        "inception_score_real": quality.inception_score(logits, halves[0], seed, device)[0],
        "coverage": quality.coverage(shares), "class_share": shares.tolist(),
    }  # fmt: skip


def figure(figure: Figure, rows: Sequence[Row], arrays: Mapping[str, np.ndarray]) -> None:
    """Draw the first seed's images, the share of each class, and every seed's distance over its floor."""
    from ..data.image_ops import image_grid

    grid, shares, ratios = figure.subplots(1, 3, width_ratios=(1.1, 1.4, 0.8))
    picture = image_grid(arrays["images"], 10).transpose(1, 2, 0)
    grid.imshow(picture.squeeze(), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    grid.set_axis_off()
    grid.set_title(f"synthetic images, seed {rows[0]['seed']}", size=10)
    names = list(dict.fromkeys(row["classifier"] for row in rows))
    seen = [name for name in names if name != "inception"]
    for place, name in enumerate(seen):
        found = np.array([row["class_share"] for row in rows if row["classifier"] == name])
        where = np.arange(found.shape[1]) + (place - 0.5) * 0.4
        low, high = found.mean(0) - found.min(0), found.max(0) - found.mean(0)
        shares.bar(where, found.mean(0), 0.4, yerr=[low, high], label=name, error_kw={"elinewidth": 0.8})
    if found.shape[1] <= 20:
        shares.set_xticks(range(found.shape[1]))
    shares.set(xlabel="class (lines: range over seeds)", ylabel="share of the synthetic images")
    shares.legend(frameon=False)
    for place, name in enumerate(names):
        known = [row["ratio"] for row in rows if row["classifier"] == name and row["ratio"] is not None]
        ratios.plot([place] * len(known), known, "o", mfc="none")
    ratios.set_xticks(range(len(names)), names)
    ratios.set(yscale="log", ylabel="FID / floor (1: as real images)", xlim=(-0.5, len(names) - 0.5))
    ratios.axhline(1, color="0.6", lw=0.8)


STUDY = Study(
    "generator-quality", measure, "classifier",
    {
        "fid": ("FID", ".3g"), "floor": ("floor", ".3g"), "ratio": ("FID / floor", ".3g"),
        "inception_score": ("IS", ".2f"), "inception_score_real": ("IS of real", ".2f"),
        "coverage": ("coverage", ".0%"), "test_accuracy": ("its test accuracy", ".1%"),
    },
    figure, check,
)  # fmt: skip
