"""Class experts (O7, O8, O9), the meta model (O10, O11) and the teacher made of both."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import FACTS, TINY, assert_same, make_teacher, shard_of, stripes
from hypothesis import given, settings
from hypothesis import strategies as st

from mosaic_ray.config.resolve import override
from mosaic_ray.config.schema import MetaConfig
from mosaic_ray.data.transforms import normalise
from mosaic_ray.distillation.experts import distinct_experts, expert_weights, form_experts
from mosaic_ray.distillation.linear_head import fit_heads
from mosaic_ray.distillation.meta_model import MetaModel, Teacher, ema_update, ema_weights, token_size
from mosaic_ray.distillation.prototypes import client_prototypes, split_held_out
from mosaic_ray.distillation.teacher import TeacherState, build_teacher, head_logits
from mosaic_ray.federated.aggregation import RunningAverage
from mosaic_ray.federated.client import ClientContext, initial_weights
from mosaic_ray.models.state_dict import head_of, to_weights

CONTEXT = ClientContext(TINY, FACTS, torch.device("cpu"))


def clients(count: int, seed: int = 0) -> list[tuple[int, dict[str, np.ndarray]]]:
    draws = np.random.default_rng(seed)
    return [(k, {"w": draws.normal(size=(3, 2)).astype(np.float32), "n": np.array(10 + k)}) for k in range(count)]


counts_matrices = st.lists(st.lists(st.integers(0, 30), min_size=3, max_size=3), min_size=2, max_size=5)


@settings(max_examples=40)
@given(counts_matrices)
def test_o7_an_expert_is_the_weighted_sum(rows):
    counts = np.array(rows)
    models = clients(len(rows))
    experts, index = form_experts(models, counts, models[0][1])
    weights = expert_weights(counts)
    for c in range(3):
        if counts[:, c].sum():
            assert weights[:, c].sum() == pytest.approx(1)
            expected = sum(weights[k, c] * w["w"].astype(float) for k, w in models)
            np.testing.assert_allclose(experts[index[c]]["w"], expected, atol=1e-6)


def test_o7_a_lone_owner_is_its_class_expert_bit_for_bit():
    counts = np.array([[5, 0, 2], [0, 7, 2]])
    models = clients(2)
    experts, index = form_experts(models, counts, None)
    assert_same(experts[index[0]], models[0][1])
    assert_same(experts[index[1]], models[1][1])


@settings(max_examples=40)
@given(counts_matrices.filter(lambda rows: all(sum(col) for col in zip(*rows, strict=True)) and all(map(sum, rows))))
def test_o8_experts_weighted_by_class_sizes_are_fedavg(rows):
    counts = np.array(rows)
    models = clients(len(rows))
    experts, index = form_experts(models, counts, None)
    shares = counts.sum(0) / counts.sum()
    mixed = sum(shares[c] * experts[index[c]]["w"].astype(float) for c in range(3))
    running = RunningAverage()
    for k, w in models:
        running.add(w, int(counts[k].sum()))
    fedavg = running.result()
    np.testing.assert_allclose(mixed, fedavg["w"], atol=1e-5)


def test_o9_a_class_without_owner_falls_back_or_says_so():
    counts = np.array([[5, 0, 2], [1, 0, 2]])
    models = clients(2)
    experts, index = form_experts(models, counts, models[1][1])
    assert_same(experts[index[1]], models[1][1])
    with pytest.raises(ValueError, match="class 1"):
        form_experts(models, counts, None)


def test_classes_with_equal_columns_share_an_expert():
    counts = np.array([[5, 10, 2], [5, 10, 0]])
    representatives, index = distinct_experts(counts)
    assert representatives == [0, 2]
    assert index.tolist() == [0, 0, 1]


@pytest.mark.parametrize("embedding", [True, False])
def test_o10_order_of_experts_matters_only_with_their_identity(embedding):
    torch.manual_seed(0)
    config = MetaConfig(expert_embedding=embedding, feedforward=32)
    meta = MetaModel(5, 5, config).eval()
    inputs = torch.randn(4, 5, 5)
    order = torch.tensor([3, 0, 4, 1, 2])
    with torch.no_grad():
        moved = (meta(inputs[:, order]) - meta(inputs)).abs().max()
        columns = (meta(inputs[:, :, order]) - meta(inputs)).abs().max()
    assert (moved > 1e-4) if embedding else (moved < 1e-5)
    assert columns > 1e-3


@pytest.mark.parametrize("classes, parameters", [(10, 948_206), (100, 20_425_196)])
def test_o6_meta_model_has_the_authors_size_less_its_dead_parameters(classes, parameters):
    meta = MetaModel(classes, classes, MetaConfig(expert_embedding=False, token_dim=-1))
    assert sum(p.numel() for p in meta.parameters()) == parameters


def test_token_size_is_bounded_and_the_authors_up_to_ten_classes():
    assert all(token_size(0, classes) == token_size(-1, classes) == (10 * classes, classes) for classes in range(1, 11))
    assert token_size(0, 100) == (200, 10) and token_size(-1, 100) == (1000, 100)
    for dim in range(1, 60):
        for classes in range(1, 30):
            size, heads = token_size(dim, classes)
            assert size == dim and size % heads == 0 and heads <= min(classes, 10)


def test_the_meta_model_in_parts_is_the_meta_model(monkeypatch):
    """With any number of rows at once, training and logits are equal up to rounding."""
    knobs = {"meta.token_dim": 30, "meta.batch_size": 128, "meta.dropout": 0.0, "meta.updates": 30}
    config = override(TINY, knobs | {"meta.select": False})
    whole = make(config)[1].meta
    monkeypatch.setattr("mosaic_ray.distillation.meta_model.MAX_NUMBERS", 5 * 3 * 30)
    assert MetaModel(3, 3, config.meta).max_rows == 5
    parts = make(config)[1].meta
    for name, value in whole.items():
        np.testing.assert_allclose(parts[name], value, atol=2e-4, err_msg=name)
    assert any(not np.array_equal(parts[name], value) for name, value in whole.items()), "it was never split"


def test_o11_bias_correction_removes_the_start_from_the_ema():
    model = torch.nn.Linear(1, 1, bias=False)
    start = {"weight": torch.full((1, 1), 7.0)}
    kept = {"weight": start["weight"].clone()}
    with torch.no_grad():
        model.weight.fill_(2.0)
    for _ in range(150):
        ema_update(kept, model, 0.99)
    share = 0.99**150
    assert share == pytest.approx(0.2215, abs=1e-4)
    assert kept["weight"].item() == pytest.approx(2 + share * 5, rel=1e-4)
    raw = ema_weights(kept, start, 0.99, 150, correct=False)
    corrected = ema_weights(kept, start, 0.99, 150, correct=True)
    assert raw["weight"].item() == kept["weight"].item()
    assert corrected["weight"].item() == pytest.approx(2.0, rel=1e-4)


def make(config, seed: int = 0):
    context = ClientContext(config, FACTS, CONTEXT.device)
    weights = initial_weights(context)
    shards = [shard_of(stripes(30, k)) for k in range(3)]
    counts = np.stack([np.bincount(s.labels, minlength=3) for s in shards])
    counts[0, 1] = 0
    parts = []
    for k, shard in enumerate(shards):
        model = context.classifier(weights)
        parts.append(client_prototypes(model, shard, config.prototypes, FACTS, (0, 0, k), "fp32"))
    prototypes = type(parts[0]).concatenate(parts)
    noisy = [
        (k, {n: (v + np.float32(0.01 * k) if v.dtype == np.float32 else v) for n, v in weights.items()})
        for k in range(3)
    ]
    seen: list[int] = []
    state, figures = make_teacher(config, FACTS, weights, noisy, counts, prototypes, lambda u, m: seen.append(u))
    return weights, state, figures, prototypes, seen


def test_a_teacher_from_the_refitted_head_is_never_worse_held_out():
    _, _, figures, _, seen = make(TINY)
    assert figures["meta_held_out_loss"] <= figures["head_held_out_loss"]
    assert seen[0] == 0
    assert seen[-1] == TINY.meta.updates


def test_s9_the_teacher_starts_at_the_head_of_all_prototypes_once_its_updates_were_chosen():
    """Without updates it is that head; the teacher by which choices are made has not seen the held-out ones."""
    weights, state, figures, prototypes, _ = make(override(TINY, {"meta.updates": 0}))
    kept, held_out = split_held_out(prototypes, TINY.prototypes.held_out, TINY.seed)
    trial, whole, fitted = fit_heads(kept, held_out, weights, "size")
    assert figures["head_held_out_loss"] == figures["meta_held_out_loss"] == fitted["held_out_loss"]
    for teacher, head in ((state, whole), (state.trial, trial)):
        assert_same(teacher.head, head)
        assert np.array_equal(teacher.meta["skip.weight"], head["head.weight"])
        assert np.array_equal(teacher.meta["skip.bias"], head["head.bias"])
    assert not np.array_equal(trial["head.weight"], whole["head.weight"])
    nothing = make(override(TINY, {"prototypes.held_out": 0.0}))[1]
    assert nothing.trial is nothing


def test_s10_the_meta_model_is_chosen_by_loss_and_not_by_accuracy(monkeypatch):
    looks = iter([(0.5, 1.0), (0.9, 2.0), (0.4, 0.8), (0.8, 0.9), (1.0, 0.9)])
    monkeypatch.setattr("mosaic_ray.distillation.meta_model.scores", lambda *given: next(looks, (0.0, 0.0)))
    monkeypatch.setattr("mosaic_ray.distillation.meta_model.surely_lower", lambda *given: True)
    config = override(TINY, {"meta.updates": 100, "prototypes.held_out": 0.0})
    assert make(config)[2]["meta_update"] == 50


@pytest.mark.parametrize("init", ["random", "prototype_head"])
def test_o31_a_teacher_is_a_function_of_its_seed(init):
    config = override(TINY, {"meta.init": init})
    first, second = make(config)[1], make(config)[1]
    assert_same(first.meta, second.meta)
    other = make(override(config, {"seed": 1}))[1]
    assert not np.array_equal(first.meta["meta.out.weight"], other.meta["meta.out.weight"])


def test_m6_the_head_path_sees_on_images_what_it_was_trained_on():
    """The teacher's logits on images equal its meta model applied to the experts' heads on the same features."""
    weights, state, _, _, _ = make(TINY)
    net = build_teacher(TINY, FACTS, state)
    images = normalise(shard_of(stripes(9)).images, FACTS.mean, FACTS.std)
    with torch.no_grad():
        features = CONTEXT.classifier(weights).eval().features(images)
        expected = net.meta(head_logits(state.experts, state.index)(features), features)
        torch.testing.assert_close(net(images), expected)
        torch.testing.assert_close(net(images, features), expected)
    assert net.reads_student_features(weights)
    assert not net.reads_student_features({n: v + 1 for n, v in weights.items()})


def test_head_logits_are_each_experts_own_head():
    _, state, _, prototypes, _ = make(TINY)
    features = torch.tensor(prototypes.vectors[:4])
    rows = head_logits(state.experts, state.index)(features)
    for c in range(3):
        matrix, bias = head_of(state.experts[state.index[c]])
        expected = features @ torch.tensor(matrix).T + torch.tensor(bias)
        torch.testing.assert_close(rows[:, c], expected)


def test_m6_the_full_path_reads_whole_experts():
    config = override(TINY, {"meta.input": "full", "meta.init": "random"})
    _, state, _, _, _ = make(config)
    net = build_teacher(config, FACTS, state)
    images = normalise(shard_of(stripes(5)).images, FACTS.mean, FACTS.std)
    with torch.no_grad():
        rows = torch.stack(
            [ClientContext(config, FACTS, CONTEXT.device).classifier(e).eval()(images) for e in state.experts], 1
        )
        torch.testing.assert_close(net(images), net.meta(rows[:, torch.tensor(state.index)]))


def test_a_teacher_survives_the_trip_through_arrays():
    _, state, _, _, _ = make(TINY)
    net = build_teacher(TINY, FACTS, TeacherState(state.backbone, state.experts, state.index, dict(state.meta)))
    assert_same(to_weights(net.meta), state.meta)
    assert isinstance(net.meta, Teacher)
