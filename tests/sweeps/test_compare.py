"""`mosaic compare`: methods side by side on one partition a seed."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev

import pytest
from cli_runner import ask, refusal
from helpers import TINY, stripes_dataset

from mosaic_ray.cli.request import compare_plan, own_knobs, reference, sweep_request
from mosaic_ray.config.resolve import to_toml
from mosaic_ray.core.errors import RequestError
from mosaic_ray.report.api import load_sweep
from mosaic_ray.runs.equal_compute import with_controls
from mosaic_ray.sweeps.results import read_results
from mosaic_ray.sweeps.runner import prepare

NARROW = "federation.widths=[1.0,0.5]"


@pytest.mark.parametrize(
    "methods, points",
    [
        ("fedavg,mosaic", [{"method": "fedavg"}, {"method": "mosaic"}]),
        ("fedrolex", [{"method": "fedavg", "federation.strategy": "fedrolex"}]),
        (" mosaic , mosaic+heterofl", [{"method": "mosaic"}, {"method": "mosaic", "federation.strategy": "heterofl"}]),
        ("fedavg+fedrolex+fedprox", [{"method": "fedavg", "federation.strategy": "fedrolex+fedprox"}]),
        ("fedrolex+fedprox", [{"method": "fedavg", "federation.strategy": "fedrolex+fedprox"}]),
    ],
)
def test_compare_takes_methods_strategies_and_both(methods, points):
    assert list(compare_plan(methods).points) == points


LAB = Path(__file__).parents[1] / "plugins/lab"


def test_compare_takes_plugins(tmp_path, monkeypatch):
    """The object's class decides whether it is a method or a strategy."""
    monkeypatch.chdir(tmp_path)
    for name in ("nearest_mean", "median"):
        shutil.copy(LAB / f"{name}.py", tmp_path)
    (tmp_path / "other.py").write_text("OTHER = 3\n")
    method, strategy = "nearest_mean.py:NEAREST_MEAN", "median.py:MEDIAN"
    assert list(compare_plan(f"{method},{strategy},{method}+fedrolex,mosaic+{strategy}").points) == [
        {"method": method},
        {"method": "fedavg", "federation.strategy": strategy},
        {"method": method, "federation.strategy": "fedrolex"},
        {"method": "mosaic", "federation.strategy": strategy},
    ]
    with pytest.raises(RequestError, match=r"other\.py:OTHER: it is a int, not an instance of"):
        compare_plan("other.py:OTHER")


def test_widths_are_allowed_where_every_point_names_its_strategy():
    assert compare_plan("fedrolex,mosaic+fedrolex").base == {
        "federation.strategy": "fedrolex", "runtime.ceiling": True,
    }  # fmt: skip
    found = compare_plan("fedrolex,mosaic").base
    assert found == {"runtime.ceiling": True}, "mosaic means the strategy that is configured"


SAME = "methods are compared on the same data, partitions and seeds"


