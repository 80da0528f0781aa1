"""Reported figures: confusion, calibration by law and by brute force, and validation accuracy along a run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import FACTS, TINY, stripes, stripes_dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from mosaic_ray.config.resolve import override
from mosaic_ray.federated.evaluation import accuracy, calibration, confusion, logits_on, per_class_accuracy
from mosaic_ray.runs import runner
from mosaic_ray.storage.store import Store

CPU = torch.device("cpu")


def drawn(count: int, classes: int, seed: int, scale: float = 3.0) -> tuple[np.ndarray, np.ndarray]:
    draws = np.random.default_rng(seed)
    logits = scale * draws.normal(size=(count, classes))
    return logits.astype(np.float32), draws.integers(0, classes, count)


def probabilities(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def test_logits_do_not_depend_on_the_chunk_and_keep_their_order():
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))
    data = stripes(23)
    whole = logits_on(network, data, FACTS, CPU)
    assert whole.shape == (23, 3) and whole.dtype == np.float32
    np.testing.assert_allclose(logits_on(network, data, FACTS, CPU, chunk=5), whole, atol=1e-5)
    np.testing.assert_allclose(logits_on(network, data.take(np.array([7])), FACTS, CPU), whole[7:8], atol=1e-5)


@settings(max_examples=30)
@given(st.integers(1, 60), st.integers(2, 6), st.integers(0, 1000))
def test_every_figure_is_what_counting_by_hand_gives(count, classes, seed):
    logits, labels = drawn(count, classes, seed)
    table = np.zeros((classes, classes), int)
    nll, bins = 0.0, {}
    for row, label in zip(probabilities(logits), labels, strict=True):
        table[label, int(row.argmax())] += 1
        nll -= np.log(row[label]) / count
        number = next(b for b in range(15) if b / 15 < row.max() <= (b + 1) / 15 + 1e-12)
        bins.setdefault(number, []).append((float(row.argmax() == label), float(row.max())))
    ece = sum(len(rows) / count * abs(np.subtract(*np.mean(rows, 0))) for rows in bins.values())
    found = confusion(logits, labels)
    assert found.tolist() == table.tolist()
    assert accuracy(found) == pytest.approx(np.mean(logits.argmax(1) == labels))
    for c, recall in enumerate(per_class_accuracy(found)):
        mine = logits[labels == c].argmax(1) == c
        assert recall == (pytest.approx(mine.mean()) if len(mine) else None)
    assert calibration(logits, labels) == pytest.approx({"nll": nll, "ece": ece})


@pytest.mark.parametrize("right", [5, 7, 9])
def test_a_prediction_that_is_right_as_often_as_it_says_has_no_calibration_error(right):
    """Probabilities (q, (1 - q) / 3 ...) on ten images of which 10 q are right; q above or below costs the distance."""
    labels = np.array([0] * right + [1] * (10 - right))

    def of(q: float) -> float:
        row = np.log(np.array([q, *[(1 - q) / 3] * 3]))
        return calibration(np.tile(row, (10, 1)).astype(np.float32), labels)["ece"]

    assert of(right / 10) == pytest.approx(0, abs=1e-6)
    assert of(0.95) == pytest.approx(abs(0.95 - right / 10), abs=1e-6)


def test_labels_drawn_from_the_predicted_probabilities_are_calibrated_and_sharpened_ones_are_not():
    logits, _ = drawn(20_000, 5, 1, scale=1.5)
    draws = np.random.default_rng(2).random((len(logits), 1))
    labels = (probabilities(logits).cumsum(1) < draws).sum(1)
    honest, proud = calibration(logits, labels), calibration(4 * logits, labels)
    assert honest["ece"] < 0.02 < 0.1 < proud["ece"]
    assert honest["nll"] < proud["nll"]
    entropy = -(probabilities(logits) * np.log(probabilities(logits))).sum(1).mean()
    assert honest["nll"] == pytest.approx(entropy, abs=0.02)


def test_certainty_is_an_error_of_the_share_that_is_wrong_and_no_knowledge_costs_log_c():
    sure = np.full((8, 4), -200, np.float32)
    sure[:, 2] = 200
    assert calibration(sure, np.array([2] * 6 + [1] * 2)) == pytest.approx({"nll": 100.0, "ece": 0.25})
    assert calibration(np.zeros((8, 4), np.float32), np.arange(8) % 4) == pytest.approx({"nll": np.log(4), "ece": 0})


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_a_network_that_diverged_has_no_calibration(broken):
    logits, labels = drawn(5, 3, 0)
    logits[2, 1] = broken
    assert calibration(logits, labels) == {"nll": None, "ece": None}


# --- along a run -----------------------------------------------------------------------------------------------------


@pytest.fixture
def go(tmp_path, monkeypatch):
    """Runs on the tiny data set; returns the summary and each tag's [step, value] points."""
    monkeypatch.setattr("mosaic_ray.data.load.load_dataset", lambda config: stripes_dataset())

    def go(knobs: dict, storage: str = "store") -> tuple[dict, dict[str, list]]:
        config = override(TINY, {"generator.steps": 2, "runtime.eval_rounds": 0} | knobs)
        summary = runner.run(config, storage=str(tmp_path / storage), progress=False)
        curves: dict[str, list] = {}
        for line in (Path(summary["paths"]["run"]) / "metrics.jsonl").read_text().splitlines():
            point = json.loads(line)
            curves.setdefault(point["tag"], []).append([point["step"], point["value"]])
        return summary, curves

    return go


