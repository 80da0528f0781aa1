"""Run experiments from Python: ``run``, ``sweep`` and ``compare`` do what the commands of these names do.

    import mosaic_ray as mr

    run = mr.run("fmnist_small", {"generator.steps": 60}, omega=0.01)
    print(run.summary.accuracy)
    run.plot("rounds")

Values are typed: numbers, texts, lists. A wrong request raises ``RequestError`` before anything starts, a failure
``RunError``. The same call again resumes, and so does the command of the same request.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from .cli.request import KNOB_OF_OPTION, compare_plan, gpus_at, parse_address, parse_config, reference, sweep_request
from .config.resolve import check_value
from .config.schema import ExperimentConfig as Config
from .core.errors import Interrupted, RequestError, RunError
from .report.api import Run, Sweep, load_model, load_run, load_sweep
from .storage.uri import redacted
from .sweeps.space import Choice, SweepPlan, check_space
from .tracking.backends import check_trackers
from .tracking.callback import Callback

__all__ = [
    "Callback", "Config", "RequestError", "Run", "RunError", "Sweep", "compare", "configure", "load_model", "load_run",
    "load_sweep", "run", "sweep",
]  # fmt: skip

#: Values of knobs by dotted name.
Knobs = Mapping[str, Any]


def configure(
    preset: str | None = None, knobs: Knobs | None = None, *, address: str | None = None, **options: Any
) -> Config:
    """Return the configuration that ``run`` runs for the same arguments; nothing starts."""
    return _parsed(preset, knobs, parse_address(address), options)


def run(
    preset: str | Config | None = None, knobs: Knobs | None = None, *, storage: str | Path = "./mosaic_runs",
    name: str | None = None, address: str | None = None, fresh: bool = False, strict_health: bool = False,
    progress: bool | None = None, callbacks: Sequence[Callback] = (), track: Sequence[str] = (), **options: Any,
) -> Run:  # fmt: skip
    """Run one experiment, as `mosaic run` does, and return it; a call that was interrupted resumes.

    Args:
        preset: a preset's name, such as ``fmnist_small`` or ``demo+distilled``, or a whole configuration. By default
            the schedule of ``dataset``, or the demo's.
        knobs: values by dotted name, such as ``{"generator.steps": 60}``.
        storage: folder of results, shared by all runs.
        name: the run's folder; by default it follows from the request.
        address: the Ray cluster: auto, local or HOST:PORT.
        fresh: compute everything anew.
        strict_health: a finding of severity error ends the run.
        progress: False shows messages only.
        callbacks: watch the run.
        track: trackers to report to: ``wandb``, ``mlflow``, ``trackio`` (docs/howto/trackers.md).
        options: other spellings of knobs: ``dataset``, ``clients``, ``omega``, ``method``, ``seed``, ``algorithm``,
            ``sampler``, ``host``.
    """
    from .runs import runner

    place, root, trackers = parse_address(address), _folder(storage), check_trackers(track)
    if isinstance(preset, Config):
        if knobs or options:
            raise RequestError("run: a configuration has all knobs; give configure() the others")
        config = preset
    else:
        config = _parsed(preset, knobs, place, options)
    with _alone():
        summary = runner.run(
            config, storage=root, name=name, address=place, fresh=fresh, progress=progress,
            strict_health=strict_health, callbacks=callbacks, track=trackers,
        )  # fmt: skip
    return load_run(summary["paths"]["run"])


def sweep(
    space: str | SweepPlan | Mapping[str, Sequence[Any]] = "lambdas_omega", knobs: Knobs | None = None, *,
    preset: str | None = None, search: str | None = None, samples: int | None = None,
    seeds: Sequence[int] | None = None, scheduler: str = "fifo", max_concurrent: int | None = None,
    storage: str | Path = "./mosaic_runs", name: str | None = None, address: str | None = None, fresh: bool = False,
    strict_health: bool = False, progress: bool | None = None, track: Sequence[str] = (), **options: Any,
) -> Sweep:  # fmt: skip
    """Run many experiments that share their common stages, as `mosaic sweep` does, and return them.

    Args:
        space: the name or file of a space, a ``SweepPlan``, or a grid: values by knob, such as
            ``{"partition.omega": [0.01, 0.1]}``.
        knobs: values that all points share.
        search: ``grid``, ``random`` or ``optuna``; the space has a default.
        samples: points of a random or optuna search.
        seeds: repeat every point with each of these.
        scheduler: ``fifo``, or ``asha``, which stops weak trials early.
        max_concurrent: the most trials at once.

    The other arguments are those of ``run``. ``RunError`` names the trials that failed; the others are kept.
    """
    plan, named = (None, space) if isinstance(space, str) else (_plan(space), "grid")
    return _swept(
        named, plan, preset, knobs, options, storage, address, search=search, samples=samples, seeds=seeds,
        scheduler=scheduler, max_concurrent=max_concurrent,
        how={"name": name, "fresh": fresh, "strict_health": strict_health, "progress": progress, "track": track},
    )  # fmt: skip


def compare(
    methods: Sequence[str] = ("fedavg", "prototype_head", "mosaic"), knobs: Knobs | None = None, *,
    preset: str | None = None, seeds: Sequence[int] = (0, 1, 2), omegas: Sequence[float] | None = None,
    own: Mapping[str, Knobs] | None = None, against: str | None = None, equal_compute: bool = False,
    max_concurrent: int | None = None, storage: str | Path = "./mosaic_runs", name: str | None = None,
    address: str | None = None, fresh: bool = False, strict_health: bool = False, progress: bool | None = None,
    track: Sequence[str] = (), **options: Any,
) -> Sweep:  # fmt: skip
    """Run methods on the same partitions, as `mosaic compare` does; ``.comparison`` of the result is their table.

    Args:
        methods: methods, strategies, or both joined by +, such as ``mosaic+fedrolex``.
        omegas: compare at each of these values.
        own: knobs of one of the methods alone, as ``{"scaffold": {"warmup.momentum": 0.0}}``.
        against: the method that differences are taken to; by default fedavg, or else the first.
        equal_compute: add federated averaging of the same client compute.

    The other arguments are those of ``sweep``.
    """
    words = ",".join(methods)
    alone = [(name, *knob) for name, chosen in (own or {}).items() for knob in _typed(chosen, {}).items()]
    plan = compare_plan(words, None if omegas is None else ",".join(map(str, omegas)), alone)
    return _swept(
        "compare", plan, preset, knobs, options, storage, address, seeds=seeds, max_concurrent=max_concurrent,
        how={"name": name, "fresh": fresh, "strict_health": strict_health, "progress": progress, "track": track},
        against=reference(words, against), equal_compute=equal_compute,
    )  # fmt: skip


def _swept(
    space: str, plan: SweepPlan | None, preset: str | None, knobs: Knobs | None, options: Mapping[str, Any],
    storage: str | Path, address: str | None, *, how: Mapping[str, Any], seeds: Sequence[int] | None = None,
    samples: int | None = None, max_concurrent: int | None = None, against: str = "", equal_compute: bool = False,
    **search: Any,
) -> Sweep:  # fmt: skip
    from .cli.sweep import compared
    from .sweeps import runner

    place, root = parse_address(address), _folder(storage)
    how = {**how, "track": check_trackers(how["track"])}
    request = sweep_request(
        space, _options(options, preset), gpus_at(place), plan=plan, knobs=_typed(knobs or {}, options),
        seeds=None if seeds is None else ",".join(map(str, seeds)), samples=None if samples is None else str(samples),
        max_concurrent=None if max_concurrent is None else str(max_concurrent), **search,
    )  # fmt: skip
    request = replace(request, against=against)
    if equal_compute:
        from .runs.equal_compute import with_controls

        points = with_controls(request.config, request.plan.points)
        request = replace(request, plan=replace(request.plan, points=points))
    with _alone():
        outcome = runner.run(request, storage=root, address=place, **how)
    if space == "compare":
        compared(request, outcome, root)
    outcome.raise_failures()
    return load_sweep(outcome.place)


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Leave no Ray behind that the block started or joined; say in one line how an interrupted block goes on."""
    from .execution.ray_session import disconnect, is_up

    before = is_up()
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted("interrupted; the same call resumes") from None
    finally:
        if not before:
            disconnect()


