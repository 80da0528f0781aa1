"""Health of partitions, generators and prototypes: every rule fires for its cause and is silent otherwise."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import FACTS, TINY, generate, shard_of, stripes
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from mosaic_ray.config.resolve import KNOBS, override
from mosaic_ray.core import health
from mosaic_ray.core.health import format_finding, generator_findings, partition_findings, prototype_findings
from mosaic_ray.core.seeding import seeded
from mosaic_ray.core.types import Finding
from mosaic_ray.distillation.generator_training import compare_with_real, snapshot_steps, train_generator
from mosaic_ray.federated.client import ClientContext
from mosaic_ray.federated.local_training import LocalTrainingConfig, train_locally
from mosaic_ray.models.classifiers import build_classifier
from mosaic_ray.models.state_dict import to_weights

TABLE = (Path(__file__).resolve().parents[2] / "docs" / "HEALTH.md").read_text(encoding="utf-8")

SOUND = {
    "owned_classes": 4.0, "coverage": 1.0, "image_coverage": 1.0, "marginal_entropy": 0.9, "label_entropy": 1.0,
    "variety": 0.6, "discriminator_accuracy": 0.9, "out_of_range": 0.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def classifier() -> nn.Module:
    """A client's classifier that knows its three classes."""
    with seeded(0, "init", "classifier"):
        model = build_classifier(TINY.model, FACTS.num_classes, FACTS.channels, FACTS.image_size)
    train_locally(
        model, shard_of(stripes(90)), LocalTrainingConfig(40, 32, 0.05, momentum=0.9), FACTS, (0, "test", 0, 0), "fp32"
    )
    return model.eval()


def codes(figures: dict[str, float]) -> list[str]:
    return [f"{finding.code} {finding.severity}" for finding in generator_findings(0, figures)]


# --- generators, trained so that it happens --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "code, knobs",
    [
        (None, {"steps": 80, "ngf": 8}),
        ("generator.mode_collapse", {"steps": 60, "lambda_d": 0.0, "lambda_e": 50.0}),
        ("generator.discriminator_overpower", {"steps": 80, "ngf": 2, "ndf": 64, "latent_dim": 2, "lambda_d": 20.0}),
        ("generator.out_of_range", {"steps": 80, "ngf": 8, "lr": 4e-3, "gan_range": "model_norm"}),
    ],
)  # fmt: skip
def test_a_generator_that_fails_raises_its_own_code_and_a_sound_one_none(classifier, code, knobs):
    order = override(TINY, {f"generator.{k}": v for k, v in ({"lr": 2e-3, "tau": 0} | knobs).items()}).generator
    shard = shard_of(stripes(90))
    figures = train_generator(classifier, to_weights(classifier), shard, order, FACTS, (0, 0), "fp32")[2]
    assert codes(figures) == ([] if code is None else [f"{code} warning"]), figures
    if code:
        (finding,) = generator_findings(3, figures)
        assert (finding.client, finding.stage) == (3, "generators")
        assert finding.value is not None and finding.threshold is not None and finding.advice


def test_a_classifier_that_knows_nothing_makes_a_generator_of_low_coverage():
    with seeded(0, "init", "classifier"):
        blank = build_classifier(TINY.model, FACTS.num_classes, FACTS.channels, FACTS.image_size).eval()
    knobs = {"steps": 60, "lr": 2e-3, "lambda_d": 0.0, "lambda_e": 0.0, "tau": 0}
    order = override(TINY, {f"generator.{name}": value for name, value in knobs.items()}).generator
    figures = train_generator(blank, to_weights(blank), shard_of(stripes(90)), order, FACTS, (0, 0), "fp32")[2]
    assert codes(figures) == ["generator.low_coverage warning"], figures


class Still(nn.Module):
    """Generates the same image for every latent."""

    num_classes, latent_dim = 0, 2

    def forward(self, z):
        return torch.linspace(-1, 1, 64).view(1, 1, 8, 8).expand(len(z), -1, -1, -1)


def test_identical_images_are_a_mode_collapse_also_for_one_class(classifier):
    data = stripes(90)
    shard = shard_of(data.take(np.flatnonzero(data.labels == 1)))
    figures = compare_with_real(Still(), classifier, shard, TINY.generator, FACTS, (0, 0))
    assert figures["variety"] == pytest.approx(0, abs=1e-6)
    assert codes(SOUND | {"owned_classes": 1.0, "marginal_entropy": 0.0} | figures) == [
        "generator.mode_collapse warning"
    ]


def test_images_are_compared_in_the_range_in_which_the_game_is_played(classifier):
    shard = shard_of(stripes(90))
    figures = compare_with_real(Still(), classifier, shard, TINY.generator, FACTS, (0, 0))
    assert figures["out_of_range"] == 0
    raw = dataclasses.replace(TINY.generator, gan_range="model_norm")
    out_of_range = ((shard.images / 255 - FACTS.mean[0]) / FACTS.std[0]).abs() > 1
    found = compare_with_real(Still(), classifier, shard, raw, FACTS, (0, 0))["out_of_range"]
    assert found == pytest.approx(float(out_of_range.float().mean()), abs=0.01)


