"""A network that no client holds, trained on synthetic images (``model.student``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import FACTS, TINY, assert_same, stripes_dataset

from mosaic_ray.config.resolve import override, resolve
from mosaic_ray.core.errors import RequestError
from mosaic_ray.distillation import ensemble
from mosaic_ray.distillation.rehearsal import SharedGenerators
from mosaic_ray.distillation.server_student import student_loss, train_server_student
from mosaic_ray.federated.client import ClientContext, initial_weights
from mosaic_ray.runs import runner
from mosaic_ray.runs.plan import stage_keys
from mosaic_ray.storage.store import Store

ON = {
    "generator.family": "cvae", "generator.steps": 20, "distill.steps": 0, "rehearsal.weight": 1.0,
    "finetune.head": "lda_head", "runtime.eval_rounds": 0, "model.student": "mobilenet", "student.steps": 25,
    "student.batch_size": 8,
}  # fmt: skip


@pytest.fixture(autouse=True)
def stripes_as_data(monkeypatch):
    monkeypatch.setattr("mosaic_ray.data.load.load_dataset", lambda config: stripes_dataset())


def go(folder: Path, **knobs: Any) -> dict[str, Any]:
    config = override(TINY, ON | {name.replace("__", "."): value for name, value in knobs.items()})
    return runner.run(config, storage=str(folder), progress=False)


def weights_of(folder: Path, summary: dict[str, Any]) -> dict[str, np.ndarray]:
    return Store(str(folder)).get(summary["stages"]["server_student"]["key"]).load("student")


def test_the_loss_is_the_one_of_its_formula():
    draws = torch.Generator().manual_seed(0)
    logits, teacher = torch.randn(6, 4, generator=draws), torch.randn(6, 4, generator=draws)
    labels = torch.tensor([0, 1, 2, 3, 0, 1])
    p, q = teacher.softmax(1), logits.softmax(1)
    by_label = -q[torch.arange(6), labels].log().mean()
    by_teacher = (p * (p / q).log()).sum(1).mean()
    for weight in (0.0, 0.3, 1.0):
        found = student_loss(logits, teacher.log_softmax(1), labels, weight)
        torch.testing.assert_close(found, weight * by_label + (1 - weight) * by_teacher)


def test_it_learns_what_the_images_show(monkeypatch):
    """Generators that draw the label's own pattern: the network tells the patterns apart, whatever the teacher says."""

    class Bars(torch.nn.Module):
        def forward(self, z, labels):
            images = torch.full((len(z), 1, 8, 8), -1.0)
            for row, label in enumerate(labels.tolist()):
                images[row, :, 2 * label : 2 * label + 2] = 1.0
            return images + 0.1 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))

    monkeypatch.setattr("mosaic_ray.distillation.rehearsal.load_generator", lambda *_: Bars())
    config = override(TINY, ON | {"student.steps": 60, "student.label_weight": 1.0})
    context = ClientContext(config, FACTS, torch.device("cpu"))
    shared = SharedGenerators(({}, {}), (0, 1), np.array([[9, 9, 0], [0, 9, 9]]))
    found = train_server_student(context, initial_weights(context), shared)
    model = context.classifier(found, "mobilenet").eval()
    labels = torch.arange(3).repeat(5)
    from mosaic_ray.data.transforms import normalise

    pixels = ((Bars()(torch.zeros(15, 1), labels) + 1) * 127.5).clamp(0, 255).to(torch.uint8)
    assert (model(normalise(pixels, FACTS.mean, FACTS.std)).argmax(1) == labels).all()


def test_a_run_evaluates_it_and_all_else_stays(tmp_path):
    plain, found = go(tmp_path, model__student=""), go(tmp_path)
    assert found["accuracy"]["server_student"] is not None and plain["accuracy"]["server_student"] is None
    assert {name for name, stage in found["stages"].items() if not stage["cached"]} == {"server_student", "evaluate"}
    assert found["accuracy"] | {"server_student": None} == plain["accuracy"]
    assert found["communication"]["measured_over_predicted"] == 1
    assert go(tmp_path)["stages"]["server_student"]["cached"]


def test_its_key_follows_its_own_knobs_and_no_other_stage_does():
    before, after = (stage_keys(override(TINY, ON | {"student.lr": lr})) for lr in (0.1, 0.2))
    assert {name for name in before if before[name] != after[name]} == {"server_student", "evaluate"}


@pytest.mark.ray
def test_serial_and_ray_train_the_same_network(tmp_path, ray_up):
    serial = weights_of(tmp_path / "serial", go(tmp_path / "serial", runtime__host="serial"))
    ray = weights_of(tmp_path / "ray", go(tmp_path / "ray", runtime__host="ray"))
    assert_same(ray, serial)


@pytest.mark.parametrize("method", ["dense", "co_boosting"])
def test_a_method_that_teaches_from_a_pool_teaches_it_itself(tmp_path, monkeypatch, method):
    """By a pool of its own, beside the other student, which stays as it is; a kill among its epochs costs no bit."""
    pool = {"epochs": 6, "generator_steps": 2, "student_steps": 2, "batch_size": 8, "channels": 4, "bn_weight": 0.0}
    knobs = {"method": method, "rehearsal__weight": 0.0, "warmup__num_rounds": 2}
    knobs |= {f"{method}__{knob}": value for knob, value in pool.items()}
    plain, found = go(tmp_path, **knobs, model__student=""), go(tmp_path, **knobs)
    assert {name for name, stage in found["stages"].items() if not stage["cached"]} == {"server_student", "evaluate"}
    assert found["accuracy"]["server_student"] is not None
    assert found["accuracy"] | {"server_student": None} == plain["accuracy"]

    teach, begun = ensemble.teach_from_pool, []

    def dies_once(context, state, begin, end, clients, rule, network="", *, report):
        if network:
            begun.append(begin)
            if begun == [0, 5]:
                raise KeyboardInterrupt
        return teach(context, state, begin, end, clients, rule, network, report=report)

    monkeypatch.setattr(ensemble, "teach_from_pool", dies_once)
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "killed", **knobs)
    again = go(tmp_path / "killed", **knobs)
    assert begun == [0, 5, 5]
    assert_same(weights_of(tmp_path / "killed", again), weights_of(tmp_path, found))


@pytest.mark.parametrize(
    "knobs, line",
    [
        ({"model.student": "resnet19"}, 'model.student = resnet19: unknown; did you mean "resnet18"'),
        ({"model.student": "cnn"}, "model.student = cnn: clients hold this network"),
        ({"model.student": "resnet18", "method": "fedavg"}, "method fedavg has none"),
        ({"model.student": "resnet18", "algorithm": "distilled"}, "learns from generators that take labels"),
    ],
)
def test_refusals(knobs, line):
    with pytest.raises(RequestError, match=line):
        resolve(sets=knobs)
