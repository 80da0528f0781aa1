"""Distillation: batches (O29), the guard, and equal results for any number of workers."""

from __future__ import annotations

import dataclasses
import threading

import numpy as np
import pytest
import torch
from helpers import FACTS, TINY, assert_same, generate, make_teacher, prototypes, shard_of, stripes

from mosaic_ray.config.resolve import override
from mosaic_ray.core.seeding import seeded
from mosaic_ray.core.types import Prototypes
from mosaic_ray.distillation.linear_head import fit_heads
from mosaic_ray.distillation.student_training import (
    AGAIN,
    Batcher,
    DistContext,
    DistillTask,
    distil,
    make_task,
    sample_weights,
    train_student,
)
from mosaic_ray.federated.client import ClientContext, initial_weights
from mosaic_ray.federated.evaluation import logits_on
from mosaic_ray.models.generator import build_generator
from mosaic_ray.models.state_dict import to_weights

CPU = torch.device("cpu")


def _quiet(step, metrics):
    pass


@pytest.fixture(scope="module")
def task() -> DistillTask:
    context = ClientContext(TINY, FACTS, CPU)
    weights = initial_weights(context)
    shards = [shard_of(stripes(30, k)) for k in range(3)]
    made = [generate(context, s, k, weights, weights) for k, s in enumerate(shards)]
    found = Prototypes.concatenate([prototypes(context, s, k, weights) for k, s in enumerate(shards)])
    counts = np.stack([np.bincount(s.labels, minlength=3) for s in shards])
    teacher, _ = make_teacher(TINY, FACTS, weights, [(k, weights) for k in range(3)], counts, found, _quiet)
    generators = tuple(m.weights for m in made)
    return make_task(TINY, FACTS, weights, teacher, generators, [m.figures for m in made], counts.sum(1), found)


def with_knobs(task: DistillTask, knobs: dict) -> DistillTask:
    return dataclasses.replace(task, config=override(task.config, knobs))


def test_o29_a_uniform_batch_holds_m_images_of_every_generator(task):
    config = override(TINY, {"distill.gen_sampling": "uniform", "distill.samples_per_generator": 5})
    uniform = make_task(config, FACTS, task.student, task.teacher, task.generators, [{}] * 3, np.ones(3), task.kept)
    assert uniform.counts.tolist() == [5, 5, 5]
    batcher = Batcher(uniform, DistContext(), CPU)
    images, _, labels = batcher(1)
    assert labels.shape == (0,)
    assert images.shape == (15, 1, 8, 8)
    assert not images.requires_grad
    assert all(p.grad is None for g in batcher.generators.values() for p in g.parameters())
    assert torch.equal(images, batcher(1)[0])
    assert not torch.equal(images, batcher(2)[0])


@pytest.mark.parametrize("backbone_lr", [0.0, 1e-4])
def test_o29_frozen_statistics_stay_bit_for_bit_and_train_moves_them(task, backbone_lr):
    stay = with_knobs(task, {"distill.guard": False, "distill.backbone_lr": backbone_lr})
    weights, _ = distil(stay, CPU, DistContext(), _quiet)
    running = [n for n in weights if "running" in n]
    assert running and all(np.array_equal(weights[n], task.student[n]) for n in running)
    moved, _ = distil(with_knobs(stay, {"distill.student_bn": "train"}), CPU, DistContext(), _quiet)
    assert not all(np.array_equal(moved[n], task.student[n]) for n in running)


def test_head_only_distillation_moves_the_head_alone(task):
    weights, _ = distil(with_knobs(task, {"distill.guard": False}), CPU, DistContext(), _quiet)
    moved = {n for n in weights if not np.array_equal(weights[n], task.student[n])}
    assert moved == {"head.weight", "head.bias"}


def test_o31_the_same_task_gives_the_same_student(task):
    assert_same(distil(task, CPU, DistContext(), _quiet)[0], distil(task, CPU, DistContext(), _quiet)[0])


