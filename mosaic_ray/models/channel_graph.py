"""Find the axes of a network's weights that share channels, by propagating channel groups through its graph.

``torch.fx`` traces the graph. Each node is then evaluated once on ``TensorLayout`` values instead of tensors. A layer's
outputs form a new channel group. Where two groups must agree (a residual addition, a gate, a layer that is used twice)
they are merged with union-find. Grouped convolutions, flattened maps and group norm tie *blocks* of neighbouring
channels together.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from torch import fx, nn
from torch.fx.node import map_arg
from torch.nn.modules.batchnorm import _BatchNorm

from ..core.errors import RequestError
from .multimodal import Encoded, Present, Tokens


class ChannelGroup:
    """``size`` channels (or blocks of channels) that are kept or dropped one by one everywhere: a union-find node.

    ``layer`` is the first layer that outputs them, ``depth`` its number counted from the image. ``full``: every client
    holds all of them, as for image channels and classes.
    """

    def __init__(self, size: int, layer: str, depth: int, full: bool = False) -> None:
        self.size, self.layer, self.depth, self.full = size, layer, depth, full
        self.parent: ChannelGroup | None = None
        self.factor = 1  # units of this group in one unit of the parent


@dataclass(frozen=True)
class AxisGroup:
    """The channels along one axis of an array: ``block`` neighbours for each unit of ``group``."""

    group: ChannelGroup
    block: int = 1

    def find(self) -> AxisGroup:
        """Return the same axis in units of the root of its group."""
        group, block = self.group, self.block
        while group.parent is not None:
            group, block = group.parent, block * group.factor
        return AxisGroup(group, block)

    @property
    def size(self) -> int:
        """Return the number of channels along the axis."""
        return self.group.size * self.block

    def split_into_blocks(self, block: int) -> AxisGroup:
        """Merge the units of the group into blocks that hold ``block`` neighbours of this axis, or a multiple."""
        dim = self.find()
        factor = math.lcm(dim.block, block) // dim.block
        if factor > 1:
            old = dim.group
            old.parent, old.factor = ChannelGroup(old.size // factor, old.layer, old.depth, old.full), factor
        return self.find()


def union(left: AxisGroup, right: AxisGroup) -> None:
    """Merge the groups of two axes of equal size: from now on both run over the same channels in the same order."""
    right = right.split_into_blocks(left.find().block)
    left = left.split_into_blocks(right.block)
    first, second = sorted((left.group, right.group), key=lambda group: group.depth)
    if first is not second:
        second.parent = first
        first.full |= second.full


@dataclass(frozen=True)
class TensorLayout:
    """The stand-in for a tensor: its number of dimensions and the channels of axis 1.

    ``unresolved``: the number of neighbours per channel is unknown (positions of a flattened map, image channels) until
    the next layer fixes it.
    """

    dim: AxisGroup
    ndim: int
    unresolved: bool = False

    def resolved(self, size: int) -> TensorLayout:
        """Return the layout with ``size`` channels, as a layer or an addend requires."""
        if not self.unresolved:
            return self
        return replace(self, dim=AxisGroup(self.dim.group, self.dim.block * (size // self.dim.size)), unresolved=False)


@dataclass(frozen=True)
class _AxisSize:
    """The result of ``x.size(axis)``; ``x.size()`` and ``x.shape`` are a tuple of these."""

    layout: TensorLayout
    axis: int


#: Names of functions and methods that do not mix or move channels.
_CHANNELWISE = {
    "abs", "adaptive_avg_pool2d", "adaptive_max_pool2d", "avg_pool2d", "celu", "clamp", "clone", "contiguous",
    "dropout", "dropout2d", "elu", "exp", "float", "gelu", "hardsigmoid", "hardswish", "hardtanh", "interpolate",
    "leaky_relu", "logsigmoid", "max_pool2d", "mish", "neg", "pow", "relu", "relu6", "relu_", "selu", "sigmoid", "silu",
    "softplus", "softsign", "sqrt", "square", "tanh",
}  # fmt: skip
#: Names of elementwise functions and methods of two tensors.
_ELEMENTWISE = {
    "add", "add_", "div", "div_", "iadd", "imul", "isub", "itruediv", "maximum", "minimum", "mul", "mul_", "sub",
    "sub_", "truediv",
}  # fmt: skip
_LAYERS_WITHOUT_WEIGHTS = tuple(
    f"torch.nn.modules.{section}" for section in ("activation", "dropout", "padding", "pooling", "upsampling")
)


def _refuse(why: str) -> NoReturn:
    raise RequestError(
        f"federation.widths: narrow clients need a network that can be traced, and {why}; take width 1.0"
    )


def trace_channels(model: nn.Module) -> tuple[dict[str, tuple[AxisGroup, ...]], AxisGroup]:
    """Return the leading axes of each state-dict entry that has channels, and the axis of the classes.

    Raises ``RequestError`` if the model cannot be traced, shares parameters, or uses an unsupported operation.
    """
    if len(list(model.named_parameters())) != len(list(model.named_parameters(remove_duplicate=False))):
        _refuse("this one has layers that share a parameter")
    propagation = _Propagation()
    # Image channels are never cut, so one unit stands for all of them.
    logits = propagation.run(model, "", _uncut(4))
    logits.dim.find().group.full = True
    return propagation.entries, logits.dim.find()


def _uncut(ndim: int, size: int = 1, unresolved: bool = True) -> TensorLayout:
    """Return the layout of values that every client holds all of: an image, or other data."""
    return TensorLayout(AxisGroup(ChannelGroup(size, "the image", 0, full=True)), ndim, unresolved)


class _Tracer(fx.Tracer):
    """Leaves the parts of a network for several modalities whole: what they do depends on values."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, Encoded | Present | Tokens) or super().is_leaf_module(m, module_qualified_name)


