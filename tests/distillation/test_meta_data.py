"""``meta.data``: the meta model trained on synthetic images differs from the other arm in its training set alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import FACTS, TINY, assert_same, make_teacher, prototypes, shard_of, stripes, stripes_dataset

from mosaic_ray.config.resolve import override
from mosaic_ray.core.errors import RunError
from mosaic_ray.core.seeding import seeded, stream
from mosaic_ray.core.types import Prototypes, Weights
from mosaic_ray.distillation.experts import form_experts
from mosaic_ray.distillation.generator_training import classifier_view, latents, load_generator
from mosaic_ray.distillation.prototypes import split_held_out
from mosaic_ray.distillation.teacher_training import expert_mean_logits, synthetic_prototypes
from mosaic_ray.federated.client import ClientContext, initial_weights
from mosaic_ray.federated.local_training import LocalTrainingConfig, train_locally
from mosaic_ray.methods.mosaic.graph import TEACHER
from mosaic_ray.models.generator import build_generator
from mosaic_ray.models.state_dict import head_of, to_weights
from mosaic_ray.pipeline.graph import KeyInputs
from mosaic_ray.runs import runner
from mosaic_ray.runs.plan import stage_keys
from mosaic_ray.storage.store import Store, stage_key

CPU = torch.device("cpu")
ARMS = ("prototypes", "synthetic", "synthetic_vote")
CONTEXT = ClientContext(TINY, FACTS, CPU)


def _global() -> Weights:
    """A trained backbone under a head as it was drawn, so that a re-fitted head has something to gain."""
    model = CONTEXT.classifier(initial_weights(CONTEXT))
    train_locally(model, shard_of(stripes(120)), LocalTrainingConfig(30, 32, 0.05), FACTS, (0, "test", 0, 0), "fp32")
    return to_weights(model) | dict(zip(("head.weight", "head.bias"), head_of(initial_weights(CONTEXT)), strict=True))


GLOBAL = _global()


def _client(k: int) -> tuple[int, Weights, Weights]:
    """Return a client's number, its model and its untrained generator, both wide enough to give all classes."""
    draws = np.random.default_rng(k)
    own = {
        name: value + np.float32(1.5 if "head" in name else 0.1) * draws.normal(size=value.shape).astype(np.float32)
        for name, value in GLOBAL.items()
        if "running" not in name and value.dtype.kind == "f"
    }
    with seeded(k, "generator"):
        generator = to_weights(build_generator(TINY.generator, FACTS.channels, FACTS.image_size))
    loud = {name: value * 20 for name, value in generator.items() if value.ndim == 4}
    return k, GLOBAL | own, generator | loud


SOURCES = [_client(k) for k in range(3)]
SHARDS = [shard_of(stripes(size, k)) for k, size in enumerate((30, 24, 45))]
COUNTS = np.array([[28, 1, 1], [2, 1, 21], [0, 44, 1]])  # as if the shards were skewed: three distinct experts
FOUND = Prototypes.concatenate([prototypes(CONTEXT, s, k, GLOBAL) for k, s in enumerate(SHARDS)])
KEPT, HELD_OUT = split_held_out(FOUND, TINY.prototypes.held_out, TINY.seed)


def teach(data: str, knobs: dict | None = None, found: Prototypes = FOUND):
    config = override(TINY, {"meta.data": data} | (knobs or {}))
    looks: list[dict] = []
    state, figures = make_teacher(
        config, FACTS, GLOBAL, [(k, own) for k, own, _ in SOURCES], COUNTS, found, lambda u, m: looks.append(m), SOURCES
    )
    return state, figures, looks


def synthetic(data: str, sources=SOURCES, knobs: dict | None = None, **options) -> Prototypes:
    context = replace(CONTEXT, config=override(TINY, {"meta.data": data} | (knobs or {})))
    experts, index = form_experts([(k, own) for k, own, _ in SOURCES], COUNTS, None)
    ensemble = expert_mean_logits(context, tuple(experts), index)
    return synthetic_prototypes(context, GLOBAL, sources, ensemble, KEPT, **options)


