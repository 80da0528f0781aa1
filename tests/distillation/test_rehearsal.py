"""Rehearsal: what clients lack, whose generators draw it, the loss, and whole runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import FACTS, TINY, assert_same, interrupted, shard_of, small_ray, stripes, stripes_dataset
from safetensors.numpy import load_file

from mosaic_ray.config.resolve import override, resolve
from mosaic_ray.core.errors import RequestError
from mosaic_ray.core.seeding import numpy_stream, seeded
from mosaic_ray.distillation.rehearsal import SharedGenerators, allocate_draws, lacking_classes, rehearsal_images
from mosaic_ray.federated.local_training import LocalTrainingConfig, Rehearsed, train_locally
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
def test_serial_and_ray_agree_bit_for_bit(tmp_path):
    serial = go(tmp_path / "serial", runtime__host="serial")
    with small_ray(2):
        assert_same(student(go(tmp_path / "ray", runtime__host="ray")), student(serial))


@pytest.mark.parametrize(
    "knobs, line",
    [
        (
            {"generator.family": "dcgan", "rehearsal.weight": 1},
            "needs generators that take labels; set generator.family",
        ),
        ({"method": "fedavg", "rehearsal.weight": 1}, "method fedavg trains no generators"),
        ({"rehearsal.ratio": 0}, "rehearsal.ratio"),
        ({"finetune.head": "dlda"}, "finetune.head"),
    ],
)
def test_refusals(knobs, line):
    with pytest.raises(RequestError, match=line):
        resolve(sets={name: str(value) for name, value in knobs.items()})
