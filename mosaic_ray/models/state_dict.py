"""Copy weights between modules and numpy arrays. Arrays are never aliased: they may be shared read-only memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from ..core.types import Weights

ModuleT = TypeVar("ModuleT", bound=nn.Module)


class _Uninitialised(TorchFunctionMode):
    """Leaves tensors as they are where ``torch.nn.init`` would fill them."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # fmt: skip
        named = kwargs or {}
        if getattr(func, "__module__", "") == "torch.nn.init":
            return named["tensor"] if "tensor" in named else args[0]
        return func(*args, **named)


@contextlib.contextmanager
def shapes_only() -> Iterator[None]:
    """Build networks without memory in the block: shapes and types without values.

    Drawing initial values for such tensors would import torch's compiler, which takes seconds.
    """
    with torch.device("meta"), uninitialised():
        yield


def uninitialised() -> contextlib.AbstractContextManager[Any]:
    """Return a context in which networks that load weights anyway are built without drawing initial values."""
    return _Uninitialised()


def to_weights(module: nn.Module) -> Weights:
    """Return the state dict (parameters and buffers) as fresh numpy arrays."""
    return {
        name: value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format).numpy()
        for name, value in module.state_dict().items()
    }


def load_weights(module: ModuleT, weights: Weights) -> ModuleT:
    """Copy ``weights`` into the module in place and return it; ``ValueError`` unless names and shapes are equal."""
    state = module.state_dict()
    if state.keys() != weights.keys():
        raise ValueError(f"weights do not fit: names differ in {sorted(state.keys() ^ weights.keys())[:3]}")
    for name, target in state.items():
        if tuple(target.shape) != np.shape(weights[name]):
            raise ValueError(f"weights do not fit: {name} is {np.shape(weights[name])}, not {tuple(target.shape)}")
    with torch.no_grad():
        for name, target in state.items():
            # Copied by numpy: torch warns about read-only arrays, and an object store's arrays are read-only.
            target.copy_(torch.from_numpy(np.array(weights[name])))
    return module


def bn_statistics(model: nn.Module, weights: Weights | None = None) -> dict[str, tuple[Tensor, Tensor]]:
    """Return running mean and variance, each [channels], of every batch norm of ``model`` by module name.

    ``weights``: state dict of another model of the same architecture to read from, instead of the model's buffers.
    """
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.running_mean is not None and module.running_var is not None:
            mean, var = module.running_mean, module.running_var
            if weights is not None:
                mean = mean.new_tensor(weights[f"{name}.running_mean"])
                var = var.new_tensor(weights[f"{name}.running_var"])
            found[name] = mean, var
    return found


def channels_last(module: ModuleT) -> ModuleT:
    """Convert the module in place to channels-last memory format, in which convolutions are fastest.

    Values and shapes of the state dict do not change; the order of summation does. Not for networks of users: ``view``
    can fail on the output of such a convolution. Not for strided 1x1 convolutions with fewer than 16 input channels: on
    a CPU oneDNN writes their gradient past the end of a buffer in this format (uxlfoundation/oneDNN issue 6035).
    """
    return module.to(memory_format=torch.channels_last)


def freeze(module: ModuleT) -> ModuleT:
    """Set eval mode and disable gradients of all parameters in place (gradients still flow to the input)."""
    return module.eval().requires_grad_(False)


def head_of(weights: Weights) -> tuple[np.ndarray, np.ndarray]:
    """Return a classifier's linear head: V [C, d] and b [C]."""
    return weights["head.weight"], weights["head.bias"]


def use_precision(precision: str, device: str | torch.device) -> contextlib.AbstractContextManager[None]:
    """Return a context of bf16 autocast on ``device``, or a null context for fp32. Resolve ``auto`` beforehand."""
    if precision == "bf16":
        return torch.autocast(torch.device(device).type, dtype=torch.bfloat16)
    if precision == "fp32":
        return contextlib.nullcontext()
    raise ValueError(f"precision {precision!r}: fp32 or bf16")
