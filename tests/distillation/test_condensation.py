"""Condensed images: the bank that holds them, the loss by hand, what training makes, and its knobs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import FACTS, TINY, assert_same, shard_of, stripes, stripes_dataset
from torch import nn

from mosaic_ray.config.resolve import override, resolve
from mosaic_ray.core.errors import RequestError
from mosaic_ray.core.seeding import seeded
from mosaic_ray.data.transforms import pm1_to_normalised, to_pm1
from mosaic_ray.distillation.condensation import (
    FEATURE_SCALE,
    global_features,
    matches_globally,
    matching_loss,
    random_features,
    random_network,
    train_condensed,
)
from mosaic_ray.distillation.diff_augment import diff_augment
from mosaic_ray.distillation.generator_training import latents, load_generator, to_pixels
from mosaic_ray.distillation.rehearsal import SharedGenerators, drawable, generator_size, rehearsal_images
from mosaic_ray.federated.local_training import Shard
from mosaic_ray.methods.mosaic import client_uploads
from mosaic_ray.models.classifiers import build_classifier
from mosaic_ray.models.image_bank import ImageBank, enlarged
from mosaic_ray.models.state_dict import to_weights
from mosaic_ray.runs import runner
from mosaic_ray.runs.plan import stage_keys

CONDENSED = {"generator.family": "condensed", "generator.matching_channels": 8, "generator.images_per_class": 4}
KNOBS = override(TINY, CONDENSED).generator


def draws(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def classifier():
    with seeded(0, "init", "classifier"):
        return build_classifier(TINY.model, FACTS.num_classes, FACTS.channels, FACTS.image_size).eval()


def trained(shard: Shard, least_images: int = 1, **knobs):
    config = replace(KNOBS, least_images=least_images, **knobs)
    return train_condensed(classifier(), shard, config, FACTS, (0, 1), "fp32", global_model=classifier())


def bank(images: torch.Tensor, scale: int = 1) -> ImageBank:
    """Return a bank that holds uint8 ``images`` [C, M, channels, s, s]."""
    classes, count, channels, side, _ = images.shape
    made = ImageBank(classes, count, channels, side * scale, scale, latent_dim=3)
    made.pixels.copy_(images)
    return made


def test_each_image_of_the_class_is_drawn_equally_often_and_unchanged():
    images = torch.randint(0, 256, (3, 5, 1, 8, 8), generator=draws(0), dtype=torch.uint8)
    holds = bank(images)
    labels = torch.arange(6000) % 3
    drawn = holds(latents(holds, 6000, draws(1), torch.device("cpu")), labels)
    pixels = torch.from_numpy(to_pixels(drawn, "pm1_then_renorm", FACTS))
    same = (pixels[:, None] == images[labels]).flatten(2).all(2)  # [B, M]
    assert (same.sum(1) == 1).all()
    for label in range(3):
        counts = same[labels == label].sum(0)
        assert (counts - 400).abs().max() < 4 * (2000 * 0.2 * 0.8) ** 0.5  # binomial, four standard deviations
    far = torch.tensor([[-1e9, 0, 0], [1e9, 0, 0]])
    assert torch.equal(holds(far, torch.tensor([1, 1])), to_pm1(images[1, [0, 4]]))


def test_small_images_are_enlarged_and_keep_their_means():
    small = torch.rand(4, 3, 4, 4, generator=draws(2)) * 2 - 1
    large = enlarged(small, 8)
    assert large.shape == (4, 3, 8, 8) and enlarged(small, 4) is small
    torch.testing.assert_close(large.mean((2, 3)), small.mean((2, 3)))
    flat = bank(torch.full((2, 1, 1, 4, 4), 37, dtype=torch.uint8), scale=2)
    assert (to_pixels(flat(torch.zeros(1, 3), torch.tensor([0])), "pm1_then_renorm", FACTS) == 37).all()


def test_a_bank_keeps_images_as_bytes_within_their_range():
    holds = bank(torch.zeros(2, 3, 1, 8, 8, dtype=torch.uint8))
    images = torch.tensor([-3.0, 0.5, 2.0]).view(3, 1, 1, 1).expand(3, 1, 8, 8)
    holds.keep(1, images)
    assert holds.pixels[1].flatten(1)[:, 0].tolist() == [0, 191, 255] and not holds.pixels[0].any()
    restored = load_generator(KNOBS, FACTS, trained(shard_of(stripes(12)), steps=2).weights)
    assert_same(to_weights(restored), to_weights(restored))


def test_it_is_sent_as_bytes():
    """3 classes of 4 images of 4x4 pixels, a byte each, and the label distribution in float64."""
    assert generator_size(override(TINY, CONDENSED), FACTS).payload == 3 * 4 * 4 * 4 + 3 * 8


def test_the_loss_by_hand():
    """Two sets of different sizes, changed alike: means of features of what ``diff_augment`` gives."""
    with seeded(0, "network"):
        network = random_network(3, 5, 8)
    real, made = torch.rand(6, 3, 8, 8, generator=draws(3)) * 2 - 1, torch.rand(2, 3, 8, 8, generator=draws(4)) * 2 - 1
    changed = diff_augment(torch.cat([real, made]), draws(5), alike=True)
    features = network(changed)
    wanted = sum((float(a) - float(b)) ** 2 for a, b in zip(features[:6].mean(0), features[6:].mean(0), strict=True))
    loss = matching_loss(random_features(network), real, made, draws(5))
    assert float(loss) == pytest.approx(wanted, rel=1e-4)


def test_sets_with_the_same_images_have_no_loss_and_no_gradient():
    with seeded(0, "network"):
        network = random_network(3, 5, 8)
    real = torch.rand(6, 3, 8, 8, generator=draws(3)) * 2 - 1
    made = real.flip(0).clone().requires_grad_()
    loss = matching_loss(random_features(network), real, made, draws(5))
    loss.backward()
    assert loss.item() < 1e-10 and float(made.grad.abs().max()) < 1e-5
    other = (-real).requires_grad_()
    far = matching_loss(random_features(network), real, other, draws(5))
    far.backward()
    assert far.item() > 1e-3 and float(other.grad.abs().max()) > 1e-5


def test_images_that_are_changed_alike_get_the_same_numbers():
    """Equal images stay equal; with a number for each image they do not."""
    images = torch.rand(1, 3, 8, 8, generator=draws(6)).expand(5, 3, 8, 8)
    alike, apart = diff_augment(images, draws(7), alike=True), diff_augment(images, draws(7))
    assert torch.equal(alike, alike[:1].expand_as(alike)) and not torch.equal(apart, apart[:1].expand_as(apart))
    one = diff_augment(images[:1], draws(7))
    torch.testing.assert_close(alike[:1], one)


def test_the_global_models_features_by_hand():
    """The distance of two images is FEATURE_SCALE times the sum of the sets' mean squared differences."""
    model, images = classifier(), torch.rand(2, 1, 8, 8, generator=draws(8)) * 2 - 1
    with torch.no_grad():
        sets = global_features(model, FACTS)(images)
        outputs, x = [], pm1_to_normalised(images, FACTS.mean, FACTS.std)
        hooks = [
            part.register_forward_hook(lambda _, inputs, output: outputs.append(output))
            for part in model.modules() if isinstance(part, nn.BatchNorm2d)
        ]  # fmt: skip
        last = model.features(x)
        for hook in hooks:
            hook.remove()
    assert len(sets) == len(outputs) + 1 >= 2
    for found, output in zip(sets, [*outputs, None], strict=True):
        plain = last if output is None else output.relu()
        if output is not None:
            half = plain.shape[-1] // 2
            ends = slice(half), slice(half, None)
            quarters = [plain[..., rows, columns] for rows in ends for columns in ends]
            plain = torch.stack([quarter.mean((2, 3)) for quarter in quarters], 2).flatten(1)
        wanted = FEATURE_SCALE * (plain[0] - plain[1]).square().mean()
        torch.testing.assert_close((found[0] - found[1]).square().sum(), wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("share, turns", [(0.0, []), (0.5, [1, 3, 5, 7]), (0.25, [3, 7]), (1.0, [*range(8)])])
def test_a_share_of_a_classs_steps_is_in_the_global_model(share, turns):
    assert [turn for turn in range(8) if matches_globally(turn, share)] == turns


def test_the_global_model_counts_where_it_is_asked():
    shard = shard_of(stripes(60))
    found = [trained(shard, steps=6, matching_global=share).weights["pixels"] for share in (0.0, 0.5, 1.0)]
    assert not any(np.array_equal(a, b) for a, b in ((found[0], found[1]), (found[1], found[2])))


def test_a_random_network_has_the_papers_blocks():
    network = random_network(3, 16, 32)
    assert [type(part) for part in network] == [nn.Conv2d, nn.GroupNorm, nn.ReLU, nn.AvgPool2d] * 3 + [nn.Flatten]
    assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 16 * 4 * 4)
    assert random_network(1, 4, 8)(torch.zeros(2, 1, 8, 8)).shape == (2, 4 * 2 * 2)  # two blocks
    assert not any(p.requires_grad for p in network.parameters())


