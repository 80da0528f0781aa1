"""Clients that are trained together: the numbers of one by one up to rounding, the same ones wherever they run."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import FACTS, TINY, assert_same, shard_of, stripes
from strategy_runs import NETWORKS, go, parts, same_results, student

from mosaic_ray.config.resolve import override
from mosaic_ray.core.errors import RunError
from mosaic_ray.core.seeding import stream
from mosaic_ray.data.transforms import augment
from mosaic_ray.execution.gpu_memory import ClientWork, estimated_bytes, steps_of
from mosaic_ray.federated.batched_training import train_together
from mosaic_ray.federated.client import (
    ClientContext,
    ClientRound,
    OnPart,
    Round,
    ScoreTask,
    TrainTask,
    batches_of,
    initial_models,
)
from mosaic_ray.federated.local_training import LocalTrainingConfig, Rehearsed, train_locally
from mosaic_ray.models.state_dict import to_weights
from mosaic_ray.models.submodel import scale_activations
from mosaic_ray.runs import runner

CPU = torch.device("cpu")
PLAN = LocalTrainingConfig(7, 16, 0.05, 1e-3, 0.9)
TOGETHER = {"runtime.clients_per_batch": 2}
#: Numbers of images: whole mini-batches, remainders, one image that is left over, fewer than a mini-batch, one.
SIZES = (32, 40, 33, 9, 1)
NOTHING = (None,) * 5
TRAIN = TrainTask("local", 0, PLAN)


def trained(plan, facts=FACTS, network="cnn", masked=False, rehearsed=NOTHING, sizes=SIZES):
    """Yield for each client (figures, weights) one by one, and the same together."""
    config = override(TINY, {"model.classifier": network})
    context = ClientContext(config, facts, CPU)
    start = initial_models(context)[network]
    shards = [shard_of(stripes(size, seed)) for seed, size in enumerate(sizes)]
    alone, together = ([context.classifier(start).double() for _ in sizes] for _ in range(2))
    addresses = [(0, "local", 2, client) for client in range(len(sizes))]
    rehearsed = rehearsed[: len(sizes)]
    with scale_activations(together[0], 0.5):
        found = train_together(
            together, shards, plan, facts, addresses, "fp32", masked=masked, rehearsed=rehearsed
        )  # fmt: skip
    for model, other, shard, address, synthetic, figures in zip(
        alone, together, shards, addresses, rehearsed, found, strict=True
    ):
        with scale_activations(model, 0.5):
            expected = train_locally(model, shard, plan, facts, address, "fp32", masked=masked, rehearsed=synthetic)
        assert not other.training
        yield (expected, to_weights(model)), (figures, to_weights(other))


def check(pairs):
    for (expected, weights), (figures, found) in pairs:
        assert figures == pytest.approx(expected, abs=1e-5)
        assert figures["steps"] == expected["steps"]
        assert found.keys() == weights.keys()
        for name, value in weights.items():
            np.testing.assert_allclose(found[name], value, atol=1e-9, err_msg=name)


@pytest.fixture
def in_double(monkeypatch):
    """Let everything compute in float64: in float32 a rounding may turn a ReLU off, and a few steps show it."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


SYNTHETIC = Rehearsed(shard_of(stripes(20, 9)), 5, 0.5)


@pytest.mark.parametrize(
    "change",
    [
        {"plan": PLAN},
        {"plan": replace(PLAN, shuffle=False, momentum=0.0, weight_decay=0.0)},
        {"plan": replace(PLAN, freeze_head=True)},
        {"plan": replace(PLAN, freeze_bn=True)},
        {"plan": replace(PLAN, loss="adjusted")},
        {"plan": PLAN, "masked": True},
        {"plan": PLAN, "facts": replace(FACTS, augmentations=("crop", "flip"))},
        {"plan": PLAN, "rehearsed": (SYNTHETIC, None, SYNTHETIC, SYNTHETIC, None)},
        {"plan": replace(PLAN, steps=3), "network": "resnet18", "sizes": (20, 24)},
        {"plan": replace(PLAN, steps=3), "network": "mobilenet", "sizes": (20, 24)},
    ],
    ids=lambda change: " ".join(f"{k}={v}" for k, v in change.items() if k != "plan")[:40] or "plan",
)
def test_together_is_one_by_one_up_to_rounding(change, in_double):
    check(trained(**change))


