"""Results of finished and failed trials."""

from __future__ import annotations

import io
import random
import re
from typing import Any

from rich.console import Console

from mosaic_ray.config.resolve import as_dict, override
from mosaic_ray.config.schema import ExperimentConfig
from mosaic_ray.core.types import STAGES
from mosaic_ray.sweeps.results import TrialResult

LAMBDA_E, OMEGA = "generator.lambda_e", "partition.omega"


def trial(
    point: int,
    seed: int = 0,
    knobs: dict[str, Any] | None = None,
    *,
    final: float = 0.9,
    control: float = 0.875,
    selection: float | None = 0.5,
    metric: str = "held-out prototypes",
    cached: tuple[str, ...] = (),
    **more: Any,
) -> TrialResult:
    """A finished trial; every stage took 2 s, and those in ``cached`` had taken 64 s to compute."""
    knobs = knobs or {}
    stages = {
        name: {"seconds": 2.0, "cached": name in cached, "key": name, "computed_seconds": 64.0 if name in cached else 2}
        for name in STAGES
    }
    summary = {
        "status": "done",
        "accuracy": {"initial": 0.5, "teacher": None, "distilled": 0.625, "final": final, "control": control},
        "validation_accuracy": None,
        "selection": {"metric": metric, "value": selection},
        "stages": stages,
        "communication_bytes": {"uplink": {"weights": 3, "counts": 4}, "downlink": {"weights": 5}},
        "health": [{"code": code} for code in ("teacher.worse", "gan.collapse", "teacher.worse")],
        "config": as_dict(override(ExperimentConfig(), knobs | {"seed": seed})),
    }
    return TrialResult(f"p{point:03}s{seed}", point, seed, knobs, summary | more)


def failed(point: int, seed: int = 0, knobs: dict[str, Any] | None = None, **where: Any) -> TrialResult:
    """A failed trial, with neither accuracy nor stages."""
    where = {"stage": None, "round": None, "client": None} | where
    config = as_dict(override(ExperimentConfig(), (knobs or {}) | {"seed": seed}))
    summary = {"status": "failed", "error": "no memory", "method": "mosaic", "seed": seed, "config": config} | where
    return TrialResult(f"p{point:03}s{seed}", point, seed, knobs or {}, summary)


STOPPED = TrialResult("p004s0", 4, 0, {}, {"status": "stopped"})


def printed(renderable: Any, width: int = 80) -> list[str]:
    stream = io.StringIO()
    Console(file=stream, width=width, color_system=None).print(renderable, crop=False)
    return [line.rstrip() for line in stream.getvalue().splitlines()]


def names_in_order(lines: list[str]) -> list[str]:
    return [match.group() for line in lines if (match := re.match(r"p\d{3}\b", line))]


def grid() -> list[TrialResult]:
    draws, point, results = random.Random(0), 0, []
    for omega in (0.01, 0.1):
        for _ in range(12):
            knobs = {OMEGA: omega} | {f"generator.lambda_{x}": draws.uniform(0.5, 15) for x in "edi"}
            for seed in range(3):
                value = draws.uniform(0.85, 0.95)
                results.append(trial(point, seed, knobs, selection=value, final=value, control=value - 0.05))
            point += 1
    return results
