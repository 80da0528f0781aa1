"""Sub-models of partial-width clients: channel groups of a network, the part that a client holds, and its model.

A channel group is a set of channels that are kept or dropped together wherever they occur. Residual additions, batch
norm, depthwise convolutions and gates put channels of several layers into one group; ``channel_graph`` derives this
from the network's graph. Image channels and classes are in no group: every client holds all of them. A width r keeps
s = ceil(r n) of a group's n channels; strategies differ in which ones. One index set per group, instead of one per
layer, keeps both sides of every residual addition aligned.
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
from .multimodal import Encoded

ModelT = TypeVar("ModelT", bound=nn.Module)

#: The channels that a client holds of each group: int64 [ceil(width * n)] in ascending order.
ChannelIndices = tuple[np.ndarray, ...]


@dataclass(frozen=True)
class ChannelLayout:
    """The channel groups of a network, numbered from the image to the head, and the axes of its weights.

    ``sizes`` [groups] are the numbers of channels, ``layers`` the names of the first layer of each group. ``entries``
    maps each state-dict entry to one item per axis: None if the axis is never cut, else (group, block), where index i
    belongs to channel i // block. The first axis of the ``heads`` is the classes.
    """

    sizes: tuple[int, ...]
    layers: tuple[str, ...]
    entries: Mapping[str, tuple[tuple[int, int] | None, ...]]
    heads: tuple[str, ...]

    def num_cut_axes(self, name: str) -> int:
        """Return the number of leading axes of an entry up to the last one that can be cut (by channel or class)."""
        cut = [axis + 1 for axis, held in enumerate(self.entries[name]) if held is not None]
        return max(*cut, int(name in self.heads), 0)

    def part_index(
        self, name: str, shape: Sequence[int], sets: ChannelIndices | None, classes: np.ndarray | None = None
    ) -> tuple[np.ndarray, ...] | None:
        """Return the index of a client's part in the full entry ``name`` of ``shape``; None if it is all of it.

        The index is an open mesh (``np.ix_``) over the first ``num_cut_axes(name)`` axes. ``sets`` are the client's
        channels, None for all; ``classes`` bool [C] selects rows of the head.
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
    """Return the layout of ``model`` (meta device allowed); ``RequestError`` if its graph cannot be followed."""
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


def num_kept(width: float, size: int) -> int:
    """Return ceil(width * size), less rounding errors of floating point: 0.55 of 100 is 55."""
    return math.ceil(width * size - 1e-9)


def check_width(channels: ChannelLayout, width: float) -> None:
    """Raise ``RequestError`` if ``width`` leaves a layer without channels, that is if width * n rounds to zero."""
    for size, layer in zip(channels.sizes, channels.layers, strict=True):
        if round(width * size) == 0:
            raise RequestError(
                f"federation.widths = {width:g}: of the {size} channels of {layer} it leaves none; take "
                f"{1 / size:g} or more, or a larger model.width"
            )


def extract(weights: Weights, channels: ChannelLayout, sets: ChannelIndices) -> Weights:
    """Return the part of full ``weights`` at channels ``sets``, as fresh arrays."""
    part = {}
    for name, array in weights.items():
        index = channels.part_index(name, array.shape, sets)
        part[name] = np.array(array) if index is None else np.ascontiguousarray(array[index])
    return part


def fit(model: ModelT, weights: Weights) -> ModelT:
    """Cut a freshly built full ``model`` in place to the shapes of ``weights``, load a copy of them, and return it.

    The result is on the CPU, also if the model was built on the meta device. Raises ``ValueError`` unless the names of
    the entries are equal.
    """
    state = model.state_dict()
    if state.keys() != weights.keys():
        raise ValueError(f"weights do not fit: names differ in {sorted(state.keys() ^ weights.keys())[:3]}")
    for prefix, module in model.named_modules():
        for name in [*module._parameters, *module._buffers]:
            entry = f"{prefix}.{name}" if prefix else name
            if entry not in state:
                continue
            value, old = torch.from_numpy(np.array(weights[entry])), module._parameters.get(name)
            if old is None:
                module._buffers[name] = value
                continue
            if old.dim() == 4 and not old.is_contiguous():  # in channels-last format, see `state_dict.channels_last`
                value = value.contiguous(memory_format=torch.channels_last)
            module._parameters[name] = nn.Parameter(value, requires_grad=old.requires_grad)
        _resize(module)
    if isinstance(model, Classifier):
        model.feature_dim = model.head.in_features
        for part in model.modules():
            if isinstance(part, Encoded):  # narrow ones are not laid side by side
                part.feature_dim = model.feature_dim
    return model


def _resize(module: Any) -> None:
    """Set a layer's size attributes to the shapes of its arrays."""
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
def scale_activations(model: nn.Module, width: float, always: bool = False) -> Iterator[None]:
    """Divide the outputs of convolutions in training mode by ``width`` inside the block (HeteroFL's Scaler).

    The activations of a partial-width network then have the scale of the full network's. No effect at width 1.
    ``always``: in eval mode, too, so that a client's model is used as it was trained.
    """

    def scale(module: nn.Module, _: Any, output: Tensor) -> Tensor | None:
        return output / width if always or module.training else None

    layers = [module for module in model.modules() if isinstance(module, _ConvNd)] if width != 1 else []
    hooks = [layer.register_forward_hook(scale) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
