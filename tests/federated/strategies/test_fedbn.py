"""FedBN (docs/algorithm.md 3.3, O22)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import FACTS, TINY, assert_same
from strategy_runs import differs, go, is_fedavg, resumes, same_on_ray, some, start_of, student, warmed_up

from mosaic_ray.config.plugins import strategy_named
from mosaic_ray.config.resolve import override
from mosaic_ray.config.schema import ExperimentConfig
from mosaic_ray.config.validate import check
from mosaic_ray.core.errors import RequestError
from mosaic_ray.federated.client import ClientContext, TrainTask, initial_weights
from mosaic_ray.federated.local_training import LocalTrainingConfig
from mosaic_ray.federated.strategies.fedbn import KeptBatchNorms

NORMS = ("trunk.1.", "trunk.4.", "trunk.8.", "trunk.11.", "trunk.15.", "trunk.18.")


def test_o22_batch_norms_stay_and_all_else_is_shared(tmp_path, monkeypatch):
    """A client's batch norms begin a round as they ended its last; all other entries are the server's."""
    begun, ended, strategy = {}, {}, strategy_named("fedbn")
    train, objective = TrainTask.run, type(strategy).objective

    def watched(self, start):
        begun[start.round_num, start.client_id] = {n: v.numpy().copy() for n, v in start.model.state_dict().items()}
        return objective(self, start)

    def run(task, context, shard, client_id, broadcast, own):
        update = train(task, context, shard, client_id, broadcast, own)
        ended[task.round_num, client_id] = update.weights, broadcast.models["cnn"]
        return update

    monkeypatch.setattr(type(strategy), "objective", watched)
    monkeypatch.setattr(TrainTask, "run", run)
    go(tmp_path, "fedbn", {"finetune.num_rounds": 0})
    for (round_num, k), weights in begun.items():
        _, sent = ended[round_num, k]
        for name, value in weights.items():
            own = name.startswith(NORMS) and round_num
            expected = ended[round_num - 1, k][0] if own else sent
            assert np.array_equal(value, expected[name]), (round_num, k, name)
    assert len(begun) == 9
    assert any(not np.array_equal(begun[1, 0][n], begun[1, 1][n]) for n in begun[1, 0])


def test_o22_layers_are_found_by_type():
    config = override(ExperimentConfig(), {"model.classifier": "resnet18", "model.width": 4})
    context = ClientContext(config, FACTS, torch.device("cpu"))
    weights = initial_weights(context)
    start, _ = start_of(context, some(2, 2, 2), context.classifier(weights), LocalTrainingConfig(1, 6, 0.1))
    _, state = KeptBatchNorms().finish(start.model, 1)
    assert len(state) == 20 * 5 and state.keys() < weights.keys()
    assert sum("shortcut" in name for name in state) == 15
    assert {name.rpartition(".")[2] for name in state} == {
        "weight", "bias", "running_mean", "running_var", "num_batches_tracked",
    }  # fmt: skip


def test_a_network_without_batch_norm_is_fedavgs_bit_for_bit(tmp_path, networks):
    found = is_fedavg(tmp_path, "fedbn", {"model.classifier": "strategy_networks:plain"})
    assert found["communication_bytes"] == go(tmp_path, "fedavg", {"model.classifier": "strategy_networks:plain"})[
        "communication_bytes"
    ]  # fmt: skip


@pytest.mark.parametrize("bn", ["running", "exact"])
def test_the_first_round_is_fedavgs_and_the_second_is_not(tmp_path, bn):
    found = is_fedavg(tmp_path, "fedbn", {"warmup.num_rounds": 1, "finetune.num_rounds": 0, "warmup.bn": bn})
    plain = go(tmp_path, "fedavg", {"warmup.num_rounds": 1, "finetune.num_rounds": 0, "warmup.bn": bn})
    assert found["communication_bytes"] == plain["communication_bytes"]
    differs(tmp_path, "fedbn", {"warmup.num_rounds": 2, "warmup.bn": bn})


def test_personal_models_are_the_global_one_with_the_clients_batch_norms(tmp_path):
    found = go(tmp_path, "fedbn")
    result = warmed_up(found)
    state = result.load("state_00001")
    assert {name for name in state if not name.startswith(NORMS)} == set() and len(state) == 30
    assert_same(state, {name: result.load("client_00001")[name] for name in state})
    personal = strategy_named("fedbn").personal(result.load("global"), state)
    assert_same(personal, result.load("global") | state)
    assert len(found["personal_accuracy"]["clients"]) == 3


@pytest.mark.parametrize("bn", ["frozen", "running", "exact"])
def test_closing_rounds_treat_statistics_by_their_knob(tmp_path, bn):
    found = go(tmp_path, "fedbn", {"finetune.bn": bn})
    before, after = warmed_up(found).load("global"), student(found)
    assert all(np.array_equal(before[n], after[n]) for n in before if "running" in n) is (bn == "frozen")
    assert ("statistics" in found["communication_bytes"]["uplink"]) is (bn == "exact")
    assert found["communication"]["measured_over_predicted"] == 1


def test_a_killed_run_resumes_bit_for_bit(tmp_path):
    resumes(tmp_path, "fedbn", {"federation.cohort_size": 2})


@pytest.mark.ray
def test_ray_and_serial_agree_bit_for_bit(tmp_path, ray_up):
    same_on_ray(tmp_path, "fedbn")


@pytest.mark.parametrize(
    "strategy, knobs",
    [
        ("fedbn", {"federation.cohort_size": 1, "federation.drop_rate": 0.3}),
        ("fedbn", {"model.classifiers": ("cnn", "mobilenet", "cnn")}),
        ("fedbn+fedrs", {}),
        ("fedbn", {"method": "prototype_head"}),
    ],
)
def test_it_works_with(tmp_path, strategy, knobs):
    found = go(tmp_path, strategy, knobs)
    assert found["communication"]["measured_over_predicted"] == 1
    assert all(np.isfinite(value).all() for value in student(found).values())
    assert 0 <= found["personal_accuracy"]["own"] <= 1


@pytest.mark.parametrize(
    "knobs, message",
    [
        ({"federation.widths": (0.5,)}, "federation.widths = [0.5]: fedbn trains whole models"),
        ({"federation.strategy": "fedbn+fedprox"}, "fedbn and fedprox cannot be combined, both set objective"),
        ({"federation.strategy": "fedbn+local"}, "fedbn and local cannot be combined, both set receive"),
    ],
)
def test_bad_requests_are_refused_in_one_line(knobs, message):
    with pytest.raises(RequestError) as caught:
        check(override(TINY, {"federation.strategy": "fedbn"} | knobs))
    assert message in str(caught.value) and "\n" not in str(caught.value)
