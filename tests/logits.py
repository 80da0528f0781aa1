"""Logits that tests of the losses share."""

from __future__ import annotations

import math

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from mosaic_ray.core.seeding import stream

B, C = 6, 5
LOG_C = math.log(C)
batches = arrays(np.float32, (B, C), elements=st.floats(-30, 30, width=32)).map(torch.from_numpy)
few = settings(max_examples=60)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=stream(seed, "test"), dtype=dtype)


def one_hot(*classes: int, scale: float = 1e4) -> Tensor:
    """Logits [len(classes), C] that put all mass on one class."""
    return scale * torch.eye(C)[list(classes)]


def gradient(loss: Tensor, at: Tensor) -> Tensor:
    return torch.autograd.grad(loss, at)[0]


def extremes() -> Tensor:
    values = torch.tensor([1e4, -1e4, 0.0])
    return torch.cartesian_prod(values, values, values)  # [27, 3], with ties and certainties
