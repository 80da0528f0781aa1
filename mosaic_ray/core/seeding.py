"""Random generators that are derived from a seed and an address.

The draws of ``stream(seed, "local", round, client)`` depend only on these arguments, so a client's work gives the same
numbers on any host, in any order, and after a resume.
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
    """Return a 63-bit seed for ``address`` under ``seed``, the first bytes of a SHA-256; equal on every machine."""
    text = json.dumps([int(seed), *[a if isinstance(a, str) else int(a) for a in address]])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def numpy_stream(seed: int, *address: Address) -> np.random.Generator:
    """Return a numpy generator (PCG64) for ``address``."""
    return np.random.Generator(np.random.PCG64(derive(seed, *address)))


def stream(seed: int, *address: Address, device: str = "cpu") -> torch.Generator:
    """Return a torch generator for ``address`` on ``device``; CPU and CUDA draws differ."""
    import torch

    generator = torch.Generator(device=device)
    generator.manual_seed(derive(seed, *address))
    return generator


@contextlib.contextmanager
def seeded(seed: int, *address: Address) -> Iterator[None]:
    """Seed torch's *global* generators for ``address`` inside the block and restore them afterwards.

    Use it for code that takes no generator: module initialisers and dropout.
    """
    import torch

    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(derive(seed, *address))
        yield