def test_training_brings_images_to_their_class():
    """The nearest class mean of real images finds the class of condensed images, and not of noise."""
    real = stripes(120)
    shard = shard_of(real)
    means = np.stack([real.images[real.labels == c].mean(0) for c in range(3)]).reshape(3, -1)
    right = {}
    for steps in (0, 240):
        pixels = trained(shard, steps=steps).weights["pixels"]
        seen = enlarged(torch.from_numpy(pixels).float().flatten(0, 1), 8).flatten(1).numpy()
        nearest = ((seen[:, None] - means[None]) ** 2).sum(2).argmin(1)
        right[steps] = float((nearest == np.repeat(np.arange(3), 4)).mean())
    assert right[240] >= 0.9 and right[0] <= 0.6


def test_classes_take_turns_and_a_class_that_is_not_held_stays_grey():
    images = stripes(60)
    shard = shard_of(images.take(np.flatnonzero(images.labels != 1)))
    none, one, two = (trained(shard, steps=steps).weights["pixels"] for steps in (0, 1, 2))
    changed = [[not np.array_equal(a[c], b[c]) for c in range(3)] for a, b in ((none, one), (one, two))]
    assert changed == [[True, False, False], [False, False, True]]
    assert (two[1] == 128).all() and not (none[0] == 128).all()


