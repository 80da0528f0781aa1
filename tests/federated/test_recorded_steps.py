"""Local steps that are recorded and replayed: the same bits as steps that are taken one by one.

CUDA graphs need a GPU. Elsewhere a recorder stands in that, like them, does nothing while it records and reads the same
tensors whenever it replays.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import FACTS, TINY, assert_same, shard_of, stripes
from torch import nn

from mosaic_ray.config.registry import CLASSIFIERS
from mosaic_ray.config.resolve import override
from mosaic_ray.config.schema import ModelConfig
from mosaic_ray.execution import gpu_memory
from mosaic_ray.federated import client
from mosaic_ray.federated.client import ClientContext, ClientRound, Round, TrainTask, initial_models, initial_weights
from mosaic_ray.federated.local_training import LocalTrainingConfig, Rehearsed, train_locally
from mosaic_ray.federated.recorded_steps import WARM_UP, RecordedStep, record_cuda_graph
from mosaic_ray.models.classifiers import build_classifier
from mosaic_ray.models.state_dict import to_weights

PLAN = LocalTrainingConfig(14, 16, 0.05, 1e-3, 0.9)
SYNTHETIC = Rehearsed(shard_of(stripes(20, 9)), 5, 0.5)


class StandIn:
    """Records work without doing it."""

    def __init__(self) -> None:
        self.recordings = self.replays = 0

    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        self.recordings += 1

        def replay() -> None:
            self.replays += 1
            work()

        return replay


def trained(record: Any = None, plan: LocalTrainingConfig = PLAN, size: int = 40, **knobs: Any) -> Any:
    context = ClientContext(TINY, FACTS, torch.device("cpu"))
    model = context.classifier(initial_weights(context))
    facts = knobs.pop("facts", FACTS)
    shard, address = shard_of(stripes(size)), (0, "local", 2, 1)
    figures = train_locally(model, shard, plan, facts, address, "fp32", record=record, **knobs)
    return to_weights(model), figures


@pytest.mark.parametrize(
    "knobs",
    [
        {}, {"size": 48}, {"plan": replace(PLAN, momentum=0.0)}, {"plan": replace(PLAN, freeze_head=True)},
        {"plan": replace(PLAN, loss="adjusted")}, {"masked": True}, {"rehearsed": SYNTHETIC},
        {"facts": replace(FACTS, augmentations=("crop", "flip"))},
    ],
    ids=str,
)  # fmt: skip
def test_recorded_steps_give_the_same_bits(knobs):
    record = StandIn()
    (weights, figures), (expected, known) = trained(record, **knobs), trained(**knobs)
    assert_same(weights, expected)
    assert figures == known and figures["steps"] == 14
    sizes = 1 if knobs.get("size") == 48 else 2  # 40 images: mini-batches of 16, 16 and 8
    assert record.recordings == sizes
    assert record.replays == 14 - WARM_UP * sizes


def test_few_steps_are_not_recorded():
    record = StandIn()
    trained(record, replace(PLAN, steps=WARM_UP), 48)
    assert record.recordings == 0


def test_a_replay_reads_what_it_is_given_and_leaves_it():
    total, given = torch.zeros(2), [torch.full((2,), float(n)) for n in range(8)]
    step = RecordedStep(lambda x: total.add_(x), lambda work: work)
    for x in given:
        step(x)
    assert total.tolist() == [28, 28]
    assert [x[0].item() for x in given] == list(range(8))


def test_inputs_of_each_shape_are_recorded_once():
    record, seen = StandIn(), []
    step = RecordedStep(lambda *x: seen.append([len(part) for part in x]), record)
    for _ in range(WARM_UP + 2):
        step(torch.zeros(4), torch.zeros(3))
        step(torch.zeros(4), torch.zeros(1))
    assert record.recordings == 2 and record.replays == 4
    assert seen == [[4, 3], [4, 1]] * (WARM_UP + 2)


def test_no_network_that_is_recorded_draws_numbers():
    for name in CLASSIFIERS:
        model = build_classifier(ModelConfig(name, width=4), 3, 1, 8)
        assert not [part for part in model.modules() if isinstance(part, nn.modules.dropout._DropoutNd)]


@pytest.mark.parametrize(
    "device, knobs, recorded",
    [
        ("cuda", {"runtime.cuda_graphs": True}, True),
        ("cpu", {"runtime.cuda_graphs": True}, False),
        ("cuda", {}, False),
        ("cuda", {"runtime.cuda_graphs": True, "federation.strategy": "scaffold"}, False),
        ("cuda", {"runtime.cuda_graphs": True, "federation.strategy": "fedrolex"}, True),
    ],
)
def test_plain_steps_on_a_gpu_are_recorded_where_it_is_asked(device, knobs, recorded):
    context = ClientContext(override(TINY, knobs), FACTS, torch.device(device))
    found = TrainTask("local", 0, PLAN)._recorder(context, 0)
    assert found is (record_cuda_graph if recorded else None)


def test_a_client_trains_with_the_recorder_that_it_is_given(monkeypatch):
    context, shard = ClientContext(TINY, FACTS, torch.device("cpu")), shard_of(stripes(48))
    start, task = Round(initial_models(context)), TrainTask("local", 0, PLAN)
    expected, record = task.run(context, shard, 0, start, ClientRound()), StandIn()
    monkeypatch.setattr(client.TrainTask, "_recorder", lambda *_: record)
    assert_same(task.run(context, shard, 0, start, ClientRound()).weights, expected.weights)
    assert record.recordings == 1


def test_a_clients_memory_is_measured_with_a_recorded_step():
    assert gpu_memory.STEPS > WARM_UP + 1
