"""Parse the options of a command line into configurations and requests."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..config import plugins
from ..config.presets import ALGORITHMS, GENERIC, SCHEDULED, SHAPES, Shape, preset_words
from ..config.registry import DATASETS
from ..config.resolve import KNOBS, check_value, read_toml, resolve
from ..config.schema import DataConfig, ExperimentConfig
from ..config.user_code import load_object
from ..core.errors import RequestError, neighbours

if TYPE_CHECKING:
    from ..deploy.capacity import ClusterRequest
    from ..execution.ray_session import Resources
    from ..sweeps.runner import Sweep, SweepRequest
    from ..sweeps.space import SweepPlan

#: Typed options that make a configuration, by the names of ``options.REQUEST``; None or absent where not given.
ConfigOptions = Mapping[str, Any]
#: Tells whether the clients of a configuration find GPUs.
HasGpus = Callable[[ExperimentConfig], bool]
#: A knob of one compared method alone: the method's name as in ``--methods``, the knob, its value.
OwnKnob = tuple[str, str, Any]


#: Refusals of `mosaic compare` by knob.
COMPARED = {"partition.omega": "--omegas lists its values; give one of them"}

#: One value of ``--grid``: commas inside brackets and quotes do not end it.
_GRID_VALUE = re.compile(r"""(?:\[[^][]*\]|"[^"]*"|'[^']*'|[^,])+""")


def sweep_request(
    space: str | None,
    options: ConfigOptions,
    has_gpus: HasGpus | None = None,
    *,
    grid: Sequence[str] = (),
    search: str | None = None,
    samples: str | None = None,
    seeds: str | None = None,
    scheduler: str = "fifo",
    max_concurrent: str | None = None,
    plan: SweepPlan | None = None,
    knobs: Mapping[str, Any] | None = None,
) -> SweepRequest:
    """Return the sweep that a command line asks for; all values are as typed.

    ``space``: name, module:function or file of the plan; where ``plan`` is given, its name. ``grid``: the knobs and
    values to try in place of a space. ``knobs``: typed values of knobs, over the plan's.
    """
    from ..sweeps.runner import SCHEDULERS, SWEEP_BASE, SweepRequest
    from ..sweeps.space import SEARCHES, check_space, load_space

    for option, word, known in (("search", search, SEARCHES), ("scheduler", scheduler, SCHEDULERS)):
        if word is not None and word not in known:
            raise RequestError(f"--{option} {word}: it takes {', '.join(known)}")
    if space and grid:
        raise RequestError(f"--grid {grid[0]}: --space {space} lists what to try as well; give one of them")
    named = space or "--grid"
    if plan is None and space:
        named, plan = load_space(space)
    sets = (item.partition("=") for item in options.get("sets", ()))
    given = {KNOB_OF_OPTION[name]: word for name, word in _typed_knobs(options).items()}
    file = read_toml(options["config"]) if options.get("config") else {}
    plugins.load_named(file | {key.strip(): value.strip() for key, _, value in sets} | given)
    plan = plan or grid_plan(grid)
    check_space(named, plan)
    swept = set(plan.knobs) | (set.intersection(*map(set, plan.points)) if plan.points else set())
    swept = {plugins.ALIASES.get(knob, knob) for knob in swept}
    typed = {_spelled(name, word): KNOB_OF_OPTION[name] for name, word in _typed_knobs(options).items()}
    typed |= {f"--set {item}": item.partition("=")[0].strip() for item in options.get("sets", ())}
    typed |= {name: name for name in knobs or ()}
    for option, knob in typed.items():
        if plugins.ALIASES.get(knob, knob) in swept:
            source = named if grid else f"space {named}"
            instead = f"give your values of it as --grid {knob}=A,B,... in place of --space, or another --space"
            if grid or named == "compare":
                instead = "give one of them" if grid else COMPARED.get(knob, "--methods names what to compare")
            raise RequestError(f"{option}: {source} tries values of {knob} itself; {instead}")
    preset = {"preset": plan.preset} if plan.preset else {}
    config = parse_config(SWEEP_BASE | preset | dict(plan.base) | dict(knobs or {}), has_gpus=has_gpus, **options)
    return SweepRequest(
        config, named, plan, search=search or "", samples=parse_count("samples", samples),
        seeds=parse_seeds(seeds, config.seed if "seed" in typed.values() else None), scheduler=scheduler,
        max_concurrent=parse_count("max-concurrent", max_concurrent),
    )  # fmt: skip


