"""Clients train parts of global models, and rounds average them (docs/algorithm.md 3.5 to 3.7, O24, O25)."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers import FACTS, TINY, assert_same, shard_of, stripes
from torch import nn

from mosaic_ray.config.resolve import override
from mosaic_ray.core.errors import RequestError
from mosaic_ray.core.types import Update
from mosaic_ray.distillation.teacher import MixedTeacher, MixedTeacherNet, TeacherState, build_teacher, group_shares
from mosaic_ray.federated.client import ClientContext, ClientRound, Round, TrainTask, initial_models
from mosaic_ray.federated.client_models import Federation, RoundAggregator, RoundStart, group_counts
from mosaic_ray.federated.local_training import LocalTrainingConfig, train_locally
from mosaic_ray.models.classifiers import Classifier
from mosaic_ray.models.state_dict import to_weights

PLAN = LocalTrainingConfig(2, 16, 0.05)
SCHEMES = ("fedrolex", "heterofl", "feddropout")
COUNTS = np.full((4, 3), 5)


def federation(optimiser: str = "fedrolex", **knobs) -> Federation:
    named = {"federation.optimiser": optimiser, "partition.num_clients": 4} | {
        name.replace("__", "."): value for name, value in knobs.items()
    }
    return Federation(override(TINY, named), FACTS)


def bench_of(made: Federation) -> ClientContext:
    return ClientContext(made.config, made.facts, torch.device("cpu"))


@pytest.mark.parametrize("optimiser", SCHEMES)
def test_a_round_of_untrained_clients_changes_nothing(optimiser):
    made = federation(optimiser, federation__widths=(1.0, 0.5, 0.25))
    models = initial_models(bench_of(made))
    fold = RoundAggregator(RoundStart(made, models, {}, "local", 3, COUNTS))
    for k in range(4):
        weights = made.submodel(k, models, made.indices(k, "local", 3))
        fold.add(Update(k, weights, 7 + k))
    assert_same(fold.result()["cnn"], models["cnn"])


@pytest.mark.parametrize("optimiser", SCHEMES)
def test_a_narrow_client_moves_its_own_coordinates_and_no_other(optimiser):
    made = federation(optimiser, federation__widths=(0.5,))
    context, models = bench_of(made), initial_models(bench_of(made))
    sets = made.indices(1, "local", 2)
    task = TrainTask("local", 2, PLAN)
    update = task.run(context, shard_of(stripes(40)), 1, Round(models), ClientRound(sets))
    fold = RoundAggregator(RoundStart(made, models, {}, "local", 2, COUNTS))
    fold.add(update)
    after, before = fold.result()["cnn"], models["cnn"]
    shapes = {name: (value.shape, update.weights[name].shape) for name, value in before.items()}
    assert shapes["trunk.3.weight"] == ((4, 4, 3, 3), (2, 2, 3, 3))
    assert shapes["head.weight"] == ((3, 16), (3, 8)) and shapes["head.bias"] == ((3,), (3,))
    for name, value in before.items():
        moved = int((after[name] != value).sum())
        assert moved <= update.weights[name].size, name
        if name.endswith("weight") and value.ndim > 1:
            assert moved > 0.9 * update.weights[name].size, name
    again = made.submodel(1, {"cnn": after}, sets)
    assert_same(again, update.weights)


def test_clients_of_a_width_share_a_window_that_rolls_and_dropouts_differ():
    rolex, dropout = (federation(name, federation__widths=(0.5,)) for name in ("fedrolex", "feddropout"))
    windows = [[made.indices(k, "local", r) for k in (0, 1) for r in (0, 1)] for made in (rolex, dropout)]
    first, rolled, same, _ = windows[0]
    assert all(map(np.array_equal, first, same)) and not all(map(np.array_equal, first, rolled))
    first, other_round, other_client, _ = windows[1]
    assert not all(map(np.array_equal, first, other_round)) and not all(map(np.array_equal, first, other_client))
    assert all(map(np.array_equal, first, dropout.indices(0, "local", 0)))
    assert not all(map(np.array_equal, first, dropout.indices(0, "closing", 0)))


def test_architectures_are_averaged_apart_and_one_without_clients_keeps_its_weights():
    made = federation("fedavg", model__classifiers=("cnn", "mobilenet"))
    models = initial_models(bench_of(made))
    fold = RoundAggregator(RoundStart(made, models, {}, "local", 0, COUNTS))
    for k, factor in ((0, 1.0), (2, 3.0)):
        moved = {n: (v * factor).astype(v.dtype) for n, v in models["cnn"].items()}
        fold.add(Update(k, moved, 1))
    after = fold.result()
    np.testing.assert_allclose(after["cnn"]["head.weight"], 2 * models["cnn"]["head.weight"], rtol=1e-6)
    assert_same(after["mobilenet"], models["mobilenet"])


def test_masked_clients_leave_out_what_they_do_not_hold():
    made = federation("fedavg", federation__masked=True)
    models = initial_models(bench_of(made))
    counts = np.array([[5, 0, 0], [5, 5, 0], [0, 0, 0], [0, 0, 0]])
    fold = RoundAggregator(RoundStart(made, models, {}, "local", 0, counts))
    for k, value in ((0, 1.0), (1, 4.0)):
        fold.add(Update(k, {n: np.full_like(v, value) for n, v in models["cnn"].items()}, 10))
    head = fold.result()["cnn"]["head.bias"]
    np.testing.assert_array_equal(head[:2], [2.5, 4.0])
    assert head[2] == models["cnn"]["head.bias"][2]


def test_masked_loss_by_hand():
    data = stripes(40).take(np.flatnonzero(stripes(40).labels != 2))
    shard = shard_of(data)
    net = Classifier(nn.Flatten(), nn.Linear(64, 3))
    logits = net(((shard.images.float() / 255) - 0.4) / 0.35).detach()
    logits[:, 2] = 0.0
    wanted = float(nn.functional.cross_entropy(logits, shard.labels))
    bias = net.head.bias.detach().clone()
    metrics = train_locally(net, shard, LocalTrainingConfig(1, 40, 0.1), FACTS, (0, "local", 0, 0), "fp32", masked=True)
    assert math.isclose(metrics["loss"], wanted, rel_tol=1e-5)
    assert net.head.bias[2] == bias[2] and net.head.bias[0] != bias[0]


def test_networks_that_cannot_be_cut_are_refused_in_one_line():
    made = federation("fedrolex", federation__widths=(1.0, 0.05))
    with pytest.raises(RequestError, match=r"^federation\.widths = 0\.05[^\n]*$"):
        made.check()
    federation("fedrolex", federation__widths=(1.0, 0.5)).check()


# --- teachers of several architectures -------------------------------------------------------------------------------


def test_shares_of_architectures_by_hand():
    counts = np.array([[6, 0, 0], [2, 4, 0], [0, 4, 0]])
    np.testing.assert_allclose(group_shares(counts, [(0, 2), (1,)]), [[0.75, 0.5, 10 / 16], [0.25, 0.5, 6 / 16]])
    np.testing.assert_array_equal(group_counts(counts, (0, 2)), [[6, 0, 0], [0, 0, 0], [0, 4, 0]])


class Fixed(nn.Module):
    """Return the same logits for every image, or the given features."""

    def __init__(self, logits: list[float]) -> None:
        super().__init__()
        self.logits = torch.tensor(logits)

    def forward(self, images, features=None):
        return self.logits.expand(len(images), -1) if features is None else features


def test_a_mixed_teacher_is_the_weighted_sum_of_log_probabilities():
    context = bench_of(federation("fedavg", model__classifiers=("cnn", "mobilenet"), meta__init="random"))
    states = []
    for name, weights in initial_models(context).items():
        head = {n: v for n, v in weights.items() if n.startswith("head.")}
        from mosaic_ray.distillation.meta_model import Teacher

        meta = Teacher(3, 3, context.config.meta, head["head.weight"].shape[1])
        states.append(TeacherState(weights, (head,), np.zeros(3, np.int64), to_weights(meta), name))
    shares = np.array([[0.25, 1.0, 0.0], [0.75, 0.0, 1.0]])
    net = build_teacher(context.config, FACTS, MixedTeacher(tuple(states), shares, 0))
    images = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    single = [build_teacher(context.config, FACTS, state)(images).log_softmax(1) for state in states]
    wanted = sum(torch.tensor(s, dtype=torch.float32) * one for s, one in zip(shares, single, strict=True))
    torch.testing.assert_close(net(images), wanted)
    assert net.reads_student_features(states[0].backbone) and not net.reads_student_features(
        {n: v + 1 for n, v in states[0].backbone.items()}
    )
    net.groups[0], net.groups[1] = Fixed([0.0, 0.0, 0.0]), Fixed([1.0, 2.0, 3.0])
    logits = torch.tensor([[5.0, 0.0, 0.0]])
    got = net(images[:1], logits)
    other = torch.tensor([1.0, 2.0, 3.0]).log_softmax(0)
    left, right = (torch.tensor(row).float() for row in shares)
    torch.testing.assert_close(got[0], left * logits[0].log_softmax(0) + right * other)


def test_s12_teachers_without_a_class_in_common_are_weighed_by_the_label_asked_for():
    """By class they tie on an image of class 0: each is sure of a class of its own. By label the owner answers."""
    net = MixedTeacherNet.__new__(MixedTeacherNet)
    torch.nn.Module.__init__(net)
    net.groups = torch.nn.ModuleList([Fixed([9.0, 0.0, 0.0]), Fixed([0.0, 9.0, 0.0])])
    net.student, net.shares = 0, torch.tensor([[1.0, 0.0, 0.5], [0.0, 1.0, 0.5]])
    images = torch.zeros(3, 1, 8, 8)
    by_class, asked = net(images)[0], torch.tensor([0, 1, 2])
    torch.testing.assert_close(by_class[0], by_class[1])
    found = net(images, None, asked)
    ours, theirs = (group(images)[0].log_softmax(0) for group in net.groups)
    torch.testing.assert_close(found, torch.stack([ours, theirs, (ours + theirs) / 2]))
    assert found[:2].argmax(1).tolist() == [0, 1]
