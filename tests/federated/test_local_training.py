"""Local training and its place in federated averaging (O20, O30, O31)."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from helpers import FACTS, TINY, Linear, assert_same, shard_of, stripes
from torch import nn

from mosaic_ray.core.seeding import stream
from mosaic_ray.data.transforms import normalise
from mosaic_ray.federated.aggregation import RunningAverage
from mosaic_ray.federated.client import ClientContext, ClientRound, Round, TrainTask, initial_weights
from mosaic_ray.federated.local_training import LocalTrainingConfig, batches, train_locally
from mosaic_ray.models.state_dict import to_weights

CONTEXT = ClientContext(TINY, FACTS, torch.device("cpu"))


def test_batches_cover_each_pass_once_and_never_straddle_it():
    order = list(batches(10, 4, 6, generator=stream(0, "x")))
    for start in (0, 3):
        assert sorted(torch.cat(order[start : start + 3]).tolist()) == list(range(10))
    assert [len(b) for b in order] == [4, 4, 2] * 2


def test_fixed_order_goes_on_where_the_last_round_stopped():
    whole = list(batches(10, 4, 6))
    parts = [b for r in range(3) for b in batches(10, 4, 2, offset=2 * r)]
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


def test_a_batch_is_no_larger_than_the_shard():
    assert [len(b) for b in batches(3, 64, 2)] == [3, 3]


@pytest.mark.parametrize("shuffle", [True, False])
def test_o31_the_same_address_gives_the_same_weights_and_another_seed_does_not(shuffle):
    plan = LocalTrainingConfig(3, 16, 0.05, 1e-4, 0.9, shuffle)
    task, start = TrainTask("local", 1, plan), Round({"cnn": initial_weights(CONTEXT)})
    shard = shard_of(stripes(40))
    first, again = (task.run(CONTEXT, shard, 2, start, ClientRound()) for _ in range(2))
    assert_same(first.weights, again.weights)
    other = ClientContext(dataclasses.replace(TINY, seed=1), FACTS, CONTEXT.device)
    differs = task.run(other, shard, 2, start, ClientRound())
    assert shuffle is not np.array_equal(first.weights["head.weight"], differs.weights["head.weight"])


def test_o20_one_client_of_fedavg_is_local_sgd():
    plan = LocalTrainingConfig(4, 16, 0.05)
    model = CONTEXT.classifier(initial_weights(CONTEXT))
    train_locally(model, shard_of(stripes(48)), plan, FACTS, (0, "local", 0, 0), "fp32")
    average = RunningAverage()
    average.add(to_weights(model), 48)
    assert_same(average.result(), to_weights(model))


def test_o20_one_step_each_is_one_step_on_the_mean_of_the_clients_gradients():
    torch.manual_seed(0)
    start = Linear()
    shards = [shard_of(stripes(32, seed)) for seed in range(3)]
    average = RunningAverage()
    gradients = torch.zeros_like(start.head.weight)
    for k, shard in enumerate(shards):
        model = Linear()
        model.load_state_dict(start.state_dict())
        train_locally(model, shard, LocalTrainingConfig(1, 32, 0.1), FACTS, (0, "local", 0, k), "fp32")
        average.add(to_weights(model), len(shard))
        probe = Linear()
        probe.load_state_dict(start.state_dict())
        loss = nn.functional.cross_entropy(probe(normalise(shard.images, FACTS.mean, FACTS.std)), shard.labels)
        gradients += torch.autograd.grad(loss, probe.head.weight)[0] / 3
    expected = (start.head.weight - 0.1 * gradients).detach().numpy()
    np.testing.assert_allclose(average.result()["head.weight"], expected, atol=1e-6)


def test_a_frozen_head_stays_and_the_rest_moves():
    start = initial_weights(CONTEXT)
    model = CONTEXT.classifier(start)
    train_locally(
        model, shard_of(stripes(48)), LocalTrainingConfig(3, 16, 0.05, freeze_head=True), FACTS, (0, "a", 0, 0), "fp32"
    )
    after = to_weights(model)
    moved = [name for name in start if not np.array_equal(start[name], after[name])]
    assert not any(name.startswith("head.") for name in moved)
    assert moved


def test_frozen_batch_norm_keeps_its_statistics_and_learns_its_scale():
    start = initial_weights(CONTEXT)
    model = CONTEXT.classifier(start)
    plan = LocalTrainingConfig(3, 16, 0.05, freeze_bn=True)
    train_locally(model, shard_of(stripes(48)), plan, FACTS, (0, "a", 0, 0), "fp32")
    after = to_weights(model)
    statistics = [name for name in start if "running" in name or "tracked" in name]
    assert statistics and all(np.array_equal(after[name], start[name]) for name in statistics)
    assert not any(np.array_equal(after[name], start[name]) for name in start if name not in statistics)


def test_training_learns_the_stripes():
    model = CONTEXT.classifier(initial_weights(CONTEXT))
    plan = LocalTrainingConfig(60, 32, 0.1, 0.0, 0.9)
    train_locally(model, shard_of(stripes(120)), plan, FACTS, (0, "local", 0, 0), "fp32")
    test = shard_of(stripes(60, 9))
    with torch.no_grad():
        right = model(normalise(test.images, FACTS.mean, FACTS.std)).argmax(1) == test.labels
    assert right.float().mean() > 0.9


def test_the_global_stream_is_left_as_it_was():
    model, shard = CONTEXT.classifier(initial_weights(CONTEXT)), shard_of(stripes(20))
    before = torch.random.get_rng_state()
    train_locally(model, shard, LocalTrainingConfig(2, 8, 0.1), FACTS, (0, "local", 0, 0), "fp32")
    assert torch.equal(before, torch.random.get_rng_state())
