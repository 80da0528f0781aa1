"""Words as they are typed, and what they mean: a config, a cluster, counts, seeds. ``RequestError`` names the word."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .config import ExperimentConfig, check_value, read_toml, resolve
from .errors import RequestError
from .presets import DATASETS
from .rooms import DataConfig

if TYPE_CHECKING:
    from .spaces import SweepPlan

#: Options that are another spelling of a knob.
KNOB_OF_OPTION = {
    "algorithm": "algorithm",
    "dataset": "data.name",
    "clients": "partition.num_clients",
    "omega": "partition.omega",
    "sampler": "partition.sampler",
    "method": "method",
    "seed": "seed",
    "host": "runtime.host",
    "skip_bad": "data.skip_bad",
}


def config_of(
    preset: str | None = None,
    config: str | None = None,
    sets: Sequence[str] = (),
    base: Mapping[str, Any] | None = None,
    **options: str | None,
) -> ExperimentConfig:
    """The config that a command line asks for; ``options`` are keys of ``KNOB_OF_OPTION``, values as typed.

    ``base``: knobs between the preset and the file (a sweep plan's), and perhaps a ``preset``.
    """
    file = dict(base or {}) | (read_toml(config) if config else {})
    if preset is not None:
        file.pop("preset", None)  # the command line is the later word
    knobs: dict[str, str] = {}
    for item in sets:
        key, equals, value = item.partition("=")
        if not (equals and key.strip()):
            raise RequestError(f"--set {item}: it takes KEY=VALUE, such as warmup.lr=0.01")
        knobs[key.strip()] = value.strip()
    typed = {name: word for name, word in options.items() if word is not None}
    for name, word in typed.items():
        knob = KNOB_OF_OPTION[name]
        if knobs.setdefault(knob, word) != word:
            raise RequestError(f"{_typed(name, word)}: --set {knob}={knobs[knob]} says otherwise; give one of them")
    root = str(knobs.get("data.root") or file.get("data.root") or "")
    for values in (file, knobs):
        if "data.name" in values:
            values["data.name"] = _imported(values["data.name"], root)
    try:
        return resolve(preset or "demo", file=file, sets=knobs)
    except RequestError as error:
        message = str(error)
        for name, word in typed.items():  # said in the words that were typed
            head, knob = f"{KNOB_OF_OPTION[name]} = {word}:", KNOB_OF_OPTION[name]
            if message.startswith(head):
                also = "" if knob == name else f" ({knob})"
                raise RequestError(f"{_typed(name, word)}{also}:{message.removeprefix(head)}") from None
        raise


def _typed(name: str, word: str) -> str:
    """An option as it stood on the command line."""
    option = f"--{name.replace('_', '-')}"
    return option if name == "skip_bad" else f"{option} {word}"


def _imported(name: Any, root: str) -> Any:
    """The name of a data set that ``mosaic data import`` has put under ``root``, in full; any other as it is."""
    from .data.places import data_root, imported_names

    known = not isinstance(name, str) or name in DATASETS or ":" in name
    return name if known or name not in imported_names(data_root(DataConfig(root=root))) else f"imported:{name}"


def address_of(word: str | None) -> str:
    """``auto``, ``local`` or HOST:PORT; by default what RAY_ADDRESS names, else this machine."""
    word = word or ("auto" if os.environ.get("RAY_ADDRESS") else "local")
    port = re.fullmatch(r"(?:ray://)?(?:[\w.-]+|\[[0-9a-fA-F:]+\]):(\d{1,5})", word)
    if word not in ("auto", "local") and not (port and 0 < int(port[1]) < 65536):
        raise RequestError(f"--address {word}: it takes auto, local or HOST:PORT")
    return word


def count_of(option: str, word: str | None) -> int | None:
    """A whole number above 0, as typed."""
    if word is None:
        return None
    if not re.fullmatch("0*[1-9][0-9]{0,5}", word):
        raise RequestError(f"--{option} {word}: it takes a whole number, at least 1 and below a million")
    return int(word)


def seeds_of(word: str | None, seed: int | None) -> tuple[int, ...]:
    """``0,1,2`` as seeds, or the one ``seed`` that was typed; nothing where none are asked for."""
    if word is None:
        return () if seed is None else (seed,)
    if seed is not None:
        raise RequestError(f"--seeds {word}: the seed is said to be {seed} as well; give one of them")
    parts = [part.strip() for part in word.split(",")]
    seeds = [int(part) for part in parts if re.fullmatch("[0-9]{1,10}", part)]
    if len(set(seeds)) < len(parts):
        raise RequestError(f"--seeds {word}: it takes whole numbers, each once, such as 0,1,2")
    try:
        return tuple(check_value("seed", seed) for seed in seeds)
    except RequestError as error:
        raise RequestError(f"--seeds {word}: {error}") from None


def refuse_swept(space: str, plan: SweepPlan, words: Mapping[str, Any]) -> None:
    """A knob that the space sets in every trial cannot be set beside it."""
    swept = set(plan.knobs) | (set.intersection(*map(set, plan.points)) if plan.points else set())
    for option, knob in KNOB_OF_OPTION.items():
        if words.get(option) is not None and knob in swept:
            raise RequestError(f"{_typed(option, words[option])}: space {space} tries values of {knob} itself")
    for item in words["sets"]:
        if (knob := item.partition("=")[0].strip()) in swept:
            raise RequestError(f"--set {item}: space {space} tries values of {knob} itself")
