"""Find methods and strategies, and their own knobs, by name, entry point, ``module:object`` or ``FILE.py:object``.

A method or strategy declares its own knobs as a frozen dataclass of ``knob(...)`` fields under the attribute ``knobs``.
They are set as ``NAME.KNOB``, where NAME is the object's attribute ``name``.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, TypeVar

from ..core.errors import RequestError, neighbours
from .fields import Knob, knobs_of
from .registry import METHODS, STRATEGIES, Entry
from .schema import ExperimentConfig
from .user_code import digest_of, load_object

T = TypeVar("T")

#: Older names of knobs.
ALIASES = {"federation.optimiser": "federation.strategy"}

#: kind -> (the knob that names one, the ones that ship, the word for one, its base class)
_KINDS: dict[str, tuple[str, Mapping[str, Entry], str, str]] = {
    "methods": ("method", METHODS, "method", "mosaic_ray.methods.base.Method"),
    "strategies": ("federation.strategy", STRATEGIES, "strategy", "mosaic_ray.federated.strategies.base.Strategy"),
}

#: Sections of plug-ins that were named as ``module:object``: section -> the object.
_SECTIONS: dict[str, Any] = {}


@lru_cache
def entries(kind: str) -> dict[str, Entry]:
    """Return all methods or strategies that have a name: the package's own, then installed entry points.

    Args:
        kind: ``methods`` or ``strategies``; installed packages use the group ``mosaic_ray.methods`` and so on.
    """
    from importlib.metadata import entry_points  # it takes as long to load as all of this package's configuration

    installed = {
        e.name: Entry(f"installed by {e.value.partition(':')[0]}", e.value)
        for e in entry_points(group=f"mosaic_ray.{kind}")
    }
    return installed | dict(_KINDS[kind][1])


@lru_cache
def load(kind: str, word: str) -> Any:
    """Return the method or strategy that ``word`` names, checked against its base class.

    Raises:
        RequestError: in one line, where nothing has that name, or where a plug-in fails (with its file and line).
    """
    knob, shipped, called, base = _KINDS[kind]
    if word in shipped:
        module, _, name = shipped[word].target.partition(":")
        return getattr(importlib.import_module(module), name)
    if ":" not in word and word not in entries(kind):
        raise RequestError(f"{knob} = {word}: unknown {called}; {neighbours(word, [*entries(kind), 'module:object'])}")
    what = f"{knob} = {word}"
    found: Any = load_object(what, word if ":" in word else entries(kind)[word].target)
    if isinstance(found, type) or getattr(found, "kind", "") != kind:
        raise RequestError(f"{what}: it is a {type(found).__name__}, not an instance of {base}")
    if found.name in {*entries(kind), *ExperimentConfig.__dataclass_fields__} - {word}:
        raise RequestError(f'{what}: its name "{found.name}" is taken; give it another')
    _SECTIONS[found.name] = found
    return found


def load_named(values: Mapping[str, Any]) -> None:
    """Load the plug-ins that dotted knobs in ``values`` name, so that their own knobs are known."""
    for kind, (knob, *_) in _KINDS.items():
        for name in (knob, *(alias for alias, meant in ALIASES.items() if meant == knob)):
            for word in parts(values[name]) if isinstance(values.get(name), str) else ():
                if ":" in word:
                    load(kind, word)


def parts(strategy: str) -> list[str]:
    """Split ``fedrolex+fedprox`` into its names."""
    return [word.strip() for word in strategy.split("+")]


def find_knob(name: str) -> Knob | None:
    """Return the knob of a method's or strategy's own section, or None where there is no such knob."""
    section, dot, _ = name.partition(".")
    for kind in _KINDS if dot else ():
        found = load(kind, section) if section in entries(kind) else _SECTIONS.get(section)
        if found is not None and found.knobs is not None:
            known = {knob.name: knob for knob in knobs_of(found.knobs, f"{section}.")}
            if name in known:
                return known[name]
    return None


def selected(config: ExperimentConfig) -> list[Any]:
    """Return the method and the strategies that ``config`` names."""
    return [load("methods", config.method), *(load("strategies", w) for w in parts(config.federation.strategy))]


@lru_cache
def strategy_named(word: str) -> Any:
    """Return the strategy that ``federation.strategy`` = ``word`` names, several joined by ``+`` as one."""
    first, *others = (load("strategies", name) for name in parts(word))
    return first.joined(others) if others else first


def trains_generators(config: ExperimentConfig) -> bool:
    """Return whether the method of ``config`` has the stage in which clients train generators."""
    return any(stage.name == "generators" for stage in load("methods", config.method).graph(config))


def section_of(config: ExperimentConfig, name: str, knobs: type[T]) -> T:
    """Return the knobs of the plug-in ``name`` as an instance of its dataclass, defaults filled in."""
    prefix = f"{name}."
    return knobs(**{k.removeprefix(prefix): value for k, value in config.extra if k.startswith(prefix)})


def own_knobs(config: ExperimentConfig, name: str) -> dict[str, Any]:
    """Return the knobs of the plug-in ``name`` that are not at their default, for keys."""
    return {knob: value for knob, value in config.extra if knob.startswith(f"{name}.")}


def identity(kind: str, word: str, config: ExperimentConfig) -> dict[str, Any]:
    """Return a plug-in's part of a key: its version, its own knobs that differ from defaults, its source digest."""
    found = load(kind, word)
    shipped = word in _KINDS[kind][1]
    source = "" if shipped else digest_of(word if ":" in word else entries(kind)[word].target)
    code = {"name": found.name, "version": found.version} | ({"source": source} if source else {})
    return code | own_knobs(config, found.name)