def images_of(k: int) -> torch.Tensor:
    generator = load_generator(TINY.generator, FACTS, SOURCES[k][2])
    z = latents(generator, int((KEPT.clients == k).sum()), stream(TINY.seed, "meta/synthetic", k), CPU)
    return classifier_view(generator(z), TINY.generator.gan_range, FACTS)


def test_synthetic_prototypes_keep_count_and_weight_of_each_client():
    made = synthetic("synthetic")
    for k in range(3):
        assert (made.clients == k).sum() == (KEPT.clients == k).sum() > 0
        assert made.sizes[made.clients == k].sum() == pytest.approx(KEPT.sizes[KEPT.clients == k].sum())
    for name, array in KEPT.arrays().items():
        assert (made.arrays()[name].dtype, made.arrays()[name].shape) == (array.dtype, array.shape), name


def test_a_synthetic_set_is_drawn_at_addresses():
    made = synthetic("synthetic")
    assert_same(made.arrays(), synthetic("synthetic").arrays())
    np.testing.assert_allclose(synthetic("synthetic", chunk=2).vectors, made.vectors, atol=1e-5)
    alone = synthetic("synthetic", sources=SOURCES[1:2])
    assert_same(alone.arrays(), made.take(np.flatnonzero(made.clients == 1)).arrays())
    assert not np.array_equal(synthetic("synthetic", knobs={"seed": 1}).vectors, made.vectors)


@pytest.mark.parametrize("model", ["global", "client"])
def test_features_are_of_the_model_that_makes_the_prototypes(model):
    made = synthetic("synthetic", knobs={"prototypes.model": model})
    for k, own, _ in SOURCES:
        reader = CONTEXT.classifier(own if model == "client" else GLOBAL).eval()
        with torch.no_grad():
            expected = reader.features(images_of(k)).numpy()
        np.testing.assert_allclose(made.vectors[made.clients == k], expected, atol=1e-5)


def test_synthetic_labels_are_the_clients_own():
    made = synthetic("synthetic")
    for k, own, _ in SOURCES:
        with torch.no_grad():
            labels = CONTEXT.classifier(own).eval()(images_of(k)).argmax(1)
            assert made.labels[made.clients == k].tolist() == labels.tolist()


@pytest.mark.parametrize("path", ["head", "full"])
def test_the_experts_vote_is_the_mean_of_the_class_experts_logits(path):
    context = replace(CONTEXT, config=override(TINY, {"meta.input": path, "meta.init": "random"}))
    counts = np.array([[28, 1, 28], [2, 1, 2], [0, 44, 0]])  # classes 0 and 2 share an expert, which counts twice
    experts, index = form_experts([(k, own) for k, own, _ in SOURCES], counts, None)
    assert len(experts) == 2
    images, features = images_of(1), torch.tensor(KEPT.vectors[: len(images_of(1))])
    with torch.no_grad():
        networks = [CONTEXT.classifier(experts[e]).eval() for e in index]
        rows = [network.head(features) if path == "head" else network(images) for network in networks]
        torch.testing.assert_close(expert_mean_logits(context, tuple(experts), index)(images, features), sum(rows) / 3)


def test_synthetic_vote_labels_by_the_vote():
    def vote(images, features):
        return images.flatten(1)[:, :3] + features[:, :3]

    context = replace(CONTEXT, config=override(TINY, {"meta.data": "synthetic_vote"}))
    made = synthetic_prototypes(context, GLOBAL, SOURCES, vote, KEPT)
    for k in range(3):
        mine = made.clients == k
        assert made.labels[mine].tolist() == vote(images_of(k), torch.tensor(made.vectors[mine])).argmax(1).tolist()
    assert len(set(made.labels.tolist())) == 3
    assert made.labels.tolist() != synthetic("synthetic").labels.tolist()