def test_the_guard_never_hands_back_a_worse_student(task):
    """A learning rate destroys the head: unguarded the student ends worse, guarded it is the best state reached."""
    wild = with_knobs(task, {"distill.lr": 50.0, "distill.anchor_weight": 0.0, "distill.guard": False})
    _, wrecked = distil(wild, CPU, DistContext(), _quiet)
    _, guarded = distil(with_knobs(wild, {"distill.guard": True}), CPU, DistContext(), _quiet)
    assert guarded["held_out_after"] >= guarded["held_out_before"]
    assert guarded["held_out_after"] >= wrecked["held_out_after"]


def test_the_guard_returns_the_initial_student_if_none_is_better(task):
    """The head that goes in loses nothing on held-out prototypes (exp(-50) is below the last bit of 1), and its teacher
    says the contrary of it."""
    dim = task.kept.vectors.shape[1]
    perfect = task.student | {
        "head.weight": 50 * np.eye(3, dim, dtype=np.float32),
        "head.bias": np.zeros(3, np.float32),
    }
    held_out = Prototypes(np.eye(3, dim, dtype=np.float32), np.arange(3), np.ones(3, np.float32), np.arange(3))
    contrary = task.teacher.meta | {
        "skip.weight": -perfect["head.weight"], "skip.bias": perfect["head.bias"], "gain": np.zeros((), np.float32)
    }  # fmt: skip
    wild = dataclasses.replace(
        with_knobs(task, {"distill.lr": 50.0, "distill.anchor_weight": 0.0}),
        student=perfect, teacher=dataclasses.replace(task.teacher, meta=contrary), held_out=held_out, whole=None,
    )  # fmt: skip
    _, wrecked = distil(with_knobs(wild, {"distill.guard": False}), CPU, DistContext(), _quiet)
    assert (wrecked["held_out_before"], wrecked["step"]) == (1.0, TINY.distill.steps)
    assert wrecked["held_out_after"] < 1
    weights, figures = distil(wild, CPU, DistContext(), _quiet)
    assert (figures["held_out_before"], figures["held_out_after"], figures["step"]) == (1.0, 1.0, 0)
    assert_same(weights, perfect)


def test_s10_the_guard_chooses_by_loss_and_not_by_accuracy(task, monkeypatch):
    looks = iter([(0.5, 1.0), (0.9, 2.0), (0.4, 0.8), (0.8, 0.9), (1.0, 0.9)])
    module = "mosaic_ray.distillation.student_training"
    monkeypatch.setattr(f"{module}.scores", lambda *given: next(looks, (0.7, 0.7)))
    losses = iter(torch.tensor([1.0, 2.0, 0.8, 0.9, 0.9, *[0.7] * 20]).double())
    monkeypatch.setattr(f"{module}.sample_losses", lambda logits, labels: next(losses).expand(len(labels)))
    knobs = {"distill.steps": 20, "distill.check_steps": 5}
    _, figures = distil(with_knobs(task, knobs), CPU, DistContext(), _quiet)
    assert (figures["step"], figures["held_out_before"], figures["held_out_after"]) == (10, 0.5, 0.7)


@pytest.mark.parametrize("init", ["prototype_head", "random"])
def test_s1_the_student_starts_at_the_head_that_the_teacher_starts_at(task, init):
    """Where the teacher starts at random, the head is fitted for the student."""
    config = override(TINY, {"meta.init": init, "meta.updates": 0})
    weights, found = ClientContext(TINY, FACTS, CPU), Prototypes.concatenate([task.kept, task.held_out])
    weights = initial_weights(weights)
    found = dataclasses.replace(found, judges=np.arange(len(found)) >= len(task.kept))
    counts = np.full((3, 3), 10)
    teacher, _ = make_teacher(config, FACTS, weights, [(k, weights) for k in range(3)], counts, found, _quiet)
    inputs = (FACTS, weights, teacher, task.generators, [{"coverage": 1.0, "owned_mass": 1.0}] * 3, np.ones(3), found)
    started = make_task(config, *inputs)
    trial, whole, _ = fit_heads(task.kept, task.held_out, weights, "size")
    assert_same(started.student, weights | trial)
    assert_same(started.whole[0], weights | whole)
    assert started.whole[1] is teacher and started.teacher.trial_head == teacher.trial_head
    if init == "prototype_head":
        assert_same(started.teacher.meta, teacher.trial_meta)
    as_paper = make_task(override(config, {"distill.start": "global"}), *inputs)
    assert_same(as_paper.student, weights)
    assert_same(as_paper.whole[0], weights)
    student, figures = distil(with_knobs(started, {"distill.steps": 0}), CPU, DistContext(), _quiet)
    assert_same(student, weights | whole)  # without a step it is what the method prototype_head makes
    assert figures["step"] == 0


