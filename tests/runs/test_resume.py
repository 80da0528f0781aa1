"""``kill -9`` at any moment, then the same command: it resumes, and ends with the numbers of an undisturbed run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

import mosaic_ray

REQUEST = [
    "run", "--clients", "3", "--set", "warmup.num_rounds=6", "--set", "warmup.checkpoint_rounds=2",
    "--set", "generator.steps=15", "--set", "generator.ngf=4", "--set", "generator.ndf=4", "--set", "distill.steps=50",
    "--set", "meta.updates=20", "--set", "meta.feedforward=64", "--set", "meta.token_dim=10",
    "--set", "meta.batch_size=16", "--set", "model.width=4", "--set", "finetune.num_rounds=4",
]  # fmt: skip


def command(storage: Path, host: str) -> list[str]:
    return [sys.executable, "-m", "mosaic_ray", *REQUEST, "--storage", str(storage), "--host", host, "--json"]


def finish(storage: Path, host: str) -> tuple[dict, str]:
    done = subprocess.run(command(storage, host), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


def kill_when(storage: Path, host: str, sign: str) -> str:
    """Start, wait for a line that begins with ``sign``, and send SIGKILL; return the output until then."""
    with subprocess.Popen(
        command(storage, host), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    ) as process:  # fmt: skip
        lines = []
        for line in process.stderr:
            lines.append(line)
            if line.startswith(sign):
                process.send_signal(signal.SIGKILL)
                break
        else:
            pytest.fail(f"{sign!r} was never seen in:\n{''.join(lines)}")
    assert process.returncode == -signal.SIGKILL
    return "".join(lines)


def outcome(summary: dict) -> tuple:
    student = (Path(summary["paths"]["run"]) / "student.safetensors").read_bytes()
    return summary["accuracy"], summary["per_class_accuracy"], summary["communication_bytes"], student


@pytest.mark.slow  # the next one kills by default
@pytest.mark.parametrize("host", ["serial", pytest.param("ray", marks=pytest.mark.ray)])
def test_killed_in_every_stage_and_resumed(tmp_path, host):
    undisturbed, _ = finish(tmp_path / "a", host)
    for sign in ("warmup: round 3", "generators: client 1", "teacher: begins", "distill: begins", "finetune: round 1"):
        kill_when(tmp_path / "b", host, sign)
    resumed, output = finish(tmp_path / "b", host)
    assert outcome(resumed) == outcome(undisturbed)
    before = ("partition", "warmup", "generators", "prototypes", "teacher", "distill")
    assert all(resumed["stages"][name]["cached"] for name in before)
    assert "warmup: cached\n" in output and "warmup: begins" not in output


def test_killed_it_goes_on_at_the_warmups_checkpoint_and_with_the_missing_generators_alone(tmp_path):
    kill_when(tmp_path, "serial", "warmup: round 5")
    output = kill_when(tmp_path, "serial", "generators: client 1")
    assert "warmup: resumed at round 4/6" in output
    assert "warmup: round 1/" not in output
    summary, output = finish(tmp_path, "serial")
    assert "warmup: cached\n" in output
    assert 1 <= summary["stages"]["generators"]["cached_clients"] < 3


@pytest.mark.parametrize(
    "how, host",
    [
        (signal.SIGINT, "serial"),
        (signal.SIGTERM, "serial"),
        (signal.SIGHUP, "serial"),
        pytest.param(signal.SIGINT, "ray", marks=[pytest.mark.ray, pytest.mark.slow]),
        pytest.param(signal.SIGTERM, "ray", marks=pytest.mark.ray),  # which Ray has a handler for
    ],
)
def test_interrupted_by_a_user_or_a_scheduler_it_names_the_command_that_resumes(tmp_path, host, how):
    with subprocess.Popen(
        command(tmp_path, host), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        # background jobs ignore interrupts, those of nohup SIGHUP, and their children inherit that
        preexec_fn=lambda: [signal.signal(one, signal.SIG_DFL) for one in (signal.SIGINT, signal.SIGHUP)],
    ) as process:  # fmt: skip
        output = []
        for line in process.stderr:
            output.append(line)
            if line.startswith("warmup: round 1"):
                process.send_signal(how)
    assert process.returncode == 130, output
    assert "to resume:" in output[-1] and "warmup.num_rounds=6" in output[-1]
    assert not [line for line in output if "SIGTERM" in line or "Traceback" in line]


TIDIES_UP = """
import os, signal, subprocess, time
from mosaic_ray.cli.group import CommandGroup
group = CommandGroup("mosaic")
@group.command()
def run():
    open("child", "w").write(str(subprocess.Popen(["sleep", "60"], stdout=-3, stderr=-3).pid))
    try:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)
    finally:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)
group.main(["run"])
"""


def test_a_second_interrupt_while_the_command_tidies_up_is_quiet(tmp_path):
    (tmp_path / "command.py").write_text(TIDIES_UP)
    ended = subprocess.run(
        [sys.executable, "command.py"], capture_output=True, text=True, check=False, cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(mosaic_ray.__file__).parents[1])},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    assert ended.returncode == 130, ended.stderr
    [line] = ended.stderr.splitlines()
    assert line.startswith("mosaic: interrupted; to resume: ") and line.endswith(" command.py run")
    child = int((tmp_path / "child").read_text())
    for _ in range(100):
        if not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE:
            return
        time.sleep(0.1)
    raise AssertionError("a process that the command started lives on")
