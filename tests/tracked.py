"""Runs with trackers, and what they log: for the tests of trackers in memory and of other projects' trackers."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from helpers import TINY

from mosaic_ray.config.resolve import override
from mosaic_ray.runs import runner

QUICK = override(TINY, {"method": "fedavg", "warmup.checkpoint_rounds": 1})


def go(storage: Path, *track: str, config=QUICK, **options: Any) -> dict[str, Any]:
    """Return the summary of a quick run that the named trackers follow."""
    return runner.run(config, storage=str(storage), progress=False, track=track, **options)


def logged(summary: dict[str, Any]) -> Counter[tuple[str, int, float]]:
    """Return the scalars of metrics.jsonl, with how often each is there."""
    lines = (Path(summary["paths"]["run"]) / "metrics.jsonl").read_text().splitlines()
    return Counter((line["tag"], line["step"], line["value"]) for line in map(json.loads, lines))


def state(summary: dict[str, Any], tracker: str) -> dict[str, Any]:
    """Return what a run knows of a tracker that follows it."""
    return json.loads((Path(summary["paths"]["run"]) / f"{tracker}.json").read_text())
