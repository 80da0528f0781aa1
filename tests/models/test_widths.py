"""Partial-width clients: index sets (O24), the part that each holds, and its model (O25, O26)."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from helpers import assert_same
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx

from mosaic_ray.config.plugins import load
from mosaic_ray.config.registry import CLASSIFIERS
from mosaic_ray.config.schema import ModelConfig
from mosaic_ray.core.errors import RequestError
from mosaic_ray.core.seeding import seeded
from mosaic_ray.core.types import Weights
from mosaic_ray.federated.aggregation import PartialAverage
from mosaic_ray.models.classifiers import Classifier, build_classifier
from mosaic_ray.models.state_dict import to_weights
from mosaic_ray.models.submodel import (
    ChannelLayout,
    channel_layout,
    check_width,
    extract,
    fit,
    num_kept,
    scale_activations,
)

each_network = pytest.mark.parametrize("name", CLASSIFIERS)
each_scheme = pytest.mark.parametrize("scheme", ["heterofl", "fedrolex", "feddropout"])


def network(name: str, width: int = 8) -> Classifier:
    """A network in float64 and eval mode, with signals of one size through all layers, and batch norms that matter."""
    with seeded(0, "test", name), torch.no_grad():
        model = build_classifier(ModelConfig(name, width=width), 5, 3, 16).double().eval()
        for entry, value in model.state_dict().items():
            if value.ndim == 4:
                torch.nn.init.kaiming_normal_(value)
            elif value.ndim == 1:
                value.uniform_(0.5, 1.5) if entry.endswith(("weight", "running_var")) else value.normal_(0, 0.3)
    return model


def held_by(channels: ChannelLayout, width: float, scheme: str, round_num: int = 6, client_id: int = 3):
    return load("strategies", scheme).channel_indices(channels, width, round_num=round_num, seed=1, client_id=client_id)


def one_group(size: int) -> ChannelLayout:
    return ChannelLayout((size,), ("layer",), {}, ())


# --- index sets ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [5, 8, 16, 64])
def test_o24_how_often_a_rolling_window_holds_each_channel(size):
    channels = one_group(size)
    for kept in range(1, size + 1):
        counts = np.zeros(size, np.int64)
        for rounds in range(3 * size):
            over = rounds % size
            assert counts.max() - counts.min() == min(kept, over) - max(0, kept + over - size)
            if over == 0:
                assert (counts == kept * (rounds // size)).all()
            (held,) = held_by(channels, kept / size, "fedrolex", rounds)
            assert len(held) == kept and (np.diff(held) > 0).all()
            counts[held] += 1


def test_o24_fedrolex_window_moves_one_channel_per_round():
    held = [held_by(one_group(5), 0.6, "fedrolex", t, k)[0].tolist() for t in range(6) for k in (0, 7)]
    assert held[::2] == held[1::2] == [[0, 1, 2], [1, 2, 3], [2, 3, 4], [0, 3, 4], [0, 1, 4], [0, 1, 2]]


def test_o24_heterofl_always_holds_the_first_channels():
    for rounds in range(7):
        assert held_by(one_group(8), 0.375, "heterofl", rounds)[0].tolist() == [0, 1, 2]


def test_o24_dropout_holds_each_channel_equally_often_on_average():
    counts, rounds = np.zeros(8), 1000
    for round_num in range(rounds):
        (held,) = held_by(one_group(8), 0.375, "feddropout", round_num)
        assert len(held) == 3 and (np.diff(held) > 0).all()
        counts[held] += 1
    spread = np.sqrt(rounds * 0.375 * 0.625)
    assert (abs(counts - 0.375 * rounds) < 5 * spread).all() and counts.std() > 0


def test_feddropout_draws_per_group_client_and_round():
    channels = ChannelLayout((64, 64), ("a", "b"), {}, ())
    draws = [held_by(channels, 0.5, "feddropout", t, k) for t in (0, 1) for k in (0, 1)]
    assert len({held.tobytes() for sets in draws for held in sets}) == 8
    again = held_by(channels, 0.5, "feddropout", 0, 0)
    assert all(map(np.array_equal, again, draws[0]))
    other = load("strategies", "feddropout").channel_indices(channels, 0.5, round_num=0, seed=2, client_id=0)
    assert not np.array_equal(other[0], again[0])


@given(st.integers(1, 2000), st.data())
@settings(max_examples=200)
def test_dust_of_floating_point_adds_no_channel(size, data):
    kept = data.draw(st.integers(1, size))
    assert num_kept(kept / size, size) == kept
    assert num_kept((kept - 0.5) / size, size) == kept


def test_55_hundredths_of_a_hundred_channels_are_55():
    assert 0.55 * 100 > 55
    assert num_kept(0.55, 100) == 55
    assert num_kept(0.1, 30) == 3


def test_a_width_that_rounds_to_no_channel_names_the_layer():
    channels = channel_layout(network("cnn", width=4))
    check_width(channels, 0.25)
    with pytest.raises(RequestError, match=r"^federation\.widths = 0\.125: of the 4 channels of trunk\.0 [^\n]*0\.25"):
        check_width(channels, 0.125)


# --- groups ----------------------------------------------------------------------------------------------------------


def test_groups_are_numbered_from_the_image_to_the_head():
    channels = channel_layout(network("cnn"))
    assert channels.sizes == (8, 8, 16, 16, 32, 32)
    assert channels.layers == ("trunk.0", "trunk.3", "trunk.7", "trunk.10", "trunk.14", "trunk.17")
    assert channels.entries["trunk.0.weight"] == ((0, 1), None, None, None)
    assert channels.entries["trunk.3.weight"] == ((1, 1), (0, 1), None, None)
    assert channels.entries["trunk.4.running_var"] == ((1, 1),)
    assert channels.entries["trunk.4.num_batches_tracked"] == ()
    assert channels.entries["head.weight"] == (None, (5, 1))
    assert channels.heads == ("head.weight", "head.bias")


def test_a_resnet_has_a_group_for_each_stage_and_one_inside_each_block():
    assert channel_layout(network("resnet18")).sizes == (8, 8, 8, 16, 16, 16, 32, 32, 32, 64, 64, 64)


def test_depthwise_convolutions_stay_in_their_input_group():
    entries = channel_layout(network("mobilenet")).entries
    depthwise = [n for n, m in network("mobilenet").named_modules() if getattr(m, "groups", 1) > 1]
    assert depthwise
    for name in depthwise:
        group, *rest = entries[f"{name}.weight"]
        assert group is not None and rest == [None] * 3
        assert sum(entry[:1] == (group,) and n.endswith(".weight") for n, entry in entries.items()) >= 3


@each_network
def test_every_entry_has_an_item_for_each_of_its_dimensions(name):
    model = network(name)
    channels = channel_layout(model)
    assert pickle.loads(pickle.dumps(channels)) == channels
    assert channels.entries.keys() == model.state_dict().keys()
    for entry, value in model.state_dict().items():
        assert value.ndim == len(channels.entries[entry])
        for size, held in zip(value.shape, channels.entries[entry], strict=True):
            assert held is None or size == channels.sizes[held[0]] * held[1]
    whole = {n for n, axes in channels.entries.items() if axes and not any(axes)}
    assert whole == {"head.bias"}, "all but the classes is in a group"


@each_network
def test_o25_both_inputs_of_every_residual_addition_hold_the_same_channels(name):
    model = network(name)
    entries = channel_layout(model).entries

    def sources(node: fx.Node) -> set:
        """Return the groups of the layers that feed this one without mixing channels."""
        if f"{node.target}.weight" in entries:
            return {entries[f"{node.target}.weight"][0]}
        return set().union(*map(sources, node.all_input_nodes))

    sums = [n for n in fx.Tracer().trace(model).nodes if n.op == "call_function" and n.target.__name__ == "add"]
    assert len(sums) == {"cnn": 0, "resnet18": 8, "resnet34": 16, "resnet50": 16, "mobilenet": 4}[name]
    for node in sums:
        assert len(node.all_input_nodes) == 2
        assert len(sources(node)) == 1 and None not in sources(node)


# --- parts -----------------------------------------------------------------------------------------------------------


def without_the_rest(weights: Weights, channels: ChannelLayout, sets) -> Weights:
    """``weights`` in which no layer reads a channel outside ``sets``."""
    kept = {name: array.copy() for name, array in weights.items()}
    for name, axes in channels.entries.items():
        if len(axes) > 1 and axes[1] is not None:
            group, block = axes[1]
            read = np.repeat(np.isin(np.arange(channels.sizes[group]), sets[group]), block)
            kept[name][:, ~read] = 0
    return kept


@each_network
@each_scheme
def test_o25_a_part_computes_what_the_whole_does_without_the_other_channels(name, scheme):
    model, images = network(name), torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)).double()
    weights, channels = to_weights(model), channel_layout(model)
    with torch.no_grad():
        everything = model(images)
        for width in (0.5, 0.3):
            sets = held_by(channels, width, scheme)
            part = fit(network(name), extract(weights, channels, sets)).eval()(images)
            whole = fit(network(name), without_the_rest(weights, channels, sets)).eval()(images)
            torch.testing.assert_close(part, whole, rtol=1e-9, atol=1e-9)
            assert part.std(0).min() > 1e-4 and not torch.allclose(part, everything, rtol=1e-3)


@each_network
@each_scheme
def test_o25_parts_put_back_untrained_change_nothing(name, scheme):
    model = network(name).float()
    weights, channels = to_weights(model), channel_layout(model)
    average = PartialAverage(weights, channels)
    for client_id, width in enumerate((0.5, 0.25)):
        sets = held_by(channels, width, scheme, client_id=client_id)
        average.add(extract(weights, channels, sets), 0.1 + client_id, sets)
    assert_same(average.result(), weights)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet"])
@each_scheme
def test_o25_coordinates_outside_every_part_stay_as_they_are(name, scheme):
    model = network(name).float()
    weights, channels = to_weights(model), channel_layout(model)
    numbered = {n: np.arange(a.size).reshape(a.shape) for n, a in weights.items()}
    average, touched = PartialAverage(weights, channels), {n: np.zeros(a.size, bool) for n, a in weights.items()}
    for client_id in range(2):
        sets = held_by(channels, 0.25, scheme, client_id=client_id)
        average.add({n: a + 1 for n, a in extract(weights, channels, sets).items()}, 3, sets)
        for entry, numbers in extract(numbered, channels, sets).items():
            touched[entry][numbers.ravel()] = True
    for entry, value in average.result().items():
        changed = (value != weights[entry]).ravel()
        np.testing.assert_array_equal(changed, touched[entry], err_msg=entry)
    assert 0 < sum(t.sum() for t in touched.values()) < sum(t.size for t in touched.values()) / 2


@each_scheme
def test_width_1_is_the_whole_network(scheme):
    model = network("resnet18")
    weights, channels = to_weights(model), channel_layout(model)
    sets = held_by(channels, 1.0, scheme)
    assert_same(extract(weights, channels, sets), weights)
    assert all(channels.part_index(name, array.shape, sets) is None for name, array in weights.items())


@pytest.mark.parametrize(
    "width, parameters", [(1, 11_173_962), (1 / 2, 2_797_610), (1 / 4, 701_466), (1 / 8, 176_402), (1 / 16, 44_622)]
)
def test_o26_parameters_of_narrow_resnet18s(width, parameters):
    with torch.device("meta"):
        model = build_classifier(ModelConfig("resnet18", width=64), 10, 3, 32)
    channels = channel_layout(model)
    sets = held_by(channels, width, "fedrolex")
    part = fit(
        model, extract({n: np.zeros(v.shape, np.float32) for n, v in model.state_dict().items()}, channels, sets)
    )
    assert sum(p.numel() for p in part.parameters()) == parameters
    assert part.feature_dim == round(512 * width)
    assert part(torch.zeros(2, 3, 8, 8)).shape == (2, 10)


def test_a_part_is_of_fresh_arrays():
    model = network("cnn")
    weights, channels = to_weights(model), channel_layout(model)
    for width in (0.5, 1.0):
        part = extract(weights, channels, held_by(channels, width, "heterofl"))
        assert not any(np.shares_memory(part[name], weights[name]) for name in part)
        assert all(array.flags.c_contiguous and array.flags.writeable for array in part.values())


# --- parts as models -------------------------------------------------------------------------------------------------


@each_network
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_fitted_network_has_a_copy_of_the_part_and_learns(name, device):
    channels = channel_layout(network(name))
    part = extract(to_weights(network(name).float()), channels, held_by(channels, 0.25, "fedrolex"))
    for array in part.values():
        array.setflags(write=False)  # as arrays in an object store are
    with torch.device(device):
        model = fit(build_classifier(ModelConfig(name, width=8), 5, 3, 16), part)
    assert_same(to_weights(model), part)
    assert model.feature_dim == model.head.in_features == part["head.weight"].shape[1]
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            assert module.weight.shape[:2] == (module.out_channels, module.in_channels // module.groups)
        if isinstance(module, torch.nn.BatchNorm2d):
            assert module.num_features == len(module.weight)
    before = {n: a.copy() for n, a in part.items()}
    model.train()(torch.randn(4, 3, 16, 16)).square().sum().backward()
    assert all(p.grad is not None and p.requires_grad for p in model.parameters())
    torch.optim.SGD(model.parameters(), 0.1).step()
    assert_same(part, before)


def test_weights_of_another_network_do_not_fit():
    with pytest.raises(ValueError, match="names differ"):
        fit(network("cnn"), to_weights(network("resnet18")))


def test_scaler_divides_only_convolution_outputs_in_training():
    model, images = network("cnn").train(), torch.randn(4, 3, 16, 16).double()
    given = {}
    model.trunk[1].register_forward_pre_hook(lambda _, inputs: given.update(x=inputs[0].detach()))
    plain = torch.nn.functional.conv2d(images, model.trunk[0].weight.detach(), padding=1)
    with scale_activations(model, 0.25):
        model(images)
        torch.testing.assert_close(given["x"], 4 * plain)
        model.eval()(images)
        torch.testing.assert_close(given["x"], plain)
    model.train()(images)
    torch.testing.assert_close(given["x"], plain)
    with scale_activations(model, 1.0):
        assert not any(module._forward_hooks for module in model.modules())
