"""Named starting points: scales (how much work) and algorithms (which switches), orthogonal to each other.

The algorithm presets hold the switches of the authors' code (``reference``, its defects included), of the paper's
text as far as it can be recovered (``paper``), of the paper's path repaired (``distilled``), and of what works best
(``fixed``: rehearsal in place of distillation; docs/EXPERIMENTS.md has the measurements).

``schedule`` is the rule by which every data set has two scales. Those of the data sets that ship bear their names:
``cifar100`` is the paper's scale, ``cifar100_small`` takes minutes on two cores. Others have ``large`` and ``small``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..core.errors import RequestError, neighbours
from .registry import DATASETS
from .schema import DistillConfig, FinetuneConfig, GeneratorConfig, WarmupConfig

PAPER: dict[str, Any] = {
    "generator.discriminator": "shared_trunk",
    "generator.div_support": "all",
    "prototypes.model": "client",
    "prototypes.weighting": "uniform",
    "prototypes.held_out": 0.0,
    "meta.init": "random",
    "meta.input": "full",
    "meta.expert_embedding": False,
    "meta.token_dim": -1,
    "meta.updates": 250,
    "meta.ema_bias_correction": False,
    "meta.select": False,
    "meta.patience": 0,
    "distill.start": "global",
    "distill.lr": 1e-4,
    "distill.backbone_lr": 1e-4,
    "distill.gen_sampling": "uniform",
    "distill.anchor_weight": 0.0,
    "distill.class_balance": False,
    "distill.guard": False,
    "finetune.bn": "running",
}

REFERENCE: dict[str, Any] = PAPER | {
    "partition.policy": "reject",
    "partition.max_tries": 20_000,
    "warmup.shuffle": False,
    "generator.stage": "before",
    "generator.classifier_source": "fresh",
    "generator.classifier_mode": "train",
    "generator.discriminator": "dcgan",
    "generator.gan_range": "model_norm",
    "generator.lambda_e": 0.0,
    "generator.lambda_d": 5.0,
    "generator.lambda_i": 0.0,
    "generator.tau": 0,
    "generator.drop_class0_bug": True,
    "generator.gan_augment": True,
    "prototypes.model": "global",
    "prototypes.rounds": "all",
    "prototypes.samples": 640,
    "prototypes.augment": True,
    "prototypes.cap": 10,
    "meta.expert_fallback": "error",
    "meta.pool": "sum",
    "distill.jsd": "bhattacharyya",
    "distill.student_bn": "frozen",
}

#: Closing rounds at a working step size in which clients rehearse, if their held-back images say that it helps.
FIXED: dict[str, Any] = {
    "generator.family": "cvae",
    "generator.latent_dim": 32,
    "distill.steps": 0,
    "warmup.bn": "exact",
    "finetune.num_rounds": 30,
    "finetune.lr": 0.02,
    "finetune.bn": "exact",
    "finetune.head": "refit",
    "rehearsal.candidates": (1.0,),
    "rehearsal.trial_rounds": 10,
}

ALGORITHMS: dict[str, tuple[dict[str, Any], str]] = {
    "fixed": (FIXED, "what works: clients rehearse synthetic images of classes that they lack (default)"),
    "distilled": ({}, "the paper's path repaired: consistent teacher, guarded student"),
    "paper": (PAPER, "the paper's text, as far as it can be recovered"),
    "reference": (REFERENCE, "the authors' code, its defects included"),
}


class Shape(NamedTuple):
    """What a schedule depends on: classes, channels, pixels a side, and training images (0: unknown)."""

    classes: int
    channels: int
    side: int
    images: int = 0


#: The shapes of the data sets that ship.
SHAPES = {
    "digits": Shape(10, 1, 8, 1_437), "mnist": Shape(10, 1, 28, 60_000), "fmnist": Shape(10, 1, 28, 60_000),
    "svhn": Shape(10, 3, 32, 73_257), "cifar10": Shape(10, 3, 32, 50_000), "cifar100": Shape(100, 3, 32, 50_000),
    "tiny_imagenet": Shape(200, 3, 64, 100_000), "food101": Shape(101, 3, 64, 75_750),
    "mfeat": Shape(10, 1, 8, 1_500),
}  # fmt: skip

#: The schedules suit 10 clients of CIFAR's 5,000 images.
CLIENTS, SHARD = 10, 5_000
#: The most closing rounds on colour images in a small schedule: for 20 minutes on two cores, with rehearsal.
COLOUR_ROUNDS = 12

#: The most passes over a client's images in a small warm-up, and its fewest rounds.
PASSES, LEAST_ROUNDS = 25, 10
#: Fewest local steps of a round, steps of a generator and images in a batch to which smaller clients scale them down.
LEAST_STEPS, LEAST_GENERATOR_STEPS, LEAST_BATCH = 5, 200, 10


@dataclass(frozen=True)
class Scale:
    """A scale preset: ``knobs`` for every algorithm, ``tuning[algorithm]`` on top for one."""

    summary: str
    knobs: Mapping[str, Any]
    tuning: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


_SMALL_SCALE: dict[str, Any] = {"warmup.lr": 0.05, "generator.ngf": 16, "generator.ndf": 16, "meta.feedforward": 256}

_PAPER_SCALE: dict[str, Any] = {
    "model.classifier": "resnet18",
    "model.width": 64,
    "generator.epochs": 200,
    "generator.ngf": 64,
    "generator.ndf": 64,
    "finetune.num_rounds": 39,
}


def schedule(shape: Shape, large: bool, clients: int = CLIENTS) -> dict[str, Any]:
    """Return the knobs of a data set's schedule: the paper's scale if ``large``, else one for two cores.

    Images are read at 32 pixels if they have another size than 8, 16, 28 or 32, or if ``large``. Where clients have
    fewer than ``SHARD`` images on average, local steps and generator steps shrink in proportion, so that a round stays
    the same part of a local epoch; the ``LEAST_`` numbers are floors. A batch is not larger than a client's images, and
    a small warm-up ends after ``PASSES`` passes over them.
    With more than ``CLIENTS`` clients fewer synthetic images per generator keep the size of a distillation batch.
    """
    knobs = _large(shape) if large else _small(shape)
    if shape.side != 32 and (large or shape.side not in (8, 16, 28)):
        knobs["data.image_size"] = 32
    images = (shape.images or CLIENTS * SHARD) / clients
    batch = images / WarmupConfig.batch_size
    for name, default, part, least in (
        ("warmup.local_steps", WarmupConfig.local_steps, images / SHARD, LEAST_STEPS),
        ("warmup.batch_size", WarmupConfig.batch_size, batch, LEAST_BATCH),
        ("finetune.local_steps", FinetuneConfig.local_steps, images / SHARD, LEAST_STEPS),
        ("generator.steps", GeneratorConfig.steps, images / SHARD, LEAST_GENERATOR_STEPS),
        ("generator.batch_size", GeneratorConfig.batch_size, batch, LEAST_BATCH),
        ("distill.samples_per_generator", DistillConfig.samples_per_generator, CLIENTS / clients, 1),
    ):
        if part < 1 and not (large and name == "generator.steps"):  # epochs follow the client's images by themselves
            knobs[name] = max(least, round(part * knobs.get(name, default)))
    rounds = knobs.get("warmup.num_rounds", WarmupConfig.num_rounds)
    seen = knobs.get("warmup.local_steps", WarmupConfig.local_steps) * min(WarmupConfig.batch_size, images)
    if not large and rounds * seen > PASSES * images:
        knobs["warmup.num_rounds"] = max(LEAST_ROUNDS, round(PASSES * images / seen))
    return knobs


def _small(shape: Shape) -> dict[str, Any]:
    knobs = _SMALL_SCALE | {"warmup.momentum": 0.9}
    if shape.classes > 10:
        return knobs | {"warmup.num_rounds": 30, "warmup.local_steps": 20}
    return knobs | ({"warmup.num_rounds": 60} if shape.channels == 3 else {"generator.steps": 400})


def _large(shape: Shape) -> dict[str, Any]:
    """Return the authors' schedule of Fashion-MNIST, CIFAR-10 or CIFAR-100, whichever is nearest in shape."""
    knobs = _PAPER_SCALE | ({} if shape.channels == 3 else {"data.channels": 3})
    if shape.classes > 10:
        return knobs | {"warmup.num_rounds": 1041, "warmup.local_steps": 20, "prototypes.k": 60}
    return knobs | {"warmup.num_rounds": 341 if shape.channels == 3 else 200}


