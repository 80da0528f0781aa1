"""Classifiers: sizes (O6), shapes, gradients, equality with torchvision, traceable graphs."""

from __future__ import annotations

import operator
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
import torchvision
from helpers import FACTS, TINY
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mosaic_ray.config import registry
from mosaic_ray.config.resolve import override
from mosaic_ray.config.schema import ModelConfig
from mosaic_ray.core.errors import RequestError
from mosaic_ray.core.seeding import seeded
from mosaic_ray.models import classifiers
from mosaic_ray.models.classifiers import CLASSIFIERS, build_classifier
from mosaic_ray.models.mobilenet import InvertedResidual
from mosaic_ray.models.state_dict import to_weights
from mosaic_ray.runs.checks import check_models

SIZES = (8, 16, 28, 32, 64)

#: mobilenet's blocks: channels in, hidden and out, in units of the width; stride.
BLOCKS = (
    (1, 1, 1, 1), (1, 4, 2, 2), (2, 8, 2, 1), (2, 8, 3, 2), (3, 12, 3, 1), (3, 12, 4, 2), (4, 16, 4, 1),
)  # fmt: skip


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def gradients_reach_everything(module: nn.Module) -> bool:
    return all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in module.parameters())


@pytest.mark.parametrize("classes, params", [(10, 11_173_962), (100, 11_220_132)])
def test_o6_resnet18_size(classes, params):
    with torch.device("meta"):
        net = build_classifier(ModelConfig(classifier="resnet18", width=64), classes, 3, 32)
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    assert (count(net), len(norms), net.feature_dim, net.head.out_features) == (params, 20, 512, classes)
    shortcuts = [n for n in net.state_dict() if "shortcut.1." in n]
    assert len(shortcuts) == 15  # three shortcut norms of five entries (O22)


def resnet_size(depths: tuple[int, ...], expansion: int, width: int, channels: int, classes: int) -> int:
    """Parameters of a ResNet with the CIFAR stem, added up by hand: k^2 i o a convolution, 2 c a batch norm."""
    total, inputs = 9 * channels * width + 2 * width, width
    for stage, depth in enumerate(depths):
        inner, outer = width << stage, expansion * width << stage
        for first in [True] + [False] * (depth - 1):
            if expansion == 1:
                total += 9 * inputs * inner + 9 * inner * inner + 4 * inner
            else:
                total += inputs * inner + 9 * inner * inner + inner * outer + 4 * inner + 2 * outer
            total += inputs * outer + 2 * outer if first and (stage or inputs != outer) else 0
            inputs = outer
    return total + inputs * classes + classes


def mobilenet_size(width: int, channels: int, classes: int) -> int:
    """Parameters of the light network, block by block."""
    total = 9 * channels * width + 2 * width + 32 * width * width + 16 * width + 8 * width * classes + classes
    for *block, _ in BLOCKS:
        inputs, hidden, outputs = (width * units for units in block)
        total += 9 * hidden + 2 * hidden + hidden * outputs + 2 * outputs
        total += inputs * hidden + 2 * hidden if hidden != inputs else 0
    return total


@pytest.mark.parametrize("classes, width, channels", [(10, 64, 3), (100, 64, 3), (7, 6, 1)])
@pytest.mark.parametrize(
    "name, depths, expansion, known",
    [
        ("resnet18", (2, 2, 2, 2), 1, {10: 11_173_962, 100: 11_220_132}),
        ("resnet34", (3, 4, 6, 3), 1, {10: 21_282_122, 100: 21_328_292}),
        ("resnet50", (3, 4, 6, 3), 4, {10: 23_520_842, 100: 23_705_252}),
    ],
)
def test_o6_resnet_sizes(name, depths, expansion, known, classes, width, channels):
    with torch.device("meta"):
        net = build_classifier(ModelConfig(width=width), classes, channels, 32, name)
    assert count(net) == resnet_size(depths, expansion, width, channels, classes)
    assert count(net) == known.get(classes, count(net)) and net.feature_dim == 8 * width * expansion


@pytest.mark.parametrize(
    "width, channels, classes, known", [(16, 3, 10, 117_930), (64, 3, 10, 1_703_562), (5, 1, 7, 0)]
)
def test_o6_mobilenet_size(width, channels, classes, known):
    with torch.device("meta"):
        net = build_classifier(ModelConfig("mobilenet", width=width), classes, channels, 32)
    assert count(net) == mobilenet_size(width, channels, classes) and count(net) == (known or count(net))


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50"])
def test_resnets_are_torchvisions_with_another_stem(name):
    """Weights copied in order of registration; the same numbers come out."""
    with torch.device("meta"):
        twin = getattr(torchvision.models, name)(num_classes=10)
        twin.conv1, twin.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    net = build_classifier(ModelConfig(name, width=64), 10, 3, 32)
    assert count(net) == count(twin)
    draws = torch.Generator().manual_seed(0)
    for part in net.modules():
        if isinstance(part, nn.BatchNorm2d):  # statistics and affine that are not all ones and zeros
            for value in (part.running_mean, part.running_var, part.weight.data, part.bias.data):
                value.copy_(0.5 + torch.rand(value.shape, generator=draws))
    twin.load_state_dict(dict(zip(twin.state_dict(), net.state_dict().values(), strict=True)), assign=True)
    x = torch.randn(2, 3, 32, 32, generator=draws)
    with torch.no_grad():
        ours, theirs = net.eval()(x), twin.eval()(x)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))


