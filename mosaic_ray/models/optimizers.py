"""torch's optimizers, which do not import torch's compiler.

The first step of an optimizer of torch imports ``torch._dynamo``, for two seconds in every process of every client, to
tell the compiler to leave the optimizer alone. Nothing is compiled here. The classes are torch's in all else.
"""

from __future__ import annotations

import inspect
from typing import TypeVar

import torch
from torch.optim import Optimizer

OptimizerT = TypeVar("OptimizerT", bound=Optimizer)

#: Methods of ``Optimizer`` that torch wraps for its compiler, in the versions that have them.
_WRAPPED = ("add_param_group", "zero_grad", "_cuda_graph_capture_health_check")


def without_compiler(base: type[OptimizerT]) -> type[OptimizerT]:
    """Return a subclass of ``base`` without the wrappers that torch puts around its methods for its compiler."""
    methods = {name: inspect.unwrap(getattr(base, name)) for name in _WRAPPED if hasattr(base, name)}
    methods["step"] = torch.no_grad()(inspect.unwrap(base.step))
    return type(base.__name__, (base,), methods | {"__module__": __name__, "__doc__": base.__doc__})


SGD = without_compiler(torch.optim.SGD)
Adam = without_compiler(torch.optim.Adam)
LBFGS = without_compiler(torch.optim.LBFGS)
