"""The devices of a run: the settled value of ``auto``, refusals, and equal numbers for any share of a GPU."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from cli_runner import ask, refusal, refused_by
from helpers import TINY, stripes_dataset
from pretended import config

from mosaic_ray.config.resolve import override
from mosaic_ray.execution.devices import describe, settle
from mosaic_ray.execution.precision import device_of
from mosaic_ray.execution.ray_session import Resources
from mosaic_ray.pipeline.stages import numbers_depend_on
from mosaic_ray.runs import runner
from mosaic_ray.sweeps.runner import as_begun

LAPTOP, STATION = Resources(2, 0, 8.0), Resources(16, 2, 64.0, share=0.125, bf16=True)


def settled(there: Resources = STATION, **knobs):
    runtime = settle(config(partition__num_clients=100, **knobs), there).runtime
    return runtime.device, runtime.gpus_per_client


def test_auto_is_the_gpus_that_are_there():
    assert settled(LAPTOP) == ("cpu", 0.0)
    assert settled() == ("cuda", 0.125)
    assert settled(runtime__device="cpu") == ("cpu", 0.0)
    assert settled(runtime__gpus_per_client=0.0) == ("cpu", 0.0)
    assert settled(runtime__gpus_per_client=0.3) == ("cuda", 0.3)
    assert settled(runtime__device="cuda", runtime__gpus_per_client=2.0) == ("cuda", 2.0)


@pytest.mark.parametrize(
    "knobs, together",
    [
        ({}, 1),
        ({"runtime__clients_per_batch": 3, "runtime__device": "cpu"}, 3),
        ({"runtime__clients_per_batch": "auto", "runtime__device": "cpu"}, 1),
        ({"runtime__clients_per_batch": "auto"}, 8),
        ({"runtime__clients_per_batch": "auto", "model__classifiers": ("cnn", "mobilenet")}, 8),
        ({"runtime__clients_per_batch": "auto", "model__classifiers": ("cnn", "resnet18")}, 1),
    ],
)
def test_small_networks_are_trained_together_on_gpus_where_that_is_left_to_auto(knobs, together):
    assert settle(config(partition__num_clients=100, **knobs), STATION).runtime.clients_per_batch == together


def test_settled_stays_as_it_is():
    for there in (LAPTOP, STATION):
        once = settle(config(), there)
        assert settle(once, there) == once


@pytest.mark.parametrize(
    "change, knobs, share",
    [
        ({"share": 1.0}, {}, 1.0),
        ({"share": 0.34}, {}, 0.5),  # a third client would not fit
        ({"share": 0.01}, {"runtime__cpus_per_client": 0.1}, 1 / 16),
        ({"share": 0.01}, {}, 1 / 8),  # 16 CPUs for 2 GPUs
        ({"share": 0.01}, {"runtime__cpus_per_client": 4.0}, 1 / 2),
        ({"share": 0.01, "gpus": 50}, {"runtime__cpus_per_client": 0.1}, 0.3333),  # 100 clients and the server
        ({"share": 0.01}, {"runtime__host": "serial"}, 1.0),
    ],
)
def test_a_gpu_gets_as_many_clients_as_memory_cpus_and_clients_allow(change, knobs, share):
    assert settled(replace(STATION, **change), **knobs) == ("cuda", share)


def test_precision_is_asked_of_the_device_that_clients_train_on(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)
    for bf16 in (True, False):
        there = replace(STATION, bf16=bf16)
        assert settle(config(), there).runtime.precision == ("bf16" if bf16 else "fp32")
        assert settle(config(runtime__device="cpu"), there).runtime.precision == "fp32"
        assert settle(config(runtime__precision="fp32"), there).runtime.precision == "fp32"


def test_one_line_says_what_is_used_and_how_to_leave_it():
    def line(there=STATION, **knobs):
        return describe(settle(config(partition__num_clients=100, **knobs), there), there)

    assert line() == "2 GPUs: clients train on them, 8 clients a GPU; --set runtime.device=cpu keeps them on CPUs"
    assert line(runtime__gpus_per_client=2.0).startswith("2 GPUs: clients train on them, 2 each;")
    assert line(runtime__device="cpu").startswith("2 GPUs: not used")
    assert line(LAPTOP) == ""
    assert line(runtime__host="serial").startswith("2 GPUs: clients train on them;")


# --- numbers, keys and names -----------------------------------------------------------------------------------------


def test_the_share_is_in_no_key_and_no_name():
    found = set()
    for share in (0.1, 0.5, 1.0):
        one = settle(config(), replace(STATION, share=share))
        found.add((str(numbers_depend_on(one)), runner.default_name(one)))
    [(knobs, name)] = found
    assert "cuda" in knobs
    on_cpus = settle(config(runtime__device="cpu", runtime__precision="bf16"), STATION)
    assert runner.default_name(on_cpus) != name


def test_a_machine_without_gpus_names_runs_as_if_there_were_no_such_knobs():
    names = {runner.default_name(settle(config(**knobs), LAPTOP)) for knobs in NO_GPU}
    assert len(names) == 1
    plain = override(settle(config(), LAPTOP), {"runtime.device": "auto", "runtime.gpus_per_client": "auto"})
    assert names == {runner.default_name(plain)}


NO_GPU = ({}, {"runtime__device": "cpu"}, {"runtime__gpus_per_client": 0.0})


def test_a_run_with_another_share_is_the_same_run(tmp_path):
    from mosaic_ray.config.resolve import to_toml

    first = settle(config(), STATION)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").write_text(to_toml(first))
    runner._keep_other(tmp_path / "run", settle(config(), replace(STATION, share=1.0)))
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    runner._keep_other(tmp_path / "run", settle(config(runtime__device="cpu"), STATION))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "run.1"]


def test_torch_is_asked_before_cuda_is_used(monkeypatch):
    on_gpus = settle(config(runtime__host="serial"), STATION)
    for there in (True, False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert device_of(on_gpus).type == ("cuda" if there else "cpu")
        assert device_of(settle(config(), LAPTOP)).type == "cpu"
        assert device_of(settle(config(), STATION)).type == "cpu"  # clients are on Ray's workers


# --- GPUs beside busy CPUs -------------------------------------------------------------------------------------------


def test_gpus_that_stay_idle_beside_clients_on_cpus_are_a_finding(tmp_path, monkeypatch):
    monkeypatch.setattr("mosaic_ray.data.load.load_dataset", lambda config: stripes_dataset())
    tiny = override(TINY, {"method": "fedavg"})
    idle = ["devices.idle_gpus"]
    for gpus, knobs, code in (
        (2, {"runtime.device": "cpu"}, idle), (2, {"runtime.gpus_per_client": 0.0}, idle), (0, {}, []),
    ):  # fmt: skip
        there = replace(LAPTOP, gpus=gpus)
        monkeypatch.setattr("mosaic_ray.execution.devices.local_resources", lambda there=there: there)
        summary = runner.run(override(tiny, knobs), storage=str(tmp_path), progress=False)
        assert [found["code"] for found in summary["health"] if found["code"].startswith("devices.")] == code


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sets, words",
    [
        (["device=cuda"], ["runtime.device = cuda: there are 0 GPUs"]),
        (["device=gpu"], ["runtime.device = gpu", "auto, cpu, cuda"]),
        (["device=cpu", "gpus_per_client=0.5"], ["runtime.device = cpu", "runtime.gpus_per_client = 0.5"]),
        (["device=cuda", "gpus_per_client=0"], ["runtime.device = cuda", "runtime.gpus_per_client = 0"]),
        (["gpus_per_client=some"], ["runtime.gpus_per_client = some", "auto, or a number"]),
        (["gpus_per_client=-1"], ["runtime.gpus_per_client = -1", "at least 0"]),
        (["gpus_per_client=1.5"], ["runtime.gpus_per_client = 1.5", "whole number"]),
    ],
)
@pytest.mark.parametrize("command", ["run", "sweep", "sweep --dry-run", "experiment moe-weights"])
@pytest.mark.usefixtures("two_cpus")
def test_what_contradicts_the_machine_or_itself_is_one_line(command, sets, words):
    line = refusal(ask(*command.split(), *(part for knob in sets for part in ("--set", f"runtime.{knob}"))))
    assert all(word in line for word in words), line


def test_the_word_auto_is_taken_from_the_command_line_and_from_a_file(tmp_path):
    from mosaic_ray.cli.request import parse_config

    path = tmp_path / "c.toml"
    path.write_text('[runtime]\ndevice = "auto"\ngpus_per_client = "auto"\n')
    typed = parse_config(sets=("runtime.gpus_per_client=auto", "runtime.device=auto"))
    assert parse_config(config=str(path)) == typed == parse_config()
    assert parse_config(sets=("runtime.gpus_per_client=0.25",)).runtime.gpus_per_client == 0.25


# --- a sweep that is resumed elsewhere -------------------------------------------------------------------------------


def begun(there: Resources, device: str, precision: str, **knobs):
    """Base, resources and lines of a sweep that began with this device and precision and is resumed ``there``."""
    state = SimpleNamespace(name="n", settled={"device": device, "precision": precision})
    return as_begun(SimpleNamespace(config=config(**knobs)), state, there)


def test_a_sweep_keeps_device_and_precision_on_another_machine_and_says_where_it_differs(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)
    base, there, lines = begun(STATION, "cuda", "bf16")
    assert (numbers_depend_on(settle(base, there)), lines) == (
        {"precision": "bf16", "threads": 1, "device": "cuda"}, [],
    )  # fmt: skip
    base, there, [line] = begun(replace(STATION, bf16=False), "cuda", "bf16")
    assert settle(base, there).runtime.precision == "bf16" and "bf16" in line and "fp32" in line
    base, there, [line] = begun(STATION, "cpu", "fp32")
    assert numbers_depend_on(settle(base, there)) == {"precision": "fp32", "threads": 1, "device": "cpu"}
    assert "began on CPUs" in line
    assert begun(LAPTOP, "cpu", "fp32")[2] == []


def test_a_sweep_that_began_on_gpus_does_not_go_on_without_one():
    line = refused_by(begun, LAPTOP, "cuda", "bf16")
    assert line.startswith("--name n: ") and "--fresh" in line
