"""Networks for samples of several modalities: absent modalities, fusion by its formula, narrow clients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from mosaic_ray.config.schema import ModelConfig
from mosaic_ray.core.errors import RequestError
from mosaic_ray.core.seeding import seeded
from mosaic_ray.core.types import DataFacts, Modality
from mosaic_ray.data.records import pack
from mosaic_ray.data.transforms import to_input
from mosaic_ray.models.classifiers import Classifier, build_classifier, norm_depths
from mosaic_ray.models.multimodal import FUSIONS, modality_of
from mosaic_ray.models.state_dict import to_weights
from mosaic_ray.models.submodel import channel_layout, extract, fit, num_kept

IMAGE, VECTOR, TEXT = (
    Modality("img", "image", (1, 8, 8)),
    Modality("v", "vector", (5,)),
    Modality("t", "text", (12,), 257),
)
ALL = (IMAGE, VECTOR, TEXT)
FACTS = DataFacts("made", 3, 1, 8, (0.5,), (0.3,), modalities=ALL)


def network(fusion: str, modalities: tuple[Modality, ...] = ALL, name: str = "cnn") -> Classifier:
    with seeded(0, "network"):
        return build_classifier(ModelConfig(fusion=fusion, width=4), 3, 1, 8, name, modalities)


def rows(present: list[list[int]], seed: int = 0) -> Tensor:
    """Return inputs of random values that have the modalities ``present`` [B, M]."""
    draws, count = np.random.default_rng(seed), len(present)
    values = {
        "img": draws.integers(0, 256, (count, 1, 8, 8)), "v": draws.normal(size=(count, 5)),
        "t": draws.integers(0, 257, (count, 12)),
    }  # fmt: skip
    return to_input(torch.tensor(pack(ALL, values, np.array(present, bool))), FACTS)


def own_features(model: Classifier, x: Tensor) -> Tensor:
    """Return the features of each modality's encoder alone, [M, B, d], computed without the fusion."""
    found, first = [], 0
    for modality in ALL:
        values = x[:, first : first + modality.size].reshape(-1, *modality.shape)
        found.append(model.trunk.encoders[modality.name].encoder(values))  # type: ignore[union-attr,operator,index]
        first += modality.size
    return torch.stack(found)


@pytest.mark.parametrize("fusion", ["mean", "gated", "late"])
def test_the_values_of_absent_modalities_change_nothing(fusion: str) -> None:
    model = network(fusion).eval()
    x = rows([[1, 0, 1]] * 4)
    other = x.clone()
    other[:, 64:69] = 7.0  # the vector, which the mask says is not there
    assert torch.equal(model(x), model(other))


@pytest.mark.parametrize("fusion", sorted(FUSIONS))
def test_a_fusion_is_its_formula(fusion: str) -> None:
    model = network(fusion).eval()
    mask = torch.tensor([[1, 0, 1], [1, 1, 1], [0, 1, 0]])
    x = rows(mask.tolist())
    each, there = own_features(model, x), mask.T[:, :, None].float()
    if fusion == "mean":
        wanted = (each * there).sum(0) / there.sum(0)
    elif fusion == "gated":
        gates = torch.stack([model.trunk.gates[m.name](f).sigmoid() for m, f in zip(ALL, each, strict=True)])  # type: ignore
        wanted = (each * gates * there).sum(0) / (gates * there).sum(0)
    elif fusion == "late":
        ones = torch.ones(3, 3, 1)
        wanted = (torch.cat([each, ones], 2) * there / there.sum(0)).transpose(0, 1).flatten(1)
    elif fusion == "prototypes":  # they are zero in a new network
        wanted = (each * there).transpose(0, 1).flatten(1)
    else:
        wanted = each.transpose(0, 1).flatten(1)
    torch.testing.assert_close(model.features(x), wanted, rtol=1e-5, atol=1e-6)


def test_late_fusion_is_the_mean_of_heads() -> None:
    model, x = network("late").eval(), rows([[1, 0, 1]])
    each = own_features(model, x)[:, 0]
    heads = model.head.weight.split(17, 1)
    own = [heads[k][:, :16] @ each[k] + heads[k][:, 16] for k in (0, 2)]
    wanted = (own[0] + own[1]) / 2 + model.head.bias
    torch.testing.assert_close(model(x)[0], wanted, rtol=1e-5, atol=1e-6)


def test_batch_norm_sees_the_rows_that_have_the_image() -> None:
    model = network("mean").train()
    x = rows([[1, 1, 0], [0, 1, 1], [1, 0, 0]])
    model(x)
    alone = network("mean").train()
    alone(x[[0, 2]])
    before, after = to_weights(alone), to_weights(model)
    assert all(np.array_equal(before[n], after[n]) for n in before if "running" in n)


def test_a_batch_without_a_modality_leaves_its_encoder_alone() -> None:
    model = network("mean").train()
    before = to_weights(model)
    model(rows([[0, 1, 0], [0, 1, 0]])).sum().backward()
    assert all(p.grad is None for n, p in model.named_parameters() if modality_of(n) in ("img", "t"))
    after = to_weights(model)
    assert all(np.array_equal(before[n], after[n]) for n in before if modality_of(n) == "img")


@pytest.mark.parametrize("fusion", ["mean", "gated"])
@pytest.mark.parametrize("name", ["cnn", "resnet18", "mobilenet"])
def test_narrow_clients_hold_channels_of_each_encoder(fusion: str, name: str) -> None:
    whole = network(fusion, name=name).eval()
    layout = channel_layout(whole)
    indices = tuple(np.arange(num_kept(0.5, size)) for size in layout.sizes)
    part = fit(network(fusion, name=name), extract(to_weights(whole), layout, indices)).eval()
    assert part(rows([[1, 1, 1], [0, 1, 0]])).shape == (2, 3)
    assert part(rows([[0, 1, 1], [0, 1, 0]])).shape == (2, 3)  # nobody has an image
    assert part.head.in_features == 8
    assert part.trunk.encoders["t"].encoder[0].weight.shape == (257, 32)  # type: ignore[union-attr,index] # embeddings stay whole


def test_features_side_by_side_cannot_be_narrow() -> None:
    with pytest.raises(RequestError, match="cat"):
        channel_layout(network("late"))


def test_depths_of_batch_norms_are_those_of_the_image_alone() -> None:
    with seeded(0, "x"):
        alone = norm_depths(ModelConfig(width=4), 3, 1, 8)
    found = norm_depths(ModelConfig(width=4), 3, 1, 8, None, ALL)
    assert list(found.values()) == list(alone.values())
    assert all(modality_of(name) == "img" for name in found)


def test_an_own_network_takes_images_alone() -> None:
    with pytest.raises(RequestError, match="several modalities"):
        network("mean", name="nets:build")
