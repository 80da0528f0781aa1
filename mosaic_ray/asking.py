"""Requests as they are typed: a sweep's, and one to hold against a cluster's file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .errors import RequestError, neighbours
from .presets import METHODS, OPTIMISERS
from .words import config_of, count_of, refuse_swept, seeds_of

if TYPE_CHECKING:
    from .runtime.cluster_fit import Asked
    from .spaces import SweepPlan
    from .sweep_launch import Request


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
) -> Request:
    """The sweep that a command line asks for; ``words`` are those of ``config_of``, all as typed.

    ``space`` is where the plan is found, or the name of the ``plan`` given.
    """
    from .spaces import SEARCHES, check_space, load_space
    from .sweep_launch import SCHEDULERS, SWEEP_BASE, Request

    for option, word, known in (("search", search, SEARCHES), ("scheduler", scheduler, SCHEDULERS)):
        if word is not None and word not in known:
            raise RequestError(f"--{option} {word}: it takes {', '.join(known)}")
    named, plan = (space, plan) if plan else load_space(space)
    check_space(named, plan)
    refuse_swept(named, plan, words)
    preset = {"preset": plan.preset} if plan.preset else {}
    config = config_of(**words, base=SWEEP_BASE | preset | dict(plan.base))
    one_seed = words["seed"] is not None or any(item.partition("=")[0].strip() == "seed" for item in words["sets"])
    return Request(
        config, named, plan, search=search or "", samples=count_of("samples", samples),
        seeds=seeds_of(seeds, config.seed if one_seed else None), scheduler=scheduler,
        max_concurrent=count_of("max-concurrent", max_concurrent),
    )  # fmt: skip


def compare_plan(methods: str) -> SweepPlan:
    """A point for each of ``methods``: a method, an optimiser (on its own: ``fedavg``), or METHOD+OPTIMISER."""
    from .spaces import SweepPlan

    def point(word: str) -> dict[str, str]:
        if word in METHODS:
            return {"method": word}
        method, plus, optimiser = word.partition("+")
        if not plus:
            method, optimiser = "fedavg", word
        if method not in METHODS or optimiser not in OPTIMISERS:
            raise RequestError(f"--methods {word}: unknown method; {neighbours(word, {*METHODS, *OPTIMISERS})}")
        return {"method": method, "federation.optimiser": optimiser}

    words = [word.strip() for word in methods.split(",")]
    points = tuple(map(point, words))
    optimisers = [p["federation.optimiser"] for p in points if "federation.optimiser" in p]
    # where each point names its own, narrow widths need not suit the default one
    base = {"federation.optimiser": optimisers[0]} if len(optimisers) == len(points) else {}
    return SweepPlan(summary=f"methods side by side: {', '.join(words)}", points=points, base=base)


def asked_of(space: str | None, words: Mapping[str, Any]) -> Asked:
    """What is asked of a cluster: a sweep of ``space``, or without one a run."""
    from .runtime.cluster_fit import Asked, fit_of_run, fit_of_sweep
    from .sweep_launch import prepare, resources_of

    if space is None:
        config = config_of(**words)
        return Asked([config], lambda nodes, _: fit_of_run(config, nodes))
    sweep = prepare(sweep_request(space, words))
    return Asked(sweep.configs, lambda nodes, storage: fit_of_sweep(resources_of(sweep, nodes, storage)))
