"""Channel groups of many kinds of networks (O25), and networks that are refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mosaic_ray.config.plugins import load
from mosaic_ray.core.errors import RequestError
from mosaic_ray.models.classifiers import Classifier
from mosaic_ray.models.state_dict import to_weights
from mosaic_ray.models.submodel import channel_layout, extract, fit


class Stem(nn.Module):
    """A convolution to 8 channels, then a subclass's layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.parts()

    def parts(self) -> None: ...

    def forward(self, x):
        return self.then(F.relu(self.stem(x)))


class Gate(Stem):
    """Squeeze and excitation (Hu et al. 2018), by linear layers."""

    def parts(self):
        self.down, self.up = nn.Linear(8, 4), nn.Linear(4, 8)

    def then(self, x):
        b, c, _, _ = x.size()
        gate = F.adaptive_avg_pool2d(x, 1).view(b, c)
        gate = torch.sigmoid(self.up(F.relu(self.down(gate)))).view(b, c, 1, 1)
        return (x * gate.expand_as(x)).mean((2, 3))


class ConvGate(Stem):
    """The same by convolutions, and a gate over places beside it."""

    def parts(self):
        self.down, self.up, self.place = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1), nn.Conv2d(8, 1, 3, padding=1)

    def then(self, x):
        gate = self.up(F.silu(self.down(x.mean(dim=[2, 3], keepdim=True)))).sigmoid()
        return F.max_pool2d(x * gate * torch.sigmoid(self.place(x)), 4).mean(3).mean(2)


class GlobalGate(Stem):
    def parts(self):
        self.gate = nn.Linear(8, 8)

    def then(self, x):
        gate = torch.tanh(self.gate(x.mean((-2, -1))))
        return torch.flatten(F.adaptive_max_pool2d(x * gate[:, :, None, None] + gate.unsqueeze(-1).unsqueeze(-1), 1), 1)


class Groups(Stem):
    """Grouped convolutions (2 and 4 groups), one of them depthwise with a multiplier, in a residual sum."""

    def parts(self):
        self.two, self.four = nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.Conv2d(8, 16, 3, padding=1, groups=4)
        self.deep, self.back = nn.Conv2d(16, 32, 3, padding=1, groups=16), nn.Conv2d(32, 8, 1)

    def then(self, x):
        return (self.back(self.deep(self.four(x + self.two(x)))) + x).flatten(2).mean(2)


class GroupNorms(Stem):
    def parts(self):
        self.norm, self.conv, self.after = nn.GroupNorm(4, 8), nn.Conv2d(8, 8, 1), nn.GroupNorm(2, 8)

    def then(self, x):
        return (self.after(self.conv(x)) + self.norm(x)).mean((2, 3))


class Flattened(Stem):
    """Maps of 2x2 places flattened in front of a linear layer and a batch norm."""

    def parts(self):
        self.norm, self.hidden = nn.BatchNorm1d(32), nn.Linear(32, 12)

    def then(self, x):
        flat = F.avg_pool2d(x, 4)
        flat = flat.view(flat.size(0), -1) + 0.5 * torch.flatten(flat, 1)
        return F.relu(self.hidden(self.norm(flat)))


class Twice(Stem):
    """A layer that is used twice."""

    def parts(self):
        self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

    def then(self, x):
        x = self.norm(self.conv(x))
        return self.norm(self.conv(x.relu())).mean((2, 3))


FOLLOWED = {Gate: 8, ConvGate: 8, GlobalGate: 8, Groups: 8, GroupNorms: 8, Flattened: 12, Twice: 8}


def built(kind: type[nn.Module]) -> Classifier:
    torch.manual_seed(0)
    model = Classifier(kind(), nn.Linear(FOLLOWED[kind], 5)).double().eval()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return model


@pytest.mark.parametrize("scheme", ["heterofl", "fedrolex", "feddropout"])
@pytest.mark.parametrize("kind", FOLLOWED)
def test_o25_a_part_computes_what_the_whole_does_without_the_other_channels(kind, scheme):
    images = torch.randn(6, 3, 8, 8, dtype=torch.float64)
    model = built(kind)
    weights, channels = to_weights(model), channel_layout(model)
    sets = load("strategies", scheme).channel_indices(channels, 0.5, round_num=3, seed=0, client_id=0)
    part = extract(weights, channels, sets)
    without = {name: array.copy() for name, array in weights.items()}
    for name, axes in channels.entries.items():
        if len(axes) > 1 and axes[1] is not None:
            group, block = axes[1]
            without[name][:, ~np.repeat(np.isin(np.arange(channels.sizes[group]), sets[group]), block)] = 0
    with torch.no_grad():
        partial_width = fit(built(kind), part)(images)
        torch.testing.assert_close(partial_width, fit(built(kind), without)(images), rtol=1e-9, atol=1e-9)
        assert not torch.allclose(partial_width, model(images), rtol=1e-3)
    assert sum(array.size for array in part.values()) < 0.7 * sum(array.size for array in weights.values())