def test_the_comparison_sees_another_learning_rate(in_double):
    alone = [expected for expected, _ in trained(PLAN)]
    together = [found for _, found in trained(replace(PLAN, lr=0.050001))]
    with pytest.raises(AssertionError, match="trunk"):
        check(zip(alone, together, strict=True))


def test_several_clients_images_are_changed_as_each_clients_alone():
    images = shard_of(stripes(12)).images
    names = ("crop", "flip")
    alone = [augment(images[:5], names, stream(0, "a")), augment(images[5:], names, stream(0, "b"))]
    together = augment(images, names, [(stream(0, "a"), 5), (stream(0, "b"), 7)])
    assert torch.equal(torch.cat(alone), together)


# --- which clients work together -------------------------------------------------------------------------------------


def grouped(task=TRAIN, clients=range(7), **knobs):
    values = {"partition.num_clients": 7, "runtime.clients_per_batch": 3} | knobs
    context = ClientContext(override(TINY, values), FACTS, CPU)
    return list(batches_of(task, context, clients).values())


def test_clients_of_one_network_and_width_work_together():
    assert grouped() == [(0, 1, 2), (3, 4, 5), (6,)]
    assert grouped(clients=[6, 1, 4]) == [(1, 4, 6)]
    mixed = {"model.classifiers": ["cnn", "mobilenet"]}
    assert grouped(**mixed) == [(0, 2, 4), (1, 3, 5), (6,)]
    widths = {"federation.widths": [1.0, 0.5], "federation.strategy": "fedrolex"}
    assert grouped(**widths) == [(0, 2, 4), (1, 3, 5), (6,)]
    assert grouped(OnPart(TRAIN, 0.2)) == [(0, 1, 2), (3, 4, 5), (6,)]


def test_others_work_one_by_one(tmp_path):
    alone = [(client,) for client in range(7)]
    assert grouped(**{"runtime.clients_per_batch": 1}) == alone
    assert grouped(ScoreTask()) == alone
    for strategy in ("fedprox", "fedrs", "scaffold", "fedprox+fedrolex"):
        assert grouped(**{"federation.strategy": strategy}) == alone, strategy
    (tmp_path / "nets.py").write_text(NETWORKS)
    assert grouped(**{"model.classifier": f"{tmp_path}/nets.py:dropping"}) == alone


# --- whole runs ------------------------------------------------------------------------------------------------------


def test_a_run_is_near_the_one_by_one_run_under_a_key_of_its_own(tmp_path):
    alone, together = go(tmp_path, "fedavg"), go(tmp_path, "fedavg", TOGETHER)
    assert alone["stages"]["warmup"]["key"] != together["stages"]["warmup"]["key"]
    assert not together["stages"]["warmup"]["cached"]
    weights = student(together)
    for name, value in student(alone).items():
        np.testing.assert_allclose(weights[name], value, atol=0.03, err_msg=name)
    assert together["communication"]["measured_over_predicted"] == 1


@pytest.mark.ray
def test_ray_and_serial_give_the_same_bits_of_mosaic(tmp_path, ray_up):
    """With rehearsal and its trials, in which clients hold images back."""
    rehearsal = {"generator.family": "cvae", "rehearsal.weight": 1.0, "rehearsal.candidates": [0.3]}
    knobs = {"method": "mosaic", "partition.num_clients": 5, **rehearsal, **TOGETHER}
    serial = go(tmp_path / "serial", "fedavg", knobs)
    there = go(tmp_path / "ray", "fedavg", knobs | {"runtime.host": "ray", "runtime.max_hosts": 2})
    same_results(there, serial)


