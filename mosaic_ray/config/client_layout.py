"""Give each client its width and its architecture, as the configuration says."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TypeVar

from ..core.errors import RequestError
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
