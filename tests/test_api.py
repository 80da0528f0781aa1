"""Runs from Python: the same runs as the commands', typed values, callbacks, one-line refusals."""

from __future__ import annotations

import ast
import json
import os
import signal
import subprocess
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from cli_runner import ask

import mosaic_ray as mr
from mosaic_ray.config.resolve import flatten, to_toml
from mosaic_ray.execution import ray_session
from mosaic_ray.sweeps.space import Choice, SweepPlan

#: The demo in seconds.
LITTLE = {
    "warmup.num_rounds": 2, "warmup.local_steps": 2, "generator.steps": 3, "generator.ngf": 4, "generator.ndf": 4,
    "rehearsal.candidates": [], "finetune.num_rounds": 1, "finetune.local_steps": 1,
}  # fmt: skip
WITH_GENERATORS = LITTLE | {"rehearsal.weight": 1.0}
WORDS = [word for name, value in WITH_GENERATORS.items() for word in ("--set", f"{name}={json.dumps(value)}")]


class Watcher(mr.Callback):
    def __init__(self):
        self.calls = []

    def on_stage(self, name):
        self.calls.append(("stage", name))

    def on_round(self, stage, done, total):
        self.calls.append(("round", stage, done, total))

    def on_metric(self, tag, step, value):
        self.calls.append(("metric", tag))

    def on_finding(self, finding):
        self.calls.append(("finding", finding.code))


def test_a_run_is_the_commands_run_and_callbacks_see_it(tmp_path):
    watcher, other = Watcher(), Watcher()
    found = mr.run("demo", WITH_GENERATORS, omega=0.3, host="serial", storage=tmp_path, callbacks=[watcher, other])
    assert watcher.calls == other.calls
    stages = [call[1] for call in watcher.calls if call[0] == "stage"]
    assert stages == list(found.summary.stages)
    rounds = [call[1:] for call in watcher.calls if call[0] == "round" and call[1] == "warmup"]
    assert rounds == [("warmup", 1, 2), ("warmup", 2, 2)]
    lines = (found.folder / "metrics.jsonl").read_text().splitlines()
    assert [call[1] for call in watcher.calls if call[0] == "metric"] == [json.loads(line)["tag"] for line in lines]
    told = {call[1] for call in watcher.calls if call[0] == "finding"}
    assert told == {row.code for row in found.summary.health if row.severity != "info"} != set()

    done = ask("run", *WORDS, "--omega", "0.3", "--host", "serial", "--storage", str(tmp_path), "--json")
    summary = json.loads(done.stdout)
    assert Path(summary["paths"]["run"]) == found.folder
    assert all(stage["cached"] for stage in summary["stages"].values())
    assert summary["accuracy"] == found.summary.accuracy


def test_configurations_are_those_of_the_command_line():
    config = mr.configure("demo", clients=7)
    shown = tomllib.loads(ask("show", "demo", "--clients", "7").stdout)
    assert tomllib.loads(to_toml(config)) == shown and shown["partition"]["num_clients"] == 7
    assert isinstance(config, mr.Config)
    assert flatten(mr.configure())["data.name"] == "digits"
    assert mr.configure(dataset="cifar100", clients=100).preset.startswith("cifar100")
    assert mr.configure("fmnist_small", {"finetune.head": "ccvr"}).finetune.head == "ccvr"


def test_a_configuration_runs_as_it_is(tmp_path):
    config = mr.configure("demo", LITTLE, host="serial", method="fedavg")
    found = mr.run(config, storage=tmp_path)
    assert found.summary.config["method"] == "fedavg"
    with pytest.raises(mr.RequestError, match="a configuration has all knobs"):
        mr.run(config, {"seed": 1}, storage=tmp_path)


def test_a_callback_that_fails_ends_the_run_and_the_same_call_resumes(tmp_path):
    class Broken(mr.Callback):
        def on_stage(self, name):
            if name == "finetune":
                raise ValueError("my own mistake")

    how = {"host": "serial", "storage": tmp_path, "method": "fedavg"}
    with pytest.raises(mr.RunError, match="my own mistake"):
        mr.run("demo", LITTLE, callbacks=[Broken()], **how)
    found = mr.run("demo", LITTLE, **how)
    assert found.summary.stages["warmup"].cached


def handlers():
    return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]


