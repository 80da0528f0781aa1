"""Which dimensions of a network's weights run over the same channels, read off its graph (``torch.fx``).

The graph is walked once with channels in place of tensors. A layer's outputs are new channels; where the graph needs
two runs of channels to agree (a residual addition, a gate, a layer that is used twice) they are united. A grouped
convolution, a flattened map and group norm tie *blocks* of neighbouring channels together.
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


class ChannelGroup:
    """Channels that stand or fall together, ``size`` units of them: a node of a union-find.

    ``layer`` made them and is number ``depth`` from the image; ``full``: everybody has to hold all of them.
    """

    def __init__(self, size: int, layer: str, depth: int, full: bool = False) -> None:
        self.size, self.layer, self.depth, self.full = size, layer, depth, full
        self.parent: ChannelGroup | None = None
        self.factor = 1  # own units in one of the parent's


@dataclass(frozen=True)
class AxisGroup:
    """A dimension of an array: ``block`` neighbours for each unit of ``group``."""

    group: ChannelGroup
    block: int = 1

    def find(self) -> AxisGroup:
        """The same dimension over the root of its group."""
        group, block = self.group, self.block
        while group.parent is not None:
            group, block = group.parent, block * group.factor
        return AxisGroup(group, block)

    @property
    def size(self) -> int:
        """Channels along it."""
        return self.group.size * self.block

    def split_into_blocks(self, block: int) -> AxisGroup:
        """The same dimension, its group in units of as many as ``block`` neighbours here, or a multiple of that."""
        dim = self.find()
        factor = math.lcm(dim.block, block) // dim.block
        if factor > 1:
            old = dim.group
            old.parent, old.factor = ChannelGroup(old.size // factor, old.layer, old.depth, old.full), factor
        return self.find()


def union(left: AxisGroup, right: AxisGroup) -> None:
    """From now on both, of one size, run over the same channels in the same order."""
    right = right.split_into_blocks(left.find().block)
    left = left.split_into_blocks(right.block)
    first, second = sorted((left.group, right.group), key=lambda group: group.depth)
    if first is not second:
        second.parent = first
        first.full |= second.full


@dataclass(frozen=True)
class TensorLayout:
    """What stands for a tensor: its number of dimensions and the channels of dimension 1.

    ``unresolved``: an unknown number of neighbours for each channel (positions of a flattened map, image channels),
    which the next layer tells.
    """

    dim: AxisGroup
    ndim: int
    unresolved: bool = False

    def resolved(self, size: int) -> TensorLayout:
        """With ``size`` channels, which a layer or an addend has told."""
        if not self.unresolved:
            return self
        return replace(self, dim=AxisGroup(self.dim.group, self.dim.block * (size // self.dim.size)), unresolved=False)


@dataclass(frozen=True)
class _Shape:
    """``x.size()``."""

    layout: TensorLayout

    def at(self, index: int | slice) -> Any:
        axes = range(self.layout.ndim)[index]
        if isinstance(axes, int):
            return _AxisSize(self.layout, axes)
        return tuple(_AxisSize(self.layout, axis) for axis in axes)


@dataclass(frozen=True)
class _AxisSize:
    """``x.size(axis)``."""

    layout: TensorLayout
    axis: int


#: Functions and methods that leave channels where they are, by name.
_CHANNELWISE = {
    "abs", "adaptive_avg_pool2d", "adaptive_max_pool2d", "avg_pool2d", "celu", "clamp", "clone", "contiguous",
    "dropout", "dropout2d", "elu", "exp", "float", "gelu", "hardsigmoid", "hardswish", "hardtanh", "interpolate",
    "leaky_relu", "logsigmoid", "max_pool2d", "mish", "neg", "pow", "relu", "relu6", "relu_", "selu", "sigmoid", "silu",
    "softplus", "softsign", "sqrt", "square", "tanh",
}  # fmt: skip
#: Functions and methods of two tensors, element by element.
_ELEMENTWISE = {
    "add", "add_", "div", "div_", "iadd", "imul", "isub", "itruediv", "maximum", "minimum", "mul", "mul_", "sub",
    "sub_", "truediv",
}  # fmt: skip
_LAYERS_WITHOUT_WEIGHTS = tuple(
    f"torch.nn.modules.{section}" for section in ("activation", "dropout", "padding", "pooling", "upsampling")
)


def _refuse(why: str) -> NoReturn:
    """The one line for networks whose channels cannot be followed."""
    raise RequestError(
        f"federation.widths: narrow clients need a network whose channels can be followed, and {why}; take width 1.0"
    )


def trace_channels(model: nn.Module) -> tuple[dict[str, tuple[AxisGroup, ...]], AxisGroup]:
    """For each entry of the state dict that has channels its leading dimensions, and the dimension of the classes.

    ``RequestError`` where a step is not understood.
    """
    if len(list(model.named_parameters())) != len(list(model.named_parameters(remove_duplicate=False))):
        _refuse("this one has layers that share a parameter")
    try:
        graph = fx.Tracer().trace(model)
    except Exception as error:  # whatever a user's forward does with a stand-in for a tensor
        reason = (str(error).splitlines() or [""])[0]
        _refuse(f"this one cannot be traced ({type(error).__name__}: {reason})")
    return _Propagation(model).run(graph)


class _Propagation:
    def __init__(self, model: nn.Module) -> None:
        self.modules = dict(model.named_modules())
        self.entries: dict[str, tuple[AxisGroup, ...]] = {}
        self.depths = itertools.count(1)

    def run(self, graph: fx.Graph) -> tuple[dict[str, tuple[AxisGroup, ...]], AxisGroup]:
        values: dict[fx.Node, Any] = {}
        for node in graph.nodes:
            args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
            if node.op == "output":
                if not isinstance(args[0], TensorLayout):
                    _refuse("this one gives more than logits")
                args[0].dim.find().group.full = True
                return self.entries, args[0].dim.find()
            values[node] = self.step(node, args, kwargs)
        raise AssertionError("a graph ends with its output")

    def step(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if node.op == "placeholder":
            # One unit whatever their number: image channels are held whole.
            return TensorLayout(AxisGroup(ChannelGroup(1, "the image", 0, full=True)), 4, unresolved=True)
        if node.op == "get_attr":
            _refuse(f"{node.target} is used outside a layer")
        if node.op == "call_module":
            if len(args) != 1 or kwargs or not isinstance(args[0], TensorLayout):
                _refuse(f"{node.target} is called with something else than one tensor")
            return self.layer(str(node.target), self.modules[str(node.target)], args[0])
        name = node.target if isinstance(node.target, str) else node.target.__name__
        made = _call(name, args, kwargs)
        if made is None:
            _refuse(f"{node.name} ({name}) is a step that is not understood")
        return made

    # --- layers ------------------------------------------------------------------------------------------------------

    def layer(self, name: str, module: nn.Module, x: TensorLayout) -> TensorLayout:
        kind = type(module)
        if kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
            return self.convolution(name, module, x.resolved(module.in_channels))
        if kind is nn.Linear and x.ndim == 2:
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
        if kind is nn.GroupNorm and module.affine:
            x = x.resolved(module.num_channels)
            own = (x.dim.split_into_blocks(module.num_channels // module.num_groups),)
            self._record(name, module, weight=own, bias=own)
            return x
        if kind is nn.Flatten and (module.start_dim, module.end_dim) == (1, -1):
            return replace(x, ndim=2, unresolved=x.unresolved or x.ndim > 2)
        plain = not module.state_dict() and kind is not nn.GLU
        if kind is nn.Identity or (plain and kind.__module__ in _LAYERS_WITHOUT_WEIGHTS):
            return x
        _refuse(f"{name} ({kind.__name__}) is a layer that is not understood")

    def convolution(self, name: str, module: Any, x: TensorLayout) -> TensorLayout:
        if module.groups == 1:
            out = self._new_group(name, module.out_channels)
            self._record(name, module, weight=(out, x.dim), bias=(out,))
        else:
            read = x.dim.split_into_blocks(module.in_channels // module.groups)  # each group stands or falls as one
            out = AxisGroup(read.group, module.out_channels // read.group.size)
            self._record(name, module, weight=(out,), bias=(out,))
        return TensorLayout(out, x.ndim)

    def _new_group(self, name: str, size: int) -> AxisGroup:
        return AxisGroup(ChannelGroup(size, name, next(self.depths)))

    def _record(self, name: str, module: nn.Module, **entries: tuple[AxisGroup, ...]) -> None:
        for entry, dims in entries.items():
            if getattr(module, entry) is None:
                continue
            known = self.entries.setdefault(f"{name}.{entry}", dims)
            for left, right in zip(known, dims, strict=True):  # a layer that is used twice
                union(left, right)


# --- functions and methods -------------------------------------------------------------------------------------------


def _call(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a function or method makes of its arguments, a tensor first; None where it is not understood."""
    others = dict(kwargs)
    first = args[0] if args else others.pop("input", None)
    if name in _ELEMENTWISE:
        return _elementwise(*args) if len(args) == 2 and not kwargs else None
    if isinstance(first, _Shape):
        return first.at(args[1]) if name == "getitem" else None
    if not isinstance(first, TensorLayout):
        return None
    if name in _CHANNELWISE:
        return None if any(isinstance(value, TensorLayout) for value in (*args[1:], *others.values())) else first
    handler = _HANDLERS.get(name)
    try:
        return None if handler is None else handler(first, *args[1:], **others)
    except (TypeError, ValueError):  # arguments that the handler does not know
        return None