@pytest.mark.parametrize(
    "words, says",
    [
        (["--methods", "mosiac"], 'did you mean "mosaic"?'),
        (["--methods", "fedavg+mosaic"], "unknown method"),
        (["--methods", ""], "unknown method"),
        (["--methods", "fedavg,fedavg"], "is there twice"),
        (["--seeds", "0,x"], "--seeds 0,x"),
        (["--methods", "fedavg,mosaic", "--set", NARROW], "fedavg trains whole models"),
        (["--set", "method=mosaic"], "method"),
        (["--omegas", "0.1,1", "--omega", "1"], "--omega 1: space compare tries values of partition.omega itself"),
        (["--omegas", "0.1,1", "--set", "partition.omega=1"], "; --omegas lists its values; give one of them"),
        (["--omegas", "0.1,x"], "--omegas 0.1,x: "),
        (["--omegas", "0.1,0"], "--omegas 0.1,0: "),
        (["--omegas", ""], "--omegas : "),
        (["--omegas", "0.1,0.10"], "--omegas 0.1,0.10: it takes numbers, each once"),
        (["--against", "mosiac"], '--against mosiac: unknown method; did you mean "mosaic"?'),
        (["--for", "scaffold", "warmup.lr=0.1"], "--for scaffold: it takes one of the methods that are compared,"),
        (["--for", "mosiac", "warmup.lr=0.1"], '--for mosiac: unknown method; did you mean "mosaic"?'),
        (["--for", "mosaic", "warmup.lr"], "--for mosaic warmup.lr: it takes METHOD KEY=VALUE"),
        (["--for", "mosaic", "warmup.lr=-1"], "--for mosaic warmup.lr=-1: "),
        (["--for", "mosaic", "warmup.lrr=1"], 'did you mean "warmup.lr"'),
        (["--for", "mosaic", "partition.omega=1"], SAME),
        (["--for", "mosaic", "method=dense"], SAME),
        (["--for", "mosaic", "federation.strategy=fedprox"], SAME),
        (["--for", "mosaic", "warmup.lr=0.1", "--for", "mosaic", "warmup.lr=0.2"], "warmup.lr: it is given twice"),
        (["--methods", "fedavg,scaffold", "--set", "warmup.momentum=0.9"], "--for scaffold warmup.momentum=0"),
        (["--against", "lda_head"], "--against lda_head: it takes one of the methods that are compared, fedavg,"),
    ],
)
@pytest.mark.usefixtures("two_cpus")
def test_a_wrong_option_is_refused_in_one_line(words, says):
    assert says in refusal(ask("compare", *words))


@pytest.mark.usefixtures("two_cpus")
def test_seeds_share_one_partition_and_warm_up_between_methods():
    result = ask("compare", "--dry-run")
    assert result.exit_code == 0, result.stderr
    assert "9 trials (3 points x 3 seeds)" in result.stdout
    counted = dict(re.findall(r"^(\w+) +\d+ +(\d+)", result.stdout, re.MULTILINE))
    assert (counted["partition"], counted["warmup"], counted["generators"]) == ("3", "3", "15")


@pytest.mark.usefixtures("two_cpus")
def test_omegas_times_methods_share_one_partition_and_warm_up_an_omega_and_seed():
    result = ask("compare", "--dry-run", "--omegas", "0.1, 1", "--seeds", "0,1")
    assert result.exit_code == 0, result.stderr
    assert "12 trials (6 points x 2 seeds)" in result.stdout
    counted = dict(re.findall(r"^(\w+) +\d+ +(\d+)", result.stdout, re.MULTILINE))
    assert (counted["partition"], counted["warmup"], counted["generators"]) == ("4", "4", "20")
    assert [point["partition.omega"] for point in compare_plan("fedavg,mosaic", "0.1,1").points] == [0.1, 0.1, 1.0, 1.0]


def test_a_method_has_knobs_for_itself_at_every_omega():
    """Their rows differ from the others by these knobs alone, and another spelling names the same row."""
    words = {"seed": None, "sets": ("warmup.momentum=0.9",)}
    own = own_knobs([("fedavg+scaffold", "warmup.momentum=0"), (" mosaic", "warmup.lr = 0.02")])
    plan = compare_plan("fedavg,scaffold,mosaic", "0.1,1", own)
    configs = [trial.config for trial in prepare(sweep_request("compare", words, plan=plan, seeds="0")).trials]
    assert [config.warmup.momentum for config in configs] == [0.9, 0.0, 0.9] * 2
    lr = configs[0].warmup.lr
    assert [config.warmup.lr for config in configs] == [lr, lr, 0.02] * 2 and lr != 0.02
    with pytest.raises(RequestError, match=r"--for scaffold warmup\.momentum=0"):
        prepare(sweep_request("compare", words, plan=compare_plan("fedavg,scaffold"), seeds="0"))


