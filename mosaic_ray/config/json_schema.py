"""The configuration as JSON Schema (draft 2020-12), by which editors complete and check a TOML file of knobs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from .fields import MOST, Knob, Names, Widths, knobs_of
from .plugins import ALIASES, entries, load
from .presets import ALGORITHMS, GENERIC, SCALES
from .registry import CLASSIFIERS, DATASETS
from .resolve import KNOBS

Schema = dict[str, Any]

#: User code, as module:object or FILE.py:object; also data sets as folder:PATH.
_CODE = {"type": "string", "pattern": ":"}
_ANY = {"type": "string"}
_TYPES = {int: "integer", float: "number", bool: "boolean", str: "string"}


def json_schema() -> Schema:
    """Return the schema of a file that ``--config`` takes. Ranges across knobs are checked by commands alone."""
    preset = "a scale, an algorithm, or both joined by a plus: " + ", ".join([*SCALES, *GENERIC, *ALGORITHMS])
    top: Schema = {"preset": {"type": "string", "description": preset}}
    own = [load(kind, name) for kind in ("methods", "strategies") for name in entries(kind)]
    more = [knob for found in own if found.knobs for knob in knobs_of(found.knobs, f"{found.name}.")]
    for knob in [*KNOBS.values(), *more]:
        section, _, leaf = knob.name.rpartition(".")
        place = top
        if section:
            place = top.setdefault(section, {"type": "object", "additionalProperties": False, "properties": {}})
            place = place["properties"]
        place[leaf] = _knob(knob)
    for older, name in ALIASES.items():
        section, _, leaf = older.rpartition(".")
        top[section]["properties"][leaf] = _knob(KNOBS[name]) | {"deprecated": True}
    plug_in = [{"properties": {"method": _CODE}, "required": ["method"]}]
    for name in ("federation.strategy", *ALIASES):
        section, _, leaf = name.rpartition(".")
        inner = {"properties": {leaf: _CODE}, "required": [leaf]}
        plug_in.append({"properties": {section: inner}, "required": [section]})
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "mosaic_ray: knobs of an experiment",
        "type": "object",
        "properties": top,
        # a plug-in that the file names may have knobs of its own, in a section of its name
        "additionalProperties": {"type": "object"},
        "if": {"anyOf": plug_in},
        "else": {"propertyNames": {"enum": list(top)}},
    }


def _knob(knob: Knob) -> Schema:
    """Return the schema of one knob: its meaning, its default, its type and range."""
    default = json.loads(json.dumps(knob.default))
    return {"description": knob.metadata["help"], "default": default} | _any_of(*_alternatives(knob))


def _any_of(*schemas: Schema) -> Schema:
    return schemas[0] if len(schemas) == 1 else {"anyOf": list(schemas)}


def _alternatives(knob: Knob) -> list[Schema]:
    meta, kind = knob.metadata, knob.kind
    known: dict[str, Mapping[str, Any]] = {
        "data.name": DATASETS, "method": entries("methods"), "federation.strategy": entries("strategies"),
        "model.classifier": CLASSIFIERS, "model.student": {"": "", **CLASSIFIERS}, "model.classifiers": CLASSIFIERS,
    }  # fmt: skip
    names = known.get(knob.name)
    if meta["choices"]:
        return [{"enum": list(meta["choices"])}, *([_CODE] if meta["plug_in"] else [])]
    if names:
        # names of imported data sets, and strategies joined by a plus, are not listed
        other = {"data.name": _ANY, "federation.strategy": {"type": "string", "pattern": "[:+]"}}.get(knob.name, _CODE)
        each: list[Schema] = [{"enum": list(names)}, other]
        return [{"type": "array", "items": _any_of(*each)}, *each] if kind == tuple[str, ...] else each
    if kind in (tuple[str, ...], Names):
        return [{"type": "array", "items": _ANY}, _ANY]
    if kind in _TYPES:
        found = {"type": _TYPES[kind]} | (_bounds(knob) if kind in (int, float) else {})
        return [found] if kind == knob.type else [{"const": "auto"}, found]
    number = {"type": "number"} | _bounds(knob)
    rules = [_ANY] if kind == Widths else []
    return [{"type": "array", "items": number} | ({"minItems": 1} if rules else {}), number, *rules]


def _bounds(knob: Knob) -> Schema:
    low, above, high = (knob.metadata[name] for name in ("low", "above", "high"))
    least = {"exclusiveMinimum": above} if above is not None else {"minimum": -MOST if low is None else low}
    return least | {"maximum": MOST if high is None else high}
