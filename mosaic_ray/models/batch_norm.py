"""Read the running statistics of a network's batch norms."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..core.types import Weights


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