def _plan(space: SweepPlan | Mapping[str, Sequence[Any]]) -> SweepPlan:
    if isinstance(space, SweepPlan):
        return space
    knobs = {name: Choice(tuple(check_value(name, value) for value in values)) for name, values in space.items()}
    plan = SweepPlan(summary=f"a grid over {', '.join(knobs)}", knobs=knobs)
    check_space("grid", plan)
    return plan


def _parsed(preset: str | None, knobs: Knobs | None, address: str, options: Mapping[str, Any]) -> Config:
    return parse_config(_typed(knobs or {}, options), has_gpus=gpus_at(address), **_options(options, preset))


def _folder(storage: str | Path) -> str:
    """Return ``storage`` as text; ``RequestError`` for one that is not a folder, which nothing is read from here."""
    if "://" in str(storage) and not str(storage).startswith("file://"):
        raise RequestError(
            f"storage {redacted(str(storage))}: from Python results are read from a folder; take `mosaic run` or "
            "`mosaic sweep` for object stores"
        )
    return str(storage)


def _options(options: Mapping[str, Any], preset: str | None) -> dict[str, Any]:
    """Return the options of a command line that mean ``options``; ``RequestError`` for an unknown one."""
    if unknown := options.keys() - KNOB_OF_OPTION.keys():
        raise RequestError(f"unknown argument {min(unknown)}; there are {', '.join(sorted(KNOB_OF_OPTION))}")
    return {**options, "preset": preset}


def _typed(knobs: Knobs, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``knobs`` with checked values; ``RequestError`` where ``options`` name one of them, too."""
    for option, value in options.items():
        knob = KNOB_OF_OPTION.get(option, "")
        if value is not None and knob in knobs:
            raise RequestError(f"{option}={value}: {knob} is among the knobs as well; give one of them")
    return {name: check_value(name, list(v) if isinstance(v, tuple) else v) for name, v in knobs.items()}
