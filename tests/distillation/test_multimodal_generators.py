"""Generators of several modalities: their rows, their loss by its formula, what clients ask of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mosaic_ray.config.resolve import override
from mosaic_ray.config.schema import ExperimentConfig, GeneratorConfig, ModelConfig
from mosaic_ray.core.seeding import seeded
from mosaic_ray.core.types import DataFacts, Modality
from mosaic_ray.data.records import pack, pictures, present_in, unpack
from mosaic_ray.data.transforms import drawn_to_input, drawn_to_stored, to_generator_range, to_input
from mosaic_ray.distillation.cvae_training import joint_reconstruction_loss, train_cvae
from mosaic_ray.distillation.generator_training import generator_for, load_generator
from mosaic_ray.distillation.rehearsal import (
    SharedGenerators,
    allocate_draws,
    allocate_modalities,
    draw_joined,
    sent_weights,
)
from mosaic_ray.federated.local_training import Shard
from mosaic_ray.models.classifiers import build_classifier
from mosaic_ray.models.multimodal_generator import MultimodalGenerator, generator_modality
from mosaic_ray.models.state_dict import to_weights

IMAGE, VECTOR, TEXT = Modality("img", "image", (1, 8, 8)), Modality("v", "vector", (5,)), Modality("t", "text", (6,), 9)
ALL = (IMAGE, VECTOR, TEXT)
FACTS = DataFacts("made", 3, 1, 8, (0.4,), (0.3,), modalities=ALL)
KNOBS = GeneratorConfig(family="cvae", latent_dim=6, ngf=4, ndf=4, steps=200, batch_size=16)


def records(count: int, present: list[int], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return records whose vector and text depend on their label, and the labels."""
    draws = np.random.default_rng(seed)
    labels = draws.integers(0, 3, count)
    values = {
        "img": draws.integers(0, 256, (count, 1, 8, 8)), "v": labels[:, None] - 1 + 0.1 * draws.normal(size=(count, 5)),
        "t": np.repeat(1 + labels[:, None], 6, 1),
    }  # fmt: skip
    return pack(ALL, values, np.tile(np.array(present, bool), (count, 1))), labels


def generator() -> MultimodalGenerator:
    with seeded(1, "generator"):
        made = generator_for(KNOBS, FACTS)
    assert isinstance(made, MultimodalGenerator)
    return made.eval()


def test_rows_have_the_modalities_of_the_client_and_no_other() -> None:
    made = generator()
    made.held.copy_(torch.tensor([0.0, 1.0, 1.0]))
    rows = made(torch.randn(4, 6, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 0]))
    assert rows.shape == (4, *FACTS.input_shape)
    assert not rows[:, :64].any() and rows[:, -3:].tolist() == [[0, 1, 1]] * 4
    tokens = rows[:, 69:75]
    assert torch.equal(tokens, tokens.round()) and tokens.min() >= 0 and tokens.max() < 9


def test_drawn_rows_are_stored_and_read_again() -> None:
    rows = generator()(torch.randn(4, 6, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 0]))
    stored = drawn_to_stored(rows, FACTS)
    assert stored.shape == (4, *FACTS.stored_shape) and stored.dtype == torch.uint8
    again = to_input(stored, FACTS)
    torch.testing.assert_close(again[:, 64:], rows[:, 64:])
    torch.testing.assert_close(again[:, :64], drawn_to_input(rows, FACTS)[:, :64], atol=0.5 / 255 / 0.3 + 1e-6, rtol=0)


def test_what_a_classifier_sees_of_real_samples_is_the_same_from_both_ranges() -> None:
    real, _ = records(5, [1, 0, 1])
    stored = torch.tensor(real)
    torch.testing.assert_close(drawn_to_input(to_generator_range(stored, FACTS), FACTS), to_input(stored, FACTS))


def test_the_loss_is_its_formula() -> None:
    real, labels = records(3, [1, 1, 1])
    rows = to_generator_range(torch.tensor(real), FACTS)
    rows[0, -3] = 0  # the first sample lacks the image
    with torch.no_grad():
        parts = generator().parts(torch.randn(3, 6, generator=torch.Generator().manual_seed(0)), torch.tensor(labels))
    found = float(joint_reconstruction_loss(parts, rows, ALL).detach())
    wanted = 0.0
    for row in (1, 2):
        goal, made = (rows[row, :64] + 1) / 2, ((parts["img"][row].flatten() + 1) / 2).clamp(0, 1)
        wanted += float(-(goal * made.log() + (1 - goal) * (1 - made).log()).sum())
    wanted += 3 * 2.5 * float((parts["v"] - rows[:, 64:69]).square().mean().log())
    for row in range(3):
        shares = parts["t"][row].softmax(0)
        wanted -= sum(float(shares[int(rows[row, 69 + place]), place].log()) for place in range(6))
    assert found == pytest.approx(wanted / 3, rel=1e-4)


