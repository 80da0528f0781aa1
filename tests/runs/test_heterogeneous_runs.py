"""Whole runs with clients of several widths and architectures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import FACTS, TINY, assert_same, shard_of, stripes_dataset
from safetensors.numpy import load_file

from mosaic_ray.config.resolve import override
from mosaic_ray.config.validate import check
from mosaic_ray.federated.client import ClientContext
from mosaic_ray.federated.client_models import Federation
from mosaic_ray.federated.static_batch_norm import moments, pooled
from mosaic_ray.pipeline import rounds
from mosaic_ray.runs import runner
from mosaic_ray.storage.store import Store

NARROW = {"federation.optimiser": "fedrolex", "federation.widths": (1.0, 0.5, 0.25)}
MIXED = {"model.classifiers": ("cnn", "mobilenet", "cnn")}


@pytest.fixture(autouse=True)
def stripes_as_data(monkeypatch):
    """Every run of this module trains on the tiny data set."""
    monkeypatch.setattr("mosaic_ray.data.load.load_dataset", lambda config: stripes_dataset())


def go(tmp_path: Path, knobs: dict, **options) -> dict:
    return runner.run(check(override(TINY, knobs)), storage=str(tmp_path), progress=False, **options)


def student(summary: dict) -> dict[str, np.ndarray]:
    return load_file(Path(summary["paths"]["run"]) / "student.safetensors")


def test_o24_whole_clients_under_fedrolex_are_fedavg_bit_for_bit(tmp_path):
    for optimiser, method in (("fedrolex", "mosaic"), ("heterofl", "fedavg"), ("feddropout", "fedavg")):
        fedavg = go(tmp_path, {"method": method})
        rolling = go(tmp_path, {"method": method, "federation.optimiser": optimiser})
        assert rolling["stages"]["warmup"]["key"] != fedavg["stages"]["warmup"]["key"]
        assert_same(student(rolling), student(fedavg))
        assert rolling["accuracy"] == fedavg["accuracy"]


def test_a_run_with_narrow_clients_ends_and_repeats(tmp_path):
    knobs = NARROW | {"federation.optimiser": "feddropout"}
    summary, again = go(tmp_path / "a", knobs), go(tmp_path / "b", knobs)
    assert_same(student(summary), student(again))
    assert all(np.isfinite(value).all() for value in student(summary).values())
    absent = {role for role, value in summary["accuracy"].items() if value is None}
    assert absent == {"ceiling", "server_student"}  # not asked for


@pytest.mark.parametrize("optimiser", ["fedrolex", "heterofl", "feddropout"])
def test_narrow_clients_learn(tmp_path, optimiser):
    more = {"partition.sampler": "iid", "model.width": 8, "warmup.num_rounds": 12, "warmup.local_steps": 5}
    knobs = NARROW | more | {"federation.optimiser": optimiser, "method": "fedavg"}
    assert go(tmp_path, knobs)["accuracy"]["final"] > 0.8  # one third by chance


def test_communication_is_what_narrow_clients_send(tmp_path):
    sent = go(tmp_path, NARROW)["communication_bytes"]
    made = Federation(override(TINY, NARROW), FACTS)
    models = {"cnn": student(go(tmp_path, NARROW))}
    sizes = [sum(v.nbytes for v in made.submodel(k, models, made.indices(k, "local", 0)).values()) for k in range(3)]
    assert sizes[0] > 3 * sizes[1] > 9 * sizes[2]
    assert sent["uplink"]["weights"] == (TINY.warmup.num_rounds + TINY.finetune.num_rounds) * sum(sizes)
    assert sent["uplink"]["statistics"] > 0


@pytest.mark.parametrize("knobs", [NARROW, {"warmup.bn": "exact"}, {"finetune.bn": "exact"}])
def test_static_statistics_are_those_of_all_clients_images(tmp_path, monkeypatch, knobs):
    seen = {}
    keep = rounds.static_statistics

    def watched(run, models, *rest):
        seen["run"], seen["models"] = run, keep(run, models, *rest)
        return seen["models"]

    monkeypatch.setattr(rounds, "static_statistics", watched)
    go(tmp_path, knobs | {"method": "fedavg"})
    run, weights = seen["run"], seen["models"]["cnn"]
    context = ClientContext(run.config, run.dataset.facts, torch.device("cpu"))
    everything = shard_of(run.dataset.train)
    alone = pooled([moments(context.classifier(weights), everything, FACTS, "fp32")])
    for name, value in alone.items():
        np.testing.assert_allclose(weights[name], value, rtol=1e-4, atol=1e-6, err_msg=name)


def test_exact_statistics_change_nothing_else_and_are_counted(tmp_path):
    exact, plain = (go(tmp_path, {"method": "fedavg", "warmup.bn": bn}) for bn in ("exact", "running"))
    assert exact["communication"]["measured_over_predicted"] == 1
    store = Store(str(tmp_path))
    left, right = (store.get(s["stages"]["warmup"]["key"]).load("global") for s in (exact, plain))
    differ = {name for name in left if not np.array_equal(left[name], right[name])}
    assert differ == {name for name in left if "running_" in name}


def test_clients_of_several_architectures_teach_one_student(tmp_path, undisturbed_tiny):
    summary = go(tmp_path, MIXED)
    assert student(summary).keys() == student(undisturbed_tiny).keys()
    assert summary["accuracy"]["teacher"] is not None and summary["accuracy"]["final"] > 0.5
    store = Store(str(tmp_path))
    warmup = store.get(summary["stages"]["warmup"]["key"])
    assert {"global", "global_001", "client_00001"} <= set(warmup.parts)
    assert warmup.load("client_00001").keys() == warmup.load("global_001").keys() != warmup.load("global").keys()
    teacher = store.get(summary["stages"]["teacher"]["key"])
    assert {"meta", "group_001_meta", "group_001_expert_0000"} <= set(teacher.parts)
    assert "mobilenet/meta_held_out_accuracy" in teacher.facts["figures"]


@pytest.mark.slow
def test_widths_and_architectures_together(tmp_path):
    knobs = MIXED | {"federation.optimiser": "heterofl", "federation.widths": (1.0, 0.5)}
    assert go(tmp_path, knobs)["accuracy"]["final"] > 0.4


@pytest.mark.parametrize("knobs", [{"generator.stage": "before"}, {"generator.classifier_source": "fresh"}])
def test_narrow_clients_train_generators_beside_narrow_networks(tmp_path, knobs):
    quick = {"generator.classifier_epochs": 1, "generator.steps": 2, "distill.steps": 2, "meta.updates": 2}
    go(tmp_path, NARROW | quick | knobs)


def test_experts_of_narrow_clients_speak_in_full(tmp_path):
    full = {"meta.input": "full", "meta.init": "random"}
    assert go(tmp_path, NARROW | full)["accuracy"]["teacher"] is not None
    assert go(tmp_path, MIXED | full)["accuracy"]["teacher"] is not None


@pytest.mark.ray
@pytest.mark.parametrize(
    "knobs",
    [
        pytest.param(NARROW | {"federation.masked": True}, id="widths"),
        pytest.param(MIXED, id="architectures", marks=pytest.mark.slow),
    ],
)
def test_ray_agrees_bit_for_bit(tmp_path, ray_up, knobs):
    serial = go(tmp_path / "serial", knobs)
    there = go(tmp_path / "ray", knobs | {"runtime.host": "ray", "runtime.max_hosts": 2})
    assert_same(student(there), student(serial))
    assert there["accuracy"] == serial["accuracy"]