@pytest.fixture
def interruptible():
    """Let SIGINT interrupt also where tests run in a shell's background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_is_one_line_and_the_same_call_resumes(tmp_path, interruptible):
    class Stop(mr.Callback):
        def on_round(self, stage, done, total):
            if stage == "warmup" and done == 2:
                os.kill(os.getpid(), signal.SIGINT)

    how = {"host": "serial", "storage": tmp_path, "method": "fedavg"}
    more, before = LITTLE | {"warmup.num_rounds": 3, "warmup.checkpoint_rounds": 1}, handlers()
    with pytest.raises(KeyboardInterrupt, match=r"^interrupted; the same call resumes$") as caught:
        mr.run("demo", more, callbacks=[Stop()], **how)
    assert caught.value._render_traceback_() == ["interrupted; the same call resumes"]
    assert handlers() == before
    watcher = Watcher()
    found = mr.run("demo", more, callbacks=[watcher], **how)
    rounds = [call[2] for call in watcher.calls if call[:2] == ("round", "warmup")]
    assert found.status == "done" and rounds == [2, 3]  # round 2 was not stored yet


def test_a_run_works_off_the_main_thread(tmp_path):
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(mr.run, "demo", LITTLE, host="serial", storage=tmp_path, method="fedavg").result()
    assert run.status == "done" and run.model()(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


@pytest.mark.ray
def test_no_ray_is_left_that_was_not_there(tmp_path):
    before, knobs = handlers(), LITTLE | {"runtime.driver_threads": 1}
    mr.run("demo", knobs, clients=2, storage=tmp_path, method="fedavg")
    assert not ray_session.is_up() and handlers() == before
    with ThreadPoolExecutor(1) as pool:  # Ray comes up again
        pool.submit(mr.run, "demo", knobs, clients=2, seed=1, storage=tmp_path, method="fedavg").result()
    assert not ray_session.is_up() and handlers() == before


@pytest.mark.ray
def test_a_ray_that_was_there_stays(tmp_path, ray_up):
    mr.run("demo", LITTLE, clients=2, storage=tmp_path, method="fedavg")
    assert ray_up.is_initialized()


@pytest.mark.parametrize(
    "call, line",
    [
        (lambda: mr.run("demo", {"warmup.lr": "0.1x"}), "warmup.lr"),
        (lambda: mr.run("demo", {"warmup.lrr": 0.1}), 'unknown knob "warmup.lrr"'),
        (lambda: mr.run("demo", {"seed": 2}, seed=1), "seed=1: seed is among the knobs as well"),
        (lambda: mr.run("demo", omegas=1), "unknown argument omegas; there are algorithm, clients"),
        (lambda: mr.run("nosuch"), "nosuch"),
        (lambda: mr.run(storage="s3://bucket/x"), "storage s3://bucket/x: from Python"),
        (lambda: mr.sweep({"warmup.lr": [0.1, "x"]}), "warmup.lr"),
        (lambda: mr.sweep({"seed": [1, 2]}, {"seed": 3}), "seed"),
        (lambda: mr.sweep("smoke", samples=0), "--samples 0"),
        (lambda: mr.compare(["nosuch"]), "nosuch"),
        (lambda: mr.compare(["fedavg"], own={"dense": {"warmup.lr": 0.1}}), "one of the methods that are compared"),
        (lambda: mr.compare(["fedavg"], own={"fedavg": {"warmup.lr": -1.0}}), "warmup.lr"),
    ],
)
def test_wrong_requests_are_refused_before_anything_starts(call, line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(mr.RequestError) as caught:
        call()
    assert line in str(caught.value) and "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.ray
def test_sweeps_and_comparisons_come_back_with_their_tables(tmp_path, ray_up):
    knobs = LITTLE | {"runtime.driver_threads": 1}
    found = mr.sweep({"partition.omega": [0.1, 1.0]}, knobs, preset="demo", storage=tmp_path, method="fedavg")
    assert sorted(row["partition.omega"] for row in found.rows) == [0.1, 1.0]
    assert all(row["status"] == "done" for row in found.rows)
    plan = SweepPlan(summary="two", knobs={"partition.omega": Choice((0.1, 1.0))})
    again = mr.sweep(plan, knobs, preset="demo", storage=tmp_path, method="fedavg")
    assert [row["accuracy_final"] for row in again.rows] == [row["accuracy_final"] for row in found.rows]
    knobs.pop("rehearsal.candidates")  # the comparison's base has a method that needs some
    table = mr.compare(["fedavg", "lda_head"], knobs, preset="demo", seeds=[0], storage=tmp_path)
    assert [method.name for method in table.comparison.sections[None]] == ["fedavg", "lda_head"]
    assert {"table.md", "table.tex", "figure.pdf"} <= {path.name for path in table.folder.iterdir()}


def test_importing_the_package_loads_nothing_and_names_are_complete():
    watched = {"torch", "ray", "numpy", "click"}
    code = f"import mosaic_ray, sys; print(sorted({watched} & set(sys.modules)), dir(mosaic_ray))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("[] ") and all(name in done.stdout for name in mr.__all__)
    stub = ast.parse((Path(mr.__file__).parent / "__init__.pyi").read_text())
    [listed] = [ast.literal_eval(node.value) for node in stub.body if isinstance(node, ast.Assign)]
    [imported] = [node.names for node in stub.body if isinstance(node, ast.ImportFrom)]
    assert sorted(listed) == sorted(alias.name for alias in imported) == sorted(mr.__all__)
    assert all(getattr(mr, name).__doc__ for name in mr.__all__)


def test_the_page_runs(tmp_path, monkeypatch):
    """Its first example with less work, and its callback."""
    page = (Path(mr.__file__).parents[1] / "docs" / "howto" / "python.md").read_text()
    first, second = (block.split("```")[0] for block in page.split("```python\n")[1:])
    monkeypatch.chdir(tmp_path)
    whole = mr.run
    monkeypatch.setattr(
        mr, "run", lambda preset, knobs, **more: whole(preset, WITH_GENERATORS | knobs, host="serial", **more),
        raising=False,
    )
    names: dict[str, object] = {}
    exec(compile(first + second, "python.md", "exec"), names)
    assert names["run"].summary.accuracy["final"] is not None
    with pytest.raises(StopIteration):
        names["Stop"]().on_metric("warmup/accuracy", 1, 0.95)
