"""The conditional variational autoencoder: losses by law, training, its knobs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import FACTS, TINY, assert_same, shard_of, stripes
from torch import nn

from mosaic_ray.config.resolve import override, resolve
from mosaic_ray.core.errors import RequestError
from mosaic_ray.core.seeding import seeded, stream
from mosaic_ray.distillation import cvae_training
from mosaic_ray.distillation.client_tasks import GeneratorInput, GeneratorTask
from mosaic_ray.distillation.cvae_training import (
    feature_loss,
    feature_maps,
    prior_divergence,
    reconstruction_loss,
    train_cvae,
)
from mosaic_ray.distillation.generator_training import latents, load_generator
from mosaic_ray.federated.client import ClientContext, initial_weights
from mosaic_ray.federated.local_training import Shard
from mosaic_ray.models.classifiers import Classifier, build_classifier
from mosaic_ray.models.encoder import build_encoder
from mosaic_ray.models.state_dict import freeze, to_weights
from mosaic_ray.pipeline.graph import KeyInputs
from mosaic_ray.runs.plan import stage_keys

KNOBS = override(TINY, {"generator.family": "cvae", "generator.ngf": 8, "generator.ndf": 8}).generator


def classifier():
    with seeded(0, "init", "classifier"):
        return build_classifier(TINY.model, FACTS.num_classes, FACTS.channels, FACTS.image_size).eval()


def trained(shard: Shard, steps: int, feature_weight: float = 0.0):
    knobs = replace(KNOBS, steps=steps, feature_weight=feature_weight)
    features = classifier() if feature_weight else None
    return train_cvae(classifier(), shard, knobs, FACTS, (0, 1), "fp32", features=features)


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


def test_the_feature_loss_by_hand():
    """Two convolutions with batch norm: every map is computed here from the layers' definitions."""
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3))
    model = freeze(Classifier(nn.Sequential(trunk, nn.AdaptiveAvgPool2d(1), nn.Flatten()), nn.Linear(3, 2)))
    for norm in (trunk[1], trunk[4]):
        norm.running_mean.normal_(), norm.running_var.uniform_(0.5, 2)
    drawn, real = torch.randn(4, 1, 6, 6, requires_grad=True), torch.randn(4, 1, 6, 6)

    def normed(norm: nn.BatchNorm2d, x):
        mean, var = norm.running_mean[:, None, None], norm.running_var[:, None, None]
        return (x - mean) / (var + norm.eps).sqrt() * norm.weight[:, None, None] + norm.bias[:, None, None]

    total = 0.0
    for x, sign in ((drawn, 1), (real, -1)):
        first = normed(trunk[1], trunk[0](x))
        second = normed(trunk[4], trunk[3](first.relu()))
        maps = [first, second, second.mean((2, 3))]
        total = maps if sign == 1 else [(a - b).square().mean() for a, b in zip(total, maps, strict=True)]
    torch.testing.assert_close(feature_loss(model, drawn, real), sum(total) / 3 * 36)
    feature_loss(model, drawn, real).backward()
    assert drawn.grad.abs().sum() > 0 and all(part.grad is None for part in model.parameters())
    assert feature_loss(model, real, real) == 0
    assert not any(part._forward_hooks for part in model.modules())


def test_without_batch_norm_the_penultimate_features_are_compared():
    model = freeze(Classifier(nn.Flatten(), nn.Linear(64, 3)))
    assert [each.shape for each in feature_maps(model, torch.zeros(2, 1, 8, 8))] == [(2, 64)]


def test_the_feature_loss_brings_reconstructions_nearer_in_features(monkeypatch):
    """Paired: the same client and streams, with the loss and next to without it."""
    found = []
    monkeypatch.setattr(cvae_training, "feature_loss", lambda *args: found.append(feature_loss(*args)) or found[-1])
    for weight in (1e-9, 500.0):
        trained(shard_of(stripes(120)), 100, weight)
    without, with_loss = (sum(float(loss.detach()) for loss in found[n : n + 10]) for n in (90, 190))
    assert with_loss < 0.9 * without


def test_a_run_takes_the_global_models_features():
    config = override(TINY, {"generator.family": "cvae", "generator.feature_weight": 1.0, "generator.steps": 4})
    context, shard = ClientContext(config, FACTS, torch.device("cpu")), shard_of(stripes(60))
    one, other = initial_weights(context), to_weights(context.classifier())
    made = [
        GeneratorTask().run(context, shard, 0, {"cnn": broadcast}, GeneratorInput(own)).weights
        for broadcast, own in ((one, one), (one, other), (other, one))
    ]
    assert_same(made[0], made[1])  # the client's own model only measures
    assert any(not np.array_equal(made[0][name], made[2][name]) for name in made[0])


def test_the_feature_loss_is_refused_without_a_reconstruction():
    with pytest.raises(RequestError, match=r"generator.feature_weight: it weighs a reconstruction"):
        resolve(algorithm="distilled", sets={"generator.feature_weight": "1"})


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
