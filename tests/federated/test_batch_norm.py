"""Static batch norm (docs/algorithm.md 3.6): statistics of all clients' images, a layer more exact with every pass."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import FACTS, assert_same, shard_of, stripes
from torch import nn

from mosaic_ray.config.schema import ModelConfig
from mosaic_ray.core.seeding import seeded
from mosaic_ray.core.types import Weights
from mosaic_ray.data.transforms import normalise
from mosaic_ray.federated.local_training import Shard
from mosaic_ray.federated.static_batch_norm import Moments, moments, passes, pooled, with_statistics
from mosaic_ray.models.classifiers import build_classifier, norm_depths
from mosaic_ray.models.state_dict import load_weights, to_weights


def network(name: str = "cnn") -> nn.Module:
    with seeded(0, "test"), torch.no_grad():
        model = build_classifier(ModelConfig(name, width=4), 3, 1, 8)
        for layer in batch_norms(model).values():
            layer.weight.uniform_(0.5, 1.5)
            layer.bias.normal_(0, 0.3)
    return model


def batch_norms(model: nn.Module) -> dict[str, nn.Module]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.BatchNorm2d)}


def shards() -> list[Shard]:
    everything = shard_of(stripes(30))
    return [Shard(everything.images[r], everything.labels[r]) for r in torch.arange(30).split([1, 17, 12])]


def a_pass(model: nn.Module, weights: Weights) -> Weights:
    load_weights(model, weights)
    return with_statistics(weights, pooled([moments(model, shard, FACTS, "fp32") for shard in shards()]))


def in_one_batch(model: nn.Module) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], torch.Tensor]:
    """Return each layer's mean and population variance in train mode with all images in one batch; and the logits."""
    seen = {}

    def read(layer: nn.Module, inputs: tuple) -> None:
        variance, mean = torch.var_mean(inputs[0].double(), (0, 2, 3), correction=0)
        seen[layer] = mean.numpy(), variance.numpy()

    hooks = [layer.register_forward_pre_hook(read) for layer in batch_norms(model).values()]
    with torch.no_grad():
        logits = model.train()(normalise(shard_of(stripes(30)).images, FACTS.mean, FACTS.std))
    for hook in hooks:
        hook.remove()
    return {name: seen[layer] for name, layer in batch_norms(model).items()}, logits


def close(weights: Weights, name: str, expected: tuple[np.ndarray, np.ndarray]) -> bool:
    mean, variance = expected
    scale = np.sqrt(variance.max())
    return bool(
        np.allclose(weights[f"{name}.running_mean"], mean, rtol=0, atol=1e-4 * scale)
        and np.allclose(weights[f"{name}.running_var"], variance, rtol=1e-3, atol=1e-4 * variance.max())
    )


