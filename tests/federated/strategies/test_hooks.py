"""A strategy outside the package uses the hooks of the ones that ship: logits, features, a second model, evaluation."""

from __future__ import annotations

import numpy as np
import pytest
from cli_runner import ask
from helpers import TINY, assert_same
from strategy_runs import go, student, warmed_up

from mosaic_ray.config.resolve import to_toml

SOURCE = """
import torch
from mosaic_ray.federated.local_training import Objective
from mosaic_ray.federated.strategies.base import Strategy
from mosaic_ray.models.state_dict import to_weights

class Kept(Objective):
    def __init__(self):
        self.seen = torch.zeros(3)

    def forward(self, model, images):
        self.features = model.features(images)
        return model.head(self.features)

    def loss(self, model, logits, labels):
        return super().loss(model, logits, labels) + WEIGHT * self.features[: len(labels)].square().mean()

    def after_step(self, model, images, labels):
        assert len(images) == len(labels)
        self.seen += torch.bincount(labels, minlength=3)

    def finish(self, model, num_steps):
        return {}, to_weights(model) | {"seen": self.seen.numpy()}

class Kind(Strategy):
    name = "kind"
    personal_models = True

    def objective(self, start):
        return Kept()

    def adjust_logits(self, start):
        assert len(start.labels)
        return lambda logits: logits * SCALE

    def personal(self, weights, state):
        return {name: value for name, value in (state or weights).items() if name != "seen"}

KIND = Kind()
"""


@pytest.fixture
def plug_in(tmp_path, monkeypatch):
    def write(weight: float, scale: float) -> str:
        name = f"kind_{weight}_{scale}.py".replace(".", "_", 2)
        (tmp_path / name).write_text(SOURCE.replace("WEIGHT", str(weight)).replace("SCALE", str(scale)))
        return f"{name}:KIND"

    monkeypatch.chdir(tmp_path)
    return write


def test_hooks_that_change_nothing_are_fedavg_bit_for_bit(tmp_path, plug_in):
    found, plain = go(tmp_path, plug_in(0.0, 1.0)), go(tmp_path, "fedavg")
    assert_same(student(found), student(plain))
    assert warmed_up(found).load("state_00000")["seen"].sum() > 0
    assert len(found["personal_accuracy"]["clients"]) == 3
    for weight, scale in ((1.0, 1.0), (0.0, 0.5)):
        other = student(go(tmp_path, plug_in(weight, scale)))
        assert any(not np.array_equal(other[name], student(plain)[name]) for name in other)


def test_a_hook_that_fails_and_a_conflict_are_one_line(tmp_path, plug_in):
    (tmp_path / "tiny.toml").write_text(to_toml(TINY))
    words = ("run", "--config", "tiny.toml", "--storage", "there", "--method", "fedavg", "--set")
    for strategy, says in (
        (f"fedlc+{plug_in(0.0, 1.0)}", "fedlc and kind cannot be combined, both set adjust_logits"),
        ("heterofl+moon --set federation.widths=[0.5]", "heterofl+moon trains whole models"),
        ("local --set federation.cohort_size=2", "federation.cohort_size = 2: with local all clients train"),
    ):
        result = ask(*words, *f"federation.strategy={strategy}".split())
        assert result.exit_code == 2, result.output
        assert says in result.stderr and result.stderr.strip().count("\n") == 0