# --- generators, by figures ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "figures, found",
    [
        ({}, []),
        ({"marginal_entropy": 0.19}, ["generator.mode_collapse"]),
        ({"marginal_entropy": 0.19, "coverage": 0.25, "image_coverage": 0.25}, ["generator.mode_collapse"]),
        ({"coverage": 0.25, "image_coverage": 0.49}, ["generator.low_coverage"]),
        ({"variety": 0.019}, ["generator.mode_collapse"]),
        ({"discriminator_accuracy": 0.995}, ["generator.discriminator_overpower"]),
        ({"out_of_range": 0.48}, ["generator.out_of_range"]),
        # a client of one class, one nearly of one class, one with six classes of an image each
        ({"owned_classes": 1.0, "marginal_entropy": 0.0, "label_entropy": 0.0}, []),
        ({"marginal_entropy": 0.05, "label_entropy": 0.05}, []),
        ({"owned_classes": 10.0, "coverage": 0.4, "image_coverage": 0.95}, []),
        # conditional generators are evaluated by label agreement
        ({"label_agreement": 0.9, "marginal_entropy": 0.1, "coverage": 0.1, "image_coverage": 0.1}, []),
        ({"label_agreement": 0.4}, ["generator.label_agreement"]),
    ],
)  # fmt: skip
def test_rules_for_generators(figures, found):
    assert codes(SOUND | figures) == [f"{code} warning" for code in found]


def test_rules_take_figures_of_an_older_result():
    assert generator_findings(0, {"owned_classes": 1.0, "marginal_entropy": 0.0, "coverage": 1.0}) == []


# --- stored images ---------------------------------------------------------------------------------------------------


def test_progress_shows_the_same_latents_on_the_way_and_changes_no_number(classifier, monkeypatch):
    config, shard = override(TINY, {"generator.steps": 20}), shard_of(stripes(40))
    weights = to_weights(classifier)
    made = generate(ClientContext(config, FACTS, torch.device("cpu")), shard, 1, weights, weights)
    assert made.progress["steps"].tolist() == list(snapshot_steps(20)) == [1, 2, 4, 9, 20]
    images = made.progress["images"]
    assert images.shape == (5, 8, 1, 8, 8) and images.dtype == np.uint8
    assert not np.array_equal(images[0], images[-1])
    with seeded(0, "init", "classifier"):
        model = build_classifier(TINY.model, FACTS.num_classes, FACTS.channels, FACTS.image_size)
    model.load_state_dict(classifier.state_dict())
    monkeypatch.setattr("mosaic_ray.distillation.generator_training.snapshot_steps", lambda steps: ())
    alone = train_generator(model, weights, shard, config.generator, FACTS, (0, 1), "fp32")
    assert alone.progress["steps"].tolist() == [0]
    alone = alone.weights
    assert all(np.array_equal(alone[name], value) for name, value in made.weights.items())


@given(st.integers(1, 10_000))
def test_moments_end_at_the_end(steps):
    found = snapshot_steps(steps)
    assert found[-1] == steps and found[0] >= 1 and len(found) <= 5 and list(found) == sorted(set(found))


# --- partition, prototypes, output -----------------------------------------------------------------------------------


def test_a_class_without_owner_and_one_without_prototype():
    assert partition_findings([3, 1, 2]) == [] == prototype_findings([1, 1, 0], [3, 1, 0])
    (empty,) = partition_findings([3, 0, 2, 0])
    assert (empty.code, empty.severity, empty.value, empty.threshold) == ("partition.empty_class", "warning", 2, 0)
    assert "classes 1, 3;" in empty.message
    (few,) = prototype_findings([2, 0, 0], [3, 1, 0])
    assert (few.code, few.value) == ("prototypes.too_few", 1) and "class 1" in few.message


def test_a_finding_in_one_line_and_in_json():
    finding = Finding("a.b", "error", "teacher", "it broke", 2, None, 4.6, "repair it")
    assert format_finding(finding) == "a.b: it broke (value not finite, threshold 4.6); repair it"
    assert finding.to_json() == {
        "code": "a.b", "severity": "error", "stage": "teacher", "client": 2, "value": None, "threshold": 4.6,
        "message": "it broke", "advice": "repair it",
    }  # fmt: skip
    assert Finding("a", "info", "s", "m").to_json()["threshold"] is None


def test_a_value_that_is_not_finite_can_be_stored():
    assert health.META_DIVERGED.finding("m", math.nan).value is None


@pytest.mark.parametrize(
    "rule",
    [found for found in vars(health).values() if isinstance(found, health.Rule)],
    ids=lambda rule: f"{rule.code}-{rule.stage}",
)
def test_every_rule_is_in_the_document_and_its_advice_names_knobs_that_exist(rule):
    rows = [row for row in TABLE.splitlines() if row.startswith(f"| `{rule.code}` | {rule.stage} | {rule.severity}")]
    assert rows, "docs/HEALTH.md has no row of it"
    if rule.threshold is not None:
        assert any(
            f" {rule.threshold:g} " in row or f" {rule.threshold:.0%} ".replace("%", " %") in row for row in rows
        )
    words = {word.strip(",;.()").partition("=")[0] for word in rule.advice.split()}
    named = {
        word for word in words if word.partition(".")[0] in {name.partition(".")[0] for name in KNOBS} and "." in word
    }
    assert named <= set(KNOBS)
