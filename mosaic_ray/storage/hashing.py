"""Plain values in one JSON spelling, and the keys made of it."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def to_json_value(value: Any, where: str) -> Any:
    """``value`` as JSON holds it, losing nothing; ``ValueError`` names the place of what would be lost."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{where} = {value}: only finite numbers can be stored")
        return value
    if isinstance(value, Mapping):
        for name in value:
            if not isinstance(name, str):
                raise ValueError(f"{where}: key {name!r} is not a word")
        return {name: to_json_value(item, f"{where}.{name}") for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json_value(item, f"{where}[{index}]") for index, item in enumerate(value)]
    raise ValueError(f"{where}: a {type(value).__name__} is no fact; arrays belong into parts")


def canonical_json(value: Any) -> bytes:
    """The one JSON spelling of a plain value: sorted keys, floats by ``repr``, ASCII."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def stage_key(stage: str, version: int, knobs: Mapping[str, Any], upstream: Sequence[str]) -> str:
    """``stage-`` and 20 hex digits that change with any of the arguments; equal on every machine.

    Knobs may nest and hold numpy scalars; tuples count as lists; the order of ``upstream`` counts, that of knobs not.
    """
    values = to_json_value(knobs, "knobs")
    asked = {"stage": stage, "version": int(version), "knobs": values, "upstream": list(upstream)}
    return f"{stage}-{hashlib.sha256(canonical_json(asked)).hexdigest()[:20]}"
