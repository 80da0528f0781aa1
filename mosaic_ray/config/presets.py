"""Named starting points: scales (how much work) and algorithms (which switches), orthogonal to each other.

The algorithm presets hold the switches of the authors' code (``reference``, its defects included), of the paper's
text as far as it can be recovered (``paper``), and the switches that work best (``fixed``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..core.errors import RequestError, neighbours

PAPER: dict[str, Any] = {
    "generator.discriminator": "shared_trunk",
    "generator.div_support": "all",
    "prototypes.model": "client",
    "meta.init": "random",
    "meta.input": "full",
    "meta.expert_embedding": False,
    "meta.token_dim": -1,
    "meta.updates": 250,
    "meta.ema_bias_correction": False,
    "meta.select": False,
    "meta.patience": 0,
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
    "prototypes.weighting": "uniform",
    "prototypes.cap": 10,
    "meta.expert_fallback": "error",
    "meta.pool": "sum",
    "distill.jsd": "bhattacharyya",
    "distill.student_bn": "frozen",
}

ALGORITHMS: dict[str, tuple[dict[str, Any], str]] = {
    "fixed": ({}, "what works: consistent teacher, guarded student (default)"),
    "paper": (PAPER, "the paper's text, as far as it can be recovered"),
    "reference": (REFERENCE, "the authors' code, its defects included"),
}


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

SCALES: dict[str, Scale] = {
    "demo": Scale(
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
    ),
    "fmnist_small": Scale(
        "Fashion-MNIST, 10 clients, a small network: minutes on two cores",
        _SMALL_SCALE | {"data.name": "fmnist", "warmup.momentum": 0.9, "generator.steps": 400},
    ),
    "cifar10_small": Scale(
        "CIFAR-10, 10 clients, a small network: minutes on two cores",
        _SMALL_SCALE | {"data.name": "cifar10", "warmup.momentum": 0.9, "warmup.num_rounds": 60},
    ),
    "mnist": Scale(
        "MNIST, 10 clients, ResNet-18 at 32x32x3 (a GPU's work)",
        _PAPER_SCALE | {"data.name": "mnist", "data.image_size": 32, "data.channels": 3, "warmup.num_rounds": 100},
    ),
    "fmnist": Scale(
        "Fashion-MNIST, 10 clients, ResNet-18 at 32x32x3 (a GPU's work)",
        _PAPER_SCALE | {"data.name": "fmnist", "data.image_size": 32, "data.channels": 3, "warmup.num_rounds": 200},
    ),
    "cifar10": Scale(
        "the paper's CIFAR-10: 10 clients, ResNet-18, 341 warm-up rounds (a GPU's work)",
        _PAPER_SCALE | {"data.name": "cifar10", "warmup.num_rounds": 341},
        {"reference": {"distill.steps": 2500}, "paper": {"distill.steps": 2500}},
    ),
    "cifar100": Scale(
        "the paper's CIFAR-100: 10 clients, ResNet-18, 1041 warm-up rounds (a GPU's work)",
        _PAPER_SCALE
        | {"data.name": "cifar100", "warmup.num_rounds": 1041, "warmup.local_steps": 20, "prototypes.k": 60},
        {
            "reference": {"distill.steps": 2500, "distill.lr": 1e-5, "distill.backbone_lr": 1e-5, "meta.pool": "mean"},
            "paper": {"distill.steps": 2500, "distill.lr": 1e-5, "distill.backbone_lr": 1e-5},
        },
    ),
}


def preset_knobs(preset: str, algorithm: str | None = None) -> dict[str, Any]:
    """Return the dotted knobs of ``preset``: a scale, an algorithm, or both joined by ``+``."""
    scale, named = "demo", algorithm or "fixed"
    for word in preset.split("+"):
        if word in SCALES:
            scale = word
        elif word in ALGORITHMS:
            named = algorithm or word
        else:
            raise RequestError(
                f'--preset {preset}: unknown preset "{word}"; {neighbours(word, [*SCALES, *ALGORITHMS])}'
            )
    if named not in ALGORITHMS:
        raise RequestError(f"algorithm = {named}: it takes one of {', '.join(ALGORITHMS)}")
    knobs = {"algorithm": named} | dict(SCALES[scale].knobs) | ALGORITHMS[named][0]
    return knobs | dict(SCALES[scale].tuning.get(named, {}))
