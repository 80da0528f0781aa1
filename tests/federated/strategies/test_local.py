"""Local training without averages (docs/algorithm.md 3.18), and the evaluation of clients' own models."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import FACTS, TINY, assert_same, stripes, stripes_dataset
from rich.console import Console
from strategy_runs import QUICK, go, resumes, same_on_ray, student, warmed_up

from mosaic_ray.config.resolve import override
from mosaic_ray.config.validate import check
from mosaic_ray.core.errors import RequestError
from mosaic_ray.federated.aggregation import RunningAverage
from mosaic_ray.federated.client import ClientContext, ClientRound, Round, TrainTask, initial_models
from mosaic_ray.federated.evaluation import accuracy, logits_on, own_accuracy, per_class_accuracy
from mosaic_ray.federated.local_training import LocalTrainingConfig
from mosaic_ray.methods.base import FedAvgOnly
from mosaic_ray.report.html.render import write_report
from mosaic_ray.report.sweep_table import measures
from mosaic_ray.report.tables import closing_table
from mosaic_ray.runs.summary import Summary
from mosaic_ray.sweeps.results import TrialResult, results_table


def test_clients_train_alone_and_the_server_averages_once(tmp_path):
    """Every client's model is that of local rounds without the server."""
    found = go(tmp_path, "local", {"finetune.num_rounds": 0})
    result, average = warmed_up(found), RunningAverage()
    sizes = np.array(found["label_counts"]).sum(1)
    for k in range(3):
        assert_same(result.load(f"state_{k:05d}"), result.load(f"client_{k:05d}"))
        average.add(result.load(f"client_{k:05d}"), float(sizes[k]))
    assert_same(result.load("global"), average.result())
    assert_same(student(found), average.result())


def test_one_client_is_fedavgs(tmp_path):
    one = {"partition.num_clients": 1}
    found, plain = (go(tmp_path, strategy, one) for strategy in ("local", "fedavg"))
    assert_same(student(found), student(plain))


def test_a_round_goes_on_from_the_clients_own_model():
    config = override(TINY, {"federation.strategy": "local"})
    context = ClientContext(config, FACTS, torch.device("cpu"))
    data = stripes(30)
    shard, models, plan = (
        context.shard(data.images, data.labels),
        initial_models(context),
        LocalTrainingConfig(2, 8, 0.1),
    )
    first = TrainTask("local", 0, plan).run(context, shard, 0, Round(models), ClientRound())
    other = {"cnn": {name: value + np.ones_like(value) for name, value in models["cnn"].items()}}
    second, again = (
        TrainTask("local", 1, plan).run(context, shard, 0, Round(sent), ClientRound(None, state))
        for sent, state in ((other, first.state), ({"cnn": first.weights}, {}))
    )
    assert_same(second.weights, again.weights)


def test_models_travel_down_once_and_up_once(tmp_path):
    found, plain = (go(tmp_path, s, {"warmup.num_rounds": 1, "finetune.num_rounds": 1}) for s in ("local", "fedavg"))
    assert found["communication_bytes"] == plain["communication_bytes"]
    longer = go(tmp_path, "local", {"warmup.num_rounds": 4, "finetune.num_rounds": 2})
    assert longer["communication_bytes"] == plain["communication_bytes"]
    assert longer["communication"]["measured_over_predicted"] == 1


def test_a_killed_run_resumes_bit_for_bit(tmp_path):
    resumes(tmp_path, "local")


@pytest.mark.ray
@pytest.mark.slow
def test_ray_and_serial_agree_bit_for_bit(tmp_path, ray_up):
    same_on_ray(tmp_path, "local")


def test_mixed_networks_and_a_method_on_top(tmp_path):
    knobs = {"model.classifiers": ("cnn", "mobilenet", "cnn"), "method": "prototype_head"}
    found = go(tmp_path, "local", knobs)
    assert found["communication"]["measured_over_predicted"] == 1
    assert len(found["personal_accuracy"]["clients"]) == 3
    assert all(np.isfinite(value).all() for value in student(found).values())


# --- the evaluation of clients' own models ---------------------------------------------------------------------------