def grid_plan(words: Sequence[str]) -> SweepPlan:
    """Return the plan of all combinations of the values in ``words``, each of the form KNOB=A,B,...

    Values are read as ``--set`` reads them; a list stands in brackets, text with commas in quotes.
    """
    from ..sweeps.space import Choice, SweepPlan, check_space

    texts: dict[str, list[str]] = {}
    for word in words:
        name, _, text = word.partition("=")
        knob, values = plugins.ALIASES.get(name.strip(), name.strip()), _GRID_VALUE.findall(text)
        if not (knob and text.strip() and ",".join(values) == text):
            raise RequestError(f"--grid {word}: it takes KNOB=A,B,..., such as partition.omega=0.01,0.1,1")
        if knob in texts:
            raise RequestError(f"--grid {word}: another --grid has values of {knob}; give them all in one")
        texts[knob] = [value.strip() for value in values]
        for value in texts[knob]:
            plugins.load_named({knob: value})
    knobs: dict[str, Any] = {}
    for word, (knob, values) in zip(words, texts.items(), strict=True):
        try:
            if knob in KNOBS and KNOBS[knob].type is str:
                values = [re.sub(r"""^(["'])(.*)\1$""", r"\2", value) for value in values]
            knobs[knob] = Choice(tuple(check_value(knob, value, text=True) for value in values))
        except RequestError as error:
            raise RequestError(f"--grid {word}: {error}") from None
        check_space(f"--grid {word}", SweepPlan(summary="a grid", knobs={knob: knobs[knob]}))
    return SweepPlan(summary=f"a grid over {', '.join(knobs)}", knobs=knobs)


def compare_plan(methods: str, omegas: str | None = None, own: Sequence[OwnKnob] = ()) -> SweepPlan:
    """Return a plan with one point for each METHOD, STRATEGY (with method fedavg) or METHOD+STRATEGY, and a ceiling.

    A method or strategy is named as in its knob; strategies joined by + combine. ``omegas``: 0.01,0.1 for all points at
    each of these. ``own``: knobs of one point.
    """
    from ..sweeps.space import SweepPlan

    words = [word.strip() for word in methods.split(",")]
    points = tuple(map(_compared, words))
    strategies = [p["federation.strategy"] for p in points if "federation.strategy" in p]
    # where each point names its own, narrow widths need not suit the default one
    base = {"federation.strategy": strategies[0]} if len(strategies) == len(points) else {}
    points = _with_own(points, methods, own)
    if omegas is not None:
        points = tuple(point | {"partition.omega": omega} for omega in _omegas(omegas) for point in points)
    return SweepPlan(
        summary=f"methods side by side: {', '.join(words)}", points=points, base={"runtime.ceiling": True} | base
    )


def own_knobs(words: Sequence[tuple[str, str]]) -> list[OwnKnob]:
    """Return what ``--for METHOD KEY=VALUE`` sets, with checked values."""
    found = []
    for name, word in words:
        key, equals, text = word.partition("=")
        if not (equals and key.strip()):
            raise RequestError(f"--for {name} {word}: it takes METHOD KEY=VALUE, such as scaffold warmup.momentum=0")
        knob = plugins.ALIASES.get(key.strip(), key.strip())
        plugins.load_named({knob: text.strip()})
        try:
            found.append((name, knob, check_value(knob, text.strip(), text=True)))
        except RequestError as error:
            raise RequestError(f"--for {name} {word}: {error}") from None
    return found


