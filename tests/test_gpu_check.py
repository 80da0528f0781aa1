"""``make gpu-check``: what it says without a GPU, when a check fails or hangs, and at its limit."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch
from click.testing import CliRunner

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """``benchmarks/gpu.py``."""
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    spec = importlib.util.spec_from_file_location("gpu_check", ROOT / "benchmarks" / "gpu.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_check", module)
    spec.loader.exec_module(module)
    return module


def called(gpu: ModuleType, tmp_path: Path, *words: str) -> tuple[int, str, dict]:
    """The exit status, the output and the JSON file."""
    found = CliRunner().invoke(gpu.main, ["--out", str(tmp_path / "gpu.json"), *words])
    return found.exit_code, found.output, json.loads((tmp_path / "gpu.json").read_text())


def test_without_a_gpu_every_check_is_skipped(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status, text, facts = called(gpu, tmp_path)
    assert status == 0
    assert [(row["check"], row["status"]) for row in facts["rows"]] == [(name, "skipped") for name in gpu.CHECKS]
    assert text.count("it needs a GPU that torch can use") == len(gpu.CHECKS)


#: Writes one row to the file that it is given, and then does what is put behind.
CHECK = 'import sys, time\nopen(sys.argv[-1], "w").write(\'{"check": "a", "what": "one", "figure": 2.0}\\n\')\n'


def after(gpu: ModuleType, code: str, seconds: float = 60.0) -> list[tuple[str, str, str]]:
    rows = gpu.watched("a", [sys.executable, "-c", CHECK + code], seconds)
    return [(row.what, row.status, row.note) for row in rows]


def test_a_check_that_fails_or_hangs_keeps_what_it_measured(gpu):
    assert after(gpu, "") == [("one", "passed", "")]
    assert after(gpu, "raise SystemExit('no such kernel')") == [
        ("one", "passed", ""), ("a: the rest", "failed", "exit status 1: no such kernel"),
    ]  # fmt: skip
    began = time.monotonic()
    child = "import subprocess\nsubprocess.run([sys.executable, '-c', 'import time; time.sleep(600)'])"
    assert after(gpu, child, 5.0) == [("one", "passed", ""), ("a: the rest", "failed", "stopped after 5 s")]
    assert time.monotonic() - began < 300  # its child was ended with it


def test_a_failure_stops_no_other_check_and_the_limit_is_kept(gpu, tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(gpu.time, "monotonic", lambda: now[0])
    asked = {}

    def watched(name, command, seconds):
        asked[name] = seconds
        now[0] += 55.0 if name == "tests" else 31.0 if name == "clients" else 5.0
        return [gpu.Row(name, name, status="failed" if name == "training" else "passed")]

    monkeypatch.setattr(gpu, "watched", watched)
    status, text, facts = called(gpu, tmp_path, "--pretend", "--limit-s", "100")
    assert status == 1
    results = {row["what"]: row["status"] for row in facts["rows"]}
    assert results == {
        "machine": "passed", "tests": "passed", "training": "failed", "clients": "passed", "many clients": "skipped",
        "generator": "skipped", "server": "skipped", "same bits": "skipped", "paper-scale CIFAR-10": "skipped",
    }  # fmt: skip
    assert asked == {"machine": 20.0, "tests": 60.0, "training": 30.0, "clients": 30.0}  # shares, then what is left
    assert "the limit of 100 s was reached" in text and "A pretended GPU" in text
    assert facts["pretended"] is True


def test_the_projection_is_the_sum_that_its_formula_says(gpu):
    rows = [
        gpu.Row("clients", gpu.AT_ONCE.format(10), 5.0, "clients/s", 2.5, "one after another"),
        gpu.Row("generator", "generator step", 20.0, "ms"),
        gpu.Row("server", "meta model update", 36.0, "ms"),
        gpu.Row("server", "distillation step", 60.0, "ms"),
    ]
    found = {row.what: row for row in gpu.projection(rows, gpu.Bench())}
    hours = [row.figure for row in found.values()]
    assert hours[:-1] == pytest.approx(
        [(341 + 2 * 39) * 10 / 5 / 3600, 10 * 200 * 79 * 0.020 / 2.5 / 3600, 500 * 0.036 / 3600, 300 * 0.060 / 3600]
    )
    assert hours[-1] == pytest.approx(sum(hours[:-1]))
    [total] = [row for row in found.values() if row.note]
    number = total.note.partition("hours = ")[2].partition(";")[0]
    number = re.sub("(clients/s|[a-wyz,])", "", number.replace("ms", "/ 1000"))
    assert eval(number.replace("x", "*")) == pytest.approx(total.figure, rel=0.01)
    assert [row.status for row in gpu.projection(rows[1:], gpu.Bench())] == ["skipped"]


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize(
    "words, expected",
    [([], ".venv-of-a-test/bin/python"), (["PYTHON=another"], "another"), (["VENV=.absent"], "python3")],
)
def test_make_needs_no_network(tmp_path, words, expected):
    """It installs nothing, and takes the environment's Python unless another one is named."""
    python = tmp_path / ".venv-of-a-test" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch()
    shutil.copy(ROOT / "Makefile", tmp_path)
    command = ["make", "-n", "-C", str(tmp_path), "gpu-check", "VENV=.venv-of-a-test", "ARGS=--pretend", *words]
    env = {"PATH": "/usr/bin:/bin"}
    said = subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout
    [line] = [line for line in said.splitlines() if "gpu.py" in line]
    assert line == f"{expected} benchmarks/gpu.py --pretend"
    assert "pip" not in said


@pytest.mark.ray
@pytest.mark.slow
def test_every_measurement_runs_on_a_pretended_gpu(tmp_path):
    """All checks but the tests, which are those of ``test_gpu.py``."""
    checks = "machine,training,clients,many clients,generator,server,same bits"
    out = tmp_path / "gpu.json"
    words = ["--pretend", "--only", checks, "--limit-s", "3000", "--out", str(out)]
    command = [sys.executable, "benchmarks/gpu.py", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    rows = json.loads(out.read_text())["rows"]
    assert done.returncode == 0, done.stdout + done.stderr
    assert {row["status"] for row in rows} == {"passed"}
    assert {row["check"] for row in rows} == {*checks.split(","), "projection"}
    assert [row["what"] for row in rows if row["check"] != "machine" and not row["figure"]] == []
