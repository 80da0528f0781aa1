"""Streams: every random draw has an address.

``stream(seed, "local", round, client)`` names a generator whose numbers depend on nothing but that address, so a
client's work gives the same numbers on any host, in any order, resumed or not.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

Address = int | str


def derive(seed: int, *address: Address) -> int:
    """A 63-bit seed for ``address`` under ``seed``: the head of a SHA-256, equal on every machine."""
    text = json.dumps([int(seed), *[a if isinstance(a, str) else int(a) for a in address]])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def numpy_stream(seed: int, *address: Address) -> np.random.Generator:
    """A numpy generator at ``address``."""
    return np.random.Generator(np.random.PCG64(derive(seed, *address)))


def stream(seed: int, *address: Address, device: str = "cpu") -> torch.Generator:
    """A torch generator at ``address`` (on ``device``; CPU and CUDA streams differ)."""
    import torch

    generator = torch.Generator(device=device)
    generator.manual_seed(derive(seed, *address))
    return generator


@contextlib.contextmanager
def seeded(seed: int, *address: Address) -> Iterator[None]:
    """Torch's *global* stream set to ``address`` inside the block and put back after it.

    For the code that can draw from nowhere else: module initialisers and dropout.
    """
    import torch

    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(derive(seed, *address))
        yield
