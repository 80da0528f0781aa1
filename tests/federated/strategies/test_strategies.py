"""The laws of the strategies that change the local objective, and of strategies combined."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import FACTS, TINY, assert_same, interrupted, stripes_dataset
from safetensors.numpy import load_file

from mosaic_ray.config.plugins import strategy_named
from mosaic_ray.config.resolve import as_dict, override, read_toml, to_toml
from mosaic_ray.config.schema import ExperimentConfig
from mosaic_ray.config.validate import check
from mosaic_ray.core.errors import RequestError
from mosaic_ray.runs import runner
from mosaic_ray.runs.plan import stage_keys
from mosaic_ray.storage.store import Store

QUICK = {"method": "fedavg", "warmup.checkpoint_rounds": 1, "runtime.eval_rounds": 0}
ROLEX = {"federation.widths": (1.0, 0.5), "model.width": 8}


@pytest.fixture(autouse=True)
def stripes_as_data(monkeypatch):
    monkeypatch.setattr("mosaic_ray.data.load.load_dataset", lambda config: stripes_dataset())


def go(folder: Path, **knobs: Any) -> dict[str, Any]:
    named = {name.replace("__", "."): value for name, value in knobs.items()}
    return runner.run(override(TINY, QUICK | named), storage=str(folder), progress=False)


def student(summary: dict[str, Any]) -> dict[str, np.ndarray]:
    return load_file(Path(summary["paths"]["run"]) / "student.safetensors")


def test_fedprox_without_the_proximal_term_is_fedavg_bit_for_bit(tmp_path):
    plain = student(go(tmp_path))
    off = go(tmp_path, federation__strategy="fedprox", fedprox__mu=0.0)
    assert not off["stages"]["warmup"]["cached"]
    assert_same(student(off), plain)
    on = student(go(tmp_path, federation__strategy="fedprox", fedprox__mu=1.0))
    assert any(not np.array_equal(on[name], plain[name]) for name in plain)


def test_a_larger_mu_keeps_the_model_nearer(tmp_path):
    def moved(mu: float) -> float:
        found = go(tmp_path / str(mu), federation__strategy="fedprox", fedprox__mu=mu, warmup__num_rounds=1)
        store, key = Store(str(tmp_path / str(mu))), found["stages"]["warmup"]["key"]
        return float(np.abs(store.get(key).load("client_00000")["head.weight"] - start["head.weight"]).sum())

    still = go(tmp_path / "start", warmup__num_rounds=0)
    start = Store(str(tmp_path / "start")).get(still["stages"]["warmup"]["key"]).load("global")
    assert moved(10.0) < moved(1.0) < moved(0.0)


def test_fedprox_over_fedrolex(tmp_path):
    summary = go(tmp_path, federation__strategy="fedrolex+fedprox", fedprox__mu=1.0, **_named(ROLEX))
    alone = go(tmp_path, federation__strategy="fedrolex", **_named(ROLEX))
    assert summary["communication"]["measured_over_predicted"] == 1
    left, right = student(summary), student(alone)
    assert any(not np.array_equal(left[name], right[name]) for name in left)
    off = go(tmp_path, federation__strategy="fedrolex+fedprox", fedprox__mu=0.0, **_named(ROLEX))
    assert_same(student(off), right)


def _named(knobs: dict[str, Any]) -> dict[str, Any]:
    return {name.replace(".", "__"): value for name, value in knobs.items()}


def test_scaffold_with_one_client_and_one_local_step_is_sgd(tmp_path):
    knobs = {"partition__num_clients": 1, "warmup__local_steps": 1, "finetune__local_steps": 1, "warmup__num_rounds": 5}
    controlled = go(tmp_path, federation__strategy="scaffold", **knobs)
    assert_same(student(controlled), student(go(tmp_path, **knobs)))  # FedAvg of one client and one step is SGD


def test_scaffolds_first_round_is_fedavgs_and_the_second_is_not(tmp_path):
    for rounds, same in ((1, True), (2, False)):
        knobs = {"warmup__num_rounds": rounds, "finetune__num_rounds": 0}
        left, right = (student(go(tmp_path, federation__strategy=s, **knobs)) for s in ("scaffold", "fedavg"))
        assert all(np.array_equal(left[name], right[name]) for name in left) is same


def test_scaffold_with_zero_control_variates_is_fedavg_bit_for_bit(tmp_path, monkeypatch):
    def nothing(self, model, num_steps):
        zero = {name: np.zeros(value.shape, np.float32) for name, value in model.named_parameters()}
        return zero, zero

    monkeypatch.setattr("mosaic_ray.federated.strategies.scaffold.ControlledObjective.finish", nothing)
    assert_same(student(go(tmp_path, federation__strategy="scaffold")), student(go(tmp_path)))


def test_scaffolds_control_variates_by_hand(tmp_path):
    """c after one round is the mean over all clients of (w_t - y_k) / (I lr)."""
    found = go(tmp_path, federation__strategy="scaffold", warmup__num_rounds=1)
    result = Store(str(tmp_path)).get(found["stages"]["warmup"]["key"])
    still = go(tmp_path, warmup__num_rounds=0)
    start = Store(str(tmp_path)).get(still["stages"]["warmup"]["key"]).load("global")["head.weight"]
    steps = TINY.warmup.local_steps * TINY.warmup.lr
    drifts = [(start - result.load(f"client_{k:05d}")["head.weight"]) / steps for k in range(3)]
    np.testing.assert_allclose(result.load("server")["head.weight"], np.mean(drifts, axis=0), rtol=1e-4, atol=1e-6)
    for k, drift in enumerate(drifts):
        np.testing.assert_allclose(result.load(f"state_{k:05d}")["head.weight"], drift, rtol=1e-4, atol=1e-6)


def test_scaffold_killed_in_the_last_round_resumes_bit_for_bit(tmp_path):
    knobs = {"federation__strategy": "scaffold", "warmup__num_rounds": 4}
    undisturbed = go(tmp_path / "whole", **knobs)
    with interrupted(in_round=3):
        go(tmp_path / "killed", **knobs)
    resumed = go(tmp_path / "killed", **knobs)
    assert_same(student(resumed), student(undisturbed))
    assert resumed["communication"]["measured_over_predicted"] == 1
    assert {"strategy"} <= undisturbed["communication_bytes"]["uplink"].keys()


@pytest.mark.ray
def test_scaffold_on_ray_agrees_bit_for_bit(tmp_path, ray_up):
    serial = go(tmp_path / "serial", federation__strategy="scaffold")
    there = go(tmp_path / "ray", federation__strategy="scaffold", runtime__host="ray", runtime__max_hosts=2)
    assert_same(student(there), student(serial))


@pytest.mark.parametrize(
    "knobs, message",
    [
        (
            {"federation.strategy": "fedporx"},
            'federation.strategy = fedporx: unknown strategy; did you mean "fedprox" or',
        ),
        (
            {"federation.strategy": "fedrolex+heterofl"},
            "federation.strategy = fedrolex+heterofl: fedrolex and heterofl cannot be combined, both set channel_",
        ),
        (
            {"federation.strategy": "scaffold", "warmup.momentum": 0.9},
            "warmup.momentum = 0.9: scaffold needs plain SGD",
        ),
        ({"federation.strategy": "fedprox", "federation.widths": (0.5,)}, "every width must be 1.0"),
        (
            {"federation.strategy": "heterofl+scaffold", "federation.widths": (1.0, 0.5)},
            "heterofl+scaffold trains whole models, so every width must be 1.0",
        ),
        ({"fedprox.mu": -1.0}, "fedprox.mu = -1.0: it takes a number at least 0"),
        ({"fedprox.nu": 1.0}, 'unknown knob "fedprox.nu"'),
    ],
)
def test_bad_requests_are_refused_in_one_line(knobs, message):
    with pytest.raises(RequestError) as caught:
        check(override(TINY, knobs))
    assert message in str(caught.value)


def test_own_knobs_travel_through_files_and_keys():
    chosen = override(TINY, {"federation.strategy": "fedprox", "fedprox.mu": 0.5})
    assert as_dict(chosen)["fedprox"] == {"mu": 0.5} and "fedprox" not in as_dict(TINY)
    assert override(ExperimentConfig(), json.loads(json.dumps(as_dict(chosen)))) == chosen
    keys = [stage_keys(override(chosen, {"fedprox.mu": mu}), "x", FACTS)["warmup"] for mu in (0.5, 0.01, 0.5)]
    assert keys[0] == keys[2] != keys[1]
    unused = override(TINY, {"fedprox.mu": 0.5})
    assert stage_keys(unused, "x", FACTS) == stage_keys(TINY, "x", FACTS)


def test_the_older_name_of_the_knob_still_works(tmp_path):
    assert override(TINY, {"federation.optimiser": "heterofl"}) == override(TINY, {"federation.strategy": "heterofl"})
    older = to_toml(TINY).replace('strategy = "fedavg"', 'optimiser = "fedavg"')
    (tmp_path / "older.toml").write_text(older)
    assert override(ExperimentConfig(), read_toml(tmp_path / "older.toml")) == TINY


def test_names_joined_by_a_plus_are_one_strategy():
    joined = strategy_named("fedprox+fedrolex")
    assert joined.name == "fedprox+fedrolex" and joined.partial_widths
