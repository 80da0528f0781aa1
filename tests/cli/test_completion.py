"""What a shell is answered at the tab key, and the scripts by which it asks."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cli_runner import REPO, ask, refusal
from test_laws import loaded_by

from mosaic_ray.cli.commands import mosaic
from mosaic_ray.cli.complete import SHELLS, VARIABLE
from mosaic_ray.config.presets import ALGORITHMS, SCALES
from mosaic_ray.config.registry import DATASETS, METHODS, STATUSES, STRATEGIES
from mosaic_ray.config.resolve import KNOBS
from mosaic_ray.sweeps.space import shipped


def process(shell: str, line: str, word: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Ask as the script of ``shell`` does, in a process of its own."""
    asks = {
        "bash": {"COMP_LINE": line, "COMP_CWORD": word},
        "zsh": {"COMP_WORDS": line, "COMP_CWORD": str(len(line.split(" ")) - 1)},
        "fish": {"COMP_WORDS": line, "COMP_CWORD": word},
    }[shell]
    environment = os.environ | asks | {VARIABLE: f"{shell}_complete", "PYTHONPATH": str(REPO)}
    call = [sys.executable, "-m", "mosaic_ray"]
    return subprocess.run(call, env=environment, cwd=folder, capture_output=True, text=True, check=True)


