"""The class-conditional generator: drawn labels, loss, evaluation and use."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from helpers import FACTS, TINY, assert_same, shard_of, stripes, stripes_dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mosaic_ray.config.resolve import override
from mosaic_ray.config.schema import GeneratorConfig
from mosaic_ray.core.health import generator_findings
from mosaic_ray.core.seeding import seeded, stream
from mosaic_ray.core.types import DataFacts, Weights
from mosaic_ray.distillation import generator_training
from mosaic_ray.distillation.generator_training import (
    draw,
    evaluate_generator,
    label_cdf,
    latents,
    load_generator,
    real_batches,
    sample,
    sampling_shares,
    train_generator,
)
from mosaic_ray.distillation.student_training import Batcher, DistContext, DistillTask
from mosaic_ray.federated.local_training import LocalTrainingConfig, Shard, train_locally
from mosaic_ray.models import discriminator as discriminators
from mosaic_ray.models.classifiers import build_classifier
from mosaic_ray.models.discriminator import build_discriminator
from mosaic_ray.models.generator import build_generator
from mosaic_ray.models.state_dict import to_weights
from mosaic_ray.runs import runner

CPU = torch.device("cpu")
ASKED = override(TINY, {"generator.conditional": True}).generator
SMALL = GeneratorConfig(latent_dim=10, ngf=4, ndf=4, conditional=True)


def classifier_of(shard: Shard, steps: int = 0) -> nn.Module:
    with seeded(0, "init", "classifier"):
        model = build_classifier(TINY.model, FACTS.num_classes, FACTS.channels, FACTS.image_size)
    if steps:
        train_locally(
            model, shard, LocalTrainingConfig(steps, 32, 0.05, momentum=0.9), FACTS, (0, "test", 0, 0), "fp32"
        )
    return model.eval()


def trained(knobs: dict, shard: Shard | None = None, classifier: nn.Module | None = None):
    """Return (weights, samples, figures, curve) of a tiny client's generator."""
    config = override(TINY, {"generator.conditional": True} | knobs).generator
    shard = shard or shard_of(stripes(60))
    classifier = classifier or classifier_of(shard)
    return train_generator(classifier, to_weights(classifier), shard, config, FACTS, (0, 1), "fp32")[:4]


def owning(*labels: int) -> Shard:
    data = stripes(90)
    return shard_of(data.take(np.flatnonzero(np.isin(data.labels, labels))))


# --- the plain path --------------------------------------------------------------------------------------------------

#: Mean absolute values of weights that the code before conditional generators gave for `TINY` on 60 images.
BEFORE = {
    "layers.0.weight": 0.015856161754651765,
    "layers.1.weight": 1.0073906108736992,
    "layers.1.bias": 0.0013966381447971798,
    "layers.1.running_mean": 0.0008717552427697228,
    "layers.1.running_var": 0.28467467054724693,
    "layers.1.num_batches_tracked": 12.0,
    "layers.3.weight": 0.015984398254957455,
    "layers.4.weight": 0.9960543811321259,
    "layers.4.bias": 0.002746793150436133,
    "layers.4.running_mean": 0.01814820384606719,
    "layers.4.running_var": 0.2858641743659973,
    "layers.4.num_batches_tracked": 12.0,
    "layers.6.weight": 0.02503040910232812,
}


def test_a_plain_generator_has_not_changed():
    weights, _, figures, curve = trained({"generator.conditional": False, "generator.steps": 12})
    found = {name: float(np.abs(value.astype(np.float64)).mean()) for name, value in weights.items()}
    # processors differ in the order of a sum; another draw is far outside this
    assert found == pytest.approx(BEFORE, rel=1e-3)
    assert list(found) == list(BEFORE)
    assert curve[-1] == pytest.approx([11, -3.5209737, 1.3483532, 1.0983722, -1.0984019], rel=1e-3)
    before = {
        "coverage": 1 / 3, "owned_mass": 1.0, "marginal_entropy": 0.9998094, "confidence": 0.341763,
        "owned_classes": 3.0,
    }  # fmt: skip
    assert {name: figures[name] for name in before} == pytest.approx(before, rel=1e-3)


def test_a_plain_generator_draws_latents_alone():
    generator = load_generator(TINY.generator, FACTS, trained({"generator.conditional": False})[0])
    (z,) = draw(generator, 6, stream(0, "a"), CPU)
    assert torch.equal(z, latents(generator, 6, stream(0, "a"), CPU))
    assert torch.equal(sample(generator, 6, stream(0, "a"), CPU), generator(z))


