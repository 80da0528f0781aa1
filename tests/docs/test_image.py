"""The Dockerfile: its stages, what it copies, and the wheel that is built from that. Docker itself is not asked."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

REPO = Path(__file__).resolve().parents[2]
TEXT = (REPO / "Dockerfile").read_text(encoding="utf-8")
LINES = re.sub(r"^#.*\n", "", TEXT, flags=re.MULTILINE).replace("\\\n", " ").splitlines()
STEPS = [tuple(line.split(maxsplit=1)) for line in LINES if line.strip()]


def stages() -> dict[str, tuple[str, list[tuple[str, str]]]]:
    """Each stage's base and instructions, by name."""
    found: dict[str, tuple[str, list[tuple[str, str]]]] = {}
    for word, rest in STEPS:
        if word == "FROM":
            base, name = rest.split(" AS ")
            found[name] = (base, [])
        elif found:
            found[list(found)[-1]][1].append((word, rest))
    return found


def whole(name: str) -> list[tuple[str, str]]:
    """The instructions of a stage and of the stages that it begins with."""
    base, steps = stages()[name]
    return [*(whole(base) if base in stages() else []), *steps]


def copied(name: str) -> list[str]:
    """The files and folders of the checkout that a stage copies."""
    lists = [rest.split()[:-1] for word, rest in whole(name) if word == "COPY" and "--from=" not in rest]
    return [source for sources in lists for source in sources]


def test_every_stage_begins_with_one_that_exists():
    names = list(stages())
    for number, (name, (base, steps)) in enumerate(stages().items()):
        assert base in names[:number] or base == "python:${PYTHON}-slim", name
        for source in re.findall(r"\bfrom=([\w-]+)", " ".join(rest for _, rest in steps)):
            assert source in names[:number], name


def test_what_is_copied_exists_and_reaches_the_build():
    allowed = set(re.findall(r"^!(.+)$", (REPO / ".dockerignore").read_text(), re.MULTILINE))
    assert {source for name in stages() for source in copied(name)} == allowed - {"dist"}
    assert all((REPO / path).exists() for path in allowed - {"dist"})


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_an_image_runs_the_command_without_the_rights_of_root(target):
    steps = whole(target)
    assert [rest for word, rest in steps if word == "USER"] == ["mosaic"] and steps[-1][0] == "USER"
    assert ("ENTRYPOINT", '["mosaic"]') in steps and ("CMD", '["--help"]') in steps
    assert any(word == "RUN" and "useradd" in rest and " mosaic " in rest for word, rest in steps)


def test_packages_are_the_pinned_ones_and_leave_no_cache_behind():
    installs = [rest for word, rest in STEPS if word == "RUN" and "pip install" in rest]
    assert len(installs) == 5
    for install in installs:
        assert "-c constraints.txt" in install or "--no-deps" in install
        assert "--no-cache-dir" in install or "--mount=type=cache,target=/root/.cache/pip" in install


def test_the_requirements_are_the_packages_own():
    [line] = [rest for word, rest in STEPS if word == "RUN" and "requirements.txt" in rest and "tomllib" in rest]
    command, _, file = line.partition(" > ")
    done = subprocess.run(["sh", "-c", command.replace("python", sys.executable, 1)], cwd=REPO, capture_output=True)
    assert file == "requirements.txt"
    wanted = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["dependencies"]
    assert done.stdout.decode().splitlines() == wanted


def test_the_wheel_is_built_from_what_is_copied(tmp_path):
    pytest.importorskip("build")
    pytest.importorskip("hatchling")
    for source in copied("wheel"):
        copy = shutil.copytree if (REPO / source).is_dir() else shutil.copy
        copy(REPO / source, tmp_path / source)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation"]
    assert any(rest == f"/opt/build/bin/python {' '.join(command[1:])}" for _, rest in STEPS)
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    [wheel] = (tmp_path / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    for folder in ("mosaic_ray", "tune_spaces"):
        assert {str(path.relative_to(REPO)) for path in (REPO / folder).rglob("*.py")} <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_continuous_integration_builds_one_and_asks_it():
    jobs = yaml.safe_load((REPO / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))["jobs"]
    steps = [step["run"] for step in jobs["image"]["steps"] if "run" in step]
    [build] = [step for step in steps if step.startswith("docker build")]
    image = re.search(r"--tag (\S+)", build)[1]
    assert "--target cpu" in build and build.endswith(" .")
    asked = [step.partition(f" {image} ")[2] for step in steps if step.startswith("docker run")]
    assert {"--help", "doctor"} <= set(asked)
