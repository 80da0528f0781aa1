"""Runs and sweeps read for a notebook: contents, missing results and refusals."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cli_runner import refused_by
from reports import ACCURACY, COUNTS, Reader, make_run, make_sweep, write_run
from trials import LAMBDA_E, OMEGA, failed, trial

import mosaic_ray
from mosaic_ray import load_run, load_sweep
from mosaic_ray.core.types import Finding
from mosaic_ray.report.load import NotAvailable, find
from mosaic_ray.runs.summary import Summary
from mosaic_ray.storage.store import OBJECTS, Store


def contents(folder: Path) -> dict[str, str]:
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_run_reads_back(tmp_path):
    run = load_run(make_run(tmp_path))
    assert (run.name, run.status, run.command) == ("one", "done", "mosaic run --storage here")
    assert {role: run.accuracy(role) for role in ACCURACY} == ACCURACY and run.gain == 0.25
    assert run.config["warmup"]["num_rounds"] == 3
    assert (run.label_counts == COUNTS).all()
    assert list(run.metrics.columns) == ["stage", "tag", "step", "value"]
    assert run.curve("warmup/accuracy").to_dict() == {1: 0.125, 2: 0.25, 3: 0.375}
    assert run.confusion("final").tolist() == [[8, 2, 0], [0, 9, 1], [3, 0, 7]]
    assert {k: images.shape for k, images in run.samples().items()} == dict.fromkeys(range(3), (16, 1, 8, 8))
    steps, images = run.progress()[2]
    assert steps.tolist() == [5, 10] and images.shape == (2, 4, 1, 8, 8)


def test_what_is_loaded_prints_as_a_few_lines(tmp_path):
    run = repr(load_run(make_run(tmp_path)))
    assert run.count("\n") < 10 and len(run) < 1000
    for part in ("Run one: done", "mosaic, seed 0", "digits, 3 clients", "final 0.8125, control 0.5625, gain +25.0",
                 "initial 0.5000", "1 of 10 stages stored", "3.0 MiB uplink", "1 warning", str(tmp_path)):  # fmt: skip
        assert part in run
    make_sweep(tmp_path / "sweeps" / "two")
    sweep = repr(load_sweep(tmp_path / "sweeps" / "two"))
    assert sweep.count("\n") < 5 and len(sweep) < 1000 and "Sweep two: " in sweep and "done" in sweep


def test_a_run_with_everything_prints_as_ten_lines(tmp_path):
    spread = {name: {"mean": 0.5, "sd": 0.1, "worst_tenth": 0.4} for name in ("own", "final", "adapted")}
    record = {"all": spread, "groups": [], "clients": {name: [0.5] * 3 for name in spread}}
    accuracy = ACCURACY | {"ceiling": 0.9, "server_student": 0.7}
    run = load_run(make_run(tmp_path, accuracy=accuracy, client_accuracy=record))
    assert len(repr(run).splitlines()) == 10 and "own 0.5000, final 0.5000, adapted 0.5000" in repr(run)
    empty = load_run(write_run(tmp_path / "runs" / "begun", None))
    assert len(repr(empty).splitlines()) <= 10 and "unfinished" in repr(empty)


HOSTILE = "<img src=x onerror=alert(1)>\x1b[31m"


def test_a_notebook_shows_tables_and_no_markup_of_others(tmp_path):
    made = make_run(tmp_path, HOSTILE.replace("/", ""), method="<script>m</script>")
    run = load_run(made)._repr_html_()
    page = Reader(run)
    assert page.words["tr"][3:7] == ["final", "after the closing rounds", "81.2 %", "+25.0"]
    assert page.text("h4").startswith("<img src=x onerror=alert(1)>")
    assert not {"img", "script"} & {tag for tag, _ in page.tags} and "\x1b" not in run
    assert "<script>m</script>" in page.text("p")
    begun = load_run(write_run(tmp_path / "runs" / "begun", None))._repr_html_()
    assert "unfinished" in Reader(begun).text("h4") and "<table" not in begun


def test_a_notebook_shows_the_tables_of_sweeps_and_comparisons(tmp_path):
    sweep = load_sweep(make_sweep(tmp_path / "sweeps" / "<b>two"))
    page = Reader(sweep._repr_html_())
    assert page.text("h4") == "<b>two" and "final" in page.words["th"] and len(page.all("table")) == 2
    best = [attributes for attributes in page.all("tr") if attributes.get("style") == "font-weight: bold"]
    assert len(best) == 2  # the first of each condition

    points = [{"method": "fedavg"}, {"method": "<i>mine"}]
    plain = {"method": "fedavg"}
    results = [trial(n, seed, plain, final=0.5 + 0.1 * n + 0.01 * seed) for n in (0, 1) for seed in (0, 1)]
    folder = make_sweep(tmp_path / "sweeps" / "compare", results, space="compare", points=points)
    table = load_sweep(folder)
    for html in (table._repr_html_(), table.comparison._repr_html_()):
        page = Reader(html)
        assert {"fedavg", "<i>mine", "vs fedavg"} <= set(page.words["th"]) and "i" not in dict(page.tags)
        assert "paired by seed" in page.text("p")


def test_a_notebook_shows_figures_as_pictures(tmp_path):
    run, sweep = load_run(make_run(tmp_path / "one")), load_sweep(make_sweep(tmp_path / "two"))
    for figure in (run.plot("rounds"), sweep.plot("ladder")):
        assert figure._repr_png_().startswith(b"\x89PNG\r\n")


def test_importing_the_package_stays_light():
    code = (
        "import sys, mosaic_ray\n"
        "heavy = {'pandas', 'numpy', 'matplotlib', 'torch', 'ray'}\n"
        "assert not heavy & set(sys.modules), sorted(heavy & set(sys.modules))\n"
        "from mosaic_ray import load_run, load_sweep\n"
        "assert 'pandas' in sys.modules and not {'torch', 'ray', 'matplotlib'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with pytest.raises(AttributeError, match="load_nothing"):
        mosaic_ray.load_nothing  # noqa: B018
    assert {"load_run", "load_sweep"} <= set(dir(mosaic_ray))


# --- which folder ----------------------------------------------------------------------------------------------------


def test_a_path_may_be_a_run_a_sweep_a_trial_or_a_storage_with_one_of_them(tmp_path):
    run = make_run(tmp_path / "a")
    sweep = make_sweep(tmp_path / "b" / "sweeps" / "s")
    trial_folder = write_run(sweep / "trials" / "p000s0", {"status": "done"})
    assert find(run) == find(tmp_path / "a") == ("run", run)
    assert find(sweep) == find(tmp_path / "b") == ("sweep", sweep)
    assert find(trial_folder) == ("run", trial_folder)


def test_a_path_that_means_no_single_run_is_refused_in_one_line(tmp_path):
    make_run(tmp_path / "a")
    make_run(tmp_path / "a", "two")
    make_sweep(tmp_path / "a" / "sweeps" / "s")
    assert "runs/one, runs/two, sweeps/s" in refused_by(find, tmp_path / "a")
    (tmp_path / "empty").mkdir()
    assert "no run or sweep lies there" in refused_by(find, tmp_path / "empty")
    assert "no such folder" in refused_by(find, tmp_path / "nowhere")
    assert "copy" in refused_by(find, "s3://bucket/runs/one")
    assert "load_sweep" in refused_by(load_run, tmp_path / "a" / "sweeps" / "s")
    assert "load_run" in refused_by(load_sweep, tmp_path / "a" / "runs" / "one")


# --- incomplete files ------------------------------------------------------------------------------------------------


def test_a_run_at_work_reads_as_far_as_it_got(tmp_path):
    folder = write_run(tmp_path / "one", None)
    with open(folder / "metrics.jsonl", "a") as lines:
        lines.write('{"stage": "warm')
    run = load_run(folder)
    assert run.status == "unfinished" and run.gain is None and run.label_counts is None
    assert len(run.metrics) == len((folder / "metrics.jsonl").read_text().splitlines()) - 1
    with pytest.raises(NotAvailable, match="no finished stage evaluate"):
        run.confusion("final")


@pytest.mark.parametrize(
    "changes",
    [
        {"accuracy": [1]}, {"accuracy": {"final": "high"}}, {"stages": {"warmup": {"key": 3, "cached": True}}},
        {"health": [{"code": "x"}]}, {"communication_bytes": {"uplink": 3}}, {"per_class_accuracy": {"final": 1}},
        {"label_counts": [[1, 2], [3]]}, {"label_counts": [[1, -2]]}, {"label_counts": "x"}, {"config": 3},
        {"status": 1}, {"communication": {"baselines": {"fedavg": 3}}}, {"calibration": {"final": 3}},
    ],
    ids=str,
)  # fmt: skip
def test_foreign_facts_are_refused_in_one_line(tmp_path, changes):
    folder = make_run(tmp_path, **changes)
    assert str(folder) in refused_by(load_run, folder)


def test_a_refusal_names_the_place_of_the_fault(tmp_path):
    folder = make_run(tmp_path, stages={"warmup": {"key": 3, "cached": True}})
    expected = f"{folder}/summary.json: its stages.warmup.key is not what a run or sweep writes"
    assert refused_by(load_run, folder).startswith(expected)


def test_a_summary_of_an_earlier_or_later_version_is_read(tmp_path):
    finding = {"code": "a.b", "severity": "info", "stage": "warmup", "message": "m"}  # before thresholds and advice
    stages = {"warmup": {"key": "warmup-0", "cached": True, "later": 1}}
    new = {"communication": None, "calibration": None, "later": {"x": [1]}}
    run = load_run(make_run(tmp_path, health=[finding], stages=stages, **new))
    assert run.summary.health == [Finding("a.b", "info", "warmup", "m")]
    assert run.summary.stages["warmup"].seconds is None and run.summary.communication is None
    assert "later" not in run.summary.to_json()


def test_a_summary_that_is_read_and_written_stays_as_it_is(tmp_path):
    content = json.loads((make_run(tmp_path) / "summary.json").read_text())
    again = Summary.from_json(content).to_json()
    assert again.pop("validation_accuracy") is None
    communication = again["communication"] | content["communication"]
    assert again == content | {"communication": communication}
    failed = {"status": "failed", "error": "e", "stage": "warmup", "round": 2, "client": None, "method": "mosaic"}
    assert Summary.from_json(failed).to_json() == failed


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, "\ud800", '{"status": "do'])
def test_damaged_files_are_refused_in_one_line(tmp_path, text):
    folder = make_run(tmp_path)
    (folder / "summary.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    assert "summary.json" in refused_by(load_run, folder)


def test_a_damaged_line_of_metrics_is_refused(tmp_path):
    folder = make_run(tmp_path)
    rows = (folder / "metrics.jsonl").read_text().splitlines()
    for wrong in ("x", '{"stage": "a", "tag": "b", "step": "c", "value": 1}', "3"):
        (folder / "metrics.jsonl").write_text("\n".join([rows[0], wrong, *rows[1:]]))
        assert "line 2" in refused_by(load_run, folder)


# --- what the store lacks --------------------------------------------------------------------------------------------


def test_freed_or_damaged_results_are_absent_and_not_changed(tmp_path):
    folder = make_run(tmp_path)
    stages = json.loads((folder / "summary.json").read_text())["stages"]
    Store(tmp_path).discard(stages["evaluate"]["key"])
    [payload] = (tmp_path / OBJECTS / stages["distill"]["key"]).glob("part-*")
    payload.write_bytes(payload.read_bytes()[:-1] + b"x")
    before, run = contents(tmp_path), load_run(folder)
    with pytest.raises(NotAvailable, match="no longer holds evaluate-"):
        run.confusion("final")
    with pytest.raises(NotAvailable, match="SHA-256"):
        run.arrays("distill", "diagnostics")
    with pytest.raises(NotAvailable, match="kept no nonsense"):
        run.arrays("teacher", "nonsense")
    assert contents(tmp_path) == before


def test_a_folder_away_from_its_store_says_so(tmp_path):
    folder = make_run(tmp_path / "a").rename(tmp_path / "elsewhere")
    with pytest.raises(NotAvailable, match="no store beside"):
        load_run(folder).samples()


def test_a_key_that_leads_out_of_the_store_is_never_followed(tmp_path):
    folder = make_run(tmp_path)
    summary = json.loads((folder / "summary.json").read_text())
    summary["stages"]["evaluate"]["key"] = "../../evaluate-0123456789"
    (folder / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(NotAvailable, match="names no stage result"):
        load_run(folder).confusion("final")


def test_generators_of_another_version_have_their_own_reason(tmp_path):
    folder = make_run(tmp_path)
    summary = json.loads((folder / "summary.json").read_text())
    assert len(load_run(folder).generators) == 3
    summary["stages"]["warmup"]["key"] = "warmup-" + "f" * 20
    (folder / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(NotAvailable, match="another version"):
        load_run(folder).samples()


def test_samples_that_are_no_images_are_absent(tmp_path):
    folder = make_run(tmp_path)
    key = load_run(folder).generators[0].key
    Store(tmp_path).put(key, {}, {"samples": {"images": np.zeros((2, 4, 8, 8), np.uint8)}})
    with pytest.raises(NotAvailable, match="no images"):
        load_run(folder).samples()


# --- sweeps ----------------------------------------------------------------------------------------------------------


def test_a_sweep_reads_back(tmp_path):
    sweep = load_sweep(make_sweep(tmp_path / "s"))
    assert sweep.name == "s" and len(sweep.results) == 72 == len(sweep.done)
    assert sweep.conditions == (OMEGA,) and set(sweep.varying) == {OMEGA, *(f"generator.lambda_{x}" for x in "edi")}
    assert [title.partition(",")[0] for title, *_ in sweep.best()] == [f"{OMEGA} = 0.01", f"{OMEGA} = 0.1"]
    for _, _, points in sweep.best():
        means = [np.mean([row["selection"] for row in point]) for point in points]
        assert means == sorted(means, reverse=True) and len(points) == 12


def test_a_sweep_without_an_ended_trial_and_one_of_an_unlisted_plan_read_back(tmp_path):
    folder = make_sweep(tmp_path / "s", [], points=None, knobs={LAMBDA_E: "0.5 .. 2", "seed": "0"})
    (folder / "results.parquet").unlink()
    sweep = load_sweep(folder)
    assert sweep.results.empty and sweep.swept == (LAMBDA_E,) and sweep.best() == []


def test_a_trial_is_a_run(tmp_path):
    folder = make_sweep(tmp_path / "s", [trial(0, 0, {LAMBDA_E: 1.0}), failed(1, 0, {LAMBDA_E: 2.0})])
    write_run(folder / "trials" / "p000s0", {"status": "done", "accuracy": ACCURACY})
    sweep = load_sweep(folder)
    assert sweep.trial("p000s0").gain == 0.25
    for name in ("p001s0", "../p000s0", "p009s9"):
        assert "no files of a trial" in refused_by(sweep.trial, name)


@pytest.mark.parametrize(
    "plan",
    [{"knobs": None}, {"space": 3}, {"seeds": "0,1"}, {"points": [3]}, {"points": {}}, {"base": []}, {"knobs": [1]}],
    ids=str,
)
def test_a_foreign_plan_is_refused_in_one_line(tmp_path, plan):
    folder = make_sweep(tmp_path / "s", **plan)
    assert "plan.json" in refused_by(load_sweep, folder)


def test_a_damaged_table_is_refused_in_one_line(tmp_path):
    folder = make_sweep(tmp_path / "s")
    table = folder / "results.parquet"
    table.write_bytes(table.read_bytes()[:-9])
    assert "results.parquet" in refused_by(load_sweep, folder)


def test_an_unknown_figure_names_the_known_ones(tmp_path):
    assert "rounds" in refused_by(load_run(make_run(tmp_path / "a")).plot, "pie")
    assert "ladder" in refused_by(load_sweep(make_sweep(tmp_path / "s")).plot, "pie")


# --- files of somebody else ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["summary.json", "metrics.jsonl", "command.txt", "label_counts.json"])
@pytest.mark.parametrize("kind", ["a pipe", "a folder", "a symbolic link", "too many"])
def test_what_is_no_file_is_refused_at_once(tmp_path, name, kind):
    folder = make_run(tmp_path, **({"label_counts": None} if name == "label_counts.json" else {}))
    path = folder / name
    path.unlink(missing_ok=True)
    if kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a folder":
        path.mkdir()
    elif kind == "too many":
        path.touch()
        os.truncate(path, 1 << 40)
    else:
        path.symlink_to("/dev/zero")
    line = refused_by(load_run, folder)
    assert str(path) in line and kind in line


def test_a_metric_that_no_frame_can_hold_is_refused(tmp_path):
    folder = make_run(tmp_path)
    for wrong in ('"step": ' + "9" * 30 + ', "value": 1', '"step": 1, "value": NaN', '"step": 1, "value": 1e999'):
        (folder / "metrics.jsonl").write_text('{"stage": "a", "tag": "b", ' + wrong + "}\n{}\n{}")
        assert "line 1" in refused_by(load_run, folder)


def test_generators_of_other_clients_are_missing(tmp_path):
    folder = make_run(tmp_path)
    content = json.loads((folder / "summary.json").read_text())
    content["config"]["partition"]["num_clients"] = 10**6
    (folder / "summary.json").write_text(json.dumps(content))
    with pytest.raises(NotAvailable, match="other clients"):
        load_run(folder).samples()
