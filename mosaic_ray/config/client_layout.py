"""Give each client its width, its architecture and its modalities, as the configuration says."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TypeVar

from ..core.errors import RequestError, neighbours
from .fields import shown
from .schema import ExperimentConfig

T = TypeVar("T")


def client_widths(config: ExperimentConfig) -> tuple[float, ...]:
    """Return the width r_k of every client, in (0, 1].

    ``federation.widths`` is a list dealt in turn, or ``rho:R`` (``rho:R:S``): client i = 1..N has
    (1/2) ** min(S, floor(R * i / N)), S = 2 (the rule of the DFRD group's later code, docs/algorithm.md O27).
    """
    widths, clients = config.federation.widths, config.partition.num_clients
    if not isinstance(widths, str):
        return _dealt(widths, clients)
    rule = re.fullmatch(r"rho:(\d+)(?::(\d+))?", widths)
    if rule is None:
        raise RequestError(
            f"federation.widths = {widths}: it takes a list such as [1.0, 0.5], or a rule such as rho:2 or rho:5:4"
        )
    rho, sigma = int(rule[1]), int(rule[2] or 2)
    return tuple(0.5 ** min(sigma, rho * client // clients) for client in range(1, clients + 1))


def client_classifiers(config: ExperimentConfig) -> tuple[str, ...]:
    """Return the architecture of every client, by name."""
    return _dealt(config.model.classifiers or (config.model.classifier,), config.partition.num_clients)


def modality_rule(config: ExperimentConfig) -> tuple[str, float] | None:
    """Return the rule of ``partition.modalities``, "p" or "each", and its number; None for a list.

    ``RequestError`` where it does not parse.
    """
    given = config.partition.modalities
    if not isinstance(given, str):
        return None
    rule = re.fullmatch(r"(p):(\d*\.?\d+)|(each):(\d{1,6})", given)
    name, number = (rule[1] or rule[3], float(rule[2] or rule[4])) if rule else ("", 0.0)
    if not number or (name == "p" and number > 1):
        raise RequestError(
            f"partition.modalities = {given}: it takes a list such as [image+text, image], p:P with 0 < P <= 1, or "
            "each:N with N of 1 or more"
        )
    return name, number


def client_modalities(config: ExperimentConfig, names: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """Return the modalities that every client holds, in the order of ``names``, those of the data set.

    ``partition.modalities`` is a list dealt in turn, of names joined by ``+``; or ``p:P``, by which a client holds each
    modality with probability P (one drawn at random where it would hold none); or ``each:N``, by which it holds N of
    them, drawn without replacement. Draws depend on the seed and the client alone. Without a value clients hold all.

    ``RequestError`` for names that the data set has not, more modalities than it has, a rule that does not parse, and a
    modality that no client holds.
    """
    given, clients, rule = config.partition.modalities, config.partition.num_clients, modality_rule(config)
    what = f"partition.modalities = {shown(given)}"
    if given and len(names) < 2:
        raise RequestError(f"{what}: samples of {config.data.name} have one modality, which every client holds")
    if not given:
        return (tuple(names),) * clients
    if rule is None:
        held = _dealt([_named(entry, names, what) for entry in given], clients)
    else:
        held = tuple(_drawn(config.seed, client, names, rule, what) for client in range(clients))
    if lacking := [name for name in names if not any(name in own for own in held)]:
        other = "add it to the list" if rule is None else "take another seed or rule, or a list"
        raise RequestError(f"{what}: no client holds {lacking[0]}; {other}, or leave it out of data.modalities")
    return held


def _named(entry: str, names: Sequence[str], what: str) -> tuple[str, ...]:
    """Return the modalities of an ``entry`` such as "image+text", in the order of ``names``."""
    words = [word.strip() for word in entry.split("+")]
    for word in words:
        if word not in names:
            raise RequestError(f'{what}: the data set has no modality "{word}"; {neighbours(word, names)}')
    if len(set(words)) < len(words):
        raise RequestError(f"{what}: {entry} names a modality twice")
    return tuple(name for name in names if name in words)


def _drawn(seed: int, client: int, names: Sequence[str], rule: tuple[str, float], what: str) -> tuple[str, ...]:
    from ..core.seeding import numpy_stream  # here: shells complete knobs without numpy

    (kind, number), draws = rule, numpy_stream(seed, "modalities", client)
    if kind == "each":
        if number > len(names):
            raise RequestError(f"{what}: the data set has {len(names)} modalities: {', '.join(names)}")
        chosen = sorted(draws.permutation(len(names))[: int(number)])
    else:
        drawn = draws.random(len(names)) < number
        chosen = [i for i, held in enumerate(drawn) if held] or [int(draws.integers(len(names)))]
    return tuple(names[i] for i in chosen)


def groups(config: ExperimentConfig) -> dict[str, tuple[int, ...]]:
    """Return the clients of each architecture, which are averaged together; architectures as they first appear."""
    found: dict[str, list[int]] = {}
    for client, name in enumerate(client_classifiers(config)):
        found.setdefault(name, []).append(client)
    return {name: tuple(clients) for name, clients in found.items()}


def any_partial_width(config: ExperimentConfig) -> bool:
    """Return whether some client trains only a part of its network."""
    return any(width < 1 for width in client_widths(config))


def _dealt(values: Sequence[T], clients: int) -> tuple[T, ...]:
    return tuple(values[client % len(values)] for client in range(clients))
