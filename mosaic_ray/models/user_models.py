"""Load networks that users define: ``model.classifier = my_lab.nets:build``.

``build(num_classes, channels, image_size, width)`` is called with these names and returns an ``nn.Module`` that maps
images [B, channels, H, W] to logits [B, num_classes], with an ``nn.Linear`` as its last step (no softmax after it):

    def build(num_classes, channels, image_size, width):
        return nn.Sequential(nn.Conv2d(channels, width, 3), nn.BatchNorm2d(width), nn.ReLU(),
                             nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes))

Every process imports the function by its name. Ray passes the working directory of the command to its workers; on a
cluster of several machines the module must exist there too, or be installed.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..config.user_code import load_object, users_code
from ..core.errors import RequestError
from ..core.seeding import seeded

#: Batch size of the forward pass that finds the head; batch norm cannot train on one image.
NUM_TRIED = 2


def user_network(name: str, **asked: int) -> tuple[nn.Module, nn.Linear]:
    """Build a fresh network with function ``name`` and arguments ``asked``; returns its trunk and its head."""
    return _split(_built(name, **asked), _head_path(name, **asked))


def _built(name: str, **asked: int) -> nn.Module:
    what = f"model.classifier = {name}"
    build = load_object(what, name, function=True)
    with users_code(what):
        made = build(**asked)
    if not isinstance(made, nn.Module):
        function = name.rpartition(":")[2]
        raise RequestError(f"{what}: {function}() returned {type(made).__name__}, not a torch.nn.Module")
    return made


def _split(network: nn.Module, path: str) -> tuple[nn.Module, nn.Linear]:
    """Replace the linear layer at ``path`` by the identity in place; returns the network and that layer."""
    head = network.get_submodule(path)
    assert isinstance(head, nn.Linear)
    for alias, module in list(network.named_modules(remove_duplicate=False)):
        if module is head:
            network.set_submodule(alias, nn.Identity())
    return network, head


@functools.cache
def _head_path(name: str, **asked: int) -> str:
    """Return the module path of the head: the ``nn.Linear`` that gives the output, found by a forward pass.

    Raises ``RequestError`` if there is none, or if the network fails on images of this shape.
    """
    what, shape = f"model.classifier = {name}", (NUM_TRIED, asked["num_classes"])
    with seeded(0, "user network"), torch.no_grad():
        network = _built(name, **asked)
        if any(map(is_lazy, (*network.parameters(), *network.buffers()))):
            raise RequestError(f"{what}: it has lazy layers; give them their sizes")
        images = torch.randn(NUM_TRIED, asked["channels"], asked["image_size"], asked["image_size"])
        outputs: dict[str, Any] = {}
        for path, module in network.named_modules():
            if isinstance(module, nn.Linear):
                module.register_forward_hook(lambda _, inputs, output, path=path: outputs.update({path: output}))
        with users_code(what):
            made = [network.train()(images), network.eval()(images)]
        for logits in made:
            if not isinstance(logits, Tensor) or logits.shape != shape:
                shown = list(logits.shape) if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
                raise RequestError(f"{what}: images {list(images.shape)} give {shown}, not logits {list(shape)}")
        found = next((path for path, output in outputs.items() if output is logits), None)
        if found is None:
            raise RequestError(
                f"{what}: its last step is not an nn.Linear to {shape[1]} classes; end it with one, without a softmax"
            )
        trunk, head = _split(network, found)
        if set(head.state_dict()) != {"weight", "bias"}:
            raise RequestError(f"{what}: its last nn.Linear needs a plain weight and a bias")
        with users_code(what):
            features = trunk(images)
        if features.shape != (NUM_TRIED, head.in_features) or not torch.allclose(head(features), logits):
            raise RequestError(f"{what}: its last nn.Linear is at work elsewhere in it too; give it one of its own")
    return found
