"""Arrays of convolutions are stored pixel by pixel: the same numbers, sooner."""

from __future__ import annotations

import copy
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import TINY
from torch import nn

from mosaic_ray.config.registry import CLASSIFIERS
from mosaic_ray.config.resolve import override
from mosaic_ray.config.schema import GeneratorConfig, ModelConfig
from mosaic_ray.models.classifiers import build_classifier
from mosaic_ray.models.discriminator import build_discriminator
from mosaic_ray.models.generator import build_generator
from mosaic_ray.models.state_dict import channels_last, load_weights, to_weights
from mosaic_ray.models.submodel import fit


def by_pixel(module: nn.Module) -> list[bool]:
    """Of each array of a convolution with more than one of everything, whether channels lie next to each other."""
    found = [p for p in module.parameters() if p.dim() == 4 and 1 not in p.shape]
    return [not p.is_contiguous() and p.is_contiguous(memory_format=torch.channels_last) for p in found]


def networks() -> dict[str, tuple[nn.Module, torch.Tensor]]:
    torch.manual_seed(0)
    images = torch.randn(4, 3, 32, 32)
    made = {name: (build_classifier(ModelConfig(), 10, 3, 32, name), images) for name in CLASSIFIERS}
    config = GeneratorConfig(ngf=8, ndf=8)
    made["generator"] = build_generator(config, 3, 32), torch.randn(4, config.latent_dim)
    made["discriminator"] = build_discriminator(config, 3, 32), images
    return made


@pytest.mark.parametrize("name", [*CLASSIFIERS, "generator", "discriminator"])
def test_the_layout_changes_no_number_but_by_rounding(name):
    network, inputs = networks()[name]
    assert by_pixel(network) and all(by_pixel(network))
    network = network.double().eval()
    plain = load_weights(networks()[name][0].double().to(memory_format=torch.contiguous_format), to_weights(network))
    outputs = [net.eval()(inputs.double()) for net in (network, plain)]
    for output in outputs:
        output.square().mean().backward()
    torch.testing.assert_close(*outputs, rtol=1e-9, atol=1e-12)
    for ours, theirs in zip(network.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-6, atol=1e-12)


#: Takes gradients in this layout and dies where memory behind a buffer was written to.
BACKWARD = """
import sys
import torch
from mosaic_ray.models.classifiers import build_classifier
from mosaic_ray.models.discriminator import build_discriminator
from mosaic_ray.models.generator import build_generator
from mosaic_ray.config.schema import GeneratorConfig, ModelConfig

torch.set_num_threads(1)
for size in (16, 32, 64):
    images = torch.randn(3, 1, size, size)
    for width in (2, 4, 8):
        for name in ("cnn", "mobilenet", "resnet18", "resnet50"):
            build_classifier(ModelConfig(name, width=width), 10, 1, size, name)(images).square().sum().backward()
    for ngf in (2, 4, 8):
        config = GeneratorConfig(ngf=ngf, ndf=ngf)
        build_generator(config, 1, size)(torch.randn(3, config.latent_dim)).square().sum().backward()
        build_discriminator(config, 1, size)(images).square().sum().backward()
"""


def test_gradients_of_few_channels_stay_in_their_buffers():
    checks = os.environ | {
        "MALLOC_CHECK_": "3",
        "LD_PRELOAD": "libc_malloc_debug.so.0",
    }  # not there: nothing is checked
    done = subprocess.run([sys.executable, "-c", BACKWARD], capture_output=True, text=True, env=checks, check=False)
    assert done.returncode == 0, done.stderr[-500:]


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_no_network_has_a_strided_pointwise_convolution(name):
    convolutions = [part for part in networks()[name][0].modules() if isinstance(part, nn.Conv2d)]
    assert not [part for part in convolutions if part.kernel_size == (1, 1) != part.stride]


@pytest.mark.parametrize("size", [16, 17])
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_a_shortcut_of_every_second_pixel_is_the_strided_one(name, size):
    torch.manual_seed(0)
    network, images = build_classifier(ModelConfig(width=8), 10, 3, size, name).double(), torch.randn(4, 3, size, size)
    strided = copy.deepcopy(network).to(memory_format=torch.contiguous_format)
    for block in strided.modules():
        if getattr(block, "stride", 1) == 2 and hasattr(block, "shortcut"):
            block.stride, block.shortcut[0].stride = 1, (2, 2)
    outputs = [net(images.double()) for net in (network, strided)]
    for output in outputs:
        output.square().sum().backward()
    torch.testing.assert_close(*outputs, rtol=1e-9, atol=1e-12)
    for ours, theirs in zip(network.parameters(), strided.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-6, atol=1e-9)


def test_weights_leave_and_enter_in_rows():
    network = build_classifier(ModelConfig(), 10, 3, 32, "cnn")
    weights = to_weights(network)
    assert all(array.flags.c_contiguous for array in weights.values())
    again = load_weights(build_classifier(ModelConfig(), 10, 3, 32, "cnn"), weights)
    assert all(by_pixel(again))
    for name, array in to_weights(again).items():
        np.testing.assert_array_equal(array, weights[name])


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_narrow_network_is_laid_out_as_the_whole_one_was(device):
    config = ModelConfig(width=16)
    with torch.device(device):
        whole = build_classifier(config, 10, 3, 32, "cnn")
    partial_width = fit(whole, to_weights(build_classifier(override(TINY, {"model.width": 8}).model, 10, 3, 32, "cnn")))
    assert by_pixel(partial_width) and all(by_pixel(partial_width))


def test_a_network_of_the_users_own_keeps_its_layout():
    own = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))
    cut = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))
    assert not any(by_pixel(fit(own, to_weights(cut))))
    assert all(by_pixel(channels_last(cut)))