def test_the_control_of_equal_compute_has_no_knobs_of_generators():
    knobs = "rehearsal.candidates=[]", "rehearsal.weight=1", "warmup.lr=0.02"
    own = own_knobs([("mosaic", knob) for knob in knobs])
    request = sweep_request("compare", {"preset": "demo"}, plan=compare_plan("fedavg,mosaic", None, own), seeds="0")
    points = with_controls(request.config, request.plan.points)
    rounds = request.config.warmup.num_rounds
    assert points[2].keys() == {"method", "warmup.lr", "warmup.num_rounds"} and points[2]["warmup.num_rounds"] > rounds
    assert len(prepare(replace(request, plan=replace(request.plan, points=points))).trials) == 3


def test_the_reference_is_one_of_the_methods_in_any_spelling():
    assert reference("fedavg,mosaic", None) == ""
    assert reference("fedavg+fedrolex,mosaic", " fedrolex ") == reference("fedrolex,mosaic", "fedavg+fedrolex")
    assert reference("fedrolex,mosaic+fedprox", "mosaic+fedprox") == "mosaic+fedprox"


@pytest.mark.ray
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning")
def test_a_comparison_writes_its_table_and_another_reference_resumes_it(tmp_path, monkeypatch, ray_up):
    """Two methods at two omegas with two seeds: run, then asked for again with another reference."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mosaic_ray.data.load.load_dataset", lambda config: stripes_dataset())
    Path("tiny.toml").write_text(to_toml(TINY))
    words = ["compare", "--methods", "prototype_head,fedavg", "--omegas", "0.3,3", "--seeds", "0,1"]
    words += ["--config", "tiny.toml"]
    first = ask(*words, "--name", "n", "--max-concurrent", "2")
    assert first.exit_code == 0, (first.stderr, first.exception)
    folder = Path("mosaic_runs/sweeps/n")
    assert {"table.md", "table.tex", "figure.pdf"} <= {path.name for path in folder.iterdir()}
    rows = read_results(folder / "results.parquet").to_pylist()
    assert [row["partition.omega"] for row in rows] == [0.3] * 4 + [3.0] * 4
    finals = [row["accuracy_final"] for row in rows]
    differences = [[100 * (finals[n + s] - finals[n + 2 + s]) for s in (0, 1)] for n in (0, 4)]
    cells = [f"{fmean(two):+.1f} ± {stdev(two):.1f}" for two in differences]
    page = (folder / "table.md").read_text()
    assert [f"| {cell}" in page for cell in cells] == [True, True] and "vs fedavg" in page
    assert [line for line in first.stdout.splitlines() if cells[0] in line and line.startswith("prototype_head")]

    monkeypatch.setattr("mosaic_ray.sweeps.tune.run_trials", lambda *_, **__: pytest.fail("a trial was started"))
    results = (folder / "results.csv").read_bytes()
    again = ask(*words, "--name", "n", "--max-concurrent", "2", "--against", "prototype_head")
    assert again.exit_code == 0, (again.stderr, again.exception)
    opposite = [f"{-fmean(two):+.1f} ± {stdev(two):.1f}" for two in differences]
    page = (folder / "table.md").read_text()
    assert all(f"| {cell}" in page for cell in opposite) and "vs prototype\\_head" in page
    assert (folder / "results.csv").read_bytes() == results
    assert load_sweep(folder).comparison.against == "prototype_head"
    assert ask(*words, "--name", "n", "--max-concurrent", "2").exit_code == 0
    assert load_sweep(folder).comparison.against == "fedavg"


def test_methods_over_narrow_clients_share_their_rounds():
    words = {"seed": None, "sets": (NARROW,)}
    plan = compare_plan("fedrolex,mosaic+fedrolex")
    sweep = prepare(sweep_request("compare", words, plan=plan, seeds="0,1"))
    assert {trial.config.federation.strategy for trial in sweep.trials} == {"fedrolex"}
    assert [trial.config.method for trial in sweep.trials] == ["fedavg", "fedavg", "mosaic", "mosaic"]
    with pytest.raises(RequestError, match="fedavg trains whole models"):
        prepare(sweep_request("compare", words, plan=compare_plan("fedavg,fedrolex"), seeds="0"))
