"""The same request on machines that settle it otherwise: each run keeps its name, and one line names the other."""

from __future__ import annotations

from dataclasses import replace

import pytest
from pretended import config

from mosaic_ray.config.resolve import override, to_toml
from mosaic_ray.execution.devices import settle
from mosaic_ray.execution.ray_session import Resources
from mosaic_ray.runs import runner
from mosaic_ray.storage.store import Store

LAPTOP, STATION = Resources(2, 0, 8.0), Resources(16, 2, 64.0, share=0.125, bf16=True)


@pytest.fixture
def runs(tmp_path):
    """Notes a run of ``asked`` as a machine with ``there`` leaves it; returns its name."""

    def begin(asked, there):
        name = runner.default_name(settle(asked, there))
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "config.toml").touch()
        return name

    return begin


@pytest.mark.parametrize(
    "asked, elsewhere, words",
    [
        ({"runtime__precision": "fp32"}, STATION, "runtime.device=cuda"),
        ({}, replace(STATION, bf16=False), "runtime.device=cuda"),
        ({"runtime__precision": "fp32", "runtime__device": "cpu"}, STATION, ""),  # the same run
        ({"runtime__gpus_per_client": 0.0, "runtime__precision": "fp32"}, STATION, ""),
    ],
)
def test_a_run_that_another_machine_settled_otherwise_is_named(runs, tmp_path, asked, elsewhere, words):
    asked = config(**asked)
    name = runs(asked, elsewhere)
    here = settle(asked, LAPTOP)
    line = runner.settled_elsewhere(asked, here, Store(str(tmp_path)))
    assert line == "" if not words else (name in line and f"settled {words}" in line)
    assert runner.settled_elsewhere(here, here, Store(str(tmp_path))) == ""  # nothing was left to a machine


def test_another_precision_of_the_same_device_is_named(runs, tmp_path, monkeypatch):
    asked = config()
    for native, other in ((True, "fp32"), (False, "bf16")):
        monkeypatch.setattr("mosaic_ray.execution.devices.has_native_bf16", lambda cuda, native=native: not native)
        name = runs(override(asked, {"seed": int(native)}), LAPTOP)
        monkeypatch.setattr("mosaic_ray.execution.devices.has_native_bf16", lambda cuda, native=native: native)
        again = override(asked, {"seed": int(native)})
        line = runner.settled_elsewhere(again, settle(again, LAPTOP), Store(str(tmp_path)))
        assert name in line and f"settled runtime.precision={other};" in line


def test_a_run_that_is_moved_aside_is_named_with_what_differs(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").write_text(to_toml(settle(config(runtime__precision="bf16"), LAPTOP)))
    line = runner._keep_other(tmp_path / "run", settle(config(runtime__precision="fp32"), LAPTOP))
    assert line == "another run had the name run (runtime.precision=bf16); it is now called run.1"
    assert runner._keep_other(tmp_path / "run", settle(config(runtime__precision="fp32"), LAPTOP)) == ""
