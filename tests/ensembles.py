"""Small fixed inputs of the losses of server-side methods, and runs of these methods on tiny images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from helpers import FACTS, TINY

from mosaic_ray.config.resolve import override
from mosaic_ray.config.schema import ExperimentConfig
from mosaic_ray.federated.client import ClientContext
from mosaic_ray.runs import runner

K, B, C = 2, 4, 3
LOGITS = torch.tensor(3 * np.sin(1 + np.arange(K * B * C)).reshape(K, B, C))
STUDENT = torch.tensor(3 * np.cos(2 + np.arange(B * C)).reshape(B, C))
LABELS = torch.tensor([0, 1, 2, 1])
COUNTS = np.array([[3, 0, 2], [1, 4, 2]])
IMAGES = torch.tensor(np.sin(0.3 * np.arange(B * 4)).reshape(B, 1, 2, 2))
LATENTS = torch.tensor(np.cos(0.7 * np.arange(B * 5)).reshape(B, 5))

_GENERATOR = {"latent_dim": 4, "channels": 4, "batch_size": 8}
#: Knobs with which each method takes moments on TINY.
QUICK: dict[str, dict[str, Any]] = {
    "dense": {"epochs": 7, "generator_steps": 2, "student_steps": 2} | _GENERATOR,
    "co_boosting": {"epochs": 7, "generator_steps": 2, "student_steps": 2} | _GENERATOR,
    "fedftg": {"turns": 2, "student_steps": 2} | _GENERATOR,
    "dfrd": {"turns": 2, "generator_steps": 2} | _GENERATOR,
    "fedcvae": {"samples": 40, "epochs": 3, "batch_size": 16},
    "fens": {"rounds": 30, "images": 20},
    "centralised": {},
}


def tiny_knobs(method: str) -> dict[str, Any]:
    """The method and its quick knobs."""
    own = {f"{method}.{name}": value for name, value in QUICK[method].items()}
    family = {"generator.family": "cvae", "generator.tau": 300} if method == "fedcvae" else {}
    return {"method": method} | own | family


def tiny(method: str, **knobs: Any) -> ExperimentConfig:
    """TINY with a method and its quick knobs; others by dotted names with two underscores for the dot."""
    more = {name.replace("__", "."): value for name, value in knobs.items()}
    return override(TINY, {"warmup.checkpoint_rounds": 1} | tiny_knobs(method) | more)


def go(folder: Path, method: str, **knobs: Any) -> dict[str, Any]:
    return runner.run(tiny(method, **knobs), storage=str(folder), progress=False)


def context(config: ExperimentConfig = TINY) -> ClientContext:
    return ClientContext(config, FACTS, torch.device("cpu"))


def softmax(row: torch.Tensor, temperature: float = 1.0) -> list[float]:
    values = [np.exp(float(v) / temperature) for v in row]
    return [v / sum(values) for v in values]


def divergence(p: list[float], q: list[float]) -> float:
    """KL(p || q)."""
    return float(sum(a * np.log(a / b) for a, b in zip(p, q, strict=True)))
