"""PmcmFL: prototypes in the place of absent modalities, by formula, and what they are made of."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import TINY
from torch import Tensor

from mosaic_ray.config.resolve import override
from mosaic_ray.config.schema import ModelConfig
from mosaic_ray.config.validate import check
from mosaic_ray.core.errors import RequestError
from mosaic_ray.core.seeding import seeded
from mosaic_ray.core.types import DataFacts, Modality, Update
from mosaic_ray.data.records import pack
from mosaic_ray.data.transforms import to_input
from mosaic_ray.federated.strategies.pmcmfl import PmcmflKnobs, PrototypeAggregator, PrototypeObjective, contrast
from mosaic_ray.models.classifiers import Classifier, build_classifier
from mosaic_ray.models.multimodal import PROTOTYPES

BOTH = (Modality("a", "vector", (3,)), Modality("b", "vector", (2,)))
FACTS = DataFacts("made", 3, 1, 8, (0.5,), (0.3,), modalities=BOTH)
PRESENT = [[1, 1], [1, 0], [0, 1], [1, 0]]
LABELS = torch.tensor([0, 1, 2, 1])


def network(seed: int = 0, known: bool = True) -> Classifier:
    with seeded(seed, "network"):
        model = build_classifier(ModelConfig(fusion="prototypes", width=2), 3, 1, 8, "cnn", BOTH)
        if known:
            model.trunk.prototypes.copy_(torch.rand(2, 3, 8))
    return model.eval()


def rows(seed: int = 0) -> Tensor:
    draws = np.random.default_rng(seed)
    values = {"a": draws.normal(size=(4, 3)), "b": draws.normal(size=(4, 2))}
    return to_input(torch.tensor(pack(BOTH, values, np.array(PRESENT, bool))), FACTS)


def encoded(model: Classifier, x: Tensor) -> tuple[Tensor, Tensor]:
    """The features of each modality as if it were there, [B, 8] each."""
    return model.trunk.encoders["a"].encoder(x[:, :3]), model.trunk.encoders["b"].encoder(x[:, 3:5])


def completed(model: Classifier, x: Tensor, classes: list[int]) -> Tensor:
    """Features side by side, with the prototypes of ``classes`` in place of absent modalities, row by row."""
    found = []
    for row, (present, label) in enumerate(zip(PRESENT, classes, strict=True)):
        parts = [features[row] for features in encoded(model, x)]
        found.append(torch.cat([parts[m] if present[m] else model.trunk.prototypes[m, label] for m in range(2)]))
    return torch.stack(found)


def test_prototypes_of_the_label_stand_in_for_what_is_absent():
    model, x = network(), rows()
    got = model.trunk.complete(*model.trunk.encode(x), LABELS)
    torch.testing.assert_close(got, completed(model, x, LABELS.tolist()))


def test_without_labels_it_is_the_class_with_the_nearest_prototypes():
    model, x = network(), rows()
    nearest = []
    for row, present in enumerate(PRESENT):
        far = [
            sum(
                float((features[row] - model.trunk.prototypes[m, label]).detach().square().sum())
                for m, features in enumerate(encoded(model, x))
                if present[m]
            )
            for label in range(3)
        ]
        nearest.append(int(np.argmin(far)))
    torch.testing.assert_close(model.features(x), completed(model, x, nearest))


def test_a_sample_that_has_everything_owes_prototypes_nothing():
    x = rows()[:1]
    torch.testing.assert_close(network().features(x), network(known=False).features(x))


def test_the_contrast_is_its_formula_and_unknown_classes_are_left_out():
    z, prototypes = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)), torch.eye(3, 6) + 0.1
    cosine = torch.nn.functional.cosine_similarity(z[:, None], prototypes[None], dim=2)
    by_hand = -(cosine / 0.5).log_softmax(1)[range(4), LABELS].mean()
    torch.testing.assert_close(contrast(z, prototypes, LABELS, 0.5), by_hand)
    without = prototypes.clone()
    without[0] = 0
    by_hand = -(cosine[1:, 1:] / 0.5).log_softmax(1)[range(3), LABELS[1:] - 1].mean()
    torch.testing.assert_close(contrast(z, without, LABELS, 0.5), by_hand)
    nothing = contrast(z.requires_grad_(), torch.zeros(3, 6), LABELS, 0.5)
    assert nothing == 0 and torch.autograd.grad(nothing, z)[0].abs().max() == 0


@pytest.mark.parametrize("mu", [0.0, 0.3])
def test_the_loss_is_cross_entropy_of_the_completed_features_and_the_contrast(mu):
    model, x = network(), rows()
    objective = PrototypeObjective(PmcmflKnobs(mu=mu, temperature=0.5), 3)
    found = objective.loss(model, objective.forward(model, x), LABELS)
    z = completed(model, x, LABELS.tolist())
    classes = torch.stack([torch.cat([*model.trunk.prototypes[:, label]]) for label in range(3)])
    by_hand = torch.nn.functional.cross_entropy(model.head(z), LABELS) + mu * contrast(z, classes, LABELS, 0.5)
    torch.testing.assert_close(found, by_hand)


def test_a_client_sends_sums_of_the_features_that_it_has():
    model, batches = network(), [(rows(0), LABELS), (rows(1), LABELS.flip(0))]
    objective = PrototypeObjective(PmcmflKnobs(), 3)
    for images, labels in batches:
        objective.after_step(model, images, labels)
    message, state = objective.finish(model, 2)
    assert not state
    sums, counts = np.zeros((2, 3, 8)), np.zeros((2, 3))
    with torch.no_grad():
        for images, labels in batches:
            for row, present in enumerate(PRESENT):
                for m, features in enumerate(encoded(model, images)):
                    if present[m]:
                        sums[m, labels[row]] += features[row].numpy()
                        counts[m, labels[row]] += 1
    np.testing.assert_allclose(message["sums"], sums, atol=1e-5)
    np.testing.assert_array_equal(message["counts"], counts)


def test_the_server_takes_means_over_all_samples_and_keeps_what_nobody_has():
    weights = {PROTOTYPES: np.full((2, 3, 8), 7.0, np.float32), "head.bias": np.zeros(3, np.float32)}
    config = SimpleNamespace(federation=SimpleNamespace(masked=False))
    federation = SimpleNamespace(config=config, classifiers=("cnn", "cnn"), partial_width=False)
    aggregator = PrototypeAggregator(SimpleNamespace(federation=federation, models={"cnn": weights}, server={}))
    counts = [np.zeros((2, 3), np.float32), np.zeros((2, 3), np.float32)]
    counts[0][0, 1], counts[1][0, 1] = 3, 1
    for client, (each, value) in enumerate(zip(counts, (1.0, 5.0), strict=True)):
        sums = each[:, :, None] * np.full(8, value, np.float32)
        aggregator.add(Update(client, weights, 10, {}, {"sums": sums, "counts": each}, {}))
    found = aggregator.result()["cnn"][PROTOTYPES]
    np.testing.assert_allclose(found[0, 1], 2.0)  # (3 x 1 + 1 x 5) / 4
    untouched = np.ones((2, 3), bool)
    untouched[0, 1] = False
    assert (found[untouched] == 7).all() and found.dtype == np.float32


def test_what_its_loss_would_not_see_is_refused():
    fits = {"federation.strategy": "pmcmfl", "model.fusion": "prototypes"}
    check(override(TINY, fits))
    for knobs in ({"warmup.loss": "adjusted"}, {"federation.masked": True}):
        with pytest.raises(RequestError, match="take ce, and false"):
            check(override(TINY, fits | knobs))
    for other in ("fedrs", "fedlc"):
        with pytest.raises(RequestError, match="both set adjust_logits"):
            check(override(TINY, fits | {"federation.strategy": f"pmcmfl+{other}"}))


def test_another_fusion_is_refused():
    with pytest.raises(RequestError, match=r"--set model\.fusion=prototypes"):
        check(override(TINY, {"federation.strategy": "pmcmfl"}))
