"""Search spaces: plans of knobs and points, how they are loaded, checked and drawn.

A space is a module with ``plan() -> SweepPlan``: one that ships in ``tune_spaces``, ``module:function``, or a file.
"""

from __future__ import annotations

import importlib
import itertools
import math
import pkgutil
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config.plugins import ALIASES, load_named
from ..config.presets import preset_knobs
from ..config.resolve import KNOBS, check_value
from ..config.user_code import load_object, users_code
from ..core.errors import RequestError, neighbours

SEARCHES = ("grid", "random", "optuna")
SHIPPED = "tune_spaces"  # imported by name only, since its plans import this module

#: Knobs of data and partition that are not part of the setting: where files lie, and how a draw is repaired.
NOT_IN_SETTING = ("data.root", "data.download", "partition.policy", "partition.max_tries")


@dataclass(frozen=True)
class Choice:
    """One of ``values``."""

    values: tuple[Any, ...]


@dataclass(frozen=True)
class Range:
    """``low`` to ``high``, both included: uniform, or uniform in the logarithm. ``grid``: its points for a grid search.

    A knob of type int draws whole numbers.
    """

    low: float
    high: float
    grid: tuple[float, ...] = ()
    log: bool = False


@dataclass(frozen=True)
class SweepPlan:
    """A search space: ``knobs`` to be combined, or a list of ``points`` (``{}`` is the base itself).

    ``preset`` is the default preset; ``base`` sets knobs for every point, which TOML and ``--set`` override.
    """

    summary: str
    knobs: Mapping[str, Choice | Range] = field(default_factory=dict)
    points: tuple[Mapping[str, Any], ...] = ()
    preset: str = ""
    base: Mapping[str, Any] = field(default_factory=dict)
    search: str = "grid"
    samples: int = 16
    seeds: tuple[int, ...] = ()


def list_spaces() -> dict[str, str]:
    """Return the shipped spaces: name to summary."""
    return {name: load_space(name)[1].summary for name in shipped()}


def load_space(word: str) -> tuple[str, SweepPlan]:
    """Return a short name and the plan of ``word``: a shipped name, ``module:function`` or a ``.py`` file."""
    what, place = f"--space {word}", f"{word}:plan" if word.endswith(".py") else word
    if ":" not in place:
        if word not in (known := shipped()):
            near = neighbours(word, known)
            raise RequestError(f"{what}: unknown space; {near} (or give module:function or FILE.py)")
        place = f"{SHIPPED}.{word}:plan"
    function = load_object(what, place, function=True)
    with users_code(what):
        plan = function()
    source, _, name = place.rpartition(":")
    if not isinstance(plan, SweepPlan):
        raise RequestError(f"{what}: {name}() returned {type(plan).__name__}, not a SweepPlan")
    module = Path(source).stem if source.endswith(".py") else source.rpartition(".")[2]
    return module if name == "plan" else name, plan


def shipped() -> list[str]:
    """Return the names of the spaces that ship."""
    return sorted(found.name for found in pkgutil.iter_modules(importlib.import_module(SHIPPED).__path__))


def check_space(name: str, plan: SweepPlan) -> None:
    """``RequestError`` where a plan has an unknown knob or an invalid value, or contradicts itself.

    ``name``: a space's, or an option as it was typed.
    """
    try:
        _check(plan)
    except RequestError as error:
        what = name if name.startswith("--") else f"--space {name}"
        raise RequestError(f"{what}: {error}") from None


def _need(holds: Any, message: str) -> None:
    if not holds:
        raise RequestError(message)


