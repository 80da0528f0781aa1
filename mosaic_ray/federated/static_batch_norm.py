"""Static batch norm (HeteroFL, Diao et al. 2021; docs/algorithm.md 3.6): statistics of all clients' images.

Running statistics of partial-width clients fit no full network. So each client sends the moments of the inputs of the
global model's batch norms over its own images, and the sums of all clients make the statistics. The network is in
eval mode: a layer's moments depend on the statistics before it, so one pass makes the first layer of a chain exact, and
every further pass the next one. A pass reads only those, and ends behind the last of them.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..core.types import DataFacts, Weights
from ..data.transforms import to_input
from ..models.state_dict import bn_statistics, use_precision
from .local_training import Shard, no_progress

#: Values summed at once: in float64 they stay in a processor's cache, which took a sixth of the time (100x64x32x32).
CACHED = 2**19


class Moments(NamedTuple):
    """Of a batch norm's input: values per channel, their sum and the sum of their squares, both float64 [channels]."""

    count: int  # type: ignore[assignment] # it hides tuple.count, which nothing calls
    total: np.ndarray
    squares: np.ndarray


class _Enough(Exception):
    """Raised when the last layer of a pass has been read."""


def passes(depths: Mapping[str, int], most: int = 0) -> list[list[str]]:
    """Return the layers that each pass reads; ``depths``: the return value of ``norm_depths``.

    Each layer once, when all before it are exact; where ``most`` (0: any number) are fewer passes than that takes, each
    reads all that are not exact yet.
    """
    deepest = max(depths.values(), default=0)
    if most and most < deepest:
        return [[name for name, depth in depths.items() if depth >= done + 1] for done in range(most)]
    return [[name for name, depth in depths.items() if depth == done + 1] for done in range(deepest)]


@torch.no_grad()
def moments(
    model: nn.Module,
    shard: Shard,
    facts: DataFacts,
    precision: str,
    layers: Sequence[str] | None = None,
    chunk: int = 100,
    progress: Callable[[int, int], None] = no_progress,
) -> dict[str, Moments]:
    """Return by layer the moments that ``shard`` adds to ``model``'s batch norms; no augmentation, eval mode.

    ``layers``: these alone; after the first ``chunk`` of images, which shows where the last of them is read, the
    network behind it is spared. ``progress(done, total)`` is called after each chunk.
    """
    layers = list(bn_statistics(model)) if layers is None else layers
    counts = dict.fromkeys(layers, 0)
    sums: dict[str, Tensor] = {}
    reads, wanted = 0, math.inf

    def read(name: str, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        nonlocal reads
        x = inputs[0].flatten(2) if inputs[0].ndim > 2 else inputs[0][:, :, None]  # [batch, channels, places]
        counts[name] += x.shape[0] * x.shape[2]
        for few in x.split(max(1, CACHED // x[0].numel())):
            few = few.double()
            sums[name] = sums.get(name, 0) + torch.stack([few.sum((0, 2)), few.square().sum((0, 2))])
        reads += 1
        if reads == wanted:
            raise _Enough

    hooks = [model.get_submodule(name).register_forward_pre_hook(partial(read, name)) for name in layers]
    model.eval()
    try:
        chunks = torch.arange(len(shard), device=shard.images.device).split(chunk)
        for number, rows in enumerate(chunks, 1):
            reads = 0
            with use_precision(precision, shard.images.device), contextlib.suppress(_Enough):
                model(to_input(shard.images[rows], facts))
            wanted = math.inf if facts.modalities else reads  # not every chunk holds every modality
            progress(number, len(chunks))
    finally:
        for hook in hooks:
            hook.remove()
    return {name: Moments(counts[name], *sums[name].cpu().numpy()) for name in layers if counts[name]}


def pooled(parts: Iterable[Mapping[str, Moments]]) -> Weights:
    """Return the running statistics, float32, over all ``parts``, added in client order.

    The variance is the population's, over n and not torch's n - 1. Batch norm normalises by it when it trains on all
    images at once, and the inversion loss compares with it.
    """
    summed: dict[str, Moments] = {}
    for part in parts:
        for name, found in part.items():
            if old := summed.get(name):
                found = Moments(old.count + found.count, old.total + found.total, old.squares + found.squares)
            summed[name] = found
    buffers: Weights = {}
    for name, (count, total, squares) in summed.items():
        mean = total / count
        buffers[f"{name}.running_mean"] = mean.astype(np.float32)
        buffers[f"{name}.running_var"] = np.maximum(squares / count - mean**2, 0).astype(np.float32)
    return buffers


def with_statistics(weights: Weights, buffers: Weights) -> Weights:
    """Return ``weights`` with the statistics of ``pooled``; nothing is copied."""
    if unknown := buffers.keys() - weights.keys():
        raise ValueError(f"statistics do not fit: the network has no {min(unknown)}")
    return weights | buffers
