"""Knobs: configuration fields with meaning, type and range, and the conversion of text to their values."""

from __future__ import annotations

import dataclasses
import json
import math
import operator
import typing
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..core.errors import RequestError

#: Numbers, or the name of a rule that gives them.
Widths = tuple[float, ...] | str
#: Names, or a rule that draws them, which is text with a colon.
Names = tuple[str, ...] | str

#: A number, or ``auto``: the machine decides (``execution.devices.settle``).
AutoInt, AutoFloat = int | str, float | str
_NUMBER_OF = {AutoInt: int, AutoFloat: float}

_WORDS = {
    int: "a whole number", float: "a number", bool: "true or false", str: "text",
    tuple[str, ...]: 'a list of names such as ["cnn", "resnet18"]',
    tuple[float, ...]: "a list of numbers such as [0.3, 1.0], each",
    Widths: "a list of numbers such as [1.0, 0.5], or a rule such as rho:3,",
    Names: 'a list such as ["image+text", "image"], or a rule such as p:0.5 or each:2',
    AutoInt: "auto, or a whole number", AutoFloat: "auto, or a number",
}  # fmt: skip

#: Bound of every number that declares none: a larger one is a slip of the hand.
MOST = 1e9

#: Most characters of a refused value in a message.
MOST_SHOWN = 200

_BOUNDS = {"above": ("above", operator.gt), "low": ("at least", operator.ge), "high": ("at most", operator.le)}


def knob(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] | None = None,
    plug_in: bool = False,
) -> Any:
    """Declare a dataclass field with its meaning and range: ``low <= value <= high``, or ``above < value``.

    ``plug_in``: beside ``choices`` it takes user code, as ``module:function`` or ``FILE.py:function``.
    """
    bounds = {"low": low, "above": above, "high": high, "choices": choices, "plug_in": plug_in}
    return field(default=default, metadata={"help": help} | bounds)


@dataclass(frozen=True)
class Knob:
    """A knob's dotted name, type, default, meaning and range."""

    name: str
    type: Any
    default: Any
    metadata: Mapping[str, Any]

    @property
    def kind(self) -> Any:
        """Return the type of its settled values: the type of the number if the knob may be ``auto``."""
        return _NUMBER_OF.get(self.type, self.type)


def knobs_of(cls: type, prefix: str = "") -> Iterator[Knob]:
    """Yield the knobs that a dataclass declares; knobs of nested dataclasses have dotted names."""
    hints = typing.get_type_hints(cls)
    for item in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[item.name]):
            yield from knobs_of(hints[item.name], f"{prefix}{item.name}.")
        elif "help" in item.metadata:
            yield Knob(prefix + item.name, hints[item.name], item.default, item.metadata)


def changed_knobs(section: Any, *without: str) -> dict[str, Any]:
    """Return the knobs of a section that are not at their default, but for those named in ``without``.

    Keys of stored results hold these, so that a new knob at its default changes no key. A default that is changed must
    therefore come with a new version of every stage that reads it.
    """
    values = ((item.name, getattr(section, item.name), item.default) for item in dataclasses.fields(section))
    return {name: value for name, value, default in values if name not in without and value != default}


def _wants(spec: Knob) -> str:
    meta = spec.metadata
    if meta["choices"]:
        return "one of " + ", ".join(meta["choices"])
    bounds = [f"{word} {meta[bound]:g}" for bound, (word, _) in _BOUNDS.items() if meta[bound] is not None]
    return " ".join([_WORDS[spec.type], " and ".join(bounds)]).strip()


def _coerce(spec: Knob, value: Any, text: bool) -> Any:
    """Convert ``value`` to the knob's type, or raise ``ValueError``. ``text``: it came from a command line."""
    if text and isinstance(value, str):
        value = _parsed(spec.type, value.strip())
    if spec.kind != spec.type:
        if value == "auto":
            return value
        spec = dataclasses.replace(spec, type=spec.kind)
    if spec.type is bool:
        if not isinstance(value, bool):
            raise ValueError
        return value
    if spec.type is int:
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError
        return value
    if spec.type is float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError
        return float(value) + 0.0  # so that -0.0 is 0.0
    rule = isinstance(value, str) and (spec.type == Widths or (spec.type == Names and ":" in value))
    if spec.type is str or rule:
        if not isinstance(value, str):
            raise ValueError
        return value
    values = value if isinstance(value, list | tuple) else [value]
    if not values and spec.type == Widths:
        raise ValueError
    each = Knob(spec.name, str if spec.type in (tuple[str, ...], Names) else float, None, spec.metadata)
    return tuple(_coerce(each, v, False) for v in values)


def _parsed(kind: Any, word: str) -> Any:
    """Parse a word of a command line: TOML, where quotes around names may be left out."""
    if kind is str or (kind == Widths and word[:1].isalpha()) or (kind in _NUMBER_OF and word == "auto"):
        return word
    if kind == Names and ":" in word and word[0] not in "[\"'":
        return word
    if kind in (tuple[str, ...], Names) and '"' not in word and "'" not in word:
        return [name.strip() for name in word.strip("[]").split(",") if name.strip()]
    import tomllib  # here, as elsewhere in this package, so that a shell's completion is quick

    return tomllib.loads(f"v = {_numeral(word)}")["v"]


def _numeral(text: str) -> str:
    """Spell a number as TOML wants it: TOML refuses `.5`, `1.` and `1e-4`, Python reads them."""
    try:
        return text if text.lstrip("+-").isdigit() else repr(float(text))
    except ValueError:
        return text


def typed(spec: Knob, value: Any, *, text: bool = False) -> Any:
    """Return ``value`` in the knob's type and range, else raise ``RequestError``. ``text``: strings are parsed."""
    meta, sane = spec.metadata, ""
    try:
        found = _coerce(spec, value, text)
        if meta["choices"] and found not in meta["choices"] and not (meta["plug_in"] and ":" in found):
            raise ValueError
        for number in (n for n in (found if isinstance(found, tuple) else (found,)) if not isinstance(n, str)):
            if not all(holds(number, meta[bound]) for bound, (_, holds) in _BOUNDS.items() if meta[bound] is not None):
                raise ValueError
            if meta["high"] is None and abs(number) > MOST:
                sane = f", and no larger than {MOST:g}"
                raise ValueError
    except (ValueError, OverflowError, RecursionError):
        raise RequestError(f"{spec.name} = {_as_given(spec, value, text)}: it takes {_wants(spec)}{sane}") from None
    return found


def _as_given(spec: Knob, value: Any, text: bool) -> str:
    """Return a refused value as it was given, cut short: text of a file that should be a number keeps its quotes."""
    try:
        if isinstance(value, str) and (text or spec.type is str):
            words = value
        else:
            words = json.dumps(value, default=repr) if isinstance(value, str | bool | list | dict) else repr(value)
    except (ValueError, RecursionError):  # a number of thousands of digits
        words = "a huge value"
    return words if len(words) <= MOST_SHOWN else f"{words[:MOST_SHOWN]}..."


def short_names(names: Iterable[str]) -> dict[str, str]:
    """Return the last part of each dotted name, where it is unique."""
    last = {name: name.rpartition(".")[2] for name in names}
    count = Counter(last.values())
    return {name: leaf if count[leaf] == 1 else name for name, leaf in last.items()}


def shown(value: Any) -> str:
    """Format a knob's value for people, rounded."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(shown, value))}]"
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
