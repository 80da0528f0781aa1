"""A driver whose Ray dies: one line that names what died and the command to resume, and nothing is lost."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from mosaic_ray.execution import ray_watch

SMALL = [
    "--clients", "3", "--set", "method=fedavg", "--set", "warmup.num_rounds=6", "--set", "warmup.checkpoint_rounds=2",
    "--set", "model.width=4",
]  # fmt: skip

linux = pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="no descriptors of processes")


@contextlib.contextmanager
def started(*command: str) -> Iterator[subprocess.Popen]:
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.kill()


@linux
@pytest.mark.parametrize("ends, says", [("raylet", True), ("driver", False), ("goodbye", False), ("shutdown", False)])
def test_it_speaks_where_ray_died_before_its_driver_and_not_else(ends, says):
    """``goodbye``: the driver ends well; ``shutdown``: it stops Ray, is asked, and says so."""
    with (
        started("sleep", "600") as raylet,
        started("sleep", "600") as gcs,
        started(sys.executable, "-IS", ray_watch.__file__, "; resume", f"raylet:{raylet.pid}", f"gcs:{gcs.pid}") as it,
    ):
        if ends in ("raylet", "shutdown"):
            raylet.kill()
            assert it.stdout.read(1)
        _, said = it.communicate(b"." if ends in ("goodbye", "shutdown") else b"", timeout=60)
    assert said.decode() == ("mosaic: error: Ray's raylet on this machine died; resume\n" if says else "")


SPACE = """
from mosaic_ray.spaces import Choice, SweepPlan

def plan():
    return SweepPlan("two", knobs={"warmup.lr": Choice((0.05, 0.02))})
"""


def command(what: str, storage: Path, host: str) -> list[str]:
    words = [what, *SMALL, "--storage", str(storage), "--host", host, "--json"]
    if what == "sweep":
        (space := storage.with_name("two.py")).write_text(SPACE)
        words += ["--space", str(space), "--max-concurrent", "1"]
    return [sys.executable, "-m", "mosaic_ray", *words]


def killed(what: str, storage: Path, victim: str, sign: str) -> list[str]:
    """Run, kill a process of its Ray at a line that holds ``sign``, and return the lines that follow."""
    with (
        tempfile.TemporaryDirectory(prefix="mw", dir="/tmp", ignore_cleanup_errors=True) as folder,
        subprocess.Popen(
            command(what, storage, "ray"), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            env=os.environ | {"PYTHONUNBUFFERED": "1", "RAY_TMPDIR": folder},
        ) as process,
    ):  # fmt: skip
        lines = []
        for line in process.stderr:
            lines.append(line)
            if sign in line:
                [found] = [p for p in psutil.Process(process.pid).children(recursive=True) if p.name() == victim]
                found.send_signal(signal.SIGKILL)
                break
        else:
            pytest.fail(f"{sign!r} was never seen in:\n{''.join(lines)}")
        after = [line for line in process.stderr if line.startswith("mosaic") or "Traceback" in line]
    assert process.returncode == 1, after
    return after


@linux
@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize(
    "what, victim, sign",
    [
        ("run", "raylet", "warmup: round 3/6"), ("run", "gcs_server", "warmup: round 3/6"),
        ("sweep", "raylet", "[1/2]"),
    ],
)  # fmt: skip
def test_a_ray_that_dies_ends_the_command_in_one_line_and_the_same_command_resumes(tmp_path, what, victim, sign):
    [line] = killed(what, tmp_path / "ray", victim, sign)
    assert line.startswith(f"mosaic: error: Ray's {victim} on this machine died (its logs: ")
    assert f"; to resume: {sys.executable} -m mosaic_ray {what} " in line
    resumed, undisturbed = (
        subprocess.run(command(what, tmp_path / host, host), capture_output=True, text=True, check=True)
        for host in ("ray", "serial")
    )
    assert "warmup: round 1/6" in undisturbed.stderr or what == "sweep"
    assert "warmup: round 1/6" not in resumed.stderr
    assert numbers(json.loads(resumed.stdout)) == numbers(json.loads(undisturbed.stdout))


def numbers(found: dict) -> list:
    """Every accuracy and the student's bytes."""
    summaries = [trial["summary"] for trial in found["trials"]] if "trials" in found else [found]
    return [
        (one["accuracy"], one["per_class_accuracy"], (Path(one["paths"]["run"]) / "student.safetensors").read_bytes())
        for one in summaries
    ]