def _check(plan: SweepPlan) -> None:
    _need(isinstance(plan.summary, str) and plan.summary, f"summary = {plan.summary!r}: it takes a line of text")
    _need(isinstance(plan.knobs, Mapping), "knobs map a knob's name to a Choice or a Range")
    _need(isinstance(plan.base, Mapping), "base maps knobs to values")
    _typed(plan.base)
    _need(isinstance(plan.points, tuple | list), "points are a tuple of mappings, one a trial")
    _need(plan.knobs or plan.points, "it has neither knobs nor points, so there is nothing to try")
    _need(not (plan.knobs and plan.points), "it has knobs and points; give one of them")
    for knob, domain in plan.knobs.items():
        _check_swept(knob)
        _check_domain(knob, domain)
    for point in plan.points:
        _need(isinstance(point, Mapping), f"points: {point!r} does not map knobs to values")
        for knob in point:
            _check_swept(knob)
    _check_distinct("points", [_typed(point) for point in plan.points])
    _need(isinstance(plan.preset, str), f"preset = {plan.preset!r}: it takes the name of a preset")
    if plan.preset:
        try:
            preset_knobs(plan.preset)
        except RequestError as error:
            raise RequestError(str(error).removeprefix("--")) from None
    _need(plan.search in SEARCHES, f"search = {plan.search}: it takes one of {', '.join(SEARCHES)}")
    possible = type(plan.samples) is int and plan.samples >= 1
    _need(possible, f"samples = {plan.samples!r}: it takes a whole number at least 1")
    _need(isinstance(plan.seeds, tuple | list), f"seeds = {plan.seeds!r}: it takes a tuple of whole numbers")
    for seed in plan.seeds:
        _need(type(check_value("seed", seed)) is type(seed), f"seeds: {seed!r} is not a whole number")
    _check_distinct("seeds", plan.seeds)


def _check_swept(knob: Any) -> None:
    _need(isinstance(knob, str), f"{knob!r}: a knob goes by its dotted name")
    _need(knob != "seed", "seed: a space leaves seeds to --seeds (or to its plan's seeds)")
    _need(knob != "algorithm", "algorithm: a preset of many knobs; sweep the knobs, or give --algorithm")


def _check_domain(knob: str, domain: Any) -> None:
    """``RequestError`` unless every value is valid for ``knob`` and a range has low < high."""
    if isinstance(domain, Choice):
        _need(isinstance(domain.values, tuple | list), f"{knob}: Choice takes a tuple of values")
        _need(domain.values, f"{knob}: the Choice is empty")
        _check_distinct(knob, _values(knob, domain.values))
        return
    _need(isinstance(domain, Range), f"{knob} = {domain!r}: it takes a Choice or a Range")
    low, high = _values(knob, (domain.low, domain.high))
    _need(KNOBS[knob].kind in (int, float), f"{knob}: a Range is for numbers; it takes a Choice")
    _need(low < high, f"{knob}: the Range {describe(domain)} needs low < high")
    _need(low > 0 or not domain.log, f"{knob}: the Range {describe(domain)} needs low > 0 for its logarithm")
    _need(isinstance(domain.grid, tuple | list), f"{knob}: the grid of a Range is a tuple of values")
    grid = _values(knob, domain.grid)
    for value in grid:
        _need(low <= value <= high, f"{knob}: {_word(value)} of the grid is outside the Range {describe(domain)}")
    _check_distinct(knob, grid)


def _check_distinct(what: str, values: Iterable[Any]) -> None:
    seen: list[Any] = []
    for value in values:
        _need(value not in seen, f"{what}: {_word(value)} is there twice")
        seen.append(value)


def _values(knob: str, values: Iterable[Any]) -> list[Any]:
    return [check_value(knob, value) for value in values]


def _typed(point: Mapping[str, Any]) -> dict[str, Any]:
    load_named(point)
    return {knob: check_value(knob, value) for knob, value in point.items()}


def grid_points(plan: SweepPlan) -> list[dict[str, Any]]:
    """Return every combination, the last knob varying fastest; or the explicit points."""
    if plan.points:
        return [_typed(point) for point in plan.points]
    axes = []
    for knob, domain in plan.knobs.items():
        values = domain.values if isinstance(domain, Choice) else domain.grid
        if not values:
            raise RequestError(
                f"--search grid: {knob} is a range ({describe(domain)}) without a grid; take --search random"
            )
        axes.append(_values(knob, values))
    return [dict(zip(plan.knobs, values, strict=True)) for values in itertools.product(*axes)]