@pytest.mark.parametrize("init", ["prototype_head", "random"])
@pytest.mark.parametrize("data", ARMS)
def test_no_kept_prototype_leaks_into_a_teacher_trained_on_synthetic_images(data, init):
    """If all prototypes that are not held out change, the synthetic arms end with the same bits."""
    mine = {row.tobytes() for row in KEPT.vectors}
    spoilt = np.array([row.tobytes() in mine for row in FOUND.vectors])
    other = replace(FOUND, vectors=np.where(spoilt[:, None], 2 * FOUND.vectors[::-1] + 1, FOUND.vectors))
    assert_same(split_held_out(other, TINY.prototypes.held_out, TINY.seed)[1].arrays(), HELD_OUT.arrays())
    knobs = {"meta.init": init, "meta.select": False}
    (state, figures, looks), (again, figures_again, looks_again) = teach(data, knobs), teach(data, knobs, other)
    if data == "prototypes":
        assert not np.array_equal(state.meta["meta.out.weight"], again.meta["meta.out.weight"])
    else:
        assert_same(state.meta, again.meta)
        assert looks == looks_again
        assert figures | {"domain_auc": 0} == figures_again | {"domain_auc": 0}


def test_arms_share_evaluation_number_and_start_of_training():
    arms = {data: teach(data)[1] for data in ARMS}
    for name in ("student_held_out_accuracy", "num_experts", "num_prototypes", "num_held_out"):
        assert len({figures[name] for figures in arms.values()}) == 1, name
    assert ["domain_auc" in figures for figures in arms.values()] == [False, True, True]
    assert arms["synthetic"]["domain_auc"] > 0.8, "noise images differ from real ones"
    fitted = [arms[data]["head_held_out_loss"] for data in ARMS]
    assert fitted[0] < min(fitted[1:]), "each arm's head is re-fitted on its own set"


def test_a_generator_that_diverged_is_named():
    k, own, generator = SOURCES[1]
    nothing = {name: value * np.float32("nan") for name, value in generator.items() if value.dtype.kind == "f"}
    with pytest.raises(RunError, match=r"client 1: .*not finite"):
        synthetic("synthetic", sources=[SOURCES[0], (k, own, generator | nothing), SOURCES[2]])


# --- keys and whole runs ---------------------------------------------------------------------------------------------


def test_the_default_key_is_that_of_results_made_before_the_knob_was():
    upstream = {name: f"{name}-1" for name in ("warmup", "prototypes", "generators")}
    knobs = {"meta": {"token_dim": 6, "feedforward": 16, "updates": 10, "batch_size": 16}, "split": {"seed": 0}}
    before = stage_key("teacher", TEACHER.version, knobs, ["warmup-1", "prototypes-1"])
    assert TEACHER.keys(KeyInputs(TINY), upstream) == (before,)
    assert len({TEACHER.keys(KeyInputs(override(TINY, {"meta.data": data})), upstream) for data in ARMS}) == 3


@pytest.mark.parametrize("data", ARMS)
def test_a_teacher_depends_on_generators_where_it_learns_from_them_alone(data):
    config = override(TINY, {"meta.data": data})
    first, other = (stage_keys(override(config, {"generator.lambda_e": value})) for value in (0.5, 1.0))
    assert first["generators"] != other["generators"]
    assert (first["teacher"] == other["teacher"]) == (data == "prototypes")


@pytest.mark.parametrize("data, path", [("synthetic", "head"), ("synthetic_vote", "full")])
def test_a_whole_run_teaches_from_its_generators(tmp_path, monkeypatch, data, path):
    monkeypatch.setattr("mosaic_ray.data.load.load_dataset", lambda config: stripes_dataset())
    knobs = {"generator.steps": 2, "distill.steps": 2, "finetune.num_rounds": 1, "runtime.eval_rounds": 0}
    knobs |= {"meta.data": data, "meta.input": path, "meta.init": "random"}

    summary = runner.run(override(TINY, knobs), storage=str(tmp_path), progress=False)
    figures = Store(str(tmp_path)).get(summary["stages"]["teacher"]["key"]).facts["figures"]
    assert 0 <= figures["domain_auc"] <= 1
    assert summary["config"]["meta"]["data"] == data
    assert 0 <= summary["accuracy"]["teacher"] <= 1
