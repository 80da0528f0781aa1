"""A package outside mosaic_ray (``lab``) brings a strategy and a method, and goes through every command."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from cli_runner import ask
from helpers import FACTS, TINY, assert_same, interrupted, small_ray, stripes_dataset
from safetensors.numpy import load_file

from mosaic_ray.config.plugins import load
from mosaic_ray.config.resolve import as_dict, override, to_toml
from mosaic_ray.core.errors import RequestError
from mosaic_ray.runs import runner
from mosaic_ray.runs.plan import graph_of, stage_keys
from mosaic_ray.storage.store import Store

METHOD, STRATEGY = "lab.nearest_mean:NEAREST_MEAN", "lab.median:MEDIAN"
LAB = Path(__file__).parent / "lab"


@pytest.fixture(autouse=True)
def place(monkeypatch, tmp_path) -> Path:
    """An empty working directory, stripes as the data set, and TINY's knobs in tiny.toml."""
    monkeypatch.setattr("mosaic_ray.data.load.load_dataset", lambda config: stripes_dataset())
    monkeypatch.chdir(tmp_path)
    Path("tiny.toml").write_text(to_toml(TINY))
    return tmp_path


def run(*words: str, method: str = METHOD, strategy: str = STRATEGY, storage: str = "runs") -> dict[str, Any]:
    command = ("run", "--config", "tiny.toml", "--storage", storage, "--method", method, "--json", "--name", "x")
    result = ask(*command, "--set", f"federation.strategy={strategy}", *words)
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def student(storage: str = "runs") -> dict[str, np.ndarray]:
    return load_file(Path(storage) / "runs" / "x" / "student.safetensors")


def test_a_run_uses_both(place):
    summary = run("--set", "nearest_mean.shrink=0.25", "--set", "median.step=0.5")
    assert list(summary["stages"]) == [
        "partition", "warmup", "prototypes", "class_means", "finetune", "control", "own_models", "evaluate",
    ]  # fmt: skip
    assert summary["accuracy"]["distilled"] > 0.5 and summary["accuracy"]["teacher"] is None
    assert summary["communication"]["measured_over_predicted"] == 1
    assert (summary["config"]["nearest_mean"], summary["config"]["median"]) == ({"shrink": 0.25}, {"step": 0.5})
    stored = Store("runs").get(summary["stages"]["class_means"]["key"]).load("global")
    plain = run(storage="other", strategy="fedavg")
    assert plain["stages"]["warmup"]["key"] != summary["stages"]["warmup"]["key"]
    assert not np.array_equal(
        stored["trunk.0.weight"], Store("other").get(plain["stages"]["warmup"]["key"]).load("global")["trunk.0.weight"]
    )


def test_the_same_command_finds_everything_and_a_killed_one_resumes(place):
    undisturbed = run(storage="whole")
    again = run(storage="whole")
    assert all(stage["cached"] for stage in again["stages"].values())
    config = override(TINY, {"method": METHOD, "federation.strategy": STRATEGY, "warmup.checkpoint_rounds": 1})
    with interrupted(in_round=2):
        runner.run(config, storage="killed", name="x", progress=False)
    resumed = run("--set", "warmup.checkpoint_rounds=1", storage="killed")
    keys = [{name: stage["key"] for name, stage in s["stages"].items()} for s in (resumed, undisturbed)]
    assert keys[0] == keys[1]
    assert_same(student("killed"), student("whole"))


def test_dry_run_report_and_garbage_collection(place):
    Path("space.py").write_text(
        "from mosaic_ray.spaces import Choice, SweepPlan\n"
        "def plan():\n    return SweepPlan('shrink', knobs={'nearest_mean.shrink': Choice((0.0, 0.5))})\n"
    )
    words = ("--config", "tiny.toml", "--method", METHOD, "--set", f"federation.strategy={STRATEGY}")
    dry = ask("sweep", "--space", "space.py", *words, "--dry-run", "--address", "local")
    assert dry.exit_code == 0, dry.stderr
    assert "class_means" in dry.stdout and "2 fits" in dry.stdout

    run()
    kept = {path.name for path in Path("runs/objects").iterdir()}
    report = ask("report", "runs/runs/x", "--out", "page.html")
    assert report.exit_code == 0, report.stderr
    assert "class_means" in Path("page.html").read_text()
    collected = ask("store", "gc", "--storage", "runs", "--older-than", "0s")
    assert collected.exit_code == 0, collected.stderr
    assert {path.name for path in Path("runs/objects").iterdir()} == kept
    assert all(stage["cached"] for stage in run()["stages"].values())


