"""``make bench``: the floor does the same steps as the hosts, and every measurement runs."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from click.testing import CliRunner

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """``benchmarks/bench.py``."""
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    threads = torch.get_num_threads()
    spec = importlib.util.spec_from_file_location("bench", ROOT / "benchmarks" / "bench.py")
    module = importlib.util.module_from_spec(spec)
    for name in ("bench", "gpu", "small_cnn"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "bench", module)
    spec.loader.exec_module(module)
    yield module
    torch.set_num_threads(threads)


def test_seconds_a_round_are_medians_without_the_first(bench):
    times = [(10.0, 1.0), (11.0, 1.5), (13.0, 2.5), (20.0, 2.75)]
    assert bench.steady(times) == {"wall": 2.0, "cpu": 0.5}


def test_medians_are_of_each_way_and_the_ways_take_turns(bench):
    calls = []

    def way(name: str, *seconds: float):
        left = list(seconds)

        def run() -> dict[str, float]:
            calls.append(name)
            return {"wall": left.pop(0)}

        return run

    assert bench.in_turn(way("a", 3, 1, 2), way("b", 9, 8, 7), repeats=3) == [{"wall": 2}, {"wall": 8}]
    assert calls == ["a", "b"] * 3


def test_the_floor_takes_the_steps_of_a_client(bench):
    """One client's result is plain SGD on its first batches, and the sum over clients of equal data is a multiple."""
    client = bench.BareClient(steps=2)
    start = client.weights()
    assert sum(array.size for array in start) == 49_022
    ended = [array.copy() for array in client.train(start)]
    model = bench.BareClient(steps=2).model
    for step in range(2):
        rows = slice(step * bench.BATCH, (step + 1) * bench.BATCH)
        images = (client.images[rows].float() / 255 - 0.5) / 0.25
        loss = torch.nn.functional.cross_entropy(model(images), client.labels[rows])
        for parameter, slope in zip(model.parameters(), torch.autograd.grad(loss, [*model.parameters()]), strict=True):
            parameter.data -= bench.LEARNING_RATE * slope
    for array, parameter in zip(ended, model.parameters(), strict=True):
        np.testing.assert_allclose(array, parameter.detach().numpy(), atol=1e-6)
    assert any((array != before).any() for array, before in zip(ended, start, strict=True))


def test_the_noise_is_read_as_fashion_mnist(bench, tmp_path):
    from mosaic_ray.config.schema import DataConfig
    from mosaic_ray.data.load import load_dataset

    bench.write_noise(tmp_path, 3)
    found = load_dataset(DataConfig(name="fmnist", root=str(tmp_path)))
    assert found.train.images.shape == (3 * bench.SAMPLES, 1, 28, 28) and found.train.images.std() > 50
    assert np.bincount(found.train.labels).tolist() == [48] * 10


def test_an_unknown_check_is_refused(bench):
    found = CliRunner().invoke(bench.main, ["--only", "rounds,rouns"])
    assert found.exit_code == 2 and "rouns: there are rounds, larger rounds" in found.output


@pytest.mark.ray
@pytest.mark.slow
def test_every_measurement_runs(tmp_path):
    out = tmp_path / "bench.json"
    command = [sys.executable, "benchmarks/bench.py", "--quick", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    rows = json.loads(out.read_text())["rows"]
    assert done.returncode == 0, done.stdout + done.stderr
    assert {row["status"] for row in rows} == {"passed"} and not [row["what"] for row in rows if not row["figure"]]
    names = "rounds, larger rounds, growth, training, many clients, generators, server, commands, whole run"
    assert {row["check"] for row in rows} == set(names.split(", "))
