"""One frozen record for a whole experiment, its rooms, and the door where every request is checked.

``resolve`` layers defaults < preset < TOML < ``--set``; ``override`` changes single knobs by dotted name.
An unknown or impossible knob is answered here, in one line, before torch or ray is loaded.
"""

from __future__ import annotations

import dataclasses
import tomllib
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..core.errors import RequestError, neighbours
from .fields import Knob, typed
from .schema import ExperimentConfig
from .validate import check

# --- names -----------------------------------------------------------------------------------------------------------


def _walk(cls: type, prefix: str = "") -> Iterator[Knob]:
    hints = typing.get_type_hints(cls)
    for item in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[item.name]):
            yield from _walk(hints[item.name], f"{prefix}{item.name}.")
        else:
            yield Knob(prefix + item.name, hints[item.name], item.default, item.metadata)


KNOBS: dict[str, Knob] = {k.name: k for k in _walk(ExperimentConfig)}
SECTIONS = tuple(f.name for f in dataclasses.fields(ExperimentConfig) if f.default is dataclasses.MISSING)


def flatten(config: ExperimentConfig) -> dict[str, Any]:
    """Every knob's value under its dotted name."""
    values = {}
    for name in KNOBS:
        section, _, leaf = name.rpartition(".")
        values[name] = getattr(getattr(config, section), leaf) if section else getattr(config, leaf)
    return values


def as_dict(config: ExperimentConfig) -> dict[str, Any]:
    """Nested plain values, fit for JSON and TOML."""
    return dataclasses.asdict(
        config, dict_factory=lambda items: {k: list(v) if isinstance(v, tuple) else v for k, v in items}
    )


# --- values -----------------------------------------------------------------------------------------------------------


def check_value(name: str, value: Any, *, text: bool = False) -> Any:
    """``value`` for knob ``name``, typed and within range; ``RequestError`` otherwise."""
    if name not in KNOBS:
        raise RequestError(f'unknown knob "{name}"; {neighbours(name, KNOBS)}')
    return typed(KNOBS[name], value, text=text)


def dotted(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested rooms to dotted names; dotted names pass through."""
    found: dict[str, Any] = {}
    for key, value in nested.items():
        found |= dotted(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return found


def override(config: ExperimentConfig, values: Mapping[str, Any], *, text: bool = False) -> ExperimentConfig:
    """``config`` with knobs changed; keys are dotted names, values typed (or words, with ``text``)."""
    rooms: dict[str, dict[str, Any]] = {}
    for name, value in dotted(values).items():
        section, _, leaf = name.rpartition(".")
        rooms.setdefault(section, {})[leaf] = check_value(name, value, text=text)
    top = rooms.pop("", {})
    top |= {section: dataclasses.replace(getattr(config, section), **knobs) for section, knobs in rooms.items()}
    return dataclasses.replace(config, **top)


def read_toml(path: str | Path) -> dict[str, Any]:
    """A user's TOML file as dotted knobs (and perhaps ``preset``)."""
    try:
        with open(path, "rb") as file:
            return dotted(tomllib.load(file))
    except OSError as error:
        raise RequestError(f"--config {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RequestError(f"--config {path}: {error}") from None


def to_toml(config: ExperimentConfig, *, comments: bool = False) -> str:
    """``config`` as TOML that ``read_toml`` reads back to the same record."""
    import tomli_w

    lines = tomli_w.dumps(as_dict(config)).splitlines()
    if not comments:
        return "\n".join(lines) + "\n"
    section, out = "", []
    for line in lines:
        if line.startswith("["):
            section = line.strip("[]") + "."
        name = section + line.split(" = ")[0]
        out.append(f"{line:<34} # {KNOBS[name].metadata['help']}" if name in KNOBS else line)
    return "\n".join(out) + "\n"


def resolve(
    preset: str = "demo",
    *,
    algorithm: str | None = None,
    file: Mapping[str, Any] | None = None,
    sets: Mapping[str, Any] | None = None,
) -> ExperimentConfig:
    """Defaults < scale preset < algorithm preset < the scale's tuning of it < TOML ``file`` < ``sets`` (as words).

    ``preset`` names a scale, an algorithm, or both joined by ``+``.
    """
    from .presets import preset_knobs

    file, sets = dict(file or {}), dict(sets or {})
    preset = file.pop("preset", preset) if preset == "demo" else preset
    file.pop("preset", None)
    for name, word in (("preset", preset), ("algorithm", file.get("algorithm", ""))):
        if not isinstance(word, str):
            raise RequestError(f"{name} = {word!r}: it takes the name of a preset; see `mosaic presets`")
    algorithm = algorithm or sets.get("algorithm") or file.get("algorithm")
    config = override(ExperimentConfig(), preset_knobs(preset, algorithm))
    config = override(override(config, file), sets, text=True)
    return check(config)
