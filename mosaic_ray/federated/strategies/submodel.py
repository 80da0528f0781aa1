"""Strategies that send each client a part of the model: HeteroFL, FedRolex and Federated Dropout."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ...core.seeding import numpy_stream
from ...models.submodel import ChannelIndices, ChannelLayout, num_kept


def _first(size: int, kept: int, round_num: int, address: tuple[int, ...]) -> np.ndarray:
    return np.arange(kept)


def _window(size: int, kept: int, round_num: int, address: tuple[int, ...]) -> np.ndarray:
    return np.sort((round_num + np.arange(kept)) % size)


def _drawn(size: int, kept: int, round_num: int, address: tuple[int, ...]) -> np.ndarray:
    seed, *rest = address
    return np.sort(numpy_stream(seed, "feddropout", round_num, *rest).choice(size, kept, replace=False))


#: optimiser -> (size, kept, round, (seed, client, space)) -> channels, rising
SCHEMES: dict[str, Callable[[int, int, int, tuple[int, ...]], np.ndarray]] = {
    "heterofl": _first,
    "fedrolex": _window,
    "feddropout": _drawn,
}


def channel_indices(
    channels: ChannelLayout, width: float, scheme: str, *, round_num: int, seed: int, client_id: int
) -> ChannelIndices:
    """The channels of each space that a client of ``width`` holds in a round.

    heterofl: the first s (Diao et al. 2021). fedrolex: s neighbours on a ring, from channel ``round_num`` mod n on, so
    the window moves up by one a round (Alam et al. 2022; their code moves it down, which covers the same). feddropout:
    s drawn at random for the round and the client (Caldas et al. 2018).
    """
    return tuple(
        SCHEMES[scheme](size, num_kept(width, size), round_num, (seed, client_id, space))
        for space, size in enumerate(channels.sizes)
    )
