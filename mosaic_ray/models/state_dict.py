"""Weights in and out of modules, always by copy: arrays that arrive may be shared memory that others read."""

from __future__ import annotations

import contextlib
from typing import TypeVar

import numpy as np
import torch
from torch import nn

from ..core.types import Weights

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def to_weights(module: nn.Module) -> Weights:
    """The state dict (parameters and buffers) as fresh numpy arrays."""
    return {
        name: value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format).numpy()
        for name, value in module.state_dict().items()
    }


def load_weights(module: ModuleT, weights: Weights) -> ModuleT:
    """``weights`` copied into the module's own storage; ``ValueError`` unless names and shapes are the same."""
    state = module.state_dict()
    if state.keys() != weights.keys():
        raise ValueError(f"weights do not fit: names differ in {sorted(state.keys() ^ weights.keys())[:3]}")
    for name, target in state.items():
        if tuple(target.shape) != np.shape(weights[name]):
            raise ValueError(f"weights do not fit: {name} is {np.shape(weights[name])}, not {tuple(target.shape)}")
    with torch.no_grad():
        for name, target in state.items():
            # The copy is numpy's: torch warns of arrays that it may not write, as those in an object store are.
            target.copy_(torch.from_numpy(np.array(weights[name])))
    return module


def channels_last(module: ModuleT) -> ModuleT:
    """In place: the arrays of convolutions stored pixel by pixel, the layout that they are fastest in.

    Values and the state dict's shapes stay as they are; sums are taken in another order. Not for networks of users:
    ``view`` on what such a convolution gives fails where it would go through otherwise. A network with a strided 1x1
    convolution (the ResNets' shortcuts) is left as it is: on a CPU, with fewer than 16 channels, oneDNN writes its
    gradient past the end of a buffer in this layout (uxlfoundation/oneDNN issue 6035).
    """
    if any(isinstance(part, nn.Conv2d) and part.kernel_size == (1, 1) != part.stride for part in module.modules()):
        return module
    return module.to(memory_format=torch.channels_last)


def freeze(module: ModuleT) -> ModuleT:
    """In place: eval mode, and no parameter asks for gradients (gradients still flow through to the input)."""
    return module.eval().requires_grad_(False)


def head_of(weights: Weights) -> tuple[np.ndarray, np.ndarray]:
    """A classifier's linear head: V [C, d] and b [C]."""
    return weights["head.weight"], weights["head.bias"]


def num_bytes(weights: Weights) -> int:
    """Bytes on the wire."""
    return sum(array.nbytes for array in weights.values())


def use_precision(precision: str, device: str | torch.device) -> contextlib.AbstractContextManager[None]:
    """bf16 autocast on ``device``, or nothing for fp32 (``auto`` has to be resolved before it comes here)."""
    if precision == "bf16":
        return torch.autocast(torch.device(device).type, dtype=torch.bfloat16)
    if precision == "fp32":
        return contextlib.nullcontext()
    raise ValueError(f"precision {precision!r}: fp32 or bf16")
