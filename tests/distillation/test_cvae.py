"""The conditional variational autoencoder: losses by law, training, its knobs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import FACTS, TINY, assert_same, shard_of, stripes
from torch import nn

from mosaic_ray.config.resolve import override, resolve
from mosaic_ray.core.errors import RequestError
from mosaic_ray.core.seeding import seeded, stream
from mosaic_ray.distillation.cvae_training import prior_divergence, reconstruction_loss, train_cvae
from mosaic_ray.distillation.generator_training import latents, load_generator
from mosaic_ray.federated.local_training import Shard
from mosaic_ray.models.classifiers import build_classifier
from mosaic_ray.models.encoder import build_encoder
from mosaic_ray.pipeline.graph import KeyInputs
from mosaic_ray.runs.plan import stage_keys

KNOBS = override(TINY, {"generator.family": "cvae", "generator.ngf": 8, "generator.ndf": 8}).generator


def trained(shard: Shard, steps: int):
    with seeded(0, "init", "classifier"):
        classifier = build_classifier(TINY.model, FACTS.num_classes, FACTS.channels, FACTS.image_size).eval()
    knobs = override(
        TINY, {"generator.family": "cvae", "generator.ngf": 8, "generator.ndf": 8, "generator.steps": steps}
    )
    return train_cvae(classifier, shard, knobs.generator, FACTS, (0, 1), "fp32")


def test_the_divergence_is_torchs():
    mean, log_variance = torch.randn(7, 5), torch.randn(7, 5)
    normal = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    expected = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0)).sum(1).mean()
    torch.testing.assert_close(prior_divergence(mean, log_variance), expected)
    assert prior_divergence(torch.zeros(3, 2), torch.zeros(3, 2)) == 0


def test_the_reconstruction_is_cross_entropy_of_pixels():
    real, logits = torch.rand(4, 1, 3, 3) * 2 - 1, torch.randn(4, 1, 3, 3)
    drawn = torch.tanh(logits / 2)  # (drawn + 1) / 2 is the sigmoid of the logits
    wanted = nn.functional.binary_cross_entropy_with_logits(logits, (real + 1) / 2, reduction="none")
    torch.testing.assert_close(reconstruction_loss(drawn, real), wanted.sum((1, 2, 3)).mean())
    assert torch.isfinite(reconstruction_loss(torch.ones(1, 1, 2, 2), -torch.ones(1, 1, 2, 2)))


@pytest.mark.parametrize("size", [8, 16, 28, 32, 64])
def test_encoders_take_every_size(size):
    mean, log_variance = build_encoder(KNOBS, 3, size, 10)(torch.zeros(2, 3, size, size), torch.tensor([1, 9]))
    assert mean.shape == log_variance.shape == (2, KNOBS.latent_dim)


def test_images_show_the_class_asked_for():
    made = trained(shard_of(stripes(120)), 200)
    generator = load_generator(KNOBS, FACTS, made.weights)
    z = latents(generator, 60, stream(0, "z"), torch.device("cpu"))
    for label in range(3):
        rows = generator(z, torch.full((60,), label)).mean(
            (0, 1, 3)
        )  # a stripe lies on rows 1 + 2 label and 2 + 2 label
        assert rows[1:7].view(3, 2).mean(1).argmax() == label
    losses = [row[1] for row in made.curve]
    assert losses[-1] < 0.8 * losses[0] and len(made.curve[0]) == 1 + len(made.losses)


def test_it_is_a_function_of_its_address_and_keeps_the_clients_shares():
    data = stripes(90)
    shard = shard_of(data.take(np.flatnonzero(data.labels != 1)))
    first, again = trained(shard, 3), trained(shard, 3)
    assert_same(first.weights, again.weights)
    shares = np.diff(first.weights["label_cdf"], prepend=0)
    np.testing.assert_allclose(shares, np.bincount(shard.labels, minlength=3) / len(shard))


def test_a_client_with_one_image_trains_nothing_and_returns():
    made = trained(shard_of(stripes(3).take(np.array([0]))), 3)
    assert made.curve == [] and made.progress["steps"].tolist() == [0]


@pytest.mark.parametrize("knob", ["generator.lambda_e=2", "generator.discriminator=shared_trunk", "generator.tau=5"])
def test_a_gans_knobs_are_refused(knob):
    name, _, value = knob.partition("=")
    with pytest.raises(RequestError, match=f"{name}: only a GAN has it"):
        resolve(sets={"generator.family": "cvae", name: value})


def test_labels_asked_for_in_two_ways_are_one_result():
    by_family, by_switch = ({"generator.family": "cgan"}, {"generator.conditional": True})
    assert stage_keys(override(TINY, by_family)) == stage_keys(override(TINY, by_switch))
    keys = [stage_keys(override(TINY, {"generator.family": f}))["generators"] for f in ("dcgan", "cgan", "cvae")]
    assert len({key for each in keys for key in each}) == 3 * TINY.partition.num_clients
    assert KeyInputs(TINY).config.generator.learning_rate == 2e-4 and KNOBS.learning_rate == 2e-3