def test_a_trained_generator_draws_what_the_label_says() -> None:
    real, labels = records(120, [0, 1, 1])
    shard = Shard(torch.tensor(real), torch.tensor(labels))
    with seeded(0, "classifier"):
        classifier = build_classifier(ModelConfig(width=4), 3, 1, 8, None, ALL)
    made = train_cvae(classifier, shard, KNOBS, FACTS, (0, 0), "fp32")
    trained = load_generator(KNOBS, FACTS, made.weights)
    asked = torch.arange(3).repeat(20)
    rows = trained(torch.randn(60, 6, generator=torch.Generator().manual_seed(0)), asked)
    vectors, tokens = rows[:, 64:69].mean(1), rows[:, 69:75]
    for label in range(3):
        assert float(vectors[asked == label].mean()) == pytest.approx(label - 1, abs=0.45)
        assert (tokens[asked == label] == 1 + label).float().mean() > 0.7
    assert made.weights["held"].tolist() == [0, 1, 1]
    travel = sent_weights(made.weights, FACTS)
    assert not any(generator_modality(name) == "img" for name in travel) and len(travel) < len(made.weights)
    assert not present_in(ALL, made.samples)[:, 0].any()


def test_a_client_asks_all_classes_of_generators_with_modalities_that_it_lacks() -> None:
    counts = np.full((3, 4), 10)
    shared = SharedGenerators((), (0, 1, 2), counts)
    richer = np.array([False, False, True])
    places, labels = allocate_draws(shared, 0, [3], 400, np.random.default_rng(0), richer)
    assert set(labels) == {0, 1, 2, 3}
    assert set(places[labels != 3]) == {2}  # the other's modalities are no news
    assert set(places[labels == 3]) == {1, 2}


def test_pictures_show_the_image_or_all_values() -> None:
    real, _ = records(3, [1, 1, 1])
    assert np.array_equal(pictures(ALL, real), unpack(ALL, real)["img"])
    others = (VECTOR, TEXT)
    values = {"v": np.array([[-9.0, -3, 0, 3, 9]]), "t": np.array([[0, 8, 4, 0, 0, 0]])}
    seen = pictures(others, pack(others, values, np.ones((1, 2), bool)))
    assert seen.shape == (1, 1, 4, 4) and seen.ravel()[:7].tolist() == [0, 0, 127, 255, 255, 0, 255]


def test_weights_of_a_generator_are_named_by_modality() -> None:
    names = {generator_modality(name) for name in to_weights(generator())}
    assert names == {"", "img", "v", "t"}


def held_by(weights: list[list[int]]) -> tuple[dict[str, np.ndarray], ...]:
    return tuple({"held": np.array(row, np.float32)} for row in weights)


def test_each_modality_is_drawn_from_a_client_that_has_it() -> None:
    counts = np.array([[10, 0], [30, 10], [10, 10], [50, 50]])
    shared = SharedGenerators(held_by([[1, 0, 0], [1, 1, 0], [1, 0, 0], [1, 1, 1]]), (0, 1, 2, 3), counts)
    labels = np.repeat([0, 1], 4000)
    owners = allocate_modalities(shared, 3, labels, np.random.default_rng(0))
    zero, one = owners[:4000], owners[4000:]
    assert {*zero[:, 0]} == {0, 1, 2} and {*one[:, 0]} == {1, 2} and {*owners[:, 1]} == {1} and {*owners[:, 2]} == {-1}
    assert np.mean(zero[:, 0] == 1) == pytest.approx(0.6, abs=0.03)


def test_joined_samples_have_the_values_of_their_generators() -> None:
    first, second = generator(), generator()
    first.held.copy_(torch.tensor([0.0, 1.0, 0.0]))
    second.held.copy_(torch.tensor([0.0, 0.0, 1.0]))
    shared = SharedGenerators((to_weights(first), to_weights(second)), (0, 1), np.full((2, 3), 10))
    config = override(
        ExperimentConfig(), {f"generator.{n}": v for n, v in vars(KNOBS).items()} | {"runtime.precision": "fp32"}
    )
    owners, labels = np.array([[-1, 0, 1], [-1, 0, -1]]), np.array([2, 0])
    made = draw_joined(config, FACTS, shared, owners, labels, torch.Generator().manual_seed(3), torch.device("cpu"))
    draws = torch.Generator().manual_seed(3)
    vector = first(torch.randn(2, 6, generator=draws), torch.tensor(labels))[:, 64:69]
    text = second(torch.randn(1, 6, generator=draws), torch.tensor(labels[:1]))[:, 69:75]
    values = unpack(ALL, made.images.numpy())
    np.testing.assert_array_equal(values["v"], vector.detach().numpy())
    np.testing.assert_array_equal(values["t"][0], text[0].detach().numpy())
    assert present_in(ALL, made.images.numpy()).tolist() == [[False, True, True], [False, True, False]]
