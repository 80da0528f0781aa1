"""Strategies that send each client a part of the model: HeteroFL, FedRolex and Federated Dropout.

A client of width r gets s = ceil(r n) of the n channels of each group of channels. Every coordinate of the model is
averaged over the clients that held it (docs/algorithm.md 3.5 to 3.7).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ...core.about import About, Paper
from ...core.seeding import numpy_stream
from .base import Strategy

if TYPE_CHECKING:
    from ...models.submodel import ChannelIndices, ChannelLayout


class Submodel(Strategy):
    """Send each client some channels of every group; subclasses choose which."""

    partial_widths = True

    def channel_indices(
        self, channels: ChannelLayout, width: float, *, round_num: int, seed: int, client_id: int
    ) -> ChannelIndices:
        from ...models.submodel import num_kept

        return tuple(
            self.choose(size, num_kept(width, size), round_num, (seed, client_id, group))
            for group, size in enumerate(channels.sizes)
        )

    def choose(self, size: int, kept: int, round_num: int, address: tuple[int, int, int]) -> np.ndarray:
        """Return ``kept`` of ``size`` channels, rising; ``address``: (seed, client, group) of a random draw."""
        raise NotImplementedError


class HeteroFL(Submodel):
    """The first channels, in every round.

    Diao, Ding and Tarokh, "HeteroFL: Computation and Communication Efficient Federated Learning for Heterogeneous
    Clients", ICLR 2021.
    """

    name = "heterofl"
    about = About(
        papers=(Paper(
            "diao2021heterofl",
            "HeteroFL: Computation and Communication Efficient Federated Learning for Heterogeneous Clients", "ICLR",
            2021, "Enmao Diao, Jie Ding, Vahid Tarokh", arxiv="2010.01264",
        ),),
    )  # fmt: skip

    def choose(self, size: int, kept: int, round_num: int, address: tuple[int, int, int]) -> np.ndarray:
        return np.arange(kept)


class FedRolex(Submodel):
    """Neighbouring channels on a ring: the window begins at channel ``round_num`` mod n, so it moves by one a round.

    Alam, Liu, Yan and Zhang, "FedRolex: Model-Heterogeneous Federated Learning with Rolling Sub-Model Extraction",
    NeurIPS 2022. Their code moves the window down, which covers the same channels.
    """

    name = "fedrolex"
    about = About(
        papers=(Paper(
            "alam2022fedrolex", "FedRolex: Model-Heterogeneous Federated Learning with Rolling Sub-Model Extraction",
            "NeurIPS", 2022, "Samiul Alam, Luyang Liu, Ming Yan, Mi Zhang", arxiv="2212.01548",
        ),),
    )  # fmt: skip

    def choose(self, size: int, kept: int, round_num: int, address: tuple[int, int, int]) -> np.ndarray:
        return np.sort((round_num + np.arange(kept)) % size)


class FedDropout(Submodel):
    """ChannelLayout drawn at random for every round and client.

    Caldas, Konečný, McMahan and Talwalkar, "Expanding the Reach of Federated Learning by Reducing Client Resource
    Requirements", 2018 (arXiv 1812.07210).
    """

    name = "feddropout"
    about = About(
        papers=(Paper(
            "caldas2018expanding", "Expanding the Reach of Federated Learning by Reducing Client Resource Requirements",
            "", 2018, "Sebastian Caldas, Jakub Konečný, H. Brendan McMahan, Ameet Talwalkar", arxiv="1812.07210",
        ),),
    )  # fmt: skip

    def choose(self, size: int, kept: int, round_num: int, address: tuple[int, int, int]) -> np.ndarray:
        seed, *rest = address
        return np.sort(numpy_stream(seed, "feddropout", round_num, *rest).choice(size, kept, replace=False))


HETEROFL, FEDROLEX, FEDDROPOUT = HeteroFL(), FedRolex(), FedDropout()