def _with_own(points: tuple[dict[str, Any], ...], methods: str, own: Sequence[OwnKnob]) -> tuple[dict[str, Any], ...]:
    """Return the points of ``methods`` with the knobs that some of them have for themselves."""
    found = [dict(point) for point in points]
    for name, knob, value in own:
        point = found[points.index(_one_of(methods, name, "--for"))]
        if knob in ("method", "federation.strategy", "seed", "preset") or knob.startswith(("data.", "partition.")):
            raise RequestError(f"--for {name} {knob}: methods are compared on the same data, partitions and seeds")
        if knob in point:
            raise RequestError(f"--for {name} {knob}: it is given twice")
        point[knob] = value
    return tuple(found)


def _omegas(text: str) -> list[float]:
    try:
        found = [check_value("partition.omega", word, text=True) for word in text.split(",")]
    except RequestError as error:
        raise RequestError(f"--omegas {text}: {error}") from None
    if len(set(found)) < len(found):
        raise RequestError(f"--omegas {text}: it takes numbers, each once, such as 0.01,0.1")
    return found


def reference(methods: str, against: str | None) -> str:
    """Return the name of the method that ``--against`` names, one of ``--methods``; empty where it is not given."""
    from ..sweeps.space import point_name

    return "" if against is None else point_name(_one_of(methods, against, "--against"))


def _one_of(methods: str, name: str, option: str) -> dict[str, Any]:
    """Return the point of ``name``, in any spelling, which must be one of ``methods``."""
    point = _compared(name.strip(), option)
    if point not in [_compared(word.strip()) for word in methods.split(",")]:
        raise RequestError(f"{option} {name}: it takes one of the methods that are compared, {methods}")
    return point


def _compared(word: str, option: str = "--methods") -> dict[str, Any]:
    """Return the knobs of a point: ``word`` is a method, strategies, or a method and strategies."""
    methods, strategies = plugins.entries("methods"), plugins.entries("strategies")
    first, plus, rest = word.partition("+")
    own = first in methods
    if ":" in first:
        own = getattr(load_object(f"{option} {word}", first), "kind", "") == "methods"
    if own and not plus:
        return {"method": first}
    method, strategy = (first, rest) if own else ("fedavg", word)
    for name in plugins.parts(strategy):
        if ":" in name:
            plugins.load("strategies", name)
        elif name not in strategies:
            raise RequestError(f"{option} {word}: unknown method; {neighbours(word, {*methods, *strategies})}")
    return {"method": method, "federation.strategy": strategy}


