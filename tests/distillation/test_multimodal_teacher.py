"""Mosaic over several modalities: features of every set, experts and tokens by modality, dropped modalities."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import TINY

from mosaic_ray.config.resolve import override
from mosaic_ray.config.schema import ExperimentConfig, MetaConfig
from mosaic_ray.core.types import DataFacts, Modality
from mosaic_ray.data.records import pack, present_in, restrict, unpack
from mosaic_ray.data.transforms import drop_from_rows, drop_modalities, to_input
from mosaic_ray.distillation.class_statistics import class_statistics
from mosaic_ray.distillation.experts import Holdings, form_experts
from mosaic_ray.distillation.meta_model import MetaModel, Teacher, by_modality
from mosaic_ray.distillation.prototypes import client_prototypes, extract_features, feature_sets, seen_with
from mosaic_ray.distillation.teacher import head_logits
from mosaic_ray.federated.client import ClientContext, initial_weights
from mosaic_ray.federated.client_models import Federation
from mosaic_ray.federated.local_training import Shard
from mosaic_ray.models.multimodal import modality_of

MODALITIES = (Modality("a", "vector", (3,)), Modality("b", "vector", (2,)), Modality("c", "vector", (4,)))
FACTS = DataFacts("views", 3, 1, 8, (0.5,), (0.5,), modalities=MODALITIES)
CPU = torch.device("cpu")


def config_of(**knobs: object) -> ExperimentConfig:
    return override(TINY, {"partition.num_clients": 2, "prototypes.k": 1, **knobs})


def views(count: int, present: np.ndarray | None = None) -> Shard:
    draws = np.random.default_rng(0)
    values = {part.name: draws.normal(size=(count, *part.shape)) for part in MODALITIES}
    there = np.ones((count, 3), bool) if present is None else present
    labels = torch.arange(count) % 3
    return Shard(torch.tensor(pack(MODALITIES, values, there)), labels)


def test_every_set_of_the_modalities_that_a_client_holds_is_seen_once() -> None:
    there = np.array([[1, 1, 0], [1, 1, 0], [1, 0, 0]], bool)  # no sample has c, and the last has no b
    shard = views(3, there)
    found = [(kept.tolist(), seen_with(shard, kept)[0].tolist()) for kept in feature_sets(shard, FACTS, "all")]
    assert found == [
        ([True, False, False], [0, 1, 2]),
        ([False, True, False], [0, 1]),
        ([True, True, False], [0, 1]),
    ]
    rows, seen = seen_with(shard, torch.tensor([False, True, False]))
    expected = restrict(MODALITIES, shard.images.numpy()[rows], np.array([False, True, False]))
    assert torch.equal(to_input(seen.images, FACTS), to_input(torch.tensor(expected), FACTS))
    assert feature_sets(shard, FACTS, "held") == [None]


@pytest.mark.parametrize("fusion", ["mean", "late", "zero_fill"])
def test_prototypes_of_all_sets_are_those_of_each_set_alone(fusion: str) -> None:
    """Brute force: the prototypes of a client whose samples had one set alone, for each set in turn."""
    config = config_of(**{"model.fusion": fusion, "prototypes.subsets": "all", "prototypes.split": "cells"})
    context = ClientContext(config, FACTS, CPU)
    model, shard = context.classifier(initial_weights(context)), views(12)
    found = client_prototypes(model, shard, config.prototypes, FACTS, (0, 1, 0), "fp32")
    alone = replace(config.prototypes, subsets="held")
    sets, expected = feature_sets(shard, FACTS, "all"), []
    assert len(sets) == 7
    for kept in sets:
        images = restrict(MODALITIES, shard.images.numpy(), kept.numpy())
        part = Shard(torch.tensor(images), shard.labels)
        expected.append(client_prototypes(model, part, alone, FACTS, (0, 1, 0), "fp32"))
    np.testing.assert_array_equal(found.vectors, np.concatenate([part.vectors for part in expected]))
    assert found.labels.tolist() == [0, 1, 2] * 7 and found.sizes.tolist() == [4.0] * 21


def test_a_sample_judges_in_every_set_or_in_none() -> None:
    config = config_of(**{"prototypes.subsets": "all", "prototypes.held_out": 0.25})
    context = ClientContext(config, FACTS, CPU)
    model = context.classifier(initial_weights(context))
    found = client_prototypes(model, views(12), config.prototypes, FACTS, (0, 1, 0), "fp32")
    assert found.judges is not None and found.judges.sum() == 3 * 7  # one of four samples of a class, in each set
    assert found.sizes[found.judges].tolist() == [1.0] * 21


def test_experts_are_averaged_over_the_clients_that_hold_the_modality_and_the_class() -> None:
    names = {"trunk.encoders.a.w": (2,), "trunk.encoders.b.w": (2,), "head.weight": (3, 4), "head.bias": (3,)}
    draws = np.random.default_rng(1)
    made = [{n: draws.normal(size=shape).astype(np.float32) for n, shape in names.items()} for _ in range(4)]
    *clients, whole = made
    counts = np.array([[6, 0, 1], [2, 3, 0], [0, 5, 0]])
    held = (("a", "b"), ("a",), ("a",))
    columns = {"a": slice(0, 2), "b": slice(2, 4)}
    experts, index = form_experts(
        enumerate(clients), counts, None, whole=whole, holdings=Holdings(held, modality_of, columns)
    )
    for label in range(3):
        expert, shares = experts[index[label]], counts[:, label]
        with_b = [k for k in range(3) if "b" in held[k] and shares[k]]
        for name, array in expert.items():
            columns_of = [slice(0, 2), slice(2, 4)] if name == "head.weight" else [slice(None)]
            for place, part in enumerate(columns_of):
                of_b = name == "trunk.encoders.b.w" or (name == "head.weight" and place == 1)
                owners = with_b if of_b else [k for k in range(3) if shares[k]]
                mean = sum(shares[k] * clients[k][name].astype(float) for k in owners)
                wanted = mean / shares[owners].sum() if owners else whole[name]
                np.testing.assert_allclose(array[..., part], wanted[..., part], rtol=1e-6)


def late_features(there: np.ndarray) -> torch.Tensor:
    """Return features of late fusion [B, M (d + 1)] for samples with the modalities ``there`` [B, M]; d = 5."""
    draws = torch.randn(len(there), 3, 6, generator=torch.Generator().manual_seed(2))
    draws[:, :, -1] = 1
    mask = torch.tensor(there, dtype=torch.float32)
    return (draws * (mask / mask.sum(1, keepdim=True))[:, :, None]).flatten(1)


THERE = np.array([[1, 1, 1], [1, 0, 0], [0, 1, 1]], bool)


def test_tokens_of_a_modality_average_to_the_logits_of_the_expert() -> None:
    draws = np.random.default_rng(3)
    experts = tuple(
        {"head.weight": draws.normal(size=(3, 18)).astype(np.float32), "head.bias": draws.normal(size=3).astype("f4")}
        for _ in range(2)
    )
    index, features = np.array([0, 1, 0]), late_features(THERE)
    whole, parts = head_logits(experts, index)(features), head_logits(experts, index, 3)(features)
    assert parts.shape == (3, 9, 3)
    there = torch.tensor(THERE, dtype=torch.float32)
    torch.testing.assert_close(parts.unflatten(1, (3, 3)).sum(1) / there.sum(1)[:, None, None], whole)
    assert not parts.unflatten(1, (3, 3))[~torch.tensor(THERE)].any()
    blocks, found = by_modality(features, 3)
    assert torch.equal(found, torch.tensor(THERE)) and blocks[found][:, -1].tolist() == pytest.approx([1.0] * 6)


@pytest.mark.parametrize("pool", ["mean", "sum"])
def test_absent_tokens_change_no_answer(pool: str) -> None:
    torch.manual_seed(4)
    meta = MetaModel(3, 3, MetaConfig(pool=pool, feedforward=16, tokens="modality"), 3).eval()
    given = torch.randn(2, 9, 3)
    absent = torch.tensor([[False] * 6 + [True] * 3, [True] * 3 + [False] * 6])
    with torch.no_grad():
        first, changed = meta(given, absent), meta(given.masked_fill(absent[:, :, None], 7.0), absent)
        torch.testing.assert_close(first, changed)
        nothing = torch.zeros(2, 9, dtype=torch.bool)
        assert not torch.allclose(meta(given, nothing), first)
        assert not torch.allclose(meta(given[:, [3, 4, 5, 0, 1, 2, 6, 7, 8]], nothing), meta(given, nothing))


def test_a_teacher_leaves_out_the_tokens_of_modalities_that_a_sample_lacks() -> None:
    torch.manual_seed(5)
    teacher = Teacher(3, 3, MetaConfig(init="random", feedforward=16, tokens="modality"), 18, 3).eval()
    features = late_features(THERE)
    given = torch.randn(3, 9, 3)
    absent = torch.tensor(~THERE).repeat_interleave(3, 1)
    with torch.no_grad():
        torch.testing.assert_close(teacher(given, features), teacher.meta(given, absent))


def test_rows_lose_modalities_as_records_do() -> None:
    shard = views(40)
    draws = [torch.Generator().manual_seed(6) for _ in range(2)]
    rows = drop_from_rows(to_input(shard.images, FACTS), MODALITIES, 0.6, draws[0])
    records = drop_modalities(shard.images, 3, 0.6, draws[1])
    assert torch.equal(rows, to_input(records, FACTS))
    assert rows[:, -3:].any(1).all() and (rows[:, -3:] == 0).any()


def test_statistics_of_all_sets_count_a_sample_once_for_each() -> None:
    from mosaic_ray.distillation.class_statistics import ClassStatisticsTask

    config = config_of(**{"model.fusion": "mean", "prototypes.subsets": "all"})
    context, shard = ClientContext(config, FACTS, CPU), views(9)
    weights = initial_weights(context)
    models = {config.model.classifier: weights}
    found = ClassStatisticsTask(False).run(context, shard, 0, models, None)
    assert found.counts.tolist() == [21, 21, 21]  # three samples of a class, in seven sets
    values = unpack(MODALITIES, shard.images.numpy())
    features, labels = [], []
    for number in range(1, 8):
        kept = np.array([bool(number >> place & 1) for place in range(3)])
        part = Shard(torch.tensor(pack(MODALITIES, values, np.tile(kept, (9, 1)))), shard.labels)
        assert present_in(MODALITIES, part.images.numpy()).sum() == 9 * kept.sum()
        features.append(extract_features(context.classifier(weights), part, FACTS, "fp32"))
        labels.append(shard.labels.numpy())
    expected = class_statistics(np.concatenate(features), np.concatenate(labels), per_class=False)
    np.testing.assert_allclose(found.means, expected.means, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.scatter, expected.scatter, rtol=1e-4, atol=1e-5)


def test_late_fusions_statistics_are_by_modality_in_any_case() -> None:
    held, every = (config_of(**{"prototypes.subsets": sets}) for sets in ("held", "all"))
    from mosaic_ray.distillation.class_statistics import ClassStatisticsTask

    parts = []
    for config in (held, every):
        context = ClientContext(config, FACTS, CPU)
        models = {config.model.classifier: initial_weights(context)}
        parts.append(ClassStatisticsTask(False).run(context, views(9), 0, models, None).arrays())
    assert parts[0].keys() == parts[1].keys()
    assert all(np.array_equal(parts[0][name], parts[1][name]) for name in parts[0])
    assert Federation(held, FACTS).head_columns("cnn").keys() == {"a", "b", "c"}
