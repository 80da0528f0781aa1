"""Requests as they are typed: a sweep's, and one to hold against a cluster's file."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..config.registry import DATASETS, METHODS, STRATEGIES
from ..config.resolve import check_value, read_toml, resolve
from ..config.schema import DataConfig, ExperimentConfig
from ..core.errors import RequestError, neighbours

if TYPE_CHECKING:
    from ..deploy.capacity import ClusterRequest
    from ..sweeps.runner import SweepRequest
    from ..sweeps.space import SweepPlan


def sweep_request(
    space: str,
    words: Mapping[str, Any],
    *,
    search: str | None = None,
    samples: str | None = None,
    seeds: str | None = None,
    scheduler: str = "fifo",
    max_concurrent: str | None = None,
    plan: SweepPlan | None = None,
) -> SweepRequest:
    """The sweep that a command line asks for; ``words`` are those of ``parse_config``, all as typed.

    ``space`` is where the plan is found, or the name of the ``plan`` given.
    """
    from ..sweeps.runner import SCHEDULERS, SWEEP_BASE, SweepRequest
    from ..sweeps.space import SEARCHES, check_space, load_space

    for option, word, known in (("search", search, SEARCHES), ("scheduler", scheduler, SCHEDULERS)):
        if word is not None and word not in known:
            raise RequestError(f"--{option} {word}: it takes {', '.join(known)}")
    named, plan = (space, plan) if plan else load_space(space)
    check_space(named, plan)
    refuse_swept(named, plan, words)
    preset = {"preset": plan.preset} if plan.preset else {}
    config = parse_config(**words, base=SWEEP_BASE | preset | dict(plan.base))
    one_seed = words["seed"] is not None or any(item.partition("=")[0].strip() == "seed" for item in words["sets"])
    return SweepRequest(
        config, named, plan, search=search or "", samples=parse_count("samples", samples),
        seeds=parse_seeds(seeds, config.seed if one_seed else None), scheduler=scheduler,
        max_concurrent=parse_count("max-concurrent", max_concurrent),
    )  # fmt: skip


def compare_plan(methods: str) -> SweepPlan:
    """A point for each of ``methods``: a method, an optimiser (on its own: ``fedavg``), or METHOD+OPTIMISER."""
    from ..sweeps.space import SweepPlan

    def point(word: str) -> dict[str, str]:
        if word in METHODS:
            return {"method": word}
        method, plus, optimiser = word.partition("+")
        if not plus:
            method, optimiser = "fedavg", word
        if method not in METHODS or optimiser not in STRATEGIES:
            raise RequestError(f"--methods {word}: unknown method; {neighbours(word, {*METHODS, *STRATEGIES})}")
        return {"method": method, "federation.optimiser": optimiser}

    words = [word.strip() for word in methods.split(",")]
    points = tuple(map(point, words))
    optimisers = [p["federation.optimiser"] for p in points if "federation.optimiser" in p]
    # where each point names its own, narrow widths need not suit the default one
    base = {"federation.optimiser": optimisers[0]} if len(optimisers) == len(points) else {}
    return SweepPlan(summary=f"methods side by side: {', '.join(words)}", points=points, base=base)


def cluster_request(space: str | None, words: Mapping[str, Any]) -> ClusterRequest:
    """What is asked of a cluster: a sweep of ``space``, or without one a run."""
    from ..deploy.capacity import ClusterRequest, fit_of_run, fit_of_sweep
    from ..sweeps.runner import prepare, resources_of

    if space is None:
        config = parse_config(**words)
        return ClusterRequest([config], lambda nodes, _: fit_of_run(config, nodes))
    sweep = prepare(sweep_request(space, words))
    return ClusterRequest(sweep.configs, lambda nodes, storage: fit_of_sweep(resources_of(sweep, nodes, storage)))


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


def parse_config(
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
    from ..data.paths import data_root, imported_names

    known = not isinstance(name, str) or name in DATASETS or ":" in name
    return name if known or name not in imported_names(data_root(DataConfig(root=root))) else f"imported:{name}"


def parse_address(word: str | None) -> str:
    """``auto``, ``local`` or HOST:PORT; by default what RAY_ADDRESS names, else this machine."""
    word = word or ("auto" if os.environ.get("RAY_ADDRESS") else "local")
    port = re.fullmatch(r"(?:ray://)?(?:[\w.-]+|\[[0-9a-fA-F:]+\]):(\d{1,5})", word)
    if word not in ("auto", "local") and not (port and 0 < int(port[1]) < 65536):
        raise RequestError(f"--address {word}: it takes auto, local or HOST:PORT")
    return word


def parse_count(option: str, word: str | None) -> int | None:
    """A whole number above 0, as typed."""
    if word is None:
        return None
    if not re.fullmatch("0*[1-9][0-9]{0,5}", word):
        raise RequestError(f"--{option} {word}: it takes a whole number, at least 1 and below a million")
    return int(word)


def parse_seeds(word: str | None, seed: int | None) -> tuple[int, ...]:
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
