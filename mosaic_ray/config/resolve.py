"""Resolve a request into one frozen configuration, and change single knobs of it.

``resolve`` layers defaults < preset < TOML < ``--set``; ``override`` changes single knobs by dotted name.
An unknown or impossible knob is answered here, in one line, before torch or ray is loaded.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..core.errors import RequestError, neighbours
from .fields import Knob, knobs_of, typed
from .plugins import ALIASES, find_knob, load_named, selected
from .schema import ExperimentConfig
from .validate import check

if TYPE_CHECKING:
    from pathlib import Path

    from .presets import Shape


class KnobTable(dict[str, Knob]):
    """Every knob by dotted name. It iterates over the package's own; it also finds aliases and plug-ins' own knobs."""

    def __missing__(self, name: str) -> Knob:
        found = self[ALIASES[name]] if name in ALIASES else find_knob(name)
        if found is None:
            raise KeyError(name)
        return found

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or name in ALIASES or (isinstance(name, str) and find_knob(name) is not None)


#: Most bytes of a file of knobs.
MOST_TOML = 1_000_000

KNOBS = KnobTable({knob.name: knob for knob in knobs_of(ExperimentConfig)})
#: The sections of the package's own knobs.
SECTIONS = tuple(f.name for f in dataclasses.fields(ExperimentConfig) if f.default_factory is not dataclasses.MISSING)


def flatten(config: ExperimentConfig) -> dict[str, Any]:
    """Return every knob's value by dotted name; knobs of the selected method and strategies are last."""
    values = {}
    for name in KNOBS:
        section, _, leaf = name.rpartition(".")
        values[name] = getattr(getattr(config, section), leaf) if section else getattr(config, leaf)
    own = (knob for found in selected(config) if found.knobs for knob in knobs_of(found.knobs, f"{found.name}."))
    return values | {knob.name: knob.default for knob in own} | dict(config.extra)


def without_share(config: ExperimentConfig) -> ExperimentConfig:
    """Return a settled ``config`` without its share of a GPU and ``auto`` Train workers, which change no number.

    In files of earlier versions the share alone named the device.
    """
    knobs, workers = config.runtime, config.distill.workers
    device = ("cuda" if knobs.gpu_share else "cpu") if knobs.device == "auto" else knobs.device
    distill = config.distill
    if workers == int(device == "cuda" and knobs.host == "ray"):
        distill = dataclasses.replace(distill, workers="auto")
    runtime = dataclasses.replace(knobs, device=device, gpus_per_client="auto")
    return dataclasses.replace(config, distill=distill, runtime=runtime)


def as_dict(config: ExperimentConfig) -> dict[str, Any]:
    """Return nested plain values, fit for JSON and TOML."""
    nested: dict[str, Any] = {}
    for name, value in flatten(config).items():
        section, _, leaf = name.rpartition(".")
        inner = nested.setdefault(section, {}) if section else nested
        inner[leaf] = list(value) if isinstance(value, tuple) else value
    return nested


def check_value(name: str, value: Any, *, text: bool = False) -> Any:
    """Return ``value`` in the type and range of knob ``name``, else raise ``RequestError``."""
    if name not in KNOBS:
        raise RequestError(f'unknown knob "{name}"; {neighbours(name, KNOBS)}')
    return typed(dataclasses.replace(KNOBS[name], name=name), value, text=text)


def dotted(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested sections to dotted names; dotted names pass through."""
    found: dict[str, Any] = {}
    for key, value in nested.items():
        found |= dotted(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return found


def override(config: ExperimentConfig, values: Mapping[str, Any], *, text: bool = False) -> ExperimentConfig:
    """Return ``config`` with knobs changed; keys are dotted names, values typed, or strings with ``text``.

    Without ``text`` there may be a ``preset``, as in a run's config.toml, which is recorded only.
    """
    sections: dict[str, dict[str, Any]] = {}
    extra, changes = dict(config.extra), dotted(values)
    preset = config.preset if text else changes.pop("preset", config.preset)
    load_named({"method": config.method, "federation.strategy": config.federation.strategy} | changes)
    for name, value in changes.items():
        value = check_value(name, value, text=text)
        section, _, leaf = ALIASES.get(name, name).rpartition(".")
        if section and section not in SECTIONS:
            extra[name] = value
        else:
            sections.setdefault(section, {})[leaf] = value
    top = sections.pop("", {})
    top |= {section: dataclasses.replace(getattr(config, section), **knobs) for section, knobs in sections.items()}
    own = tuple(sorted((name, value) for name, value in extra.items() if value != KNOBS[name].default))
    return dataclasses.replace(config, **top, extra=own, preset=preset)


def read_toml(path: str | Path) -> dict[str, Any]:
    """Read a user's TOML file as dotted knobs (and perhaps ``preset``)."""
    import tomllib

    try:
        with open(path, "rb") as file:
            text = file.read(MOST_TOML + 1)
        if len(text) > MOST_TOML:
            raise RequestError(f"--config {path}: it is larger than {MOST_TOML:,} bytes, so it is no file of knobs")
        return dotted(tomllib.loads(text.decode()))
    except OSError as error:
        raise RequestError(f"--config {path}: {error.strerror}") from None
    except RecursionError:
        raise RequestError(f"--config {path}: it is nested too deeply") from None
    except ValueError as error:  # no TOML, no UTF-8, a number of thousands of digits
        raise RequestError(f"--config {path}: {error}") from None


def to_toml(config: ExperimentConfig, *, comments: bool = False) -> str:
    """Write ``config`` as TOML, which ``read_toml`` reads back to an equal configuration."""
    import tomli_w

    named = {"preset": config.preset} if config.preset else {}
    lines = tomli_w.dumps(named | as_dict(config)).splitlines()
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
    shape: Shape | None = None,
) -> ExperimentConfig:
    """Layer defaults < scale preset < algorithm preset < the scale's tuning of it < TOML ``file`` < ``sets``.

    ``preset`` names a scale, an algorithm, or both joined by ``+``. ``shape``: the data set's, for small and large.
    """
    from .presets import CLIENTS, preset_knobs, preset_words

    file, sets = dict(file or {}), dict(sets or {})
    preset = file.pop("preset", preset) if preset == "demo" else preset
    file.pop("preset", None)
    for name, word in (("preset", preset), ("algorithm", file.get("algorithm", ""))):
        if not isinstance(word, str):
            raise RequestError(f"{name} = {word!r}: it takes the name of a preset; see `mosaic presets`")
    algorithm = algorithm or sets.get("algorithm") or file.get("algorithm")
    clients = "partition.num_clients"
    count = check_value(clients, sets.get(clients, file.get(clients, CLIENTS)), text=clients in sets)
    knobs = preset_knobs(preset, algorithm, count, shape) | {"preset": preset_words(preset, algorithm)[0] or "demo"}
    config = override(ExperimentConfig(), knobs)
    config = override(override(config, file), sets, text=True)
    return check(config)