def _small_tuning(shape: Shape, knobs: Mapping[str, Any], clients: int) -> dict[str, dict[str, Any]]:
    """Return the knobs with which ``fixed`` does less work, for about 20 minutes on two cores (docs/EXPERIMENTS.md).

    Closing rounds take at most ``PASSES`` passes over the images. Colour images cost more than grey ones, so there are
    at most ``COLOUR_ROUNDS`` closing rounds and half of a generator's steps.
    """
    images = (shape.images or CLIENTS * SHARD) / clients
    seen = knobs.get("finetune.local_steps", FinetuneConfig.local_steps) * min(WarmupConfig.batch_size, images)
    colour = shape.channels == 3
    most = COLOUR_ROUNDS if colour else FIXED["finetune.num_rounds"]
    rounds = min(most, max(LEAST_ROUNDS, round(PASSES * images / seen)))
    own = {"finetune.num_rounds": rounds} if rounds < FIXED["finetune.num_rounds"] else {}
    steps = knobs.get("generator.steps", GeneratorConfig.steps)
    if colour and steps > LEAST_GENERATOR_STEPS:
        own["generator.steps"] = max(LEAST_GENERATOR_STEPS, steps // 2)
    return {"fixed": own} if own else {}


def _tuning(shape: Shape, knobs: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the authors' distillation, and their CIFAR-100 for more than 10 classes; ``knobs``: the schedule's.

    The authors have other distillation steps and meta updates at omega 0.01. A preset does not know omega, which is an
    axis of sweeps: docs/algorithm.md, R3 and R4.
    """
    paper: dict[str, Any] = {"distill.steps": 2500 if shape.channels == 3 else 1500}
    if shape.classes <= 10:
        return {"reference": paper, "paper": paper}
    paper["finetune.local_steps"] = knobs["warmup.local_steps"]
    if shape.channels == 3:
        paper |= {"distill.lr": 1e-5, "distill.backbone_lr": 1e-5}
    return {"reference": paper | {"meta.pool": "mean", "prototypes.samples": 1280}, "paper": paper}


_DEMO = Scale(
    "digits, 5 clients, about a minute on two cores",
    _SMALL_SCALE
    | {
        "data.name": "digits",
        "partition.num_clients": 5,
        "warmup.num_rounds": 10,
        "warmup.batch_size": 32,
        "warmup.local_steps": 5,
        "generator.steps": 300,
        "generator.latent_dim": 32,
        "runtime.eval_rounds": 1,
    },
    # digits are learnt to the end in more rounds, and a trial is no longer than the closing rounds
    {"fixed": {"finetune.num_rounds": 5, "rehearsal.trial_rounds": 5}},
)


def scale_named(word: str, clients: int = CLIENTS, shape: Shape | None = None) -> Scale:
    """Return the scale ``word`` for ``clients`` clients, of ``SCALES`` or ``GENERIC``; ``shape``: for the latter."""
    if word == "demo":
        return _DEMO
    name = word.removesuffix("_small")
    large, own = word in ("large", *SHAPES), {"data.name": name} if name in SHAPES else {}
    shape = SHAPES.get(name) or shape or SHAPES["digits"]
    knobs = schedule(shape, large, clients) | own
    if word == "mnist":  # the authors' README; its shape is Fashion-MNIST's
        knobs["warmup.num_rounds"] = 100
    rounds = f", {knobs['warmup.num_rounds']} warm-up rounds" if large and own else ""
    work = f"ResNet-18{rounds} (a GPU's work)" if large else "a small network, minutes on two cores"
    title = DATASETS[name].summary.partition(":")[0] if own else "any data set, by its shape"
    tuning = _tuning(shape, knobs) if large else _small_tuning(shape, knobs, clients)
    return Scale(f"{title}: {CLIENTS} clients, {work}", knobs, tuning)


#: Scales of any data set, by its shape.
GENERIC = ("small", "large")
SCALES = {word: scale_named(word) for word in ("demo", *(f"{name}_small" for name in SHAPES), *SHAPES)}
#: The knobs that scales set.
SCHEDULED = frozenset[str]().union(*(scale.knobs for scale in SCALES.values()))


def preset_words(preset: str, algorithm: str | None = None) -> tuple[str, str]:
    """Return the scale ("" if none) and the algorithm in ``preset``: one of them, or both joined by ``+``."""
    scale, named = "", algorithm or "fixed"
    for word in preset.split("+"):
        if word in SCALES or word in GENERIC:
            scale = word
        elif word in ALGORITHMS:
            named = algorithm or word
        else:
            raise RequestError(
                f'--preset {preset}: unknown preset "{word}"; {neighbours(word, [*SCALES, *GENERIC, *ALGORITHMS])}'
            )
    if named not in ALGORITHMS:
        raise RequestError(f"algorithm = {named}: it takes one of {', '.join(ALGORITHMS)}")
    return scale, named


def preset_knobs(
    preset: str, algorithm: str | None = None, clients: int = CLIENTS, shape: Shape | None = None
) -> dict[str, Any]:
    """Return the dotted knobs of ``preset`` for ``clients`` clients; without a scale they are the demo's.

    ``shape``: the data set's, for a scale in ``GENERIC``.
    """
    scale, named = preset_words(preset, algorithm)
    found = scale_named(scale or "demo", clients, shape)
    return {"algorithm": named} | dict(found.knobs) | ALGORITHMS[named][0] | dict(found.tuning.get(named, {}))