# --- labels ----------------------------------------------------------------------------------------------------------


def cluster_request(counts: list[int]) -> nn.Module:
    """A conditional generator of a client with so many images of each class."""
    generator = build_generator(SMALL, 1, 8, len(counts))
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    generator.label_cdf.copy_(label_cdf(labels, len(counts)))
    return generator.eval()


@given(st.lists(st.integers(0, 50), min_size=1, max_size=9).filter(any), st.integers(0, 90), st.integers(0, 10**6))
@settings(max_examples=60)
def test_labels_follow_the_clients_counts_within_one(counts, number, seed):
    _, labels = draw(cluster_request(counts), number, stream(seed, "labels"), CPU)
    found = torch.bincount(labels, minlength=len(counts)).numpy()
    assert len(found) == len(counts) and found.sum() == number
    assert (np.abs(found - number * np.array(counts) / sum(counts)) < 1 + 1e-9).all()
    assert not found[np.array(counts) == 0].any()


def test_labels_have_an_address_and_no_order():
    generator = cluster_request([30, 0, 10, 60])
    (z, labels), (again_z, again) = (draw(generator, 100, stream(0, "here"), CPU) for _ in range(2))
    assert torch.equal(z, again_z) and torch.equal(labels, again)
    assert torch.equal(z, latents(generator, 100, stream(0, "here"), CPU))
    assert not torch.equal(labels, draw(generator, 100, stream(0, "there"), CPU)[1])
    assert not torch.equal(labels, labels.sort().values)
    assert torch.equal(sample(generator, 100, stream(0, "here"), CPU), generator(z, labels))


@pytest.mark.parametrize("drawn", [0.0, 1 - 2**-53])
def test_the_ends_of_the_range_are_owned_classes(monkeypatch, drawn):
    """The least and the largest draw must not step on the classes before and behind those that are owned."""
    generator = cluster_request([0, 3, 3, 0, 3, 0])
    monkeypatch.setattr(torch, "rand", lambda *shape, **options: torch.full(shape, drawn, dtype=torch.float64))
    _, labels = draw(generator, 7, stream(0, "edge"), CPU)
    assert set(labels.tolist()) == {1, 2, 4}


@pytest.mark.gpu
def test_devices_draw_the_same_labels():
    generator, cuda = cluster_request([7, 0, 90, 3, 1]), torch.device("cuda")
    here = draw(generator, 257, stream(0, "device"), CPU)
    there = draw(generator.to(cuda), 257, stream(0, "device"), cuda)
    assert all(torch.equal(a, b.cpu()) for a, b in zip(here, there, strict=True))


def test_the_label_distribution_travels_with_the_generator():
    shard = owning(0, 2)
    weights = trained({}, shard)[0]
    assert weights["label_cdf"].dtype == np.float64
    assert weights["label_cdf"].tolist() == [0.5, 0.5, 1.0]
    loaded = load_generator(ASKED, FACTS, weights)
    assert set(draw(loaded, 50, stream(0, "x"), CPU)[1].tolist()) == {0, 2}
    with pytest.raises(ValueError, match="names differ"):
        load_generator(TINY.generator, FACTS, weights)


def test_real_images_come_with_their_labels():
    shard = shard_of(stripes(50))
    label_of = {tuple(x.flatten().tolist()): int(y) for x, y in zip(shard.images, shard.labels, strict=True)}
    for real, labels in real_batches(shard, ASKED, FACTS, (0, 0), 7):
        pixels = ((real + 1) * 127.5).round().to(torch.uint8)
        assert [label_of[tuple(x.flatten().tolist())] for x in pixels] == labels.tolist()


# --- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("discriminator", ["dcgan", "shared_trunk"])
@pytest.mark.parametrize("gan_range", ["pm1_then_renorm", "model_norm"])
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_every_variant_trains_and_leaves_finite_weights(discriminator, gan_range, mode):
    weights, samples, figures, curve = trained({
        "generator.discriminator": discriminator, "generator.gan_range": gan_range, "generator.classifier_mode": mode,
    })  # fmt: skip
    assert all(np.isfinite(v).all() for v in weights.values()) and np.isfinite(curve).all()
    assert samples.shape == (64, 1, 8, 8)
    assert 0 <= figures["label_agreement"] <= figures["owned_mass"] <= 1


def test_a_conditional_generator_is_a_function_of_its_address():
    assert_same(trained({})[0], trained({})[0])


