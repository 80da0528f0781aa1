"""Narrow clients: which channels of a network belong together, the part that a client holds, and that part as a model.

A *group* is a run of channels that are kept or dropped together wherever they occur. Residual additions, batch norm,
depthwise convolutions and gates make one group of several layers' channels, as ``channel_flow`` reads off the network's
graph. Image channels and classes are in no group: every client holds them whole. A width r keeps s = ceil(r n) of a
group's n channels, and the federated optimisers differ in which. One set per group rather than per layer keeps both
sides of every residual addition aligned.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from ..core.errors import RequestError
from ..core.types import Weights
from .channel_graph import trace_channels
from .classifiers import Classifier

ModelT = TypeVar("ModelT", bound=nn.Module)

#: What a client holds: for each group the channels that it keeps, int64 [ceil(width * n)], rising.
ChannelIndices = tuple[np.ndarray, ...]


@dataclass(frozen=True)
class ChannelLayout:
    """The groups of a network, numbered from the image to the head, and where its weights have them.

    ``sizes`` counts their channels, ``layers`` names the first layer of each. ``entries`` has, for every entry of the
    state dict, an item for each dimension: None where it is held whole, else (group, block): index i belongs to channel
    i // block. ``heads`` are the entries whose first dimension is the classes.
    """

    sizes: tuple[int, ...]
    layers: tuple[str, ...]
    entries: Mapping[str, tuple[tuple[int, int] | None, ...]]
    heads: tuple[str, ...]

    def num_cut_axes(self, name: str) -> int:
        """How many leading dimensions of an entry include all that a client may hold in part."""
        parted = [axis + 1 for axis, held in enumerate(self.entries[name]) if held is not None]
        return max(*parted, int(name in self.heads), 0)

    def part_index(
        self, name: str, shape: Sequence[int], sets: ChannelIndices | None, classes: np.ndarray | None = None
    ) -> tuple[np.ndarray, ...] | None:
        """Where in the whole entry ``name``, of ``shape``, a client's part of it lies; None: everywhere.

        An open mesh (``np.ix_``) over its first ``num_cut_axes(name)`` dimensions. ``classes`` bool [C] leaves those
        rows of the head.
        """
        cut = self.num_cut_axes(name)
        indices = [np.arange(size) for size in shape[:cut]]
        for axis, held in enumerate(self.entries[name][:cut]):
            if sets is not None and held is not None:
                group, block = held
                indices[axis] = (sets[group][:, None] * block + np.arange(block)).ravel()
        if classes is not None and name in self.heads:
            indices[0] = np.flatnonzero(classes)
        whole = all(len(index) == size for index, size in zip(indices, shape[:cut], strict=True))
        return None if whole else np.ix_(*indices)


def channel_layout(model: nn.Module) -> ChannelLayout:
    """The groups of ``model``, which may be on the meta device; ``RequestError`` where its graph cannot be followed."""
    found, logits = trace_channels(model)
    dims = {name: tuple(dim.find() for dim in entry) for name, entry in found.items()}
    partial = {dim.group for entry in dims.values() for dim in entry if not dim.group.full}
    groups = sorted(partial, key=lambda group: group.depth)
    number = {group: index for index, group in enumerate(groups)}
    entries: dict[str, tuple[tuple[int, int] | None, ...]] = {}
    for name, value in model.state_dict().items():
        held = [(number[dim.group], dim.block) if dim.group in number else None for dim in dims.get(name, ())]
        entries[name] = (*held, *[None] * (value.ndim - len(held)))
    heads = tuple(name for name, entry in dims.items() if entry[0].group is logits.group)
    return ChannelLayout(tuple(s.size for s in groups), tuple(s.layer for s in groups), entries, heads)


# --- the part that a client holds ------------------------------------------------------------------------------------


def num_kept(width: float, size: int) -> int:
    """ceil(width * size), but for the dust of floating point: 0.55 of 100 is 55."""
    return math.ceil(width * size - 1e-9)


def check_width(channels: ChannelLayout, width: float) -> None:
    """``RequestError`` where ``width`` leaves a layer without channels: where width * n rounds to zero."""
    for size, layer in zip(channels.sizes, channels.layers, strict=True):
        if round(width * size) == 0:
            raise RequestError(
                f"federation.widths = {width:g}: of the {size} channels of {layer} it leaves none; take "
                f"{1 / size:g} or more, or a larger model.width"
            )


def extract(weights: Weights, channels: ChannelLayout, sets: ChannelIndices) -> Weights:
    """The part of whole ``weights`` at ``sets``, as fresh arrays."""
    part = {}
    for name, array in weights.items():
        index = channels.part_index(name, array.shape, sets)
        part[name] = np.array(array) if index is None else np.ascontiguousarray(array[index])
    return part


# --- that part as a model --------------------------------------------------------------------------------------------


def fit(model: ModelT, weights: Weights) -> ModelT:
    """In place: ``model``, whole and freshly built, cut to the shapes of ``weights`` and loaded with a copy of them.

    On the CPU, also where the model was built on the meta device. ``ValueError`` unless the names are the same.
    """
    state = model.state_dict()
    if state.keys() != weights.keys():
        raise ValueError(f"weights do not fit: names differ in {sorted(state.keys() ^ weights.keys())[:3]}")
    for prefix, module in model.named_modules():
        for name in [*module._parameters, *module._buffers]:
            entry = f"{prefix}.{name}" if prefix else name
            if entry in state:
                _replace(module, name, torch.from_numpy(np.array(weights[entry])))
        _resize(module)
    if isinstance(model, Classifier):
        model.feature_dim = model.head.in_features
    return model


def _replace(module: nn.Module, name: str, value: Tensor) -> None:
    old = module._parameters.get(name)
    if old is None:
        module._buffers[name] = value
    else:
        if old.dim() == 4 and not old.is_contiguous():  # laid out by pixel, as `channels_last` has it
            value = value.contiguous(memory_format=torch.channels_last)
        module._parameters[name] = nn.Parameter(value, requires_grad=old.requires_grad)


def _resize(module: Any) -> None:
    """A layer's own record of its sizes, after its arrays."""
    if isinstance(module, _ConvNd):
        outputs, inputs = module.weight.shape[:2]
        if module.groups > 1:
            module.groups = module.groups * outputs // module.out_channels
        module.out_channels, module.in_channels = outputs, inputs * module.groups
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, _BatchNorm):
        arrays = (*module._parameters.values(), *module._buffers.values())
        sizes = (len(array) for array in arrays if array is not None and array.ndim)
        module.num_features = next(sizes, module.num_features)
    elif isinstance(module, nn.GroupNorm) and module.affine:
        module.num_groups = module.num_groups * len(module.weight) // module.num_channels
        module.num_channels = len(module.weight)


@contextlib.contextmanager
def scale_activations(model: nn.Module, width: float) -> Iterator[None]:
    """Within the block the outputs of convolutions in training mode are divided by ``width`` (HeteroFL's Scaler).

    A narrow network then passes on activations of the whole one's size. Nothing is done at width 1.
    """

    def scale(module: nn.Module, _: Any, output: Tensor) -> Tensor | None:
        return output / width if module.training else None

    layers = [module for module in model.modules() if isinstance(module, _ConvNd)] if width != 1 else []
    hooks = [layer.register_forward_hook(scale) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
