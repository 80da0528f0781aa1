"""Accuracies at the clients: own models, the final one and the adapted one, against numbers made by hand."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import FACTS, TINY, stripes_dataset
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from safetensors.numpy import load_file

import mosaic_ray.data.load as datasets
from mosaic_ray.config.resolve import override
from mosaic_ray.data.transforms import normalise
from mosaic_ray.distillation.ensemble import Ensemble
from mosaic_ray.federated.client import AdaptTask, ClientContext, OwnScoreTask
from mosaic_ray.federated.evaluation import own_accuracy
from mosaic_ray.pipeline.personal import spread
from mosaic_ray.pipeline.rounds import cohort_of
from mosaic_ray.report.comparison import compare
from mosaic_ray.report.html.render import write_report
from mosaic_ray.report.tables import closing_table
from mosaic_ray.runs import runner
from mosaic_ray.runs.plan import stage_keys
from mosaic_ray.storage.store import StageResult, Store
from mosaic_ray.sweeps.results import TrialResult, result_rows, results_table

QUICK = {
    "method": "fedavg", "partition.num_clients": 4, "warmup.num_rounds": 2, "finetune.num_rounds": 1,
    "finetune.lr": 0.05, "runtime.eval_rounds": 0,
}  # fmt: skip
#: Clients 0 and 2 are narrow, 1 and 3 have another network; two of the four take part in a round.
MIXED = {
    "model.classifiers": ("cnn", "mobilenet"), "federation.strategy": "fedrolex", "federation.cohort_size": 2,
    "federation.widths": (0.5, 1.0), "federation.bn_passes": 1, "finetune.adapt_steps": 2,
}  # fmt: skip


@pytest.fixture(autouse=True)
def data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda config: stripes_dataset())


def go(storage: Path, knobs: dict) -> dict:
    return runner.run(override(TINY, QUICK | knobs), storage=str(storage), progress=False)


def stored(storage: Path, found: dict, stage: str) -> StageResult:
    return Store(str(storage)).get(found["stages"][stage]["key"])


def by_hand(logits: np.ndarray, counts: np.ndarray) -> float:
    """The accuracy if every test image had the weight that makes its class as frequent as at the client."""
    labels = stripes_dataset().test.labels
    weights = (counts / counts.sum())[labels] / np.bincount(labels)[labels]
    return float(np.average(logits.argmax(1) == labels, weights=weights))


def computed(found: dict) -> set[str]:
    return {name for name, stage in found["stages"].items() if not stage["cached"]}


def test_own_and_final_models_of_mixed_narrow_and_absent_clients(tmp_path):
    found = go(tmp_path, MIXED)
    reached, counts = found["client_accuracy"]["clients"], np.array(found["label_counts"])
    config = override(TINY, QUICK | MIXED)
    context, test = ClientContext(config, FACTS, torch.device("cpu")), stripes_dataset().test
    images = normalise(torch.tensor(test.images), FACTS.mean, FACTS.std)
    warmup, closed = stored(tmp_path, found, "warmup"), stored(tmp_path, found, "finetune")
    present = cohort_of(config, "local", 1)
    assert len(present) == 2 and {f"client_{k:05d}" in warmup.parts for k in present} == {True}
    parts = context.federation.parts("global")
    for k, name in enumerate(context.federation.classifiers):
        with torch.no_grad():
            own = context.classifier(warmup.load(parts[name]), name).eval()(images).numpy()
            final = context.classifier(closed.load(parts[name]), name).eval()(images).numpy()
            if k in present:
                own = Ensemble(context, {k: warmup.load(f"client_{k:05d}")})(images)[0].numpy()
        assert reached["own"][k] == pytest.approx(by_hand(own, counts[k])), k
        assert reached["final"][k] == pytest.approx(by_hand(final, counts[k])), k
    layouts = [(group["classifier"], group["width"], group["clients"]) for group in found["client_accuracy"]["groups"]]
    assert layouts == [("cnn", 0.5, 2), ("mobilenet", 1.0, 2)]
    for group, members in zip(found["client_accuracy"]["groups"], ([0, 2], [1, 3]), strict=True):
        for name in ("own", "final", "adapted"):
            assert group[name] == spread([reached[name][k] for k in members])
    assert all(0 <= value <= 1 for value in reached["adapted"])
    assert found["communication"]["measured_over_predicted"] == 1, "nothing is sent for it"


@pytest.mark.ray
@pytest.mark.parametrize("knobs", [MIXED, pytest.param({"finetune.adapt_steps": 3}, marks=pytest.mark.slow)])
def test_ray_and_serial_agree_bit_for_bit(tmp_path, ray_up, knobs):
    serial = go(tmp_path / "serial", knobs)
    there = go(tmp_path / "ray", knobs | {"runtime.host": "ray", "runtime.max_hosts": 2})
    assert there["client_accuracy"] == serial["client_accuracy"]


def test_a_finished_run_gains_the_numbers_without_training_and_adapting_changes_nothing_else(tmp_path, monkeypatch):
    first = go(tmp_path, {})
    assert "final_models" not in first["stages"] and first["client_accuracy"]["all"].keys() == {"own", "final"}
    shutil.rmtree(tmp_path / "objects" / first["stages"]["own_models"]["key"])  # as an earlier version left it
    run = OwnScoreTask.run

    def broken(task, context, shard, client_id, *inputs):
        if client_id == 2:
            raise KeyboardInterrupt
        return run(task, context, shard, client_id, *inputs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(OwnScoreTask, "run", broken)
        go(tmp_path, {})
    again = go(tmp_path, {})
    assert computed(again) == {"own_models"} and again["client_accuracy"] == first["client_accuracy"]
    adapted = go(tmp_path, {"finetune.adapt_steps": 20})
    assert computed(adapted) == {"final_models"} and adapted["accuracy"] == first["accuracy"]
    assert adapted["selection"] == first["selection"]
    everyone = adapted["client_accuracy"]
    assert everyone["all"]["adapted"]["mean"] > everyone["all"]["final"]["mean"], "it learns its own classes"
    assert {name: everyone["clients"][name] for name in ("own", "final")} == first["client_accuracy"]["clients"]
    before, after = (load_file(Path(run["paths"]["run"]) / "student.safetensors") for run in (first, adapted))
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert go(tmp_path, {"finetune.adapt_steps": 20})["client_accuracy"] == everyone


def test_steps_of_no_length_leave_the_final_model_as_it_is(tmp_path):
    """With frozen batch norm; by two clients of one network whose head is made anew."""
    still = {"finetune.lr": 1e-12, "finetune.adapt_steps": 2, "finetune.head": "lda_head", "partition.num_clients": 2}
    reached = go(tmp_path, still)["client_accuracy"]["clients"]
    assert reached["adapted"] == pytest.approx(reached["final"])


def test_equal_clients_do_not_differ(tmp_path):
    """80 images of each class are dealt evenly to 4 clients, and nobody trains."""
    found = go(tmp_path, {"partition.sampler": "iid", "warmup.num_rounds": 0, "finetune.num_rounds": 0})
    assert found["client_accuracy"]["all"]["own"]["sd"] == found["client_accuracy"]["all"]["final"]["sd"] == 0
    assert found["client_accuracy"]["all"]["final"]["mean"] == pytest.approx(found["accuracy"]["final"])


@given(st.lists(st.one_of(st.none(), st.floats(0, 1)), min_size=1, max_size=40))
def test_the_worst_tenth_is_not_above_the_mean(values):
    known = [value for value in values if value is not None]
    found = spread(values)
    if not known:
        assert found == {}
        return
    assert min(known) <= found["worst_tenth"] <= found["mean"] + 1e-12
    assert found["mean"] == pytest.approx(np.mean(known)) and found["sd"] == pytest.approx(np.std(known), abs=1e-9)
    assert (found["sd"] == 0) == (len(set(known)) == 1) or found["sd"] < 1e-12


def test_worst_tenth_by_hand():
    assert spread([k / 20 for k in range(1, 21)])["worst_tenth"] == pytest.approx(0.075)  # 2 of 20 clients
    assert spread([0.5, 0.1, None])["worst_tenth"] == 0.1


def test_classes_without_test_images_are_left_out():
    assert own_accuracy([0.5, None, 1.0], np.array([1, 6, 1])) == 0.75


def test_keys_follow_the_adaptation_in_its_own_stage_alone():
    plain, asked, more = (stage_keys(override(TINY, QUICK | {"finetune.adapt_steps": n})) for n in (0, 1, 2))
    assert asked.keys() - plain.keys() == {"final_models"}
    assert {name for name in more if more[name] != asked[name]} == {"final_models"}
    assert all(asked[name] == plain[name] for name in plain)


def test_a_client_whose_work_fails_is_left_out(tmp_path, monkeypatch):
    def broken(task, context, shard, client_id, *inputs):
        if client_id == 1:
            raise ValueError("bad")
        return 0.5

    monkeypatch.setattr(AdaptTask, "run", broken)
    found = go(tmp_path, {"finetune.adapt_steps": 1, "federation.min_cohort": 2, "federation.max_client_failures": 1})
    assert found["client_accuracy"]["clients"]["adapted"] == [0.5, None, 0.5, 0.5]
    assert found["client_accuracy"]["all"]["adapted"] == {"mean": 0.5, "sd": 0, "worst_tenth": 0.5}
    assert [row["client"] for row in found["health"] if row["code"] == "client.failed"] == [1]
    assert go(tmp_path / "plain", {})["client_accuracy"]["all"].keys() == {"own", "final"}


def test_tables_pages_and_columns_show_them(tmp_path):
    found = go(tmp_path, {"finetune.adapt_steps": 1})
    summary = json.loads((Path(found["paths"]["run"]) / "summary.json").read_text())
    figures = summary["client_accuracy"]["all"]
    lines = io.StringIO()
    Console(file=lines, width=80).print(closing_table(summary))
    [adapted] = [line for line in lines.getvalue().splitlines() if "final model, adapted" in line]
    numbers = [f"{100 * figures['adapted'][name]:.1f}" for name in ("mean", "sd", "worst_tenth")]
    assert [word for word in adapted.split()[3:] if word != "%"] == numbers
    page = Path(write_report(found["paths"]["run"], str(tmp_path / "page.html"))).read_text()
    assert "Accuracy at the clients" in page and "final model, adapted" in page
    tags = (Path(found["paths"]["run"]) / "metrics.jsonl").read_text()
    assert all(f'"clients/{model}_{name}"' in tags for model, its in figures.items() for name in its)
    results = [TrialResult(f"p{n}s0", n, 0, {}, summary) for n in range(2)]
    assert results_table(results).to_pylist()[0]["clients_own_worst_tenth"] == figures["own"]["worst_tenth"]
    points = [{"method": "mosaic"}, {"method": "fedavg"}]
    table = compare(result_rows(results), points, None)
    cells = dict(zip(table.heads, table.cells(table.sections[None][0]), strict=True))
    assert cells["client"] == f"{100 * figures['final']['mean']:.1f}"
    assert cells["sd own"] == f"{100 * figures['own']['sd']:.1f}"
    assert cells["worst adapted"] == f"{100 * figures['adapted']['worst_tenth']:.1f}"
    narrow = io.StringIO()
    Console(file=narrow, width=80).print(table)
    assert max(map(len, narrow.getvalue().splitlines())) <= 80 and narrow.getvalue().count("worst own") == 1
    older = [TrialResult("p0s0", 0, 0, {}, {n: v for n, v in summary.items() if n != "client_accuracy"})]
    assert not compare(result_rows(older), points, None).at_clients