def test_blocks_of_channels_that_stand_or_fall_together():
    groups = channel_layout(built(Groups))
    assert groups.sizes == (2,)
    assert groups.entries["trunk.stem.weight"][0] == groups.entries["trunk.two.weight"][0] == (0, 4)
    assert groups.entries["trunk.four.weight"] == ((0, 8), None, None, None)
    assert groups.entries["trunk.deep.weight"] == ((0, 16), None, None, None)
    assert groups.entries["trunk.back.weight"][:2] == ((0, 4), (0, 16))
    assert channel_layout(built(GroupNorms)).sizes == (2,)
    flattened = channel_layout(built(Flattened))
    assert flattened.sizes == (8, 12)
    assert flattened.entries["trunk.norm.weight"] == ((0, 4),)
    assert flattened.entries["trunk.hidden.weight"] == ((1, 1), (0, 4))


def test_a_sum_with_the_image_and_a_gate_of_one_channel_are_held_whole():
    class Sum(Stem):
        def parts(self):
            self.back = nn.Conv2d(8, 3, 1)

        def forward(self, x):
            return F.relu(self.back(F.relu(self.stem(x))) + x).mean((2, 3))

    model = Classifier(Sum(), nn.Linear(3, 5))
    channels = channel_layout(model)
    assert channels.sizes == (8,)
    assert channels.entries["trunk.back.weight"][:2] == (None, (0, 1))
    assert channels.entries["head.weight"] == (None, None)
    assert channel_layout(built(ConvGate)).entries["trunk.place.weight"][:2] == (None, (0, 1))


def test_one_channel_that_is_a_gate_and_an_addend_is_held_whole():
    class Ones(Stem):
        def parts(self):
            self.first, self.second, self.back = nn.Conv2d(8, 1, 1), nn.Conv2d(8, 1, 1), nn.Conv2d(1, 8, 1)

        def then(self, x):
            first, second = self.first(x), self.second(x)
            return (x * second + self.back(first + second)).mean((2, 3))

    assert channel_layout(Classifier(Ones(), nn.Linear(8, 5))).sizes == (8,)


def test_a_view_with_the_size_of_other_channels_keeps_as_many():
    class Viewed(Stem):
        def parts(self):
            self.grouped, self.up = nn.Conv2d(8, 8, 1, groups=2), nn.Linear(8, 8)

        def then(self, x):
            b, c = x.shape[0], x.shape[1]
            return self.up(F.adaptive_avg_pool2d(self.grouped(x), 1).reshape(b, c)).view(b, c)

    entries = channel_layout(Classifier(Viewed(), nn.Linear(8, 5))).entries
    assert entries["trunk.up.weight"] == (entries["trunk.stem.weight"][0], (0, 4)) == ((0, 4), (0, 4))


# --- refused ---------------------------------------------------------------------------------------------------------


def then(step):
    return type("Made", (Stem,), {"then": lambda self, x: step(self, x)})


REFUSED = {
    "concatenation": (then(lambda self, x: torch.cat([x, x], 1).mean((2, 3))), "cat"),
    "branch": (then(lambda self, x: x.mean((2, 3)) if x.sum() > 0 else x.amax((2, 3))), "cannot be traced"),
    "number of channels": (then(lambda self, x: x.mean((2, 3)).view(-1, 8)), "view"),
    "mean over channels": (then(lambda self, x: x.mean(1)), "mean"),
    "permuted": (then(lambda self, x: x.permute(0, 2, 3, 1)), "permute"),
    "flattened batch": (then(lambda self, x: torch.flatten(x)), "flatten"),
    "channels by number": (then(lambda self, x: x[:, :4].mean((2, 3))), "getitem"),
    "exponent": (then(lambda self, x: x.pow(x).mean((2, 3))), "pow"),
    "parameter": (then(lambda self, x: (x * self.stem.weight.mean()).mean((2, 3))), "stem.weight"),
    "another's channels": (then(lambda self, x: (x.mean((2, 3)) + x).mean((2, 3))), "add"),
    "keyword": (then(lambda self, x: self.stem(input=x).mean((2, 3))), "stem"),
    "pair": (then(lambda self, x: (x.mean((2, 3)), x)), "more than logits"),
}


class Odd(Stem):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.odd = layer

    def then(self, x):
        return self.odd(x).mean((2, 3))


class Tied(Stem):
    def parts(self):
        self.first, self.second = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.second.weight = self.first.weight

    def then(self, x):
        return self.second(self.first(x)).mean((2, 3))


@pytest.mark.parametrize("case", REFUSED)
def test_networks_that_cannot_be_traced_are_refused_in_one_line(case):
    kind, word = REFUSED[case]
    with pytest.raises(RequestError, match=rf"^federation\.widths: [^\n]*{word}[^\n]*; take width 1\.0$"):
        channel_layout(kind() if case == "pair" else Classifier(kind(), nn.Linear(8, 5)))


@pytest.mark.parametrize(
    "layer",
    [nn.LayerNorm(8), nn.PixelShuffle(2), nn.ConvTranspose2d(8, 8, 1), nn.GLU(1), nn.GroupNorm(2, 8, affine=False)],
)
def test_a_layer_that_is_not_understood_is_named(layer):
    with pytest.raises(RequestError, match=rf"trunk\.odd \({type(layer).__name__}\)[^\n]*; take width 1\.0$"):
        channel_layout(Classifier(Odd(layer), nn.Linear(8, 5)))


def test_shared_parameters_are_refused():
    with pytest.raises(RequestError, match="share a parameter"):
        channel_layout(Classifier(Tied(), nn.Linear(8, 5)))
