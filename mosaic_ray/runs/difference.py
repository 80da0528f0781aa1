"""Find a run by its name or path, and compare two: their knobs, the first stage at which they part, accuracies."""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from ..config.resolve import KNOBS, MOST_TOML, dotted, override
from ..config.schema import ExperimentConfig
from ..core.errors import RequestError, neighbours
from ..core.types import ROLES
from ..core.untrusted import parse_json, read_regular
from ..pipeline.graph import KeyInputs, Stage
from ..storage.store import Store
from .plan import graph_of, merged
from .summary import StageRecord, Summary

_FILES = ("summary.json", "config.toml")
_UNREADABLE = (OSError, ValueError, RecursionError)

Pair = tuple[Any, Any]


@dataclass(frozen=True)
class Side:
    """A run: where it lies, its summary (empty before there is one), its knobs by dotted name."""

    place: str
    summary: Summary
    knobs: Mapping[str, Any]

    @property
    def status(self) -> str:
        return self.summary.status or "unfinished"

    @property
    def stages(self) -> Mapping[str, StageRecord]:
        return self.summary.stages or {}


@dataclass(frozen=True)
class Difference:
    """What ``left`` (A) and ``right`` (B) do not share; pairs are (A's, B's), None where a run has none.

    ``shared``: the stages before the first one with different results, ``stage``; ``because``: what differs in what
    that stage's key is made of, ``why``: the same in words. ``accuracy`` is by role, in [0, 1].
    """

    left: Side
    right: Side
    knobs: dict[str, Pair]
    shared: tuple[str, ...]
    stage: str | None
    because: dict[str, Pair] = field(default_factory=dict)
    why: str = ""
    accuracy: dict[str, tuple[float | None, float | None]] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """Return the lines about stages."""
        before = f"shared before it: {', '.join(self.shared)}" if self.shared else "no stage before it is shared"
        if self.stage is None:
            return [self.why]
        return [f"first stage with another result: {self.stage} ({before})", f"  {self.why}"]


def find_runs(words: tuple[str, str], storage: str) -> tuple[Side, Side]:
    """Return the two runs that ``words`` name: runs or trials in ``storage``, or paths of folders.

    A run goes by its name, a trial by SWEEP/TRIAL, or by its own name where one sweep alone has it.
    ``RequestError`` where a word names no run or several, or both name the same one.
    """
    try:
        store, refused = Store(storage, create=False), None
    except RequestError as error:
        store, refused = None, error
    left, right = (_find(word, store, refused) for word in words)
    if left.place == right.place:
        raise RequestError(f"diff {words[0]} {words[1]}: both are {left.place}; name two runs")
    return left, right


def _find(word: str, store: Store | None, refused: RequestError | None) -> Side:
    if "://" in word:
        raise RequestError(f"{word}: it takes a run's name, or a path on a disk; --storage takes a URI")
    found: dict[str, Callable[[str], bytes]] = {}
    if any(os.path.lexists(os.path.join(word, name)) for name in (*_FILES, "plan.json")):
        folder = os.path.realpath(word)
        found[folder] = lambda name: read_regular(os.path.join(folder, name))
    if store is not None:
        for place in _places(store, word):
            where = os.path.realpath(store.where(place)) if store.local_root else store.where(place)
            found.setdefault(where, _reader(store, place))
    if not found and refused is not None:
        raise refused
    if not found and store is not None:
        known = store.files.names("runs")
        near = neighbours(word, known, "`mosaic runs`") if known else "there is none"
        raise RequestError(f"{word}: there is no such run in {store.uri}; {near}")
    if len(found) > 1:
        raise RequestError(f"{word}: {len(found)} runs have this name; give the path of one: {', '.join(found)}")
    return _read(*found.popitem())


def _reader(store: Store, place: str) -> Callable[[str], bytes]:
    return lambda name: store.files.read(f"{place}/{name}")


def _places(store: Store, word: str) -> Iterator[str]:
    """Yield the folders in ``store`` that ``word`` may mean."""
    parts = word.rstrip("/").split("/")
    if {"", ".", ".."} & set(parts):
        return
    match parts:
        case [name]:
            yield from _present(store, f"runs/{name}")
            for sweep in store.files.names("sweeps"):
                yield from _present(store, f"sweeps/{sweep}/trials/{name}")
        case ["runs", name]:
            yield from _present(store, f"runs/{name}")
        case [sweep, trial] | ["sweeps", sweep, "trials", trial]:
            yield from _present(store, f"sweeps/{sweep}/trials/{trial}")


def _present(store: Store, place: str) -> Iterator[str]:
    try:
        if not set(_FILES).isdisjoint(store.files.names(place)):
            yield place
    except (OSError, ValueError):  # a link, no folder, no name
        return