def cluster_request(space: str | None, grid: Sequence[str], options: ConfigOptions, file: str) -> ClusterRequest:
    """Return the request to check against a cluster's ``file``: a sweep of ``space`` or ``grid``, or else a run."""
    from ..deploy.capacity import ClusterRequest, fit_of_run, fit_of_sweep
    from ..deploy.cluster_spec import gpus_declared
    from ..execution.devices import settle
    from ..runs.runner import estimate_devices
    from ..sweeps.runner import prepare, resources_of

    if space is None and not grid:
        config = parse_config(has_gpus=lambda _: gpus_declared(file), **options)

        def settled(there: Resources) -> ExperimentConfig:
            return settle(config, estimate_devices([config], there))

        return ClusterRequest(
            lambda there: [settled(there)], lambda nodes, _, there: fit_of_run(settled(there), nodes)
        )
    request = sweep_request(space, options, lambda _: gpus_declared(file), grid=grid)
    prepared = prepare(request)
    configs = prepared.configs

    def sweep(there: Resources) -> Sweep:
        return prepare(request, there=estimate_devices(configs, replace(there, runs=len(configs))))

    return ClusterRequest(
        lambda there: sweep(there).configs,
        lambda nodes, storage, there: fit_of_sweep(resources_of(sweep(there), nodes, storage)),
        work_known=prepared.plan_json["search"] != "optuna",
    )


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
    base: Mapping[str, Any] | None = None, *, has_gpus: HasGpus | None = None, **options: Any
) -> ExperimentConfig:
    """Return the configuration that a command line asks for.

    Args:
        base: Knobs between the preset and the file (a sweep plan's), and perhaps a ``preset``.
        has_gpus: Asked where the data set chooses the schedule. None: for a command that trains nothing, to which the
            choice makes no difference.
    """
    path = options.get("config")
    own, base = read_toml(path) if path else {}, dict(base or {})
    knobs: dict[str, Any] = {}
    for item in options.get("sets", ()):
        key, equals, value = item.partition("=")
        if not (equals and key.strip()):
            raise RequestError(f"--set {item}: it takes KEY=VALUE, such as warmup.lr=0.01")
        knobs[key.strip()] = value.strip()
    typed = _typed_knobs(options)
    for name, word in typed.items():
        knob = KNOB_OF_OPTION[name]
        if knobs.setdefault(knob, word) != word:
            raise RequestError(f"{_spelled(name, word)}: --set {knob}={knobs[knob]} says otherwise; give one of them")
    if "data.name" in own | knobs:  # the data set chooses the scale
        base["preset"] = "+".join(word for word in base.get("preset", "").split("+") if word in ALGORITHMS)
    file = base | own
    preset = options.get("preset") or file.get("preset", "")
    file.pop("preset", None)
    if isinstance(preset, str) and not ALGORITHMS.keys().isdisjoint(preset.split("+")) and "algorithm" not in own:
        file.pop("algorithm", None)  # the base's
    root = str(knobs.get("data.root") or file.get("data.root") or "")
    for values in (file, knobs):
        if "data.name" in values:
            values["data.name"] = _imported(values["data.name"], root)

    def resolved(preset: str, **more: Any) -> ExperimentConfig:
        try:
            return resolve(preset, file=file, sets=knobs, **more)
        except RequestError as error:
            message = str(error)
            for name, word in typed.items():  # names the option that was typed
                head, knob = f"{KNOB_OF_OPTION[name]} = {word}:", KNOB_OF_OPTION[name]
                if message.startswith(head):
                    also = "" if knob == name else f" ({knob})"
                    raise RequestError(f"{_spelled(name, word)}{also}:{message.removeprefix(head)}") from None
            raise

    scale = preset_words(preset)[0] if preset and isinstance(preset, str) else ""
    if own.keys() >= SCHEDULED:  # a run's config.toml has a schedule already
        return replace(resolved("demo"), preset="") if preset == "" else resolved(preset)
    chosen = not scale and isinstance(preset, str) and "data.name" in file | knobs
    if not (chosen or scale in GENERIC):
        return resolved("demo" if preset == "" else preset)
    config, reason = resolved(f"small+{preset}".rstrip("+") if chosen else preset), ""
    shape = _shape(config, has_gpus)
    if chosen:
        scale, reason = _choose(config, has_gpus)
    return replace(resolved(scale, algorithm=config.algorithm, shape=shape), reason=reason)


def _shape(config: ExperimentConfig, has_gpus: HasGpus | None) -> Shape:
    """Return the shape of a request's data set; without ``has_gpus`` CIFAR-10's in place of an unknown one."""
    if config.data.name in SHAPES:
        return SHAPES[config.data.name]
    from ..data.load import shape_of

    shape = shape_of(config.data) or (None if has_gpus else SHAPES["cifar10"])
    if shape is None:
        raise RequestError(
            f"data.name = {config.data.name}: its images are not known before they are loaded, so no schedule is "
            "chosen for it; name one, such as --preset demo or --preset cifar10_small"
        )
    return shape


