"""`mosaic run --dry-run`: devices, actors, work and stored results, without data, without Ray and without a file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli_runner import ask, refusal
from helpers import TINY

from mosaic_ray.config.resolve import override
from mosaic_ray.runs.dry_run import dry_run

pytestmark = pytest.mark.usefixtures("two_cpus")


def run(*words: str) -> list[str]:
    result = ask("run", "--dry-run", *words)
    assert (result.exit_code, result.stderr) == (0, ""), result.stderr
    return result.stdout.splitlines()


def test_a_run_is_planned_without_its_data():
    words = ["--dataset", "cifar10", "--set", "data.root=empty", "--clients", "7", "--set", "warmup.num_rounds=3"]
    words += ["--set", "warmup.local_steps=4", "--name", "mine", "--preset", "demo"]
    lines = run(*words)
    assert lines[0] == "run mine: method mosaic, algorithm fixed, data cifar10, 7 clients, seed 0"
    assert "client actors: 2, up to 4 of the run's 7 clients on each, in turn" in lines
    rows = [line.split() for line in lines]
    assert ["warmup", "1", "1", "21", "client", "rounds,", "84", "local", "steps"] in rows
    found = json.loads("\n".join(run(*words, "--json")))
    assert (found["name"], found["actors"], found["device"], found["clients"]) == ("mine", 2, "cpu", 7)
    [warmup] = [row for row in found["work"] if row["stage"] == "warmup"]
    assert warmup["work"] == {"client rounds": 21, "local steps": 84}
    assert not list(Path().iterdir())


@pytest.mark.parametrize("words", ["--name a/b", "--set runtime.device=cuda"])
def test_a_dry_run_refuses_what_a_run_would(words):
    line = refusal(ask("run", "--dry-run", *words.split()))
    assert line == refusal(ask("run", *words.split())) and not list(Path().iterdir())


def test_a_dry_run_counts_stored_results(tiny_in_storage, tmp_path):
    def counts(config=TINY, **options):
        found = dry_run(config, str(tmp_path), None, "local", **options)
        return {row.stage: (row.unique, row.stored) for row in found.work}

    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    clients = TINY.partition.num_clients
    whole = counts()
    assert all(unique == 0 for unique, _ in whole.values()) and whole["generators"] == (0, clients)
    more = counts(override(TINY, {"distill.steps": TINY.distill.steps + 1}))
    assert {stage for stage, (unique, _) in more.items() if unique} == {"distill", "finetune", "evaluate"}
    anew = counts(fresh=True)
    assert anew["generators"] == (clients, 0) and not any(stored for _, stored in anew.values())
    other = counts(override(TINY, {"seed": 77}))  # of its partition nothing is known
    assert other["warmup"] == (1, 0)
    assert files == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}


def test_the_name_is_that_of_the_run(tiny_in_storage, tmp_path):
    assert dry_run(TINY, str(tmp_path), None, "local").name == Path(tiny_in_storage["paths"]["run"]).name


def test_damaged_summaries_are_left_out(tiny_in_storage, tmp_path):
    [summary] = tmp_path.glob("runs/*/summary.json")
    summary.write_text("{")
    found = dry_run(TINY, str(tmp_path), None, "local")
    assert not any(row.stored for row in found.work)
