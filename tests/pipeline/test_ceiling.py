"""The ceiling: the linear probe's mathematics, and its place in a run."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import TINY, assert_same, stripes, stripes_dataset
from sklearn.linear_model import LogisticRegression
from trials import printed

import mosaic_ray.data.load as datasets
from mosaic_ray.config.resolve import override
from mosaic_ray.pipeline import ceiling
from mosaic_ray.pipeline.ceiling import linear_probe
from mosaic_ray.report.sweep_table import sweep_table
from mosaic_ray.report.tables import CEILING, closing_table
from mosaic_ray.runs import runner
from mosaic_ray.storage.store import Store
from mosaic_ray.sweeps.results import TrialResult

QUICK = {"method": "fedavg", "warmup.num_rounds": 2, "finetune.num_rounds": 1, "runtime.ceiling": True}


def go(storage: Path, **knobs: object) -> dict:
    named = {name.replace("__", "."): value for name, value in knobs.items()}
    return runner.run(override(TINY, QUICK | named), storage=str(storage), progress=False)


@pytest.fixture(autouse=True)
def data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda config: stripes_dataset())


def clouds(num_classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    draws = np.random.default_rng(seed)
    labels = np.arange(60 * num_classes) % num_classes
    centres = draws.normal(size=(num_classes, 5)) * [1, 10, 0.1, 1, 1] + [0, 50, 0, -3, 0]
    return (centres[labels] + draws.normal(size=(len(labels), 5)) * [1, 10, 0.1, 1, 1]).astype(np.float32), labels


@pytest.mark.parametrize("num_classes", [2, 3])
def test_the_probe_is_the_minimum_of_its_loss(num_classes):
    features, labels = clouds(num_classes)
    features[:, 4] = 7.0  # a feature without variance takes no part
    matrix, bias = linear_probe(features, labels, num_classes)
    deviation = np.where(features.std(0) > 0, features.std(0), 1)
    x = torch.tensor((features - features.mean(0)) / deviation, dtype=torch.float64)
    v = torch.tensor(matrix * deviation, dtype=torch.float64, requires_grad=True)
    b = torch.tensor(bias + matrix @ features.mean(0), dtype=torch.float64, requires_grad=True)
    loss = torch.nn.functional.cross_entropy(x @ v.T + b, torch.tensor(labels)) + v.square().sum() / (2 * len(labels))
    loss.backward()
    assert float(v.grad.abs().max()) < 1e-4 and float(b.grad.abs().max()) < 1e-4
    if num_classes > 2:
        other = LogisticRegression(C=1.0, tol=1e-8, max_iter=1000).fit(x.numpy(), labels)
        found = (features @ matrix.T + bias) - (features @ matrix.T + bias).mean(1, keepdims=True)
        np.testing.assert_allclose(found, other.decision_function(x.numpy()), atol=0.02)


def test_a_class_without_images_is_predicted_for_none():
    features, labels = clouds(3)
    for held in ((0, 2), (1,)):
        rows = np.isin(labels, held)
        matrix, bias = linear_probe(features[rows], labels[rows], 3)
        logits = features[rows] @ matrix.T + bias
        assert np.isfinite(logits).all()
        absent = [label for label in range(3) if label not in held]
        assert (logits[:, absent] <= logits[:, list(held)].min() + 1e-3).all()


def test_it_is_reported_and_changes_nothing_else(tmp_path):
    probed = go(tmp_path, partition__validation_fraction=0.2)
    plain = go(tmp_path, partition__validation_fraction=0.2, runtime__ceiling=False)
    assert plain["accuracy"]["ceiling"] is None and 0.5 < probed["accuracy"]["ceiling"] <= 1
    assert {**probed["accuracy"], "ceiling": None} == plain["accuracy"]
    assert probed["selection"] == plain["selection"]
    assert probed["communication_bytes"] == plain["communication_bytes"]
    assert probed["communication"]["measured_over_predicted"] == 1
    keys, other = ({n: s["key"] for n, s in run["stages"].items()} for run in (probed, plain))
    assert {name for name in keys if keys[name] != other.get(name)} == {"ceiling", "evaluate"}


def test_methods_with_one_warm_up_share_it_and_a_second_run_finds_it(tmp_path, monkeypatch):
    first = go(tmp_path)
    monkeypatch.setattr(ceiling, "linear_probe", lambda *_: pytest.fail("it was computed again"))
    second, again = go(tmp_path, method="lda_head"), go(tmp_path)
    assert first["stages"]["ceiling"]["key"] == second["stages"]["ceiling"]["key"]
    assert first["accuracy"]["ceiling"] == second["accuracy"]["ceiling"]
    assert second["stages"]["ceiling"]["cached"] and again["stages"]["ceiling"]["cached"]
    assert again["accuracy"] == first["accuracy"]


def test_it_is_the_warmed_up_network_with_a_head_of_training_images(tmp_path, monkeypatch):
    """No test or validation image enters; of many images a fixed sample does."""
    first = go(tmp_path / "a", partition__validation_fraction=0.2)
    store = Store(str(tmp_path / "a"))
    made, warmup = (store.get(first["stages"][name]["key"]).load("global") for name in ("ceiling", "warmup"))
    assert {name for name in made if not np.array_equal(made[name], warmup[name])} == {"head.weight", "head.bias"}
    other = dataclasses.replace(stripes_dataset(), test=stripes(60, 7))
    monkeypatch.setattr(datasets, "load_dataset", lambda config: other)
    seen = []
    fit = ceiling.linear_probe
    monkeypatch.setattr(ceiling, "linear_probe", lambda x, y, c: seen.append(len(y)) or fit(x, y, c))
    second = go(tmp_path / "b", partition__validation_fraction=0.2)
    assert_same(Store(str(tmp_path / "b")).get(second["stages"]["ceiling"]["key"]).load("global"), made)
    monkeypatch.setattr(ceiling, "MOST_PROBED", 50)
    go(tmp_path / "c", partition__validation_fraction=0.2)
    assert seen == [sum(map(sum, first["label_counts"])), 50]


def test_a_killed_run_goes_on_at_the_ceiling(tmp_path, monkeypatch):
    whole = go(tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ceiling, "linear_probe", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        go(tmp_path / "killed")
    again = go(tmp_path / "killed")
    assert {name for name, stage in again["stages"].items() if not stage["cached"]} == {
        "ceiling", "own_models", "evaluate",
    }  # fmt: skip
    assert again["accuracy"] == whole["accuracy"]


def test_tables_mark_it_as_no_federated_method(tmp_path):
    summary = go(tmp_path)
    assert CEILING in "\n".join(printed(closing_table(summary)))
    results = [TrialResult("p000s0", 0, 0, {"method": "fedavg"}, summary)]
    lines = printed(sweep_table(results, (), ("method",)))
    assert CEILING in lines and any(line.split()[-1:] == ["ceiling"] for line in lines)
    plain = go(tmp_path, runtime__ceiling=False)
    without = sweep_table([dataclasses.replace(results[0], summary=plain)], (), ("method",))
    assert not any("ceiling" in line for line in printed(closing_table(plain)) + printed(without))
