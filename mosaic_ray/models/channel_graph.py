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


class Space:
    """Channels that stand or fall together, ``size`` units of them: a node of a union-find.

    ``layer`` made them and is number ``depth`` from the image; ``whole``: everybody has to hold all of them.
    """

    def __init__(self, size: int, layer: str, depth: int, whole: bool = False) -> None:
        self.size, self.layer, self.depth, self.whole = size, layer, depth, whole
        self.parent: Space | None = None
        self.factor = 1  # own units in one of the parent's


@dataclass(frozen=True)
class Dim:
    """A dimension of an array: ``block`` neighbours for each unit of ``space``."""

    space: Space
    block: int = 1

    def settled(self) -> Dim:
        """The same dimension over the root of its space."""
        space, block = self.space, self.block
        while space.parent is not None:
            space, block = space.parent, block * space.factor
        return Dim(space, block)

    @property
    def size(self) -> int:
        """Channels along it."""
        return self.space.size * self.block

    def coarsened(self, block: int) -> Dim:
        """The same dimension, its space in units of as many as ``block`` neighbours here, or a multiple of that."""
        dim = self.settled()
        factor = math.lcm(dim.block, block) // dim.block
        if factor > 1:
            old = dim.space
            old.parent, old.factor = Space(old.size // factor, old.layer, old.depth, old.whole), factor
        return self.settled()


def unite(left: Dim, right: Dim) -> None:
    """From now on both, of one size, run over the same channels in the same order."""
    right = right.coarsened(left.settled().block)
    left = left.coarsened(right.block)
    first, second = sorted((left.space, right.space), key=lambda space: space.depth)
    if first is not second:
        second.parent = first
        first.whole |= second.whole


@dataclass(frozen=True)
class Flow:
    """What stands for a tensor: its number of dimensions and the channels of dimension 1.

    ``open``: an unknown number of neighbours for each channel (the places of a flattened map; the image's channels),
    which the next layer tells.
    """

    dim: Dim
    ndim: int
    open: bool = False

    def closed(self, size: int) -> Flow:
        """With ``size`` channels, which a layer or an addend has told."""
        if not self.open:
            return self
        return replace(self, dim=Dim(self.dim.space, self.dim.block * (size // self.dim.size)), open=False)


@dataclass(frozen=True)
class _Sizes:
    """``x.size()``."""

    flow: Flow

    def at(self, index: int | slice) -> Any:
        axes = range(self.flow.ndim)[index]
        return _Size(self.flow, axes) if isinstance(axes, int) else tuple(_Size(self.flow, axis) for axis in axes)


@dataclass(frozen=True)
class _Size:
    """``x.size(axis)``."""

    flow: Flow
    axis: int


#: Functions and methods that leave channels where they are, by name.
_KEEPING = {
    "abs", "adaptive_avg_pool2d", "adaptive_max_pool2d", "avg_pool2d", "celu", "clamp", "clone", "contiguous",
    "dropout", "dropout2d", "elu", "exp", "float", "gelu", "hardsigmoid", "hardswish", "hardtanh", "interpolate",
    "leaky_relu", "logsigmoid", "max_pool2d", "mish", "neg", "pow", "relu", "relu6", "relu_", "selu", "sigmoid", "silu",
    "softplus", "softsign", "sqrt", "square", "tanh",
}  # fmt: skip
#: Functions and methods of two tensors, element by element.
_BINARY = {
    "add", "add_", "div", "div_", "iadd", "imul", "isub", "itruediv", "maximum", "minimum", "mul", "mul_", "sub",
    "sub_", "truediv",
}  # fmt: skip
_LAYERS_WITHOUT_WEIGHTS = tuple(
    f"torch.nn.modules.{section}" for section in ("activation", "dropout", "padding", "pooling", "upsampling")
)


def refuse(why: str) -> NoReturn:
    """The one line for networks whose channels cannot be followed."""
    raise RequestError(
        f"federation.widths: narrow clients need a network whose channels can be followed, and {why}; take width 1.0"
    )


def follow(model: nn.Module) -> tuple[dict[str, tuple[Dim, ...]], Dim]:
    """For each entry of the state dict that has channels its leading dimensions, and the dimension of the classes.

    ``RequestError`` where a step is not understood.
    """
    if len(list(model.named_parameters())) != len(list(model.named_parameters(remove_duplicate=False))):
        refuse("this one has layers that share a parameter")
    try:
        graph = fx.Tracer().trace(model)
    except Exception as error:  # whatever a user's forward does with a stand-in for a tensor
        reason = (str(error).splitlines() or [""])[0]
        refuse(f"this one cannot be traced ({type(error).__name__}: {reason})")
    return _Follower(model).run(graph)


class _Follower:
    def __init__(self, model: nn.Module) -> None:
        self.modules = dict(model.named_modules())
        self.dims: dict[str, tuple[Dim, ...]] = {}
        self.depths = itertools.count(1)

    def run(self, graph: fx.Graph) -> tuple[dict[str, tuple[Dim, ...]], Dim]:
        values: dict[fx.Node, Any] = {}
        for node in graph.nodes:
            args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
            if node.op == "output":
                if not isinstance(args[0], Flow):
                    refuse("this one gives more than logits")
                args[0].dim.settled().space.whole = True
                return self.dims, args[0].dim.settled()
            values[node] = self.step(node, args, kwargs)
        raise AssertionError("a graph ends with its output")

    def step(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if node.op == "placeholder":
            # One unit whatever their number: image channels are held whole.
            return Flow(Dim(Space(1, "the image", 0, whole=True)), 4, open=True)
        if node.op == "get_attr":
            refuse(f"{node.target} is used outside a layer")
        if node.op == "call_module":
            if len(args) != 1 or kwargs or not isinstance(args[0], Flow):
                refuse(f"{node.target} is called with something else than one tensor")
            return self.layer(str(node.target), self.modules[str(node.target)], args[0])
        name = node.target if isinstance(node.target, str) else node.target.__name__
        made = _call(name, args, kwargs)
        if made is None:
            refuse(f"{node.name} ({name}) is a step that is not understood")
        return made

    # --- layers ------------------------------------------------------------------------------------------------------

    def layer(self, name: str, module: nn.Module, x: Flow) -> Flow:
        kind = type(module)
        if kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
            return self.convolution(name, module, x.closed(module.in_channels))
        if kind is nn.Linear and x.ndim == 2:
            if module.in_features % x.dim.size:
                refuse(f"{name} does not read whole maps")
            x = x.closed(module.in_features)
            out = self.made_by(name, module.out_features)
            self.remember(name, module, weight=(out, x.dim), bias=(out,))
            return Flow(out, 2)
        if isinstance(module, _BatchNorm):
            x = x.closed(module.num_features)
            own = (x.dim,)
            self.remember(name, module, weight=own, bias=own, running_mean=own, running_var=own)
            return x
        if kind is nn.GroupNorm and module.affine:
            x = x.closed(module.num_channels)
            own = (x.dim.coarsened(module.num_channels // module.num_groups),)
            self.remember(name, module, weight=own, bias=own)
            return x
        if kind is nn.Flatten and (module.start_dim, module.end_dim) == (1, -1):
            return replace(x, ndim=2, open=x.open or x.ndim > 2)
        plain = not module.state_dict() and kind is not nn.GLU
        if kind is nn.Identity or (plain and kind.__module__ in _LAYERS_WITHOUT_WEIGHTS):
            return x
        refuse(f"{name} ({kind.__name__}) is a layer that is not understood")

    def convolution(self, name: str, module: Any, x: Flow) -> Flow:
        if module.groups == 1:
            out = self.made_by(name, module.out_channels)
            self.remember(name, module, weight=(out, x.dim), bias=(out,))
        else:
            read = x.dim.coarsened(module.in_channels // module.groups)  # each group stands or falls as one
            out = Dim(read.space, module.out_channels // read.space.size)
            self.remember(name, module, weight=(out,), bias=(out,))
        return Flow(out, x.ndim)

    def made_by(self, name: str, size: int) -> Dim:
        return Dim(Space(size, name, next(self.depths)))

    def remember(self, name: str, module: nn.Module, **entries: tuple[Dim, ...]) -> None:
        for entry, dims in entries.items():
            if getattr(module, entry) is None:
                continue
            known = self.dims.setdefault(f"{name}.{entry}", dims)
            for left, right in zip(known, dims, strict=True):  # a layer that is used twice
                unite(left, right)


# --- functions and methods -------------------------------------------------------------------------------------------


def _call(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a function or method makes of its arguments, a tensor first; None where it is not understood."""
    others = dict(kwargs)
    first = args[0] if args else others.pop("input", None)
    if name in _BINARY:
        return _joined(*args) if len(args) == 2 and not kwargs else None
    if isinstance(first, _Sizes):
        return first.at(args[1]) if name == "getitem" else None
    if not isinstance(first, Flow):
        return None
    if name in _KEEPING:
        return None if any(isinstance(value, Flow) for value in (*args[1:], *others.values())) else first
    handler = _HANDLERS.get(name)
    try:
        return None if handler is None else handler(first, *args[1:], **others)
    except (TypeError, ValueError):  # arguments that the handler does not know
        return None


def _joined(left: Any, right: Any) -> Flow | None:
    """``left`` and ``right`` element by element; one channel, or a number, goes with many."""
    if not isinstance(left, Flow):
        left, right = right, left
    if isinstance(right, int | float):
        return left
    if not isinstance(left, Flow) or not isinstance(right, Flow) or left.ndim != right.ndim:
        return None
    if left.open != right.open:
        left, right = left.closed(right.dim.size), right.closed(left.dim.size)
    for one, many in ((left, right), (right, left)):
        if one.dim.size == 1 != many.dim.size and not one.open:
            one.dim.settled().space.whole = True
            return many
    if left.dim.size != right.dim.size:
        return None
    unite(left.dim, right.dim)
    return left


def _flattened(x: Flow, start_dim: int = 0, end_dim: int = -1) -> Flow | None:
    if start_dim < 1 or end_dim not in (-1, x.ndim - 1):
        return None
    return replace(x, ndim=start_dim + 1, open=x.open or (start_dim == 1 and x.ndim > 2))


def _viewed(x: Flow, *shape: Any) -> Flow | None:
    """[B, -1], or [B, channels] and ones."""
    batch, second, *rest = shape[0] if len(shape) == 1 else shape
    if not (isinstance(batch, _Size) and batch.axis == 0):
        return None
    if second == -1 and not rest:
        return _flattened(x, 1)
    if not (isinstance(second, _Size) and second.axis == 1 and all(size == 1 for size in rest)):
        return None
    if x.open or second.flow.open or second.flow.dim.size != x.dim.size:
        return None
    unite(x.dim, second.flow.dim)
    return replace(x, ndim=2 + len(rest))


def _averaged(x: Flow, dim: Any, keepdim: bool = False) -> Flow | None:
    axes = {axis % x.ndim for axis in (dim if isinstance(dim, tuple | list) else (dim,))}
    if min(axes) < 2:
        return None
    return x if keepdim else replace(x, ndim=x.ndim - len(axes))


def _squeezed(x: Flow, dim: int) -> Flow | None:
    return replace(x, ndim=x.ndim - 1) if dim % x.ndim >= 2 else None


def _unsqueezed(x: Flow, dim: int) -> Flow | None:
    return replace(x, ndim=x.ndim + 1) if dim % (x.ndim + 1) >= 2 else None


def _item(x: Flow, index: Any) -> Flow | None:
    """[:, :, None, None] and the like."""
    everything = slice(None)
    if not isinstance(index, tuple) or index[:2] != (everything, everything):
        return None
    if not all(part is None or part == everything for part in index[2:]):
        return None
    return replace(x, ndim=x.ndim + index.count(None))


_HANDLERS: dict[str, Callable[..., Any]] = {
    "expand_as": _joined,
    "flatten": _flattened,
    "getattr": lambda x, name: _Sizes(x) if name == "shape" else None,
    "getitem": _item,
    "mean": _averaged,
    "reshape": _viewed,
    "size": lambda x, axis=None: _Sizes(x) if axis is None else _Sizes(x).at(axis),
    "squeeze": _squeezed,
    "unsqueeze": _unsqueezed,
    "view": _viewed,
}