def test_keys_follow_the_source_of_a_file(place):
    Path("mine.py").write_text((LAB / "nearest_mean.py").read_text())
    first = run(method="mine.py:NEAREST_MEAN")
    assert all(stage["cached"] for stage in run(method="mine.py:NEAREST_MEAN")["stages"].values())
    Path("mine.py").write_text((LAB / "nearest_mean.py").read_text() + "# another\n")
    load.cache_clear()
    second = run(method="mine.py:NEAREST_MEAN")
    changed = {name for name in first["stages"] if first["stages"][name]["key"] != second["stages"][name]["key"]}
    assert changed == {"class_means", "finetune", "evaluate"}


def test_own_knobs_change_the_keys_that_depend_on_them():
    base = override(TINY, {"method": METHOD, "federation.strategy": STRATEGY})
    assert [stage.name for stage in graph_of(base)][2:4] == ["prototypes", "class_means"]

    def changed(knob: str, value: float) -> set[str]:
        before, after = (stage_keys(c, "x", FACTS) for c in (base, override(base, {knob: value})))
        return {name for name in before if before[name] != after[name]}

    assert changed("nearest_mean.shrink", 0.5) == {"class_means", "finetune", "evaluate"}
    assert changed("median.step", 0.5) == set(stage_keys(base)) - {"partition"}
    assert as_dict(base)["median"] == {"step": 1.0}


@pytest.mark.ray
def test_on_ray_with_the_same_bits(place, monkeypatch):
    run(storage="serial")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(LAB.parent), os.environ.get("PYTHONPATH", "")]))
    with small_ray(num_cpus=2):
        run("--host", "ray", "--set", "runtime.max_hosts=2", storage="ray")
    assert_same(student("ray"), student("serial"))