def answered(line: str, folder: Path, word: str | None = None) -> list[str]:
    """The answers in bash to ``mosaic LINE``; ``word`` is what bash takes for the current word."""
    line = f"mosaic {line}"
    ended = process("bash", line, line.rpartition(" ")[2] if word is None else word, folder)
    assert ended.stderr == ""
    return [answer.removeprefix("plain,") for answer in ended.stdout.splitlines() if answer]


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A working directory with runs and a sweep."""
    for place in ("runs/one", "runs/other", "runs/odd name\x1b", "sweeps/s/trials/p000s0", "sweeps/s/trials/p001s0"):
        (tmp_path / "mosaic_runs" / place).mkdir(parents=True)
    (tmp_path / "here" / "runs" / "mine").mkdir(parents=True)
    return tmp_path


FIXED = {
    "": set(mosaic.commands),
    "run --algorithm ": set(ALGORITHMS),
    "run --method ": set(METHODS),
    "run --preset demo+": {f"demo+{name}" for name in ALGORITHMS},
    "compare --methods mosaic,fedr": {"mosaic,fedrolex", "mosaic,fedrs"},
    "compare --methods mosaic+fedro": {"mosaic+fedrolex"},
    "methods ": {*METHODS, *STRATEGIES},
    "sweep --space ": set(shipped()),
    "sweep --scheduler a": {"asha"},
    "runs --status ": set(STATUSES),
    "completion ": set(SHELLS),
    "run --set ": {f"{name}=" for name in KNOBS},
    "sweep --grid warmup.lo": {"warmup.loss=", "warmup.local_steps="},
    "nothing ": set(),
    "store l": {"ls"},
}


@pytest.mark.parametrize("line", FIXED)
def test_names(line, tmp_path):
    found = answered(line, tmp_path)
    wanted = {answer for answer in FIXED[line] if not answer.startswith("nothing")}
    if line == "nothing ":
        wanted = set(mosaic.commands)  # click goes on as if the word were not there
    assert len(found) == len(set(found)) and set(found) == wanted


def test_presets_and_data_sets(tmp_path, monkeypatch):
    monkeypatch.setenv("MOSAIC_DATA", str(tmp_path / "data"))
    (tmp_path / "data" / "imported" / "mine").mkdir(parents=True)
    assert set(answered("run --dataset ", tmp_path)) == {*DATASETS, "mine"} == set(answered("data fetch ", tmp_path))
    assert set(answered("show ", tmp_path)) == {*SCALES, "small", "large", *ALGORITHMS}


@pytest.mark.parametrize(
    "line, word, wanted",
    [
        ("run --set warmup.loss=", "", ["ce", "adjusted"]),
        ("run --set warmup.loss=a", "a", ["adjusted"]),
        ("run --set warmup.loss=a", "warmup.loss=a", ["warmup.loss=adjusted"]),  # `=` divides no words here
        ("run --set warmup.shuffle=", "=", ["true", "false"]),
        ("run --set distill.workers=", "", ["auto"]),
        ("run --set warmup.lr=", "", []),
        ("run --set no.knob=", "", []),
        ("run --set federation.strategy=fedrolex+fedp", "fedrolex+fedp", ["fedrolex+fedprox"]),
        ("run --set model.classifiers=[cnn,mob", "[cnn,mob", ["[cnn,mobilenet"]),
        ("sweep --grid warmup.loss=ce,a", "ce,a", ["ce,adjusted"]),
        ("run --set data.name=cifar10", "cifar10", ["cifar10", "cifar100"]),
        ("run --set=warmup.lr_", "warmup.lr_", ["warmup.lr_decay="]),
    ],
)
def test_values_of_knobs_after_the_equals_sign(line, word, wanted, tmp_path):
    assert answered(line, tmp_path, word) == wanted


def test_names_of_runs_sweeps_and_trials(runs):
    assert answered("run --name ", runs) == ["one", "other"], "names with spaces or control characters are left out"
    assert answered("sweep --name ", runs) == ["s"] == answered("runs --sweep ", runs)
    assert answered("diff o", runs) == ["one", "other"]
    assert answered("diff one s/", runs) == ["s/p000s0", "s/p001s0"]
    assert answered("run --storage here --name ", runs) == ["mine"]
    assert answered("run --storage s3://bucket/x --name ", runs) == []
    assert answered("report ", runs) == ["dir,"] and answered("run --config ", runs) == ["file,"]


def test_the_other_shells(tmp_path):
    zsh = process("zsh", "mosaic run --set warmup.lo", "", tmp_path).stdout.splitlines()
    assert zsh[:3] == ["plain", "warmup.local_steps=", KNOBS["warmup.local_steps"].metadata["help"]]
    fish = process("fish", "mosaic run --set warmup.lo", "warmup.lo", tmp_path).stdout.splitlines()
    assert fish[0] == f"plain,warmup.local_steps=\t{KNOBS['warmup.local_steps'].metadata['help']}"


def test_answers_load_nothing_heavy():
    ask_it = (
        "import os, sys, contextlib; os.environ.update(_MOSAIC_COMPLETE='bash_complete', COMP_CWORD='', "
        "COMP_LINE='mosaic sweep --space '); os._exit = sys.exit; from mosaic_ray.cli import main\n"
        "sys.stdout = sys.stderr\n"
        "with contextlib.suppress(SystemExit): main()\n"
        "sys.stdout = sys.__stdout__"
    )
    heavy = {"ray", "torch", "pandas", "pyarrow", "numpy", "rich", "importlib.metadata", "tomllib", "tempfile"}
    assert loaded_by(ask_it, {*heavy, "mosaic_ray.sweeps.space"}) == {"mosaic_ray.sweeps.space"}


def test_scripts_and_refusals(tmp_path):
    for shell in SHELLS:
        assert VARIABLE in ask("completion", shell).stdout
    assert "completion tcsh: it takes bash, zsh, fish" in refusal(ask("completion", "tcsh"))


@pytest.mark.skipif(shutil.which("bash") is None, reason="it needs bash")
def test_a_real_bash(runs):
    """The script's function is called with bash's own variables for a command line."""
    (runs / "bin").mkdir()
    command = runs / "bin" / "mosaic"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m mosaic_ray "$@"\n')
    command.chmod(0o755)
    (runs / "script").write_text(ask("completion", "bash").stdout)
    lines = """
        . ./script
        complete -p mosaic
        compopt() { echo "option $2"; }
        type_it() {
            COMP_LINE=$1 COMP_POINT=${#1} COMPREPLY=(); _mosaic_completion mosaic "$2"; echo "${COMPREPLY[@]}"
        }
        type_it 'mosaic run --pre' --pre
        type_it 'mosaic run --set warmup.loss=' ''
        type_it 'mosaic diff on' on
        type_it 'mosaic run --set warmup.lr_' warmup.lr_
    """
    environment = os.environ | {"PATH": f"{runs}/bin:{os.environ['PATH']}", "PYTHONPATH": str(REPO)}
    ended = subprocess.run(["bash", "--norc", "-c", lines], cwd=runs, env=environment, capture_output=True, text=True)
    assert ended.stdout.splitlines() == [
        "complete -o nosort -F _mosaic_completion mosaic", "--preset", "ce adjusted", "one", "option nospace",
        "warmup.lr_decay=",
    ], ended.stderr  # fmt: skip


def test_a_shell_that_passes_no_line_gets_commands_and_no_traceback(tmp_path):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COMP_")}
    environment |= {VARIABLE: "bash_complete", "PYTHONPATH": str(REPO)}
    call = [sys.executable, "-m", "mosaic_ray"]
    ended = subprocess.run(call, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert ended.stderr == "" and "plain,sweep" in ended.stdout.splitlines()