def test_s1_a_student_that_starts_as_its_teacher_has_nothing_to_copy(task):
    """The teacher is the re-fitted head: the soft loss and its gradient are 0, so that the head does not move."""
    alone = {"distill.soft_weight": 1.0, "distill.anchor_weight": 0.0, "distill.guard": False}
    head = {f"skip.{name}": task.student[f"head.{name}"] for name in ("weight", "bias")}
    meta = task.teacher.meta | head | {"gain": np.zeros((), np.float32)}
    teacher = dataclasses.replace(task.teacher, meta=meta)
    same = with_knobs(dataclasses.replace(task, teacher=teacher, whole=None), alone)
    losses = []

    def note(step, metrics):
        losses.append(metrics["loss"])

    weights, _ = distil(same, CPU, DistContext(), note)
    assert max(map(abs, losses)) < 1e-5
    np.testing.assert_allclose(weights["head.weight"], task.student["head.weight"], atol=0.02)
    distil(dataclasses.replace(same, student=task.teacher.backbone), CPU, DistContext(), note)
    assert losses[-1] > 0.01


def test_s9_the_student_takes_the_steps_that_were_chosen_again_on_all_prototypes(task):
    chosen, figures = train_student(task, CPU, DistContext(), _quiet, 10)
    student, teacher = task.whole
    none, every = task.held_out.take(np.arange(0)), Prototypes.concatenate([task.kept, task.held_out])
    whole = dataclasses.replace(task, student=student, teacher=teacher, kept=every, held_out=none, whole=None)
    expected, _ = train_student(whole, CPU, DistContext(), _quiet, int(figures["step"]), guard=False)
    found, found_figures = distil(task, CPU, DistContext(), _quiet)
    assert_same(found, expected)
    assert found_figures == figures
    assert not np.array_equal(found["head.weight"], chosen["head.weight"])


def test_the_second_training_counts_its_steps_on(task):
    reported = []
    free = with_knobs(task, {"distill.guard": False})  # the last step is taken
    distil(free, CPU, DistContext(), lambda step, metrics: reported.append((step, metrics)))
    steps, many = [step for step, _ in reported], free.config.distill.steps
    assert steps == sorted(set(steps)) and steps[-1] == 2 * many
    assert [metrics.get(AGAIN) == many for step, metrics in reported] == [step > many for step in steps]
    assert all("loss" in metrics for _, metrics in reported)


def test_s2_labels_that_were_asked_for_move_the_target_where_they_have_weight(task):
    """Conditional generators asked for class 2 alone: with nearly all weight on labels the student names it."""
    alone = {"generator.conditional": True, "distill.guard": False, "distill.anchor_weight": 0.0}
    config = override(task.config, alone)
    with seeded(0, "test", "generator"):
        made = to_weights(build_generator(config.generator, 1, 8, 3))
    made["label_cdf"] = np.array([0.0, 0.0, 1.0])
    asked = dataclasses.replace(task, config=config, generators=(made,) * 3, whole=None)
    seen = []
    for weight in (0.0, 0.99):
        knobs = {"distill.label_weight": weight, "distill.lr": 0.5}
        student, _ = distil(with_knobs(asked, knobs), CPU, DistContext(), _quiet)
        images, _, labels = Batcher(asked, DistContext(), CPU)(1)
        assert set(labels.tolist()) == {2}
        with torch.no_grad():
            named = ClientContext(TINY, FACTS, CPU).classifier(student).eval()(images).argmax(1)
        seen.append(float((named == 2).float().mean()))
    assert seen[1] == 1 > seen[0]