def random_points(plan: SweepPlan, samples: int, seed: int) -> list[dict[str, Any]]:
    """Draw ``samples`` points; point i's value of a knob comes from the stream (seed, "space", knob, i).

    A larger sweep therefore begins with the points of a smaller one. Where every knob has a list of values, a point
    that was drawn before is left out, and ``num_points`` bounds the number of points.
    """
    if plan.points:
        raise RequestError("--search random: the space lists its points; take --search grid")
    most, found = num_points(plan), dict[Any, dict[str, Any]]()
    for i in itertools.count():
        if len(found) >= min(samples, most):
            return list(found.values())
        point = {knob: _draw(knob, domain, seed, i) for knob, domain in plan.knobs.items()}
        found.setdefault(i if most == math.inf else tuple(point.values()), point)
    raise AssertionError("unreachable")


def num_points(plan: SweepPlan) -> float:
    """Return the number of combinations of the knobs; infinity where one is a ``Range``."""
    sizes = (len(domain.values) if isinstance(domain, Choice) else math.inf for domain in plan.knobs.values())
    return math.prod(sizes)


def _draw(knob: str, domain: Choice | Range, seed: int, index: int) -> Any:
    from ..core.seeding import numpy_stream

    draws = numpy_stream(seed, "space", knob, index)
    if isinstance(domain, Choice):
        return check_value(knob, domain.values[int(draws.integers(len(domain.values)))])
    margin = 0.5 if KNOBS[knob].kind is int else 0.0  # each whole number gets the values that round to it
    there, back = (math.log, math.exp) if domain.log else (float, float)
    return rounded(knob, domain, back(draws.uniform(there(domain.low - margin), there(domain.high + margin))))


def rounded(knob: str, domain: Range, value: float) -> Any:
    """Return a drawn ``value`` within ``domain``, as a whole number or with the 6 digits that are shown."""
    low, high = _values(knob, (domain.low, domain.high))
    return min(max(round(value) if isinstance(low, int) else float(f"{value:.6g}"), low), high)


def setting_knobs(names: Iterable[str]) -> tuple[str, ...]:
    """Return the ``names`` that choose the setting: knobs of data and partition, less ``NOT_IN_SETTING``.

    Accuracies in two settings do not compare, so a best configuration is chosen within each.
    """
    return tuple(n for n in names if n.startswith(("data.", "partition.")) and n not in NOT_IN_SETTING)


def point_name(point: Mapping[str, Any]) -> str:
    """Return the method of a comparison's point as ``mosaic compare --methods`` takes it, the shortest spelling."""
    strategy = next((point[name] for name in ("federation.strategy", *ALIASES) if name in point), "")
    if point["method"] == "fedavg":
        return str(strategy or "fedavg")
    return "+".join(filter(None, (point["method"], strategy)))


def describe(domain: Choice | Range) -> str:
    """Return a domain as text: ``0.01, 0.1, 1``, ``0.5 .. 2`` or ``0.5 .. 2 (log)``."""
    if isinstance(domain, Choice):
        return ", ".join(map(_word, domain.values))
    return f"{_word(domain.low)} .. {_word(domain.high)}" + (" (log)" if domain.log else "")


def _word(value: Any) -> str:
    """Return a value in the syntax of ``--set``; text that ``--grid`` would split stands in quotes."""
    if isinstance(value, str) and (not value or value != value.strip() or re.search("[],\"'[]", value)):
        return f"'{value}'" if '"' in value else f'"{value}"'
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(_word, value))}]"
    return repr(value).removesuffix(".0") if isinstance(value, float) else str(value)