TAGS = ("warmup", "teacher", "distill", "finetune", "control")


@pytest.mark.parametrize("method", ["mosaic", "prototype_head"])
def test_validation_accuracy_is_a_curve_where_clients_hold_validation_images(go, method, monkeypatch):
    knobs = {"partition.validation_fraction": 0.2, "method": method}
    summary, curves = go(knobs)
    curves = {stage: curves.get(f"{stage}/validation_accuracy") for stage in TAGS}
    reached = summary["validation_accuracy"]
    assert curves["warmup"] == [[TINY.warmup.num_rounds, reached["initial"]]]
    if method == "mosaic":
        assert curves["teacher"] == [[TINY.meta.updates, reached["teacher"]]]
        assert curves["distill"] == [[TINY.distill.steps, reached["distilled"]]]
    else:
        assert curves["teacher"] is None
        assert curves["distill"] == [[1, reached["distilled"]]]
    for stage, role in (("finetune", "final"), ("control", "control")):
        assert [step for step, _ in curves[stage]] == [1, 2]
        assert curves[stage][-1][1] == reached[role]

    def never(*arguments, **options):
        raise AssertionError("a finished run looks at no image again")

    monkeypatch.setattr("mosaic_ray.pipeline.evaluate.logits_on", never)
    _, again = go(knobs)
    assert {stage: again.get(f"{stage}/validation_accuracy") for stage in TAGS} == curves


def test_a_closing_phase_that_was_killed_resumes_with_its_validation_curve(go, monkeypatch):
    knobs = {
        "partition.validation_fraction": 0.2, "method": "fedavg", "finetune.num_rounds": 4,
        "warmup.checkpoint_rounds": 2,
    }  # fmt: skip
    from mosaic_ray.federated.client import TrainTask

    train = TrainTask.run

    def dies(task, *inputs):
        if task.phase == "closing" and task.round_num == 3:
            raise KeyboardInterrupt
        return train(task, *inputs)

    with monkeypatch.context() as patch:
        patch.setattr(TrainTask, "run", dies)
        with pytest.raises(KeyboardInterrupt):
            go(knobs)
    resumed, undisturbed = (go(knobs, storage)[1]["finetune/validation_accuracy"] for storage in ("store", "other"))
    assert [step for step, _ in resumed] == [1, 2, 3, 4]
    assert resumed == undisturbed


def test_without_validation_images_there_is_no_such_curve_and_models_are_scored_once(go, tmp_path, monkeypatch):
    seen = []

    def counted(*arguments, **options):
        seen.append(arguments)
        return logits_on(*arguments, **options)

    monkeypatch.setattr("mosaic_ray.pipeline.evaluate.logits_on", counted)
    summary, curves = go({})
    assert not [tag for tag in curves if "validation" in tag]
    assert len(seen) == len(TAGS)
    facts = Store(str(tmp_path / "store")).get(summary["stages"]["evaluate"]["key"]).facts
    assert facts["nll"].keys() == facts["ece"].keys() == summary["accuracy"].keys() - {"ceiling", "server_student"}
    assert all(value > 0 for value in facts["nll"].values())
    assert all(0 <= value <= 1 for value in facts["ece"].values())
    go({"distill.lr": 5e-4})
    assert len(seen) == len(TAGS) + 2, "initial, teacher and control are the first run's"