def _elementwise(left: Any, right: Any) -> TensorLayout | None:
    """``left`` and ``right`` element by element; one channel, or a number, goes with many."""
    if not isinstance(left, TensorLayout):
        left, right = right, left
    if isinstance(right, int | float):
        return left
    if not isinstance(left, TensorLayout) or not isinstance(right, TensorLayout) or left.ndim != right.ndim:
        return None
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
    """[B, -1], or [B, channels] and ones."""
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


def _squeeze(x: TensorLayout, dim: int) -> TensorLayout | None:
    return replace(x, ndim=x.ndim - 1) if dim % x.ndim >= 2 else None


def _unsqueeze(x: TensorLayout, dim: int) -> TensorLayout | None:
    return replace(x, ndim=x.ndim + 1) if dim % (x.ndim + 1) >= 2 else None


def _getitem(x: TensorLayout, index: Any) -> TensorLayout | None:
    """[:, :, None, None] and the like."""
    everything = slice(None)
    if not isinstance(index, tuple) or index[:2] != (everything, everything):
        return None
    if not all(part is None or part == everything for part in index[2:]):
        return None
    return replace(x, ndim=x.ndim + index.count(None))


_HANDLERS: dict[str, Callable[..., Any]] = {
    "expand_as": _elementwise,
    "flatten": _flatten,
    "getattr": lambda x, name: _Shape(x) if name == "shape" else None,
    "getitem": _getitem,
    "mean": _mean,
    "reshape": _view,
    "size": lambda x, axis=None: _Shape(x) if axis is None else _Shape(x).at(axis),
    "squeeze": _squeeze,
    "unsqueeze": _unsqueeze,
    "view": _view,
}