def mobilenet_work(width: int, size: int) -> int:
    """Multiply-adds of the light network for one image of 3 channels and 10 classes, added up by hand."""
    total = 27 * width * size * size
    for inputs, hidden, outputs, stride in BLOCKS:
        total += inputs * hidden * width * width * size * size if hidden != inputs else 0
        size = -(-size // stride)
        total += (9 * hidden * width + hidden * outputs * width * width) * size * size
    return total + 32 * width * width * size * size + 80 * width


def multiply_adds(name: str, width: int, size: int) -> float:
    """Of one image."""
    with torch.device("meta"), FlopCounterMode(display=False) as flops:
        build_classifier(ModelConfig(name, width=width), 10, 3, size).eval()(torch.empty(1, 3, size, size))
    return flops.get_total_flops() / 2


@pytest.mark.parametrize("width, size", [(16, 28), (16, 64), (32, 32)])
def test_mobilenet_is_light(width, size):
    light = multiply_adds("mobilenet", width, size)
    assert light == mobilenet_work(width, size)
    assert light < multiply_adds("resnet18", width, size) / 3 and light < multiply_adds("cnn", width, size)


@pytest.mark.parametrize(
    "name, sums", [("cnn", 0), ("resnet18", 8), ("resnet34", 16), ("resnet50", 16), ("mobilenet", 4)]
)
def test_networks_show_their_graph(name, sums):
    """Widths are derived from plain modules and written sums; nothing depends on the images."""
    net = build_classifier(ModelConfig(name, width=2), 3, 1, 8).eval()
    traced = torch.fx.symbolic_trace(net)
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(traced(x), net(x), rtol=0, atol=0)
    calls = Counter(node.target for node in traced.graph.nodes if node.op == "call_function")
    assert calls.pop(operator.add, 0) == sums
    assert calls.pop(operator.getitem, 0) == 3 * name.startswith("resnet")  # every second pixel: strided shortcuts
    assert set(calls) <= {nn.functional.relu}
    leaves = {type(traced.get_submodule(node.target)) for node in traced.graph.nodes if node.op == "call_module"}
    pools = {nn.MaxPool2d, nn.AdaptiveAvgPool2d, nn.Flatten}
    assert leaves <= {nn.Conv2d, nn.BatchNorm2d, nn.Linear, nn.ReLU, nn.ReLU6} | pools
    assert not [node for node in traced.graph.nodes if node.op == "call_method"]


def test_mobilenets_bottlenecks_are_linear():
    net = build_classifier(ModelConfig("mobilenet", width=2), 3, 1, 8)
    blocks = [part for part in net.trunk if isinstance(part, InvertedResidual)]
    assert len(blocks) == len(BLOCKS) and all(type(block.layers[-1]) is nn.BatchNorm2d for block in blocks)
    assert sum(isinstance(part, nn.ReLU6) for part in net.modules()) == 1 + 1 + 2 * 6 + 1


def test_o26_narrow_resnet18_sizes():
    sizes = [count(build_classifier(ModelConfig("resnet18", width=width), 10, 3, 32)) for width in (32, 16, 8, 4)]
    assert sizes == [2_797_610, 701_466, 176_402, 44_622]


def test_cnn_has_six_convolutions_and_feature_dim_64():
    net = build_classifier(ModelConfig(), 10, 3, 32)
    convs = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
    assert [c.out_channels for c in convs] == [16, 16, 32, 32, 64, 64] and all(c.bias is None for c in convs)
    assert net.feature_dim == 64 and sum(isinstance(m, nn.BatchNorm2d) for m in net.modules()) == 6


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_classifiers_at_every_size(name, size, channels):
    with seeded(0, "init", "classifier"):
        net = build_classifier(ModelConfig(name, width=4), 7, channels, size)
    x = torch.randn(3, channels, size, size, generator=torch.Generator().manual_seed(1))
    features, logits = net.features(x), net(x)
    assert features.shape == (3, net.feature_dim) and isinstance(net.head, nn.Linear)
    torch.testing.assert_close(net.head(features), logits)
    (logits * torch.arange(7)).square().sum().backward()
    assert gradients_reach_everything(net)


def test_every_network_that_is_listed_can_be_built():
    assert list(CLASSIFIERS) == list(registry.CLASSIFIERS)


def test_a_client_may_have_another_network():
    model = ModelConfig("cnn", width=4)
    sizes = {
        name: count(build_classifier(ModelConfig(name, width=4), 3, 1, 8)) for name in ("cnn", "resnet18", "mobilenet")
    }
    assert {name: count(build_classifier(model, 3, 1, 8, name)) for name in sizes} == sizes
    assert len(set(sizes.values())) == 3 and count(build_classifier(model, 3, 1, 8)) == sizes["cnn"]


def test_classifiers_refuse_tiny_images():
    with pytest.raises(RequestError, match=r"data\.image_size = 4: "):
        build_classifier(ModelConfig(), 10, 1, 4)
    for knobs in ({"model.classifier": "resnet50"}, {"model.classifiers": ("cnn", "mobilenet")}):
        check_models(override(TINY, knobs), FACTS)
        with pytest.raises(RequestError, match=r"data\.image_size = 4: classifiers take 8 pixels or more"):
            check_models(override(TINY, knobs), replace(FACTS, image_size=4))


def test_every_network_that_is_named_is_checked(monkeypatch):
    made = []
    monkeypatch.setattr(
        classifiers, "build_classifier", lambda *asked: made.append(build_classifier(*asked)) or made[-1]
    )
    check_models(override(TINY, {"model.classifiers": ("resnet50", "cnn"), "model.width": 3}), FACTS)
    assert [net.feature_dim for net in made] == [12, 96]


def test_initialisation_follows_the_seed():
    def build(seed):
        with seeded(seed, "init", "classifier"):
            return to_weights(build_classifier(ModelConfig(width=4), 10, 1, 8))

    first, again, other = build(0), build(0), build(1)
    assert all(np.array_equal(first[n], again[n]) for n in first)
    assert not np.array_equal(first["head.weight"], other["head.weight"])
