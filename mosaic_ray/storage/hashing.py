"""Canonical JSON of plain values, and the stage keys and names of folders that are hashes of it."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def to_json_value(value: Any, where: str) -> Any:
    """Convert ``value`` to JSON types without loss (numpy scalars and tuples are allowed).

    Raises ``ValueError`` for anything else, such as NaN, naming its place below ``where``.
    """
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
    """Encode a plain value as JSON with sorted keys, floats by ``repr``, in ASCII: equal values give equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def stage_key(stage: str, version: int, knobs: Mapping[str, Any], upstream: Sequence[str]) -> str:
    """Return ``stage-`` and 20 hex digits of the SHA-256 of the arguments; equal on every machine.

    Knobs may nest and hold numpy scalars; tuples count as lists. The order of ``upstream`` matters, the order of knobs
    does not.
    """
    values = to_json_value(knobs, "knobs")
    asked = {"stage": stage, "version": int(version), "knobs": values, "upstream": list(upstream)}
    return f"{stage}-{hashlib.sha256(canonical_json(asked)).hexdigest()[:20]}"


def request_name(kind: str, version: int, request: Mapping[str, Any], *words: str) -> str:
    """Return the default name of a folder for ``request``: the ``words`` and 8 hex digits; equal requests share it."""
    return "-".join([*words, stage_key(kind, version, request, []).rpartition("-")[2][:8]])


def plain(path: str) -> str:
    """Return the last part of ``path`` with _ for each character that is neither a letter nor a digit."""
    return "".join(c if c.isalnum() else "_" for c in path.rpartition("/")[2])