def test_the_figures_and_the_curve_are_those_of_the_steps():
    made = trained(shard_of(stripes(60)), steps=30)
    assert made.losses == ("loss",) and [row[0] for row in made.curve] == list(range(30))
    assert all(row[1] > 0 for row in made.curve)
    assert made.progress["steps"][-1] == 30 and made.samples.shape[1:] == (1, 8, 8)
    assert {"label_agreement", "coverage", "variety"} <= made.figures.keys()
    again = trained(shard_of(stripes(60)), steps=30)
    assert_same(made.weights, again.weights)


def test_images_of_a_class_with_one_image_would_be_copies_of_it():
    """The reason for ``least_images``: correlations with the one image, of 4 images made from noise."""
    one = stripes(3).take(np.array([1]))
    made = trained(shard_of(one), steps=400, image_scale=1, lr=0.05)
    pixels = made.weights["pixels"][1].reshape(4, -1).astype(float)
    assert (made.weights["pixels"][[0, 2]] == 128).all()
    assert min(np.corrcoef(row, one.images[0].ravel())[0, 1] for row in pixels) > 0.8


def test_classes_with_too_few_images_are_neither_made_nor_asked_for():
    """20 images of class 0, 19 of class 1, none of class 2; then a client without enough of any."""
    images = stripes(60)
    rows = np.flatnonzero(images.labels == 0), np.flatnonzero(images.labels == 1)[:19]
    shard = shard_of(images.take(np.concatenate(rows)))
    made = trained(shard, least_images=20, steps=4)
    assert (made.weights["pixels"][1:] == 128).all() and not (made.weights["pixels"][0] == 128).all()
    assert made.weights["label_cdf"].tolist() == [1.0, 1.0, 1.0]
    none = trained(shard, least_images=21, steps=4)
    assert (none.weights["pixels"] == 128).all() and none.curve == [] and none.progress["steps"].tolist() == [0]

    counts = np.array([[20, 19, 0], [0, 19, 30]])
    for least, labels in ((20, {2}), (5, {1, 2})):
        config = override(TINY, CONDENSED | {"generator.least_images": least})
        shared = SharedGenerators((made.weights, none.weights), (1, 2), drawable(config, counts))
        place = ("finetune", 0, 0)
        drawn = rehearsal_images(config, FACTS, shared, np.array([1, 0, 0]), place, 50, torch.device("cpu"))
        assert drawn is not None and set(drawn.labels.tolist()) == labels
    assert drawable(override(TINY, {"generator.family": "cvae"}), counts) is counts


def test_a_run_shares_only_classes_that_were_condensed(tmp_path, monkeypatch):
    """Rehearsal and ``model.student`` both draw from what the stage of the generators shares."""
    monkeypatch.setattr("mosaic_ray.data.load.load_dataset", lambda config: stripes_dataset())
    knobs = {"distill.steps": 0, "generator.least_images": 30, "generator.steps": 2, "rehearsal.weight": 1.0}
    seen = []
    real = client_uploads.Generators.shared
    monkeypatch.setattr(client_uploads.Generators, "shared", lambda *a: seen.append(real(*a)) or seen[-1])
    made = runner.run(override(TINY, CONDENSED | knobs), storage=str(tmp_path), progress=False)
    counts = np.array(made["label_counts"])
    assert ((counts > 0) & (counts < 30)).any() and np.array_equal(seen[0].counts, np.where(counts >= 30, counts, 0))


@pytest.mark.parametrize(
    "knobs, says",
    [
        ({"generator.family": "condensed", "generator.tau": 5}, "generator.tau: only a GAN has it"),
        ({"generator.family": "condensed", "generator.feature_weight": 1.0}, "take generator.family=cvae"),
        ({"generator.image_scale": 4}, "generator.image_scale: only condensed images have it"),
        ({"generator.images_per_class": 4, "generator.family": "cvae"}, "take generator.family=condensed"),
    ],
)
def test_knobs_that_would_do_nothing_are_refused(knobs, says):
    with pytest.raises(RequestError, match=says):
        resolve(sets=knobs)


def test_its_knobs_are_in_the_keys_of_its_generators_alone():
    """A GAN's knobs and the discriminator's are no part of them."""
    found = [
        stage_keys(override(TINY, knobs))["generators"]
        for knobs in (CONDENSED, CONDENSED | {"generator.image_scale": 4}, {"generator.family": "cvae"}, {})
    ]
    assert len({key for keys in found for key in keys}) == 4 * TINY.partition.num_clients
    assert KNOBS.learning_rate == 0.05 and KNOBS.labelled