def test_the_label_term_stands_for_entropy_and_diversity():
    weights = trained({})[0]
    assert_same(weights, trained({"generator.lambda_d": 0.0, "generator.div_support": "all"})[0])
    assert not np.array_equal(weights["layers.0.weight"], trained({"generator.lambda_e": 0.0})[0]["layers.0.weight"])


def _players(monkeypatch, lambda_e: float) -> tuple[Weights, Weights, nn.Module]:
    """Return generator and discriminator after one step each, and the classifier."""
    made: list[nn.Module] = []

    def build(*words):
        made.append(build_discriminator(*words))
        return made[0]

    monkeypatch.setattr(generator_training, "build_discriminator", build)
    shard, classifier = owning(0, 2), classifier_of(owning(0, 2))
    weights = trained({"generator.steps": 1, "generator.lambda_e": lambda_e, "generator.tau": 0}, shard, classifier)[0]
    return weights, to_weights(made[0]), classifier


def test_the_label_term_teaches_the_generator_alone(monkeypatch):
    before = to_weights(classifier_of(owning(0, 2)))
    without, discriminator, _ = _players(monkeypatch, 0.0)
    steered, same, classifier = _players(monkeypatch, 5.0)
    assert_same(discriminator, same)
    assert_same(before, to_weights(classifier))
    assert all(p.grad is None for p in classifier.parameters())
    changed = {n for n in without if not np.array_equal(without[n], steered[n])}
    assert {"layers.0.weight", "embedding.weight"} <= changed
    fresh = trained({"generator.batch_size": 2, "generator.steps": 1, "generator.lr": 1e-12}, owning(1))[0]
    moved = (fresh["embedding.weight"] != steered["embedding.weight"]).any(1)
    assert moved.tolist() == [True, False, True], "the class that is not owned is never asked for"


def test_the_discriminator_gets_the_labels_of_real_and_fake(monkeypatch):
    labels_seen = []

    class Witness(discriminators.Discriminator):
        def forward(self, x, labels=None):
            labels_seen.append(labels)
            return super().forward(x, labels)

    monkeypatch.setattr(discriminators, "Discriminator", Witness)
    shard = owning(1)
    trained({"generator.steps": 2}, shard)
    assert len(labels_seen) == 6 and all(labels.tolist() == [1] * len(labels) for labels in labels_seen)


def test_images_show_the_class_asked_for():
    shard = shard_of(stripes(120))
    classifier = classifier_of(shard, 60)
    weights, _, figures, _ = trained({"generator.steps": 150, "generator.lr": 2e-3}, shard, classifier)
    assert figures["label_agreement"] > 0.9 and figures["coverage"] == 1
    generator = load_generator(ASKED, FACTS, weights)
    z = latents(generator, 60, stream(0, "z"), CPU)
    for label in range(3):
        images = generator(z, torch.full((60,), label))
        rows = images.mean((0, 1, 3))  # a stripe lies on rows 1 + 2 label and 2 + 2 label
        assert rows[1:7].view(3, 2).mean(1).argmax() == label


# --- figures, by hand ------------------------------------------------------------------------------------------------


class Painter(nn.Module):
    """Generates one-pixel images with the shown class as value: ``shown[label]``, unconditional ones in turn."""

    latent_dim = 1

    def __init__(self, shown: list[int], counts: list[int] | None = None) -> None:
        super().__init__()
        self.shown, self.num_classes = torch.tensor(shown), len(counts or [])
        if counts:
            labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
            self.label_cdf = label_cdf(labels, len(counts))

    def forward(self, z, labels=None):
        classes = self.shown[torch.arange(len(z)) % len(self.shown)] if labels is None else self.shown[labels]
        return classes.float().reshape(-1, 1, 1, 1)


