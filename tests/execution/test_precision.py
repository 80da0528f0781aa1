"""``runtime.precision=auto``: one answer for a machine, under any load."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from collections.abc import Callable, Iterator

import pytest
import torch

from mosaic_ray.config.resolve import override, resolve
from mosaic_ray.config.schema import ExperimentConfig
from mosaic_ray.deploy import doctor
from mosaic_ray.execution import precision
from mosaic_ray.execution.devices import settle
from mosaic_ray.execution.precision import has_native_bf16
from mosaic_ray.execution.ray_session import local_resources
from mosaic_ray.runs.runner import default_name

Pretend = Callable[..., None]


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Pretend:
    """Stands in for the processors: flags that the CPU has, the compute capability of each GPU."""

    def processors(*flags: str, gpus: tuple[tuple[int, int], ...] = ()) -> None:
        known = {"avx2": True, "avx512_bf16": False, "amx_bf16": False, "cpu_name": "a CPU"}
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known | dict.fromkeys(flags, True), raising=False)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(gpus))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda gpu=0: gpus[gpu])

    return processors


def settled(gpus_per_client: float | str) -> str:
    config = override(ExperimentConfig(), {"runtime.gpus_per_client": gpus_per_client})
    return settle(config, local_resources()).runtime.precision


declared = pytest.mark.parametrize(
    "flags, native",
    [
        ((), False), (("avx512_f", "avx512_vnni"), False), (("amx_tile", "amx_int8"), False), (("neon",), False),
        (("avx512_bf16",), True), (("amx_bf16",), True), (("neon", "bf16"), True),
    ],
)  # fmt: skip


@declared
def test_a_cpu_declares_bf16(pretend, flags, native):
    pretend(*flags)
    assert has_native_bf16(cuda=False) is native
    assert has_native_bf16(cuda=True) is native  # without a usable GPU clients train on the CPU
    assert settled(0.0) == settled("auto") == ("bf16" if native else "fp32")


@declared
def test_before_torch_2_11_linux_lists_what_a_cpu_declares(pretend, monkeypatch, tmp_path, flags, native):
    pretend()
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    monkeypatch.setattr(precision, "CPUINFO", tmp_path / "cpuinfo")
    assert not has_native_bf16(cuda=False)  # no Linux
    (tmp_path / "cpuinfo").write_text(f"model name\t: a CPU\nflags\t\t: fpu avx2 {' '.join(flags)} sse\n")
    assert has_native_bf16(cuda=False) is native


@pytest.mark.parametrize(
    "gpus, native",
    [(((7, 5),), False), (((8, 0),), True), (((8, 6), (9, 0)), True), (((9, 0), (7, 0)), False), (((10, 0),), True)],
)
def test_gpus_need_compute_capability_8(pretend, gpus, native):
    pretend(gpus=gpus)
    assert (settled(0.5), settled("auto"), settled(0.0)) == (*["bf16" if native else "fp32"] * 2, "fp32")
    pretend("avx512_bf16", gpus=gpus)
    assert (settled(0.5), settled(0.0)) == ("bf16" if native else "fp32", "bf16")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_precision_that_was_asked_for_stays(pretend, precision):
    pretend(*(["avx512_bf16"] if precision == "fp32" else []))
    asked = override(ExperimentConfig(), {"runtime.precision": precision})
    assert settle(asked, local_resources()).runtime.precision == precision


def test_this_machine_gives_one_answer_and_the_doctor_the_same():
    native = has_native_bf16(cuda=False)
    assert settled(0.0) == ("bf16" if native else "fp32")
    found = [check.found for check in doctor._torch() if check.what == "bf16"]
    assert found[-1] == ("native on the CPU" if native else "not native on the CPU; fp32 is used")


@pytest.mark.parametrize("seconds, ratio", [([0, 1, 2, 4], "0.5"), ([0, 3, 4, 5], "3")])
def test_the_doctor_times_bf16_and_decides_nothing_by_it(monkeypatch, seconds, ratio):
    ticks = (tick for pair in (seconds[:2], seconds[2:]) for _ in range(6) for tick in pair)
    monkeypatch.setattr(doctor.time, "perf_counter", lambda: next(ticks))
    before = settled(0.0)
    check = doctor._bf16_speed("the CPU")
    assert (check.severity, check.found.partition(" ")[0]) == ("ok", ratio)
    assert settled(0.0) == before


def test_the_doctor_says_that_a_gpu_cannot_compute():
    if not torch.cuda.is_available():
        check = doctor._bf16_speed("the GPU")
        assert (check.severity, check.found.partition(" (")[0]) == ("warning", "the GPU cannot multiply matrices")


def test_the_doctor_checks_each_device_as_a_run_does(pretend, monkeypatch):
    pretend("avx512_bf16", gpus=((7, 5),))
    card = types.SimpleNamespace(name="a card", total_memory=2**34)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda gpu: card)
    found = [check.found for check in doctor._torch() if check.what == "bf16"]
    assert found == ["not native on the GPU; fp32 is used", "native on the CPU"]


# --- under load ------------------------------------------------------------------------------------------------------

#: Torch takes most of the time of a start, so a stand-in declares a CPU that has bf16: only there could a measurement
#: decide.
STAND_IN = """
import sys, types
torch = sys.modules["torch"] = types.ModuleType("torch")
torch.cuda = types.SimpleNamespace(is_available=lambda: False)
torch.cpu = types.SimpleNamespace(get_capabilities=lambda: {"avx512_bf16": True})
"""

#: A start of the command as far as its name and its first key.
START = """
import json
from mosaic_ray.execution.devices import settle
from mosaic_ray.execution.ray_session import local_resources
from mosaic_ray.runs.plan import stage_keys
from mosaic_ray.runs.runner import default_name
from mosaic_ray.cli.request import parse_config
config = settle(parse_config(preset="demo"), local_resources())
print(json.dumps([config.runtime.precision, default_name(config), *stage_keys(config)["warmup"]]))
"""


@pytest.fixture
def busy() -> Iterator[None]:
    """Two processes that compute for as long as a test runs."""
    loop = "import os\nparent = os.getppid()\nwhile os.getppid() == parent: pass"
    processes = [subprocess.Popen([sys.executable, "-c", loop]) for _ in range(2)]
    yield
    for process in processes:
        process.kill()
        process.wait()


@pytest.mark.usefixtures("busy")
def test_twenty_starts_on_a_busy_machine_give_one_name_and_one_key():
    found = set()
    for _ in range(20):
        start = subprocess.run([sys.executable, "-c", STAND_IN + START], capture_output=True, text=True, check=True)
        found.add(start.stdout)
    [line] = found
    precision, name, key = json.loads(line)
    assert precision == "bf16"
    assert name.startswith("digits-mosaic-fixed-s0-")
    assert key.startswith("warmup-")


@pytest.mark.slow
@pytest.mark.usefixtures("busy")
def test_twenty_dry_runs_on_a_busy_machine_name_one_run(tmp_path):
    """The command itself, with this machine's torch."""
    command, found = [sys.executable, "-m", "mosaic_ray", "run", "--dry-run", "--json"], set()
    for _ in range(20):
        start = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
        said = json.loads(start.stdout)
        found.add((said["name"], said["device"], said["precision"]))
    here = settle(resolve("demo"), local_resources())
    assert found == {(default_name(here), here.runtime.device, here.runtime.precision)}