def test_a_killed_run_resumes_with_the_same_bits(tmp_path, monkeypatch):
    whole = go(tmp_path / "whole", "fedavg", TOGETHER)
    work = TrainTask.run_batch

    def broken(task, *inputs):
        if task.round_num == 2:
            raise KeyboardInterrupt
        return work(task, *inputs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(TrainTask, "run_batch", broken)
        go(tmp_path / "killed", "fedavg", TOGETHER)
    resumed = go(tmp_path / "killed", "fedavg", TOGETHER)
    same_results(resumed, whole)


class Diverging(TrainTask):
    """Local training in which client 1 diverges."""

    def run_batch(self, context, shards, clients, broadcast, owns):
        found = super().run_batch(context, shards, clients, broadcast, owns)
        return [RunError("diverged", client=1) if client == 1 else r for client, r in zip(clients, found, strict=True)]


def mapped(tmp_path, task, ordered=True, **knobs):
    """Results by client of one call of ``RunContext.map`` over five clients, in the order in which they came."""
    from helpers import stripes_dataset

    from mosaic_ray.execution.placement import Placement
    from mosaic_ray.pipeline.context import FailedClients
    from mosaic_ray.pipeline.partition import deal
    from mosaic_ray.storage.store import Store
    from mosaic_ray.tracking.tracker import Tracker

    values = {"partition.num_clients": 5, "partition.omega": 10.0, **TOGETHER, **knobs}
    config, failed = override(TINY, values), FailedClients("warmup")
    with (
        Tracker(None, progress=False) as tracker,
        runner.open_run(config, stripes_dataset(), Store(str(tmp_path)), tracker, Placement()) as run,
    ):
        deal(run)
        start = Round(initial_models(run.client_context))
        found = run.map(
            task, range(5), start, lambda client: ClientRound(), failed_clients=failed, max_missing=5, ordered=ordered
        )  # fmt: skip
        return [(client, copy.deepcopy(update.weights)) for client, update in found], failed


def test_results_come_in_client_order_whatever_the_batches(tmp_path):
    mixed = {"model.classifiers": ["cnn", "mobilenet"]}  # batches (0, 2), (1, 3), (4,)
    found, failed = mapped(tmp_path, TRAIN, **mixed)
    assert [client for client, _ in found] == [0, 1, 2, 3, 4]
    assert not failed.rounds
    again, _ = mapped(tmp_path, TRAIN, ordered=False, **mixed)
    assert sorted(client for client, _ in again) == [0, 1, 2, 3, 4]
    for client, weights in again:
        assert_same(weights, dict(found)[client])


def test_a_client_that_fails_fails_alone(tmp_path):
    found, failed = mapped(tmp_path, Diverging("local", 0, PLAN))
    assert [client for client, _ in found] == [0, 2, 3, 4]
    assert list(failed.rounds) == [1]
    for client, weights in mapped(tmp_path, TRAIN)[0]:
        if client != 1:
            assert_same(weights, dict(found)[client])


def test_a_batch_that_fails_as_a_whole_fails_for_each_of_its_clients(tmp_path, monkeypatch):
    def broken(task, context, shards, clients, broadcast, owns):
        raise RunError("no memory")

    monkeypatch.setattr(TrainTask, "run_batch", broken)
    found, failed = mapped(tmp_path, TRAIN)
    assert not found
    assert sorted(failed.rounds) == [0, 1, 2, 3, 4]


def test_training_that_diverges_is_that_clients_error():
    context = ClientContext(TINY, FACTS, CPU)
    shards, start = [shard_of(stripes(32, seed)) for seed in range(2)], Round(initial_models(context))
    owns = [ClientRound(), ClientRound()]
    found = TrainTask("local", 0, replace(PLAN, lr=1e30)).run_batch(context, shards, [0, 1], start, owns)
    assert [(type(error), error.client) for error in found] == [(RunError, 0), (RunError, 1)]
    assert "diverged" in str(found[0])


# --- devices ---------------------------------------------------------------------------------------------------------


def test_clients_together_take_more_memory_and_are_measured_together():
    def work(together):
        return ClientWork(override(TINY, {"runtime.clients_per_batch": together}), FACTS, 40)

    assert estimated_bytes(work(3)) > estimated_bytes(work(2)) > estimated_bytes(work(1))
    first = next(steps_of(work(3), CPU))
    assert first.func.__name__ == "run_batch"
    assert len(first()) == 3


def test_the_warm_up_of_a_run_has_a_part_for_each_client(tmp_path):
    summary = go(tmp_path, "fedavg", TOGETHER)
    assert {f"client_{k:05d}" for k in range(3)} <= {name.split("/")[0] for name in parts(summary)}
