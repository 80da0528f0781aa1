"""Build the content of summary.json."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from ..config.resolve import as_dict
from ..config.schema import ExperimentConfig

VERSIONS_OF = ("mosaic-ray", "torch", "ray", "numpy", "torchvision", "scikit-learn")


def _summary(config: ExperimentConfig, run: Any, results: Mapping[str, Any]) -> dict[str, Any]:
    """summary.json, as DESIGN's outside contract has it."""
    import numpy as np

    from .communication import COMPARISONS, communication

    traffic: dict[str, dict[str, int]] = {"uplink": {}, "downlink": {}}
    for stage, kinds in run.traffic.items():
        if stage in COMPARISONS:
            continue
        for direction, amounts in kinds.items():
            for kind, amount in amounts.items():
                traffic[direction][kind] = traffic[direction].get(kind, 0) + amount
    return {
        "status": "done",
        "method": config.method,
        "seed": config.seed,
        "accuracy": results["accuracy"],
        "validation_accuracy": results["validation_accuracy"],
        "selection": _selection(results),
        "per_class_accuracy": results["per_class_accuracy"],
        "calibration": results["calibration"],
        "stages": dict(run.log),
        "communication_bytes": traffic,
        "communication": communication(run, np.array(results["label_counts"])),
        "health": [finding.as_dict() for finding in run.findings],
        "config": as_dict(config),
        "versions": _versions(),
        "label_counts": results["label_counts"],
    }


def _selection(results: Mapping[str, Any]) -> dict[str, Any]:
    """What configurations are chosen by, never test images: the final model on the clients' validation images, or
    where there are none, the distilled student on held-out prototypes (None without prototypes)."""
    if results["validation_accuracy"]:
        return {"metric": "validation accuracy", "value": results["validation_accuracy"]["final"]}
    return {"metric": "held-out prototypes", "value": results["held_out_accuracy"]}


def _versions() -> dict[str, str]:
    found = {}
    for name in VERSIONS_OF:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            from .. import __version__

            found[name] = __version__ if name == "mosaic-ray" else "not installed"
    return found
