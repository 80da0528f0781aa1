"""One frozen record for a whole experiment, its rooms, and the door where every request is checked.

``resolve`` layers defaults < preset < TOML < ``--set``; ``override`` changes single knobs by dotted name.
An unknown or impossible knob is answered here, in one line, before torch or ray is loaded.
"""

from __future__ import annotations

import dataclasses
import re
import tomllib
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .errors import RequestError, neighbours
from .knobs import Knob, shown, typed
from .rooms import ExperimentConfig

# --- names -----------------------------------------------------------------------------------------------------------


def _walk(cls: type, prefix: str = "") -> Iterator[Knob]:
    hints = typing.get_type_hints(cls)
    for item in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[item.name]):
            yield from _walk(hints[item.name], f"{prefix}{item.name}.")
        else:
            yield Knob(prefix + item.name, hints[item.name], item.default, item.metadata)


KNOBS: dict[str, Knob] = {k.name: k for k in _walk(ExperimentConfig)}
ROOMS = tuple(f.name for f in dataclasses.fields(ExperimentConfig) if f.default is dataclasses.MISSING)


def flatten(config: ExperimentConfig) -> dict[str, Any]:
    """Every knob's value under its dotted name."""
    values = {}
    for name in KNOBS:
        room, _, leaf = name.rpartition(".")
        values[name] = getattr(getattr(config, room), leaf) if room else getattr(config, leaf)
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
        room, _, leaf = name.rpartition(".")
        rooms.setdefault(room, {})[leaf] = check_value(name, value, text=text)
    top = rooms.pop("", {})
    top |= {room: dataclasses.replace(getattr(config, room), **knobs) for room, knobs in rooms.items()}
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
    room, out = "", []
    for line in lines:
        if line.startswith("["):
            room = line.strip("[]") + "."
        name = room + line.split(" = ")[0]
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


def check(config: ExperimentConfig) -> ExperimentConfig:
    """What no single knob can tell: ``RequestError`` where knobs contradict each other."""
    from .presets import CLASSIFIERS, DATASETS, METHODS, OPTIMISERS
    from .roster import any_narrow

    def need(holds: bool, message: str) -> None:
        if not holds:
            raise RequestError(message)

    name = config.data.name
    need(
        name in DATASETS or re.fullmatch(r"(parquet|folder|imported):.+", name),
        f"data.name = {name}: unknown data set; {neighbours(name, [*DATASETS, 'parquet:PATH', 'folder:PATH'])}",
    )
    need(config.data.channels != 2, "data.channels = 2: it may be 1 or 3, or 0 for the data set's own")
    need(
        config.data.image_size in (0, 8, 16, 28, 32, 64),
        f"data.image_size = {config.data.image_size}: it may be 8, 16, 28, 32 or 64, or 0 for the data set's own",
    )
    need(config.method in METHODS, f"method = {config.method}: unknown method; {neighbours(config.method, METHODS)}")
    optimiser = config.federation.optimiser
    need(optimiser in OPTIMISERS, f"federation.optimiser = {optimiser}: unknown; {neighbours(optimiser, OPTIMISERS)}")
    narrow = any_narrow(config)
    need(
        OPTIMISERS[optimiser].partial_widths or not narrow,
        f"federation.widths = {shown(config.federation.widths)}: {optimiser} trains whole models, so every width must "
        f"be 1.0; these take narrow clients: {', '.join(n for n, facts in OPTIMISERS.items() if facts.partial_widths)}",
    )
    cohort, clients = config.federation.cohort_size, config.partition.num_clients
    student, mixed = config.model.classifier, config.model.classifiers
    for classifier in (student, *mixed):
        need(
            classifier in CLASSIFIERS or re.fullmatch(r"[\w.]+:\w+", classifier),
            f"model.classifier = {classifier}: unknown; {neighbours(classifier, [*CLASSIFIERS, 'module:function'])}",
        )
    need(
        not mixed or clients % len(mixed) == 0,
        f"model.classifiers = {shown(mixed)}: {len(mixed)} networks for {clients} clients; name one for each, or a "
        "number of them that divides the clients'",
    )
    need(
        not mixed or student in mixed,
        f"model.classifier = {student}: the student begins at the average of the clients that hold its network, so it "
        f"must be one of model.classifiers = {shown(mixed)}",
    )
    whole = not narrow and len(set(mixed)) < 2
    need(
        whole or config.prototypes.model == "global",
        "prototypes.model = client: clients of several widths or networks have no feature space in common; take global",
    )
    need(
        whole or config.prototypes.rounds == "last",
        "prototypes.rounds = all: with clients of several widths or networks they are uploaded once; take last",
    )
    need(
        whole or config.meta.data == "prototypes",
        f"meta.data = {config.meta.data}: with clients of several widths or networks it takes prototypes",
    )
    need(
        not config.generator.conditional or not config.generator.drop_class0_bug,
        "generator.conditional = true: the class that generator.drop_class0_bug leaves out could not be drawn",
    )
    need(
        cohort <= clients,
        f"federation.cohort_size = {cohort}: there are {clients} clients (partition.num_clients)",
    )
    least, asked = config.federation.min_cohort, cohort or clients
    need(
        least <= asked,
        f"federation.min_cohort = {least}: only {asked} clients are asked in a round "
        f"({'federation.cohort_size' if cohort else 'partition.num_clients'})",
    )
    need(
        config.meta.init == "random" or config.meta.input == "head",
        f"meta.init = {config.meta.init}: a re-fitted head needs meta.input = head (or take meta.init = random)",
    )
    cpus = config.runtime.cpus_per_client
    need(
        cpus < 1 or float(cpus).is_integer(),
        f"runtime.cpus_per_client = {cpus:g}: Ray takes a fraction below 1 or a whole number",
    )
    gpus = config.runtime.gpus_per_client
    need(
        gpus <= 1 or float(gpus).is_integer(),
        f"runtime.gpus_per_client = {gpus:g}: Ray takes a fraction up to 1 or a whole number",
    )
    return config