def _choose(config: ExperimentConfig, has_gpus: HasGpus | None) -> tuple[str, str]:
    """Return the scale for a request's data set and device, and the line that explains it.

    It follows from what is declared: ``runtime.device`` or ``runtime.gpus_per_client`` where one is given, else whether
    there are GPUs.
    """
    name, device, share = config.data.name, config.runtime.device, config.runtime.gpus_per_client
    if device != "auto":
        large, why = device == "cuda", f"runtime.device = {device}"
    elif share != "auto":
        large, why = config.runtime.gpu_share > 0, f"runtime.gpus_per_client = {share:g}"
    else:
        large = has_gpus is not None and has_gpus(config)
        why = "a GPU in reach" if large else "no GPU in reach"
    pair = (f"{name}_small", name) if name in SHAPES else GENERIC
    other = f"--preset {pair[not large]} for {'the small one' if large else 'the full scale'}"
    return pair[large], f"schedule {pair[large]} ({why}); {other}"


def gpus_at(address: str) -> HasGpus:
    """Return a function that checks whether clients find GPUs: on this machine, or at the cluster's ``address``."""

    def has_gpus(config: ExperimentConfig) -> bool:
        from ..execution.ray_session import connect, in_all, local_resources, machines_to_come

        if address == "local" or config.runtime.host == "serial":
            return local_resources().gpus >= 1
        return in_all(connect(address), machines_to_come()).gpus >= 1

    return has_gpus


def _typed_knobs(options: ConfigOptions) -> dict[str, str]:
    return {name: str(word) for name, word in options.items() if name in KNOB_OF_OPTION and word is not None}


def _spelled(name: str, word: str) -> str:
    """Return an option as it stood on the command line."""
    option = f"--{name.replace('_', '-')}"
    return option if name == "skip_bad" else f"{option} {word}"


def _imported(name: Any, root: str) -> Any:
    """Return ``imported:NAME`` for a data set that ``mosaic data import`` has put under ``root``; else ``name``."""
    from ..data.paths import data_root, imported_names

    known = not isinstance(name, str) or name in DATASETS or ":" in name
    return name if known or name not in imported_names(data_root(DataConfig(root=root))) else f"imported:{name}"


def parse_address(address: str | None) -> str:
    """Return ``auto``, ``local`` or HOST:PORT; by default ``auto`` where RAY_ADDRESS is set, else ``local``."""
    address = address or ("auto" if os.environ.get("RAY_ADDRESS") else "local")
    port = re.fullmatch(r"(?:ray://)?(?:[\w.-]+|\[[0-9a-fA-F:]+\]):(\d{1,5})", address)
    if address not in ("auto", "local") and not (port and 0 < int(port[1]) < 65536):
        raise RequestError(f"--address {address}: it takes auto, local or HOST:PORT")
    return address


def parse_count(option: str, text: str | None) -> int | None:
    """Return a whole number above 0; None where none was typed."""
    if text is None:
        return None
    if not re.fullmatch("0*[1-9][0-9]{0,5}", text):
        raise RequestError(f"--{option} {text}: it takes a whole number, at least 1 and below a million")
    return int(text)


def parse_age(text: str) -> int:
    """Return the seconds of ``--older-than``: a number and s, m, h or d."""
    age = re.fullmatch("([0-9]{1,6})([smhd])", text)
    if not age:
        raise RequestError(f"--older-than {text}: it takes a number and s, m, h or d, such as 12h or 7d")
    return int(age[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[age[2]]


def parse_seeds(text: str | None, seed: int | None) -> tuple[int, ...]:
    """Return the seeds of ``0,1,2``; without a ``text`` the one ``seed`` that was typed, or none."""
    if text is None:
        return () if seed is None else (seed,)
    if seed is not None:
        raise RequestError(f"--seeds {text}: the seed is set to {seed} as well; give one of them")
    parts = [part.strip() for part in text.split(",")]
    seeds = [int(part) for part in parts if re.fullmatch("[0-9]{1,10}", part)]
    if len(set(seeds)) < len(parts):
        raise RequestError(f"--seeds {text}: it takes whole numbers, each once, such as 0,1,2")
    try:
        return tuple(check_value("seed", seed) for seed in seeds)
    except RequestError as error:
        raise RequestError(f"--seeds {text}: {error}") from None