class Reader(nn.Module):
    """Sees the class that a Painter shows, quite sure."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes

    def forward(self, x):
        return 50 * nn.functional.one_hot(x.flatten().round().long(), self.num_classes).float()


def evaluated(painter: Painter, num_classes: int, owned: list[int]) -> dict[str, float]:
    facts = DataFacts("dots", num_classes, 1, 1, (0.0,), (1.0,))
    config = dataclasses.replace(ASKED, gan_range="model_norm")
    mask = torch.zeros(num_classes, dtype=torch.bool)
    mask[owned] = True
    return evaluate_generator(painter, Reader(num_classes), mask, config, facts, (0, 0))[0]


def test_figures_of_a_conditional_generator_by_hand():
    """Labels 0, 1, 3 are drawn as 2 : 1 : 1; it shows class 1 for label 0, and class 2, not owned, for label 3."""
    figures = evaluated(Painter([1, 1, 2, 2], [256, 128, 0, 128]), 4, [0, 1, 3])
    assert figures["label_agreement"] == pytest.approx(0.25)
    assert figures["owned_mass"] == pytest.approx(0.75)
    assert figures["coverage"] == pytest.approx(1 / 3)
    assert figures["marginal_entropy"] == pytest.approx(-(0.75 * np.log(0.75) + 0.25 * np.log(0.25)) / np.log(3))
    assert evaluated(Painter([0, 1, 2, 3], [256, 128, 0, 128]), 4, [0, 1, 3])["label_agreement"] == 1


def test_figures_of_a_plain_generator_by_hand():
    figures = evaluated(Painter([0, 0, 0, 2]), 4, [0, 1])
    assert "label_agreement" not in figures
    assert (figures["owned_mass"], figures["coverage"]) == pytest.approx((0.75, 0.5))
    assert figures["confidence"] == pytest.approx(1)


def test_one_prediction_in_a_hundred_covers_one_of_up_to_ten_classes():
    figures = evaluated(Painter([0] * 98 + [1, 2]), 10, list(range(10)))
    assert figures["coverage"] == pytest.approx(0.1), "5 of 512 are less than 1 %"
    assert evaluated(Painter([0] * 97 + [1, 1, 2]), 10, list(range(10)))["coverage"] == pytest.approx(0.2)


@pytest.mark.parametrize("kind", ["plain", "conditional"])
def test_coverage_can_be_whole_with_two_hundred_classes(kind):
    """1 % of the predictions could go to a hundred of them at most."""
    shown, everything = list(range(200)), list(range(200))
    counts = [1] * 200 if kind == "conditional" else None
    assert evaluated(Painter(shown, counts), 200, everything)["coverage"] == 1
    half = [label // 2 for label in shown]
    assert evaluated(Painter(half, counts), 200, everything)["coverage"] == pytest.approx(0.5)


def test_k4_agreement_is_a_conditional_generators_quality():
    figures = [{"coverage": 0.3, "owned_mass": 1.0, "label_agreement": 0.9}, {"coverage": 1.0, "owned_mass": 0.9}]
    shares = sampling_shares("quality", np.array([400, 400]), figures)
    np.testing.assert_allclose(shares, [0.5, 0.5])


def test_a_conditional_generator_is_warned_of_by_its_agreement():
    figures = {"owned_classes": 10.0, "marginal_entropy": 0.1, "coverage": 0.2, "label_agreement": 0.9}
    assert generator_findings(0, figures) == [], "a client of nearly one class is hardly asked for the others"
    (finding,) = generator_findings(3, figures | {"label_agreement": 0.4})
    assert (finding.code, finding.client, finding.value) == ("generator.label_agreement", 3, 0.4)


# --- the stages after ------------------------------------------------------------------------------------------------


def test_workers_share_a_batch_of_conditional_generators():
    config = override(TINY, {"generator.conditional": True})
    made = tuple(trained({"generator.steps": 2}, owning(*classes))[0] for classes in ((0,), (1, 2), (0, 1, 2)))
    nothing = np.zeros((0, 1), np.float32)
    task = DistillTask(config, FACTS, {}, None, made, np.array([4, 3, 5]), nothing, nothing)
    alone = Batcher(task, DistContext(), CPU)
    images, _, labels = alone(1)
    assert images.shape == (12, 1, 8, 8) and torch.equal(images, alone(1)[0]) and not torch.equal(images, alone(2)[0])
    first, second = (Batcher(task, DistContext(rank, 2), CPU)(1) for rank in range(2))
    for whole, one, other in zip((images, images, labels), first, second, strict=True):
        assert torch.equal(torch.cat([one[:4], other, one[4:]]), whole)
    assert labels[:4].tolist() == [0] * 4 and set(labels[4:7].tolist()) == {1, 2}, "the labels of its client's images"


@pytest.mark.parametrize("data", ["prototypes", "synthetic"])
def test_a_whole_run_with_conditional_generators(tmp_path, monkeypatch, data):
    monkeypatch.setattr("mosaic_ray.data.load.load_dataset", lambda config: stripes_dataset())
    knobs = {"generator.conditional": True, "generator.steps": 2, "distill.steps": 2, "finetune.num_rounds": 1}
    knobs |= {"runtime.eval_rounds": 0, "meta.data": data}
    summary = runner.run(override(TINY, knobs), storage=str(tmp_path), progress=False)
    assert summary["status"] == "done" and summary["config"]["generator"]["conditional"] is True
    assert 0 <= summary["accuracy"]["final"] <= 1