def test_an_installed_package_is_listed_and_found_by_name(place):
    """Entry points, in a fresh process with a distribution on its path."""
    info = place / "lab-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: lab\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        f"[mosaic_ray.methods]\nnearest_mean = {METHOD}\n[mosaic_ray.strategies]\nmedian = {STRATEGY}\n"
    )
    paths = [str(place), str(LAB.parent), str(Path(__file__).parents[2])]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}

    def mosaic(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", "mosaic_ray", *words], capture_output=True, text=True, env=env)

    listed = mosaic("methods").stdout
    assert "nearest_mean" in listed and "median" in listed and "installed by lab" in listed
    refused = mosaic("run", "--method", "nearest_mean", "--set", "nearest_mean.shrink=2")
    assert refused.returncode == 2
    assert refused.stderr == "mosaic: error: nearest_mean.shrink = 2: it takes a number at least 0 and at most 1\n"


BROKEN = [
    ("import no_such_thing\n", "line 1: ModuleNotFoundError: No module named 'no_such_thing'"),
    ("x = 1\nMINE = 1 / 0\n", "line 2: ZeroDivisionError: division by zero"),
    ("def f(:\n", "line 1: SyntaxError"),
    ("MINE = 3\n", "it is a int, not an instance of mosaic_ray.methods.base.Method"),
    ("OTHER = 3\n", 'no "MINE" there'),
    (
        "from mosaic_ray.methods.base import Method\nclass M(Method):\n    name = 'mosaic'\nMINE = M()\n",
        'its name "mosaic" is taken',
    ),
]


@pytest.mark.parametrize("source, message", BROKEN)
def test_a_broken_plug_in_is_one_line(place, source, message):
    Path("broken.py").write_text(source)
    load.cache_clear()
    result = ask("run", "--method", "broken.py:MINE")
    assert result.exit_code == 2 and result.stderr.count("\n") == 1
    assert result.stderr.startswith("mosaic: error: ") and message in result.stderr
    assert not Path("mosaic_runs").exists()


def test_objects_that_are_no_plug_in_are_refused():
    for knob, word in (("method", "lab.nearest_mean:MEANS"), ("federation.strategy", "lab.median:Median")):
        with pytest.raises(RequestError, match="not an instance of mosaic_ray"):
            override(TINY, {knob: word})


SAMPLER = """
import numpy as np

def in_turn(labels, class_sizes, config, seed):
    return [np.arange(k, len(labels), config.num_clients) for k in range(config.num_clients)]

def twice(labels, class_sizes, config, seed):
    return [np.arange(len(labels))] * config.num_clients
"""


def test_a_sampler_of_the_users_own(place):
    Path("deal.py").write_text(SAMPLER)
    shown = ask("partition", "--clients", "3", "--sampler", "deal.py:in_turn", "--json")
    assert json.loads(shown.stdout)["client_sizes"] == [80, 80, 80], shown.stderr
    config = override(TINY, {"partition.sampler": "deal.py:in_turn"})
    before = stage_keys(config, "x", FACTS)["partition"]
    Path("deal.py").write_text(SAMPLER + "# another\n")
    assert stage_keys(config, "x", FACTS)["partition"] != before != stage_keys(TINY, "x", FACTS)["partition"]
    for name, message in (("twice", "every index exactly once"), ("absent", "no function absent() there")):
        result = ask("partition", "--clients", "3", "--sampler", f"deal.py:{name}", "--json")
        assert result.exit_code == 2 and message in result.stderr and result.stderr.count("\n") == 1


def test_comparisons_take_plug_ins(place):
    words = ("--config", "tiny.toml", "--methods", f"fedavg,{METHOD},{METHOD}+{STRATEGY}", "--dry-run")
    result = ask("compare", *words, "--address", "local")
    assert result.exit_code == 0, result.stderr
    assert "class_means" in result.stdout


FRESH = """
import pickle, sys
from mosaic_ray.config.resolve import flatten, override
base = pickle.loads(bytes.fromhex(sys.argv[1]))
print(flatten(override(base, {"nearest_mean.shrink": 0.5}))["nearest_mean.shrink"])
"""


def fresh(*words: str) -> str:
    """Run Python in a process that has not loaded the plug-ins; return its output."""
    paths = os.pathsep.join([str(LAB.parent), str(Path(__file__).parents[2])])
    done = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": paths}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


SPACE = """
from mosaic_ray.spaces import Choice, SweepPlan
def plan():
    return SweepPlan("shrink", knobs={"nearest_mean.shrink": Choice((0.0, 1.0))})
"""


def test_a_fresh_process_knows_the_knobs_of_what_is_named(place):
    """A trial's process gets a pickled configuration; a command reads the space before anything else."""
    base = override(TINY, {"method": METHOD, "federation.strategy": STRATEGY})
    assert fresh("-c", FRESH, pickle.dumps(base).hex()) == "0.5\n"
    Path("space.py").write_text(SPACE)
    planned = fresh("-m", "mosaic_ray", "sweep", "--space", "space.py", "--method", METHOD, "--dry-run")
    assert "class_means" in planned


@pytest.mark.slow
def test_a_sweep_of_own_knobs_and_its_report(place):
    Path("space.py").write_text(SPACE)
    quick = ("--set", "warmup.num_rounds=2", "--set", "finetune.num_rounds=0", "--storage", "st", "--name", "s")
    words = ("--method", METHOD, "--set", f"federation.strategy={STRATEGY}", *quick)
    fresh("-m", "mosaic_ray", "sweep", "--space", "space.py", *words)
    table = pq.read_table("st/sweeps/s/results.parquet").to_pylist()
    assert [row["nearest_mean.shrink"] for row in table] == [0.0, 1.0]
    assert table[0]["accuracy_distilled"] != table[1]["accuracy_distilled"]
    assert all(row["federation.strategy"] == row["federation.optimiser"] == STRATEGY for row in table)
    fresh("-m", "mosaic_ray", "report", "st/sweeps/s", "--out", "sweep.html")
    page = Path("sweep.html").read_text()
    assert "nearest_mean.shrink" in page
    assert "class_means" in page