class _Propagation:
    """Evaluate a traced graph on layouts and record the axes of every state-dict entry."""

    def __init__(self) -> None:
        self.entries: dict[str, tuple[AxisGroup, ...]] = {}
        self.depths = itertools.count(1)

    def run(self, model: nn.Module, prefix: str, start: TensorLayout) -> TensorLayout:
        """Return the layout of the outputs of ``model`` for inputs of the layout ``start``.

        ``prefix``: the path of ``model`` in the whole network, with a dot behind it; "" for the network itself.
        """
        try:
            graph = _Tracer().trace(model)
        except Exception as error:  # a user's forward may raise anything on a proxy tensor
            reason = (str(error).splitlines() or [""])[0]
            _refuse(f"this one cannot be traced ({type(error).__name__}: {reason})")
        modules, values = dict(model.named_modules()), dict[fx.Node, Any]()
        for node in graph.nodes:
            args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
            if node.op == "placeholder":
                values[node] = start
            elif node.op != "output":
                values[node] = self.step(node, args, kwargs, modules, prefix)
        (found,) = args  # a graph ends with its output
        if not isinstance(found, TensorLayout):
            _refuse("this one gives more than logits")
        return found

    def step(
        self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any], modules: dict[str, nn.Module], prefix: str
    ) -> Any:
        if node.op == "get_attr":
            _refuse(f"{node.target} is used outside a layer")
        if node.op == "call_module":
            if len(args) != 1 or kwargs or not isinstance(args[0], TensorLayout):
                _refuse(f"{node.target} is called with something else than one tensor")
            return self.layer(f"{prefix}{node.target}", modules[str(node.target)], args[0])
        name = node.target if isinstance(node.target, str) else node.target.__name__
        made = _call(name, args, kwargs)
        if made is None:
            _refuse(f"{node.name} ({name}) is a step that is not understood")
        return made

    def layer(self, name: str, module: nn.Module, x: TensorLayout) -> TensorLayout:
        kind = type(module)
        if isinstance(module, Encoded):
            return self.run(module.encoder, f"{name}.encoder.", _uncut(1 + len(module.modality.shape)))
        if isinstance(module, Present):
            return _uncut(2, unresolved=False)
        if isinstance(module, Tokens):  # every client holds whole embeddings
            return _uncut(3, module.embedding_dim, unresolved=False)
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
            x = x.resolved(module.in_channels)
            if module.groups == 1:
                out = self._new_group(name, module.out_channels)
                self._record(name, module, weight=(out, x.dim), bias=(out,))
            else:  # a group of the convolution is kept or dropped as one
                read = x.dim.split_into_blocks(module.in_channels // module.groups)
                out = AxisGroup(read.group, module.out_channels // read.group.size)
                self._record(name, module, weight=(out,), bias=(out,))
            return TensorLayout(out, x.ndim)
        if type(module) is nn.Linear and x.ndim == 2:
            if module.in_features % x.dim.size:
                _refuse(f"{name} does not read whole maps")
            x = x.resolved(module.in_features)
            out = self._new_group(name, module.out_features)
            self._record(name, module, weight=(out, x.dim), bias=(out,))
            return TensorLayout(out, 2)
        if isinstance(module, _BatchNorm):
            x = x.resolved(module.num_features)
            own = (x.dim,)
            self._record(name, module, weight=own, bias=own, running_mean=own, running_var=own)
            return x
        if type(module) is nn.GroupNorm and module.affine:
            x = x.resolved(module.num_channels)
            own = (x.dim.split_into_blocks(module.num_channels // module.num_groups),)
            self._record(name, module, weight=own, bias=own)
            return x
        if type(module) is nn.Flatten and (module.start_dim, module.end_dim) == (1, -1):
            return replace(x, ndim=2, unresolved=x.unresolved or x.ndim > 2)
        plain = not module.state_dict() and kind is not nn.GLU
        if kind is nn.Identity or (plain and kind.__module__ in _LAYERS_WITHOUT_WEIGHTS):
            return x
        _refuse(f"{name} ({kind.__name__}) is a layer that is not understood")

    def _new_group(self, name: str, size: int) -> AxisGroup:
        return AxisGroup(ChannelGroup(size, name, next(self.depths)))

    def _record(self, name: str, module: nn.Module, **entries: tuple[AxisGroup, ...]) -> None:
        for entry, dims in entries.items():
            if getattr(module, entry) is None:
                continue
            known = self.entries.setdefault(f"{name}.{entry}", dims)
            for left, right in zip(known, dims, strict=True):  # they differ if a layer is used twice
                union(left, right)


def _call(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the layout that function or method ``name`` gives for ``args``; None if it is not supported."""
    others = dict(kwargs)
    first = args[0] if args else others.pop("input", None)
    if name in _ELEMENTWISE:
        return _elementwise(*args) if len(args) == 2 and not kwargs else None
    if isinstance(first, tuple):
        return first[args[1]] if name == "getitem" else None
    if not isinstance(first, TensorLayout):
        return None
    if name in _CHANNELWISE:
        return None if any(isinstance(value, TensorLayout) for value in (*args[1:], *others.values())) else first
    handler = _HANDLERS.get(name)
    try:
        return None if handler is None else handler(first, *args[1:], **others)
    except (TypeError, ValueError):  # arguments that the handler does not support
        return None


def _elementwise(left: Any, right: Any) -> TensorLayout | None:
    """Combine two tensors, or a tensor and a number, elementwise; one channel is broadcast over many."""
    if not isinstance(left, TensorLayout):
        left, right = right, left
    if isinstance(right, int | float):
        return left
    if not isinstance(left, TensorLayout) or not isinstance(right, TensorLayout) or left.ndim != right.ndim:
        return None
    for one, many in ((left, right), (right, left)):
        if many.unresolved and not one.unresolved and one.dim.size == 1 < many.dim.size:
            one.dim.find().group.full = True
            return many
    if left.unresolved != right.unresolved:
        left, right = left.resolved(right.dim.size), right.resolved(left.dim.size)
    for one, many in ((left, right), (right, left)):
        if one.dim.size == 1 != many.dim.size and not one.unresolved:
            one.dim.find().group.full = True
            return many
    if left.dim.size != right.dim.size:
        return None
    union(left.dim, right.dim)
    return left


def _flatten(x: TensorLayout, start_dim: int = 0, end_dim: int = -1) -> TensorLayout | None:
    if start_dim < 1 or end_dim not in (-1, x.ndim - 1):
        return None
    return replace(x, ndim=start_dim + 1, unresolved=x.unresolved or (start_dim == 1 and x.ndim > 2))


def _view(x: TensorLayout, *shape: Any) -> TensorLayout | None:
    """Handle ``view`` and ``reshape`` to [B, -1], or to [B, channels, 1, ...]."""
    batch, second, *rest = shape[0] if len(shape) == 1 else shape
    if not (isinstance(batch, _AxisSize) and batch.axis == 0):
        return None
    if second == -1 and not rest:
        return _flatten(x, 1)
    if not (isinstance(second, _AxisSize) and second.axis == 1 and all(size == 1 for size in rest)):
        return None
    if x.unresolved or second.layout.unresolved or second.layout.dim.size != x.dim.size:
        return None
    union(x.dim, second.layout.dim)
    return replace(x, ndim=2 + len(rest))


def _mean(x: TensorLayout, dim: Any, keepdim: bool = False) -> TensorLayout | None:
    axes = {axis % x.ndim for axis in (dim if isinstance(dim, tuple | list) else (dim,))}
    if min(axes) < 2:
        return None
    return x if keepdim else replace(x, ndim=x.ndim - len(axes))


def _shape(x: TensorLayout) -> tuple[_AxisSize, ...]:
    return tuple(_AxisSize(x, axis) for axis in range(x.ndim))


def _getitem(x: TensorLayout, index: Any) -> TensorLayout | None:
    """Handle indices such as [:, :, None, None] and [:, :, ::2, ::2], which take some of the pixels of each channel."""
    everything = slice(None)
    if not isinstance(index, tuple) or index[:2] != (everything, everything):
        return None
    if not all(part is None or isinstance(part, slice) for part in index[2:]):
        return None
    return replace(x, ndim=x.ndim + index.count(None))


_HANDLERS: dict[str, Callable[..., Any]] = {
    "expand_as": _elementwise,
    "flatten": _flatten,
    "getattr": lambda x, name: _shape(x) if name == "shape" else None,
    "getitem": _getitem,
    "mean": _mean,
    "reshape": _view,
    "size": lambda x, axis=None: _shape(x) if axis is None else _shape(x)[axis],
    "squeeze": lambda x, dim: replace(x, ndim=x.ndim - 1) if dim % x.ndim >= 2 else None,
    "unsqueeze": lambda x, dim: replace(x, ndim=x.ndim + 1) if dim % (x.ndim + 1) >= 2 else None,
    "view": _view,
}