def test_s8_the_guard_judges_moving_features_by_validation_images(task):
    """A wild backbone: its last state is worse on images, while the head on old features may look fine."""
    wild = with_knobs(task, {"distill.backbone_lr": 1.0, "distill.lr": 1e-6, "distill.anchor_weight": 0.0})
    wild = dataclasses.replace(wild, whole=None)

    def loss_on_images(weights) -> float:
        network = ClientContext(TINY, FACTS, CPU).classifier(weights).eval()
        logits = torch.tensor(logits_on(network, images, FACTS, CPU))
        return float(torch.nn.functional.cross_entropy(logits, torch.tensor(images.labels)))

    images = stripes(30, 9)
    last, blind = distil(wild, CPU, DistContext(), _quiet)
    assert (blind["unguarded"], blind["step"]) == (1, TINY.distill.steps)
    assert loss_on_images(last) > loss_on_images(task.student)
    chosen, figures = distil(dataclasses.replace(wild, validation=images), CPU, DistContext(), _quiet)
    assert (figures["unguarded"], figures["step"]) == (0, 0)
    assert_same(chosen, task.student)
    frozen, _ = distil(dataclasses.replace(task, validation=images), CPU, DistContext(), _quiet)
    assert_same(frozen, distil(task, CPU, DistContext(), _quiet)[0])  # features that stay are judged by prototypes


def test_balanced_weights_give_each_class_seen_the_same_say():
    logits = torch.eye(3)[[0, 0, 0, 1]] * 10
    weights = sample_weights(logits, 0.0, True, DistContext())
    torch.testing.assert_close(weights, torch.tensor([1 / 3, 1 / 3, 1 / 3, 1.0]))
    assert sample_weights(logits, 0.0, False, DistContext()).tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("counts", [(40, 10, 1, 0), (100, 0, 0, 0), (9, 9, 9, 9), (60, 4, 4, 2)])
def test_s7_no_image_counts_more_than_four_times_its_share(counts):
    labels = torch.repeat_interleave(torch.arange(4), torch.tensor(counts))
    weights = sample_weights(10 * torch.eye(4)[labels], 0.0, True, DistContext())
    named = [count for count in counts if count]
    equal = sum(named) / len(named)
    for label, count in enumerate(counts):
        total = float(weights[labels == label].sum())
        assert total == pytest.approx(min(1.0, 4 * count / equal), rel=1e-5), "of a whole class's 1"


def test_images_that_the_teacher_is_unsure_of_are_left_out():
    logits = torch.tensor([[10.0, 0, 0], [0.1, 0, 0]])
    assert sample_weights(logits, 0.9, False, DistContext()).tolist() == [1, 0]


class _Group:
    """Workers as threads of this process that add up their tensors at a barrier."""

    def __init__(self, size: int) -> None:
        self.size, self.barrier, self.slots = size, threading.Barrier(size), [None] * size

    def peer(self, rank: int) -> DistContext:
        def sum_(tensor: torch.Tensor) -> None:
            self.slots[rank] = tensor.detach().clone()
            self.barrier.wait()
            total = sum(self.slots[1:], self.slots[0].clone())
            self.barrier.wait()
            tensor.copy_(total)

        return DistContext(rank, self.size, sum_)


@pytest.mark.parametrize("backbone_lr", [0.0, 1e-4])
def test_two_workers_end_where_one_ends(task, backbone_lr):
    task = with_knobs(task, {"distill.guard": False, "distill.backbone_lr": backbone_lr})
    alone, _ = distil(task, CPU, DistContext(), _quiet)
    group, ends = _Group(2), [None, None]

    def work(rank: int) -> None:
        ends[rank] = distil(task, CPU, group.peer(rank), _quiet)[0]

    threads = [threading.Thread(target=work, args=(r,)) for r in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert_same(ends[0], ends[1])
    for name, value in alone.items():
        np.testing.assert_allclose(ends[0][name], value, atol=2e-4, err_msg=name)
