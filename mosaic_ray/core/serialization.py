"""Check values that were read from JSON against types, without a library: dataclasses in, dataclasses out."""

from __future__ import annotations

import functools
import types
from dataclasses import MISSING, fields, is_dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

_hints = functools.cache(functools.partial(get_type_hints, include_extras=True))


def from_json(kind: Any, value: Any, place: str = "") -> Any:
    """Return ``value``, read from JSON, as the type ``kind``.

    ``kind`` is a dataclass (keyword fields; unknown keys are ignored, a missing key or null takes the field's default),
    ``list[X]``, ``dict[str, X]``, ``X | None``, ``Literal``, ``Annotated[X, (low, high)]`` with both bounds included,
    ``Any`` or a plain type; an int may stand for a float. Raises ``ValueError`` with the place of the first
    value that does not fit, such as ``stages.warmup.key``.
    """
    origin, args = get_origin(kind), get_args(kind)
    if is_dataclass(kind) and isinstance(kind, type) and isinstance(value, dict):
        names = [f.name for f in fields(kind) if f.default is MISSING or value.get(f.name) is not None]
        return kind(**{name: from_json(_hints(kind)[name], value.get(name), _at(place, name)) for name in names})
    if origin is list and isinstance(value, list):
        return [from_json(args[0], found, _at(place, str(number))) for number, found in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        return {name: from_json(args[1], found, _at(place, name)) for name, found in value.items()}
    if origin in (Union, types.UnionType):
        return None if value is None else from_json(args[0], value, place)
    if origin is Annotated:
        low, high = args[1]
        fits = low <= from_json(args[0], value, place) <= high
    elif origin is Literal:
        fits = value in args
    else:
        plain: Any = {float: (int, float), Any: object}.get(kind, kind)
        fits = origin is None and isinstance(value, plain) and (kind in (bool, Any) or not isinstance(value, bool))
    if not fits:
        raise ValueError(place)
    return value


def _at(place: str, name: str) -> str:
    name = name if name.isprintable() else repr(name)
    return f"{place}.{name}" if place else name
