"""Rehearsal: what clients lack, whose generators draw it, the loss, and whole runs."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import FACTS, TINY, assert_same, interrupted, shard_of, stripes, stripes_dataset
from safetensors.numpy import load_file

from mosaic_ray.config.resolve import override, resolve
from mosaic_ray.config.validate import check
from mosaic_ray.core.errors import RequestError
from mosaic_ray.core.seeding import numpy_stream, seeded
from mosaic_ray.data.transforms import normalise
from mosaic_ray.distillation.rehearsal import SharedGenerators, allocate_draws, lacking_classes, rehearsal_images
from mosaic_ray.federated.client import ClientContext, OnPart, ScoreTask, Task, TrainTask, held_back
from mosaic_ray.federated.local_training import LocalTrainingConfig, Rehearsed, Shard, train_locally
from mosaic_ray.methods.rehearsal_choice import best
from mosaic_ray.models.classifiers import build_classifier
from mosaic_ray.models.generator import build_generator
from mosaic_ray.models.state_dict import to_weights
from mosaic_ray.runs import runner
from mosaic_ray.runs.plan import stage_keys
from mosaic_ray.storage.store import Store

CPU = torch.device("cpu")
ON = {
    "generator.family": "cvae", "generator.ngf": 4, "generator.ndf": 4, "generator.steps": 20, "distill.steps": 2,
    "meta.updates": 2, "rehearsal.weight": 1.0, "finetune.lr": 0.02, "finetune.bn": "exact",
    "finetune.head": "lda_head", "warmup.checkpoint_rounds": 1, "runtime.eval_rounds": 0,
}  # fmt: skip


@pytest.fixture(autouse=True)
def stripes_as_data(monkeypatch):
    monkeypatch.setattr("mosaic_ray.data.load.load_dataset", lambda config: stripes_dataset())


def go(folder: Path, **knobs: Any) -> dict[str, Any]:
    config = override(TINY, ON | {name.replace("__", "."): value for name, value in knobs.items()})
    return runner.run(config, storage=str(folder), progress=False)


def student(summary: dict[str, Any]) -> dict[str, np.ndarray]:
    return load_file(Path(summary["paths"]["run"]) / "student.safetensors")


def test_a_class_below_a_tenth_of_an_equal_share_is_lacking():
    assert lacking_classes(np.array([100, 0, 3, 4])).tolist() == [1]  # an equal share is 26.75
    assert lacking_classes(np.array([100, 0, 2, 4])).tolist() == [1, 2]
    assert lacking_classes(np.array([5, 5])).tolist() == []


def test_labels_spread_evenly_and_generators_by_their_images():
    counts = np.array([[900, 0, 300, 0], [0, 50, 100, 0], [500, 4, 0, 7]])
    shared = SharedGenerators(({}, {}, {}), (0, 2, 5), counts)
    places, labels = allocate_draws(shared, 5, [1, 2, 3], 4000, numpy_stream(0, "test"))
    # class 3 is held by client 5 itself alone; client 5's own generator draws nothing
    assert np.bincount(labels, minlength=4).tolist() == [0, 2000, 2000, 0]
    assert set(places[labels == 1]) == {1} and set(places) == {0, 1}
    assert abs((places[labels == 2] == 0).mean() - 0.75) < 0.04
    places, labels = allocate_draws(shared, 0, [1], 10, numpy_stream(0, "test"))
    assert set(places) == {1}  # four images are too few to be asked for
    assert len(allocate_draws(shared, 5, [3], 10, numpy_stream(0, "test"))[0]) == 0


def test_images_are_a_function_of_their_address():
    config = override(TINY, ON)
    with seeded(0, "generator"):
        weights = to_weights(build_generator(config.generator, FACTS.channels, FACTS.image_size, FACTS.num_classes))
    shared = SharedGenerators((weights, weights), (1, 2), np.array([[9, 9, 0], [0, 0, 9]]))
    first, again, other = (
        rehearsal_images(config, FACTS, shared, np.array([50, 0, 0]), ("closing", number, 0), 12, CPU)
        for number in (3, 3, 4)
    )
    assert torch.equal(first.images, again.images) and torch.equal(first.labels, again.labels)
    assert not torch.equal(first.images, other.images)
    assert first.images.dtype == torch.uint8 and torch.bincount(first.labels).tolist() == [0, 6, 6]
    assert rehearsal_images(config, FACTS, shared, np.array([9, 9, 9]), ("closing", 3, 0), 12, CPU) is None


def test_weight_zero_with_frozen_batch_norm_is_plain_training():
    shard, extra = shard_of(stripes(40)), shard_of(stripes(24, seed=1))
    plan = LocalTrainingConfig(4, 8, 0.05, momentum=0.9, freeze_bn=True)

    def trained(rehearsed: Rehearsed | None) -> dict[str, np.ndarray]:
        with seeded(0, "init"):
            model = build_classifier(TINY.model, FACTS.num_classes, FACTS.channels, FACTS.image_size)
        train_locally(model, shard, plan, FACTS, (0, "test", 0, 0), "fp32", rehearsed=rehearsed)
        return to_weights(model)

    plain, nothing, some = trained(None), trained(Rehearsed(extra, 8, 0.0)), trained(Rehearsed(extra, 8, 1.0))
    for name, value in plain.items():
        np.testing.assert_allclose(nothing[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
    assert any(not np.allclose(some[name], value) for name, value in plain.items())


def test_the_control_and_the_stages_before_do_not_follow_rehearsal():
    before, after = (stage_keys(override(TINY, ON | {"rehearsal.weight": w})) for w in (0.5, 1.0))
    assert {name for name in before if before[name] != after[name]} == {
        "finetune", "closing_statistics", "closing_head", "evaluate",
    }  # fmt: skip
    off = stage_keys(override(TINY, ON | {"rehearsal.weight": 0.0}))
    changed = stage_keys(override(TINY, ON | {"rehearsal.weight": 0.0, "rehearsal.ratio": 2.0}))
    assert off == changed


def test_a_run_counts_its_bytes_and_resumes_with_the_same_numbers(tmp_path):
    undisturbed = go(tmp_path / "whole", finetune__num_rounds=3)
    assert undisturbed["communication"]["measured_over_predicted"] == 1
    tally = Store(str(tmp_path / "whole")).get(undisturbed["stages"]["finetune"]["key"]).facts["communication"]
    assert tally["downlink"]["generators"] == 2 * undisturbed["communication_bytes"]["uplink"]["generators"]
    go(tmp_path / "killed", finetune__num_rounds=3, rehearsal__weight=0.0, method="fedavg")  # warm-up and control
    with interrupted(in_round=2):
        go(tmp_path / "killed", finetune__num_rounds=3)
    assert_same(student(go(tmp_path / "killed", finetune__num_rounds=3)), student(undisturbed))
    plain = go(tmp_path / "whole", finetune__num_rounds=3, rehearsal__weight=0.0)
    assert plain["accuracy"]["control"] == undisturbed["accuracy"]["control"]
    assert not all(np.array_equal(v, student(plain)[n]) for n, v in student(undisturbed).items())


@pytest.mark.ray
def test_serial_and_ray_agree_bit_for_bit(tmp_path, ray_up):
    serial = go(tmp_path / "serial", runtime__host="serial")
    assert_same(student(go(tmp_path / "ray", runtime__host="ray")), student(serial))


#: A request that chooses the weight by trials.
CHOICE = {"rehearsal__weight": 0.0, "rehearsal__candidates": (0.3, 1.0), "rehearsal__trial_rounds": 2}


def test_a_client_holds_back_the_same_share_of_each_class_for_every_task():
    labels = np.repeat([0, 1, 2], [40, 9, 19])
    mask = held_back(labels, 0.1, 7, 3)
    assert np.bincount(labels[mask], minlength=3).tolist() == [4, 0, 1]  # floor(0.1 n) of each class
    assert np.array_equal(mask, held_back(labels, 0.1, 7, 3))
    assert not np.array_equal(mask, held_back(labels, 0.1, 7, 4))
    assert not np.array_equal(mask, held_back(labels, 0.1, 8, 3))


@dataclass(frozen=True)
class Seen(Task[None, None, np.ndarray]):
    """Return the pixel sums of the images that the task sees."""

    def run(self, context: ClientContext, shard: Shard, client_id: int, broadcast: None, own: None) -> np.ndarray:
        return shard.images.float().sum((1, 2, 3)).numpy()


def test_a_task_sees_either_the_held_back_images_or_the_others():
    config, shard = override(TINY, ON), shard_of(stripes(60))
    context = ClientContext(config, FACTS, CPU)
    rest, back = (OnPart(Seen(), 0.2, held).run(context, shard, 1, None, None) for held in (False, True))
    everything = Seen().run(context, shard, 1, None, None)
    assert len(rest) and len(back) and sorted([*rest, *back]) == sorted(everything)


def test_a_failure_in_a_trial_names_its_round():
    task = TrainTask("trial", 3, LocalTrainingConfig(1, 8, 0.05))
    assert OnPart(task, 0.1).round_num == 3
    assert OnPart(Seen(), 0.1).round_num is None


def test_scores_are_counts_and_cross_entropy_by_brute_force():
    config, shard = override(TINY, ON), shard_of(stripes(30))
    context = ClientContext(config, FACTS, CPU)
    with seeded(0, "score"):
        models = tuple(to_weights(build_classifier(config.model, FACTS.num_classes, FACTS.channels, FACTS.image_size))
                       for _ in range(2))  # fmt: skip
    found = ScoreTask().run(context, shard, 0, models, None)
    for row, weights in zip(found, models, strict=True):
        model = context.classifier(weights).eval()
        logits = model(normalise(shard.images, FACTS.mean, FACTS.std)).double()
        assert row[:2].tolist() == [30, (logits.argmax(1) == shard.labels).sum()]
        loss = torch.nn.functional.cross_entropy(logits, shard.labels, reduction="sum")
        assert row[2] == pytest.approx(float(loss.detach()), rel=1e-5)


def test_the_most_right_answers_win_then_the_lower_loss_then_the_smaller_weight():
    assert best(np.array([[9, 5, 3.0], [9, 6, 8.0], [9, 4, 1.0]])) == 1
    assert best(np.array([[9, 5, 3.0], [9, 5, 2.0]])) == 1
    assert best(np.array([[9, 5, 2.0], [9, 5, 2.0]])) == 0


def test_the_weight_is_chosen_by_held_back_images_and_the_bytes_are_counted(tmp_path):
    chosen = go(tmp_path, **CHOICE)
    assert chosen["communication"]["measured_over_predicted"] == 1
    store = Store(str(tmp_path))
    scores = store.get(chosen["stages"]["rehearsal"]["key"]).load("scores")["scores"]
    images = sum(int(0.1 * n) for counts in chosen["label_counts"] for n in counts)
    assert scores[:, 0].tolist() == [images] * 3 and images > 0
    weight = (0.0, 0.3, 1.0)[best(scores)]
    fixed = go(tmp_path, rehearsal__weight=weight)
    assert_same(student(chosen), student(fixed))
    assert fixed["stages"]["finetune"]["key"] != chosen["stages"]["finetune"]["key"]
    sent = chosen["communication_bytes"]
    assert sent["downlink"]["generators"] == 2 * sent["uplink"]["generators"]  # once, to two others
    again = go(tmp_path, **CHOICE | {"rehearsal__candidates": (0.3,)})  # the trials are shared
    assert {name for name, stage in again["stages"].items() if name.startswith("trial") and stage["cached"]} == {
        "trial_0", "trial_0.3",
    }  # fmt: skip


def test_with_weight_0_chosen_the_closing_rounds_are_the_controls_and_run_once(tmp_path, monkeypatch):
    monkeypatch.setattr("mosaic_ray.methods.rehearsal_choice.best", lambda scores: 0)
    run = {**CHOICE, "distill__steps": 0, "partition__validation_fraction": 0.2, "runtime__eval_rounds": 1}
    weightless = go(tmp_path / "alone", **run | {"rehearsal__candidates": ()})
    ran = []
    rounds = "mosaic_ray.pipeline.rounds.federated_rounds"
    inner = sys.modules["mosaic_ray.pipeline.rounds"].federated_rounds
    monkeypatch.setattr(rounds, lambda ctx, plan, *rest: (ran.append(plan.name), inner(ctx, plan, *rest))[1])
    chosen = go(tmp_path / "chosen", **run)
    assert ran == ["warmup", "trial_0", "trial_0.3", "trial_1", "finetune"]
    assert_same(student(chosen), student(weightless))
    assert chosen["communication"]["measured_over_predicted"] == 1
    curves = {}
    for line in (Path(chosen["paths"]["run"]) / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        section, _, leaf = row["tag"].partition("/")
        curves.setdefault(section, []).append((leaf, row["step"], row["value"]))
    assert curves["finetune"] == curves["control"] and len(curves["finetune"]) > 2

    go(tmp_path / "after", **run | {"method": "fedavg", "rehearsal__candidates": ()})  # it stores them
    ran.clear()
    after = go(tmp_path / "after", **run)
    assert ran == ["trial_0", "trial_0.3", "trial_1"] and after["stages"]["control"]["cached"]
    assert_same(student(after), student(chosen))
    assert after["accuracy"] == chosen["accuracy"] and after["communication"] == chosen["communication"]


def test_a_trial_leaves_the_held_back_images_out_of_training(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("mosaic_ray.federated.client.train_locally", lambda model, shard, *a, **k: (
        seen.append(len(shard)), {"loss": 1.0, "accuracy": 0.0, "steps": 1})[1])  # fmt: skip
    counts = np.array(go(tmp_path, **CHOICE, warmup__num_rounds=1, finetune__num_rounds=1)["label_counts"])
    sizes, less = counts.sum(1), (counts - (0.1 * counts).astype(int)).sum(1)
    trials = [int(n) for n in [*less] * 2] * 3
    assert seen == [*sizes, *trials, *sizes, *sizes]  # warm-up, three trials of two rounds, closing rounds, control


@pytest.mark.parametrize("round_num", [0, 1])
def test_a_killed_trial_resumes_with_the_same_numbers(tmp_path, round_num):
    undisturbed = go(tmp_path / "whole", **CHOICE)
    with interrupted(in_round=round_num, phase="trial"):
        go(tmp_path / "killed", **CHOICE)
    assert_same(student(go(tmp_path / "killed", **CHOICE)), student(undisturbed))


EARLY = {"rehearsal__begins": "warmup", "generator__stage": "before", "distill__steps": 0}


def test_rehearsal_from_the_warm_up_on_comes_after_the_generators_and_the_control_has_none(tmp_path):
    closing = go(tmp_path, **EARLY | {"rehearsal__begins": "closing"})
    early = go(tmp_path, **EARLY)
    stages = list(early["stages"])
    assert stages.index("generators") < stages.index("warmup") < stages.index("control_warmup")
    assert early["communication"]["measured_over_predicted"] == 1
    sent = early["communication_bytes"]
    assert sent["downlink"]["generators"] == 2 * sent["uplink"]["generators"]  # once, to two others
    keys = [{name: stage["key"] for name, stage in run["stages"].items()} for run in (early, closing)]
    same = {name for name, key in keys[0].items() if keys[1].get(name) == key}
    assert same == {"partition", "generators", "control"}
    assert early["stages"]["control_warmup"]["key"] == closing["stages"]["warmup"]["key"]
    assert early["accuracy"]["control"] == closing["accuracy"]["control"]
    warm = {name: Store(str(tmp_path)).get(run["stages"]["warmup"]["key"]).load("global")
            for name, run in (("early", early), ("closing", closing))}  # fmt: skip
    assert any(not np.array_equal(warm["early"][name], warm["closing"][name]) for name in warm["early"])


def test_early_rehearsal_with_a_weight_chosen_for_the_closing_rounds(tmp_path):
    found = go(tmp_path, **EARLY, rehearsal__candidates=(0.3,), rehearsal__trial_rounds=1)
    assert found["communication"]["measured_over_predicted"] == 1
    sent = found["communication_bytes"]
    assert sent["downlink"]["generators"] == 2 * sent["uplink"]["generators"]


@pytest.mark.parametrize("more", [{}, {"federation__widths": (1.0, 0.5, 0.5), "federation__strategy": "fedrolex"}])
def test_a_killed_warm_up_with_rehearsal_resumes_with_the_same_numbers(tmp_path, more):
    undisturbed = go(tmp_path / "whole", **EARLY, **more)
    with interrupted(in_round=1, phase="local"):
        go(tmp_path / "killed", **EARLY, **more)
    assert_same(student(go(tmp_path / "killed", **EARLY, **more)), student(undisturbed))


@pytest.mark.parametrize(
    "knobs, words",
    [
        ({"generator.stage": "after_warmup"}, "set generator.stage=before"),
        ({"rehearsal.weight": 0.0, "rehearsal.candidates": (0.3,)}, "it is 0; set it above 0"),
    ],
)
def test_early_rehearsal_needs_generators_before_the_warm_up_and_a_weight(knobs, words):
    early = {name.replace("__", "."): value for name, value in EARLY.items()}
    with pytest.raises(RequestError, match=words):
        check(override(TINY, ON | early | knobs))


def test_a_method_without_generators_tries_no_weight():
    candidates = {"method": "lda_head", "rehearsal.weight": 0.0, "rehearsal.candidates": (0.3, 1.0)}
    assert stage_keys(override(TINY, ON | candidates)) == stage_keys(
        override(TINY, ON | candidates | {"rehearsal.candidates": ()})
    )


def test_rounds_before_a_new_head_begin_with_the_warm_ups(tmp_path):
    knobs = {"method": "lda_head", "rehearsal__weight": 0.0}
    anew = go(tmp_path, **knobs)  # the student of lda_head has the warm-up's features
    plain = go(tmp_path, **knobs | {"method": "fedavg"})
    assert_same(student(anew), student(plain))
    assert not np.array_equal(
        student(go(tmp_path, **knobs, finetune__head="keep"))["head.weight"], student(anew)["head.weight"]
    )


def test_without_distillation_the_closing_rounds_begin_at_the_warm_up(tmp_path):
    weight = {"rehearsal__weight": 1.0, "finetune__head": "keep"}
    alone = go(tmp_path, distill__steps=0, **weight)
    assert not {"teacher", "distill"} & alone["stages"].keys()
    assert alone["accuracy"].get("distilled") is None and alone["communication"]["measured_over_predicted"] == 1
    # a student that distillation leaves as it was gives the same closing rounds
    frozen = go(tmp_path, **weight, distill__start="global", distill__lr=1e-30, distill__anchor_weight=0.0)
    assert frozen["stages"]["generators"]["cached"]
    for name, value in student(alone).items():
        np.testing.assert_allclose(student(frozen)[name], value, rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.ray
def test_serial_and_ray_choose_alike(tmp_path, ray_up):
    serial = go(tmp_path / "serial", runtime__host="serial", **CHOICE)
    ray = go(tmp_path / "ray", runtime__host="ray", **CHOICE)
    assert_same(student(ray), student(serial))


@pytest.mark.parametrize(
    "knobs, line",
    [
        (
            {"generator.family": "dcgan", "rehearsal.weight": 1},
            "needs generators that take labels; set generator.family",
        ),
        ({"method": "fedavg", "rehearsal.weight": 1}, "rehearsal.weight = 1: it needs generators, and method fedavg"),
        ({"rehearsal.ratio": 0}, "rehearsal.ratio"),
        ({"finetune.head": "dlda"}, "finetune.head"),
        ({"rehearsal.candidates": "[0.3]", "generator.family": "dcgan"}, "rehearsal.candidates = .0.3.: it needs gen"),
        ({"distill.steps": 0, "rehearsal.candidates": "[]"}, "distill.steps = 0: .*; set rehearsal.weight above 0"),
        ({"rehearsal.candidates": "[0]"}, "rehearsal.candidates = .0.: it takes a list of numbers .* each above 0"),
    ],
)
def test_refusals(knobs, line):
    with pytest.raises(RequestError, match=line):
        resolve(sets={name: str(value) for name, value in knobs.items()})