def _read(place: str, read: Callable[[str], bytes]) -> Side:
    try:
        try:
            summary = Summary.from_json(parse_json(read("summary.json")))
        except FileNotFoundError:
            summary = Summary()
        knobs = summary.config
        if knobs is None:
            knobs = tomllib.loads(read("config.toml")[:MOST_TOML].decode())
        return Side(place, summary, dotted(knobs))
    except FileNotFoundError:
        raise RequestError(f"{place}: that is a sweep; name one of its trials, as SWEEP/TRIAL") from None
    except _UNREADABLE as error:
        raise RequestError(f"{place}: its files are not what a run writes ({error})") from None


def difference(left: Side, right: Side) -> Difference:
    """Compare two runs."""
    names = dict.fromkeys([*left.knobs, *right.knobs])
    pairs = {name: (left.knobs.get(name), right.knobs.get(name)) for name in names if name != "preset"}
    knobs = {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
    order = merged([left.stages, right.stages])
    keys = {name: tuple(s.stages[name].key if name in s.stages else None for s in (left, right)) for name in order}
    stage = next((name for name in order if keys[name][0] != keys[name][1]), None)
    shared = tuple(order[: order.index(stage)] if stage else order)
    because: dict[str, Pair] = {}
    if stage is None:
        why = "all stages have the same results: the knobs above change none" if knobs else "all stages are the same"
        if not order:
            why = "neither has a finished stage, so stages cannot be compared"
    elif None in keys[stage]:
        which, other = ("A", right) if keys[stage][1] is None else ("B", left)
        why = f"only {which} has it" + ("" if other.status == "done" else "; the other did not get so far")
    else:
        because, why = _reasons(left, right, stage, knobs)
    scores = (left.summary.accuracy or {}, right.summary.accuracy or {})
    accuracy = {role: (scores[0].get(role), scores[1].get(role)) for role in ROLES}
    accuracy = {role: pair for role, pair in accuracy.items() if pair != (None, None)}
    return Difference(left, right, knobs, shared, stage, because, why, accuracy)


def _reasons(left: Side, right: Side, stage: str, knobs: Mapping[str, Pair]) -> tuple[dict[str, Pair], str]:
    """Return what differs in what the keys of ``stage`` are made of, and a sentence about it."""
    try:
        sides = [_key_parts(side, stage) for side in (left, right)]
    except (RequestError, LookupError, TypeError, AttributeError, ValueError) as error:
        return {}, f"which knobs of it differ is not known: {error}"
    found: dict[str, Pair] = {}
    for name in dict.fromkeys([*sides[0], *sides[1]]):
        absent = KNOBS[name].default if name in KNOBS else None  # keys leave defaults out
        pair = sides[0].get(name, absent), sides[1].get(name, absent)
        if pair[0] != pair[1]:
            found[name] = cast(Pair, knobs.get(name, pair))
    if found:
        words = (f"{name} ({json.dumps(a)} and {json.dumps(b)})" for name, (a, b) in found.items())
        return found, f"because of {', '.join(words)}"
    if stage == "partition":
        return {}, "its knobs are the same: the images are others"
    return {}, "its knobs are the same: another version of this package made one of them, or other user code"


def _key_parts(side: Side, name: str) -> dict[str, Any]:
    """Return by dotted name what the key of a stage is made of, without keys of other stages.

    ``RequestError`` where user code would have to be loaded for that, or for knobs of another version.
    """
    named = [side.knobs.get(knob) for knob in ("method", "federation.strategy", "federation.optimiser")]
    named += [side.knobs.get("model.classifier"), side.knobs.get("partition.sampler"), side.knobs.get("model.student")]
    if user := [word for word in (*named, *side.knobs.get("model.classifiers", ())) if word and ":" in word]:
        raise RequestError(f"{user[0]} is user code, which is not loaded to find out")
    config = override(ExperimentConfig(), side.knobs)
    stages: dict[str, Stage] = {stage.name: stage for stage in graph_of(config)}
    if name not in stages:
        raise RequestError("this version of the package has no such stage")
    stage = stages[name]
    counts = side.summary.label_counts
    inputs = KeyInputs(config, sizes=[sum(row) for row in counts] if counts else None)
    parts = dict(stage.knobs(inputs))
    if "data" in parts:
        parts["data"] = parts["data"].get("unseen", parts["data"])
    found = dotted(json.loads(json.dumps(parts)))
    if stage.per_client is not None:
        own = [dotted(json.loads(json.dumps(stage.per_client(inputs, k)))) for k in range(config.partition.num_clients)]
        for entry in dict.fromkeys(entry for client in own for entry in client if entry != "client"):
            values = [client.get(entry) for client in own]
            found[entry] = values[0] if all(value == values[0] for value in values) else values
    return {entry: value for entry, value in found.items() if entry != "facts"}
