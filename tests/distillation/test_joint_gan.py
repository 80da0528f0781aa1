"""GANs of several modalities: what the discriminator reads, which gradients reach the generator, what it learns."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from mosaic_ray.config.schema import GeneratorConfig, ModelConfig
from mosaic_ray.core.seeding import seeded
from mosaic_ray.core.types import DataFacts, Modality
from mosaic_ray.data.records import pack, present_in
from mosaic_ray.data.transforms import drawn_to_input, to_generator_range
from mosaic_ray.distillation.generator_training import generator_for, load_generator, relaxed, train_generator
from mosaic_ray.federated.local_training import LocalTrainingConfig, Shard, train_locally
from mosaic_ray.models.classifiers import Classifier, build_classifier
from mosaic_ray.models.joint_discriminator import (
    JointDiscriminator,
    JointSamples,
    embedded,
    read_samples,
    relaxed_texts,
    straight_through,
)
from mosaic_ray.models.multimodal import Tokens
from mosaic_ray.models.multimodal_generator import MultimodalGenerator

IMAGE, VECTOR, TEXT = Modality("img", "image", (1, 8, 8)), Modality("v", "vector", (5,)), Modality("t", "text", (6,), 9)
ALL = (IMAGE, VECTOR, TEXT)
FACTS = DataFacts("made", 3, 1, 8, (0.4,), (0.3,), modalities=ALL)
KNOBS = GeneratorConfig(family="cgan", latent_dim=6, ngf=4, ndf=4, steps=250, batch_size=32, lr=2e-3)


def made_shard(count: int, present: list[int], seed: int = 0) -> Shard:
    """Return samples of which every modality tells the class."""
    draws = np.random.default_rng(seed)
    labels = draws.integers(0, 3, count)
    values = {
        "img": draws.integers(0, 60, (count, 1, 8, 8)) + 90 * labels[:, None, None, None],
        "v": labels[:, None] * 2 - 2 + 0.3 * draws.normal(size=(count, 5)),
        "t": np.repeat(1 + 2 * labels[:, None], 6, 1),
    }
    records = pack(ALL, values, np.tile(np.array(present, bool), (count, 1)))
    return Shard(torch.tensor(records), torch.tensor(labels))


def generator(held: list[float]) -> MultimodalGenerator:
    with seeded(1, "generator"):
        made = generator_for(KNOBS, FACTS)
    made.held.copy_(torch.tensor(held))
    return made


def discriminator() -> JointDiscriminator:
    with seeded(2, "discriminator"):
        return JointDiscriminator(KNOBS, ALL, 3)


def classifier(fusion: str = "mean") -> Classifier:
    with seeded(3, "classifier"):
        return build_classifier(ModelConfig(width=4, fusion=fusion), 3, 1, 8, None, ALL)


def real(count: int, present: list[int]) -> JointSamples:
    return read_samples(to_generator_range(made_shard(count, present).images, FACTS), ALL)


def test_the_score_is_its_formula() -> None:
    judge, labels = discriminator(), torch.tensor([0, 2, 1, 1])
    samples = real(4, [1, 1, 1])
    samples.present[1] = torch.tensor([0.0, 1.0, 0.0])
    with torch.no_grad():
        found = judge(samples, labels)
        for row in range(4):
            hidden = sum(
                judge.encoders[name](samples.values[name][row : row + 1])[0]
                for number, name in enumerate(("img", "v", "t")) if samples.present[row, number]
            )  # fmt: skip
            phi = torch.where(hidden > 0, hidden, 0.2 * hidden)
            score = judge.head.weight[0] @ phi + judge.head.bias[0] + judge.embedding.weight[labels[row]] @ phi
            assert float(found[row]) == pytest.approx(float(score), abs=1e-5)


@pytest.mark.parametrize("absent", [0, 1, 2])
def test_an_absent_modality_changes_nothing_and_gets_no_gradient(absent: int) -> None:
    judge, labels, name = discriminator(), torch.arange(4) % 3, ALL[absent].name
    held = [float(number != absent) for number in range(3)]
    found = generator([1.0, 1.0, 1.0]).parts(torch.randn(4, 6, generator=torch.Generator().manual_seed(0)), labels)
    present = torch.tensor([held, [1.0, 1.0, 1.0]]).repeat(2, 1)  # every other sample lacks it
    fake, _ = relaxed(found, replace(real(4, [1, 1, 1]), present=present), 4, FACTS)
    value = fake.values[name].detach().requires_grad_()
    scores = judge(JointSamples({**fake.values, name: value}, present), labels)
    other = judge(JointSamples({**fake.values, name: torch.rand_like(value)}, present), labels)
    assert torch.equal(scores[::2], other[::2]) and not torch.equal(scores[1::2], other[1::2])
    [gradient] = torch.autograd.grad(scores.sum(), value)
    assert not gradient[::2].any() and gradient[1::2].any()
    nobody = JointSamples({n: v for n, v in fake.values.items() if n != name}, torch.tensor([held]).expand(4, -1))
    assert torch.equal(judge(nobody, labels)[::2], scores[::2])  # it needs no values where no sample has it


def test_the_gradient_reaches_every_decoder_of_the_client_and_no_other() -> None:
    for held in ([1.0, 1.0, 1.0], [0.0, 1.0, 1.0], [0.0, 0.0, 1.0]):
        made, judge, labels = generator(held), discriminator(), torch.arange(8) % 3
        found = made.parts(torch.randn(8, 6, generator=torch.Generator().manual_seed(0)), labels, held=True)
        fake, texts = relaxed(found, real(5, [int(part) for part in held]), 8, FACTS)
        assert fake.present.tolist() == [held] * 8
        seen = drawn_to_input(made.rows(found, 8), FACTS)
        with relaxed_texts(model := classifier().eval(), texts):
            logits = model(seen)
        for loss in (judge(fake, labels).sum(), torch.nn.functional.cross_entropy(logits, labels)):
            made.zero_grad()
            loss.backward(retain_graph=True)
            for part, there in zip(ALL, held, strict=True):
                reached = [p.grad is not None and bool(p.grad.any()) for p in made.decoders[part.name].parameters()]
                assert any(reached) == bool(there), (part.name, held)


@pytest.mark.parametrize("fusion", ["mean", "late", "gated", "zero_fill"])
def test_a_classifier_answers_alike_on_relaxed_texts_and_tokens(fusion: str) -> None:
    made, model, labels = generator([1.0, 1.0, 1.0]), classifier(fusion).eval(), torch.arange(5) % 3
    found = made.parts(torch.randn(5, 6, generator=torch.Generator().manual_seed(0)), labels)
    _, texts = relaxed(found, real(5, [1, 1, 1]), 5, FACTS)
    rows = drawn_to_input(made.rows(found, 5), FACTS)
    with torch.no_grad():
        plain = model(rows)
        with relaxed_texts(model, texts):
            assert torch.allclose(model(rows), plain, atol=1e-5)
            with relaxed_texts(model, {name: value.roll(1, 1) for name, value in texts.items()}):
                assert not torch.allclose(model(rows), plain, atol=1e-3)
        assert torch.equal(model(rows), plain)  # nothing is left behind


def test_relaxed_tokens_are_those_of_the_text_with_the_gradient_of_the_softmax() -> None:
    logits = torch.randn(2, 9, 6, generator=torch.Generator().manual_seed(0), requires_grad=True)
    with seeded(0, "tokens"):
        tokens = Tokens(9)
    weights, chosen = straight_through(logits), logits.argmax(1)
    torch.testing.assert_close(embedded(tokens, weights), embedded(tokens, chosen))
    scale = torch.randn(9, generator=torch.Generator().manual_seed(1))[None, :, None]
    [found] = torch.autograd.grad((weights * scale).sum(), logits)
    soft = logits.detach().softmax(1)
    torch.testing.assert_close(found, soft * (scale - (soft * scale).sum(1, keepdim=True)))
    [own] = torch.autograd.grad(embedded(tokens, weights.detach()).sum(), tokens.weight)
    assert not own[0].any() and own[1:].any()  # token 0 stays a zero vector


def test_absence_tells_nothing_about_real_and_synthetic() -> None:
    """A synthetic sample of a step has the modalities of a real one."""
    samples = real(3, [1, 1, 1])
    samples.present[1] = torch.tensor([1.0, 0.0, 1.0])
    found = generator([1.0, 1.0, 1.0]).parts(torch.zeros(7, 6), torch.zeros(7, dtype=torch.int64))
    fake, _ = relaxed(found, samples, 7, FACTS)
    assert torch.equal(fake.present, samples.present[torch.tensor([0, 1, 2, 0, 1, 2, 0])])


@pytest.mark.parametrize("held", [[1, 1, 1], [0, 1, 0], [0, 0, 1]])
def test_training_brings_samples_of_the_class_that_is_asked(held: list[int]) -> None:
    shard, model = made_shard(150, held), classifier()
    plan = LocalTrainingConfig(60, 32, 0.1, 0.0, 0.9, True)
    train_locally(model, shard, plan, FACTS, (0, "warmup", 0, 0), "fp32")
    trained, fresh = (
        train_generator(model, None, shard, replace(KNOBS, steps=steps), FACTS, (0, 0), "fp32") for steps in (250, 0)
    )
    assert trained.figures["label_agreement"] > max(0.8, fresh.figures["label_agreement"] + 0.2)
    assert trained.weights["held"].tolist() == held
    assert np.array_equal(present_in(ALL, trained.samples).all(0), np.array(held, bool))
    rows = load_generator(KNOBS, FACTS, trained.weights)(
        torch.randn(90, 6, generator=torch.Generator().manual_seed(0)), torch.arange(3).repeat(30)
    )
    if held[1]:  # vectors have no bound
        means = [float(rows[torch.arange(3).repeat(30) == label, 64:69].mean()) for label in range(3)]
        assert means[0] < -1.2 and means[2] > 1.2