def test_every_pass_makes_one_more_layer_exact_and_then_eval_mode_is_train_mode_on_all_images():
    expected, logits = in_one_batch(network())
    weights = to_weights(network())
    assert len(expected) == 6
    for done in range(1, 7):
        weights = a_pass(network(), weights)
        exact = [close(weights, name, found) for name, found in expected.items()]
        assert exact[:done] == [True] * done and exact[done : done + 1] != [True]
    with torch.no_grad():
        model = load_weights(network(), weights).eval()
        torch.testing.assert_close(
            model(normalise(shard_of(stripes(30)).images, FACTS.mean, FACTS.std)), logits, rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("name, passes", [("resnet18", 17), ("mobilenet", 22)])
def test_as_many_passes_do_as_there_are_batch_norms_in_the_longest_chain(name, passes):
    expected, logits = in_one_batch(network(name))
    assert len(expected) >= passes
    weights = to_weights(network(name))
    for _ in range(passes):
        weights = a_pass(network(name), weights)
    assert all(close(weights, layer, found) for layer, found in expected.items())
    with torch.no_grad():
        images = normalise(shard_of(stripes(30)).images, FACTS.mean, FACTS.std)
        torch.testing.assert_close(load_weights(network(name), weights).eval()(images), logits, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("name", ["cnn", "resnet18", "mobilenet"])
def test_depths_by_brute_force_what_reads_anothers_statistics_lies_behind_it(name):
    """Statistics that are infinite show in every layer behind them."""
    layers = batch_norms(network(name))
    before: dict[str, set[str]] = {layer: set() for layer in layers}
    for broken in layers:
        model = network(name)
        for layer, module in batch_norms(model).items():

            def look(_: nn.Module, inputs: tuple, layer: str = layer, broken: str = broken) -> None:
                if inputs[0].isnan().any():
                    before[layer].add(broken)

            module.register_forward_pre_hook(look)
        with torch.no_grad():
            batch_norms(model)[broken].running_mean.fill_(torch.nan)
            model.eval()(torch.zeros(2, 1, 8, 8))

    def depth(layer: str) -> int:
        return 1 + max((depth(other) for other in before[layer]), default=0)

    assert norm_depths(ModelConfig(name, width=4), 3, 1, 8) == {layer: depth(layer) for layer in layers}


def test_depths_go_through_layers_that_change_their_input_in_place_and_ways_that_meet():
    class Meeting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.left, self.right, self.last = (nn.BatchNorm2d(1) for _ in range(4))
            self.unused, self.bare = nn.BatchNorm2d(1), nn.BatchNorm2d(1, track_running_stats=False)
            self.head = nn.Linear(64, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = nn.functional.relu(self.first(x), inplace=True)
            x = self.last(self.right(self.left(self.bare(x))) + x)
            return self.head(x.flatten(1))

    import mosaic_ray.models.classifiers as classifiers

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(classifiers, "build_classifier", lambda *_: Meeting())
        assert norm_depths(ModelConfig("my:net"), 3, 1, 8) == {"first": 1, "left": 2, "right": 3, "last": 4}


def test_a_pass_reads_what_the_last_one_made_ready_or_all_that_is_left():
    depths = {"a": 1, "b": 2, "side": 2, "c": 3}
    assert passes(depths) == passes(depths, 3) == passes(depths, 9) == [["a"], ["b", "side"], ["c"]]
    assert passes(depths, 2) == [["a", "b", "side", "c"], ["b", "side", "c"]]
    assert passes(depths, 1) == [list(depths)]
    assert passes({}) == []


@pytest.mark.parametrize("most", [0, 2])
@pytest.mark.parametrize("name", ["cnn", "resnet18"])
def test_reading_some_layers_a_pass_ends_as_reading_all_in_every_pass(name, most):
    everything, sparing = to_weights(network(name)), to_weights(network(name))
    for layers in passes(norm_depths(ModelConfig(name, width=4), 3, 1, 8), most):
        everything = a_pass(network(name), everything)
        model = load_weights(network(name), sparing)
        found = [moments(model, shard, FACTS, "fp32", layers, chunk=5) for shard in shards()]
        assert all(list(part) == layers for part in found)
        sparing = with_statistics(sparing, pooled(found))
    for entry, value in everything.items():
        np.testing.assert_allclose(sparing[entry], value, rtol=1e-4, atol=1e-6, err_msg=entry)


def test_the_network_behind_the_last_layer_is_spared():
    model, convolutions = network(), []
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(lambda layer, *_: convolutions.append(layer))
    second = list(batch_norms(model))[1]
    moments(model, shard_of(stripes(30)), FACTS, "fp32", [second], chunk=10)
    assert len(convolutions) == 6 + 2 + 2  # the first chunk shows which layer it is


def test_the_variance_is_the_population_s_where_torch_has_n_less_one():
    model = network()
    for layer in batch_norms(model).values():
        layer.momentum = 1.0
    in_one_batch(model)
    first, num_values = next(iter(batch_norms(model))), 30 * 8 * 8
    variance = a_pass(network(), to_weights(network()))[f"{first}.running_var"]
    torch_s = to_weights(model)[f"{first}.running_var"]
    np.testing.assert_allclose(variance, torch_s * (num_values - 1) / num_values, rtol=1e-5)


def test_moments_by_hand():
    model, shard = network(), shards()[1]
    found = moments(model, shard, FACTS, "fp32", chunk=5)
    inputs = {}
    for name, layer in batch_norms(model).items():
        layer.register_forward_pre_hook(lambda _, x, name=name: inputs.update({name: x[0].double().numpy()}))
    with torch.no_grad():
        model.eval()(normalise(shard.images, FACTS.mean, FACTS.std))
    assert list(found) == list(inputs)
    for name, x in inputs.items():
        assert found[name].count == x.size / x.shape[1]
        assert found[name].total.dtype == found[name].squares.dtype == np.float64
        np.testing.assert_allclose(found[name].total, x.sum((0, 2, 3)), rtol=1e-5, atol=1e-3)
        np.testing.assert_allclose(found[name].squares, (x**2).sum((0, 2, 3)), rtol=1e-5)


def test_how_the_images_are_spread_over_clients_and_batches_does_not_matter(monkeypatch):
    model = network()
    together = pooled([moments(model, shard_of(stripes(30)), FACTS, "fp32")])
    monkeypatch.setattr("mosaic_ray.federated.static_batch_norm.CACHED", 500)
    apart = pooled(moments(model, shard, FACTS, "fp32", chunk=7) for shard in shards())
    assert together.keys() == apart.keys()
    for name, value in together.items():
        assert value.dtype == np.float32
        np.testing.assert_allclose(value, apart[name], rtol=1e-4, atol=1e-6, err_msg=name)


def test_batch_norm_of_vectors():
    model, images = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64)), shard_of(stripes(30)).images
    found = pooled(moments(model, shard, FACTS, "fp32") for shard in shards())
    variance, mean = torch.var_mean(normalise(images, FACTS.mean, FACTS.std).flatten(1), 0, correction=0)
    np.testing.assert_allclose(found["1.running_mean"], mean, atol=1e-6)
    np.testing.assert_allclose(found["1.running_var"], variance, rtol=1e-5)


def test_a_spread_that_is_small_beside_the_mean_survives_the_sums():
    draws = np.random.default_rng(0).normal(1000, 0.1, (50_000, 2)).astype(np.float32).astype(np.float64)
    parts = [{"bn": Moments(len(x), x.sum(0), (x**2).sum(0))} for x in np.split(draws, 5)]
    buffers = pooled(parts)
    np.testing.assert_allclose(buffers["bn.running_mean"], draws.mean(0), rtol=1e-7)
    np.testing.assert_allclose(buffers["bn.running_var"], draws.var(0), rtol=1e-5)
    alike = {"bn": Moments(3, np.array([0.3]), np.array([0.1 * 0.1 * 3 * (1 - 1e-15)]))}
    assert pooled([alike])["bn.running_var"] >= 0


def test_looking_changes_nothing():
    model = network().train()
    before = to_weights(model)
    moments(model, shards()[0], FACTS, "fp32")
    assert_same(to_weights(model), before)
    assert not model.training
    assert not any(layer._forward_pre_hooks for layer in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_layers_without_statistics_or_use_are_left_out():
    model = nn.Sequential(nn.BatchNorm2d(1, track_running_stats=False), nn.BatchNorm2d(1))
    model.unused = nn.BatchNorm2d(4)
    model.forward = lambda x: model[1](model[0](x))
    assert list(moments(model, shards()[2], FACTS, "fp32")) == ["1"]


def test_statistics_go_where_they_belong():
    weights = to_weights(network())
    buffers = {"trunk.1.running_mean": np.full(4, 7, np.float32)}
    changed = with_statistics(weights, buffers)
    assert_same(changed, weights | buffers)
    assert_same(weights, to_weights(network()))
    with pytest.raises(ValueError, match="no elsewhere"):
        with_statistics(weights, {"elsewhere.running_mean": np.zeros(4, np.float32)})