def test_own_accuracy_by_hand():
    table = np.array([[8, 2, 0], [5, 5, 0], [0, 0, 0]])
    recalls = per_class_accuracy(table)
    assert own_accuracy(recalls, np.array([30, 10, 60])) == pytest.approx(0.75 * 0.8 + 0.25 * 0.5)
    assert own_accuracy(recalls, np.array([10, 10, 0])) == pytest.approx(accuracy(table))
    assert own_accuracy(recalls, np.array([0, 0, 5])) == 0


def test_the_summary_has_the_accuracy_of_each_clients_model(tmp_path):
    """Accuracies on a test set in which each class has the client's share of it."""
    found = go(tmp_path, "local")
    assert "personal" in found["stages"] and found["accuracy"].keys() == go(tmp_path, "fedavg")["accuracy"].keys()
    context, test = ClientContext(override(TINY, QUICK), FACTS, torch.device("cpu")), stripes_dataset().test
    counts, every, own = np.array(found["label_counts"]), [], []
    for k in range(3):
        model = context.classifier(warmed_up(found).load(f"state_{k:05d}")).eval()
        predicted = logits_on(model, test, FACTS, context.device).argmax(1)
        every.append(np.mean(predicted == test.labels))
        recall = [np.mean(predicted[test.labels == c] == c) for c in range(3)]
        own.append(sum(counts[k, c] / counts[k].sum() * recall[c] for c in range(3)))
    reached = found["personal_accuracy"]
    assert reached["clients"] == pytest.approx(own)
    assert (reached["own"], reached["all"]) == pytest.approx((np.mean(own), np.mean(every)))
    stored = json.loads((Path(found["paths"]["run"]) / "summary.json").read_text())
    assert Summary.from_json(stored).to_json()["personal_accuracy"] == reached
    assert go(tmp_path, "local")["stages"]["personal"]["cached"]


def test_sweeps_have_columns_where_a_trial_has_personal_models(tmp_path):
    rows = [TrialResult(f"p{n}s0", n, 0, {}, go(tmp_path, s)) for n, s in enumerate(("fedavg", "local"))]
    table = results_table(rows).to_pylist()
    assert [row["personal_own"] for row in table] == [None, rows[1].summary["personal_accuracy"]["own"]]
    assert "personal_own" not in results_table(rows[:1]).column_names
    assert measures([table])["personal"] == "personal_own"
    assert "personal" not in measures([results_table(rows[:1]).to_pylist()])


def test_the_closing_table_and_the_page_show_clients_own_models(tmp_path):
    found = go(tmp_path, "local")
    console = Console(file=io.StringIO(), width=100)
    console.print(closing_table(found))
    [line] = [line for line in console.file.getvalue().splitlines() if "clients' own models" in line]
    page = write_report(found["paths"]["run"], str(tmp_path / "page.html"))
    assert "own models after the warm-up" in Path(page).read_text()
    assert line.split()[-2:] == [f"{100 * found['personal_accuracy']['own']:.1f}", "%"]


@pytest.mark.parametrize(
    "knobs, message",
    [
        ({"federation.cohort_size": 2}, "federation.cohort_size = 2: with local all clients train in every round"),
        ({"federation.drop_rate": 0.25}, "federation.drop_rate = 0.25: with local all clients train in every round"),
        ({"federation.widths": (0.5,)}, "federation.widths = [0.5]: local trains whole models"),
        ({"prototypes.rounds": "all"}, "prototypes.rounds = all: it needs a global model in every round"),
        ({"federation.strategy": "local+ditto"}, "local and ditto cannot be combined, both set objective"),
    ],
)
def test_bad_requests_are_refused_in_one_line(knobs, message):
    with pytest.raises(RequestError) as caught:
        check(override(TINY, {"federation.strategy": "local"} | knobs))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_methods_that_work_in_every_round_are_refused(monkeypatch):
    monkeypatch.setattr(FedAvgOnly, "after_round", lambda self, ctx, finished: None)
    with pytest.raises(RequestError, match="method = fedavg: it needs a global model in every round, and local has"):
        check(override(TINY, {"federation.strategy": "local", "method": "fedavg"}))
