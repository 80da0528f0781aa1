"""Packaging: the wheel's and the sdist's contents, pinned versions, and the files that set a machine up."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from mosaic_ray import __version__

REPO = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
REQUIRED = [Requirement(text) for text in PROJECT["dependencies"]]
EXTRAS = [Requirement(text) for extra in PROJECT["optional-dependencies"].values() for text in extra]
PINNED = {
    canonicalize_name(name): Version(version)
    for name, _, version in (line.partition("==") for line in (REPO / "constraints.txt").read_text().splitlines())
}

#: Modules of distributions with another name.
DISTRIBUTIONS = {"PIL": "pillow", "mlflow": "mlflow-skinny", "sklearn": "scikit-learn", "tomli_w": "tomli-w", "yaml": "pyyaml"}


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder that holds the wheel and the sdist of this checkout."""
    pytest.importorskip("build")
    pytest.importorskip("hatchling")
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--sdist", "--no-isolation", "--outdir", str(out), str(REPO)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return out


def test_the_wheel_holds_two_packages_and_nothing_else(built):
    [wheel] = built.glob("*.whl")
    assert wheel.name == f"mosaic_ray-{__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.split("/")[0] for name in names} == {
        "mosaic_ray", "tune_spaces", f"mosaic_ray-{__version__}.dist-info",
    }  # fmt: skip
    shipped = {name for name in names if name.endswith(".py")}
    assert shipped == {
        str(p.relative_to(REPO)) for folder in ("mosaic_ray", "tune_spaces") for p in (REPO / folder).rglob("*.py")
    }


def test_the_wheel_runs_away_from_the_checkout(built, tmp_path):
    [wheel] = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    (tmp_path / "elsewhere").mkdir()

    def run(*words: str) -> str:
        environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
        command = [sys.executable, *words]
        return subprocess.run(
            command, capture_output=True, text=True, check=True, cwd=tmp_path / "elsewhere", env=environment
        ).stdout

    assert run("-c", "import mosaic_ray; print(mosaic_ray.__file__)").startswith(str(tmp_path / "site"))
    assert run("-m", "mosaic_ray", "--version") == f"mosaic {__version__}\n"
    assert "partition" in run("-m", "mosaic_ray", "--help")
    entry = (tmp_path / "site" / f"mosaic_ray-{__version__}.dist-info" / "entry_points.txt").read_text()
    assert "mosaic = mosaic_ray.cli:main" in entry


def test_the_sdist_holds_what_a_checkout_needs(built):
    [sdist] = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {
        "cli.py", "cluster.yaml", "clusters/gcp.yaml", "Makefile", "README.md", "constraints.txt", "pyproject.toml",
        "tests/test_packaging.py", "mosaic_ray/cli/commands.py", "tune_spaces/__init__.py",
    } <= names  # fmt: skip
    assert not [name for name in names if name.startswith((".venv", "mosaic_runs")) or name.endswith(".pyc")]


def test_the_index_would_take_wheel_and_sdist(built):
    pytest.importorskip("twine")
    command = [sys.executable, "-m", "twine", "check", "--strict", *map(str, built.iterdir())]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("PASSED") == 2


def test_the_lock_file_leaves_out_one_extra():
    recipe = re.search(r"^LOCKED := (.+)$", (REPO / "Makefile").read_text(), re.MULTILINE)[1].split()
    assert set(PROJECT["optional-dependencies"]) - set(recipe) == {"track", "trackio"}


def test_constraints_are_names_and_versions_only():
    lines = (REPO / "constraints.txt").read_text().splitlines()
    names = [line.partition("==")[0] for line in lines]
    assert names == sorted(set(names))
    for line in lines:
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", line), line


@pytest.mark.parametrize("need", REQUIRED + EXTRAS, ids=str)
def test_every_dependency_has_an_honest_bound_and_a_pin(need):
    pin = PINNED[canonicalize_name(need.name)]
    bounds = sorted(bound.operator for bound in need.specifier)
    assert bounds == [">="] or (need.name == "ray" and bounds == ["<", ">="])  # Ray's private modules are in use
    assert need.specifier.contains(pin), f"{need} leaves out the pinned {pin}"


def test_pinned_packages_need_nothing_unpinned():
    seen, todo = set(), [*REQUIRED, *EXTRAS]
    while todo:
        need = todo.pop()
        name = canonicalize_name(need.name)
        if (name, frozenset(need.extras)) in seen:
            continue
        seen.add((name, frozenset(need.extras)))
        assert name in PINNED, f"{name} is needed and not in constraints.txt"
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:  # left out on this platform, or an extra that is not installed
            continue
        if Version(distribution.version).public != str(PINNED[name]):
            pytest.skip(f"{name} {distribution.version} is installed, not the pinned {PINNED[name]}")
        declared = distribution.requires or []
        for inner in map(Requirement, declared):
            extras = {"", *need.extras}
            if inner.marker is None or any(inner.marker.evaluate({"extra": extra}) for extra in extras):
                todo.append(inner)


def test_every_import_is_a_declared_dependency():
    optional = [Requirement(text) for extra in ("hf", "track") for text in PROJECT["optional-dependencies"][extra]]
    declared = {canonicalize_name(need.name) for need in [*REQUIRED, *optional]}
    declared.add("datasets")  # comes with flwr-datasets, for partitioners of which the user imports it
    for path in [*(REPO / "mosaic_ray").rglob("*.py"), *(REPO / "tune_spaces").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            for name in (
                {name.split(".")[0] for name in names} - sys.stdlib_module_names - {"mosaic_ray", "tune_spaces"}
            ):
                assert canonicalize_name(DISTRIBUTIONS.get(name, name)) in declared, f"{path.name} imports {name}"


def test_ci_runs_the_tests_and_cannot_pass_without_them():
    script = REPO / ".ci" / "run"
    if not script.exists():
        pytest.skip("not a checkout")
    assert os.access(script, os.X_OK)
    text = script.read_text()
    assert "set -euo pipefail" in text
    assert re.findall(r'^make (\w+) VENV="\$place/venv"', text, re.MULTILINE) == ["lint", "types", "test", "docs"]
    assert "||" not in text


def make(tmp_path: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """``make`` on this Makefile in an empty folder, with a Python that only records calls of pip."""
    fake = tmp_path / "python"
    if not fake.exists():
        fake.write_text(
            "#!/bin/sh\n"
            'echo "python $*" >> log\n'
            'case "$*" in\n'
            '*"-m venv"*) for last; do :; done; case "$*" in *--clear*) rm -rf "$last";; esac\n'
            '  mkdir -p "$last/bin"; cp "$0" "$last/bin/python"; printf "#!/bin/sh\\necho mosaic \\"\\$@\\" >> log\\n" > "$last/bin/mosaic"\n'
            '  chmod +x "$last/bin/mosaic";;\n'
            '*"-m pip"*) test ! -e offline;;\n'
            '*"-m pytest"*) test ! -e failing;;\n'
            "esac\n"
        )
        fake.chmod(0o755)
        for name in ("pyproject.toml", "constraints.txt"):
            (tmp_path / name).touch()
    command = ["make", "-f", str(REPO / "Makefile"), f"PYTHON={fake}", *words]
    environment = {k: v for k, v in os.environ.items() if k not in {"MAKEFLAGS", "MAKELEVEL", "MFLAGS", "VENV", "ARGS"}}
    return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)


def log_of(tmp_path: Path) -> list[str]:
    """Return the calls since the last look."""
    log = tmp_path / "log"
    lines = [re.search(r"venv|pip|pytest|mosaic run.*|$", line)[0] for line in log.read_text().splitlines()]
    log.unlink()
    return [line for line in lines if line]


def test_make_installs_once_and_again_when_the_versions_change(tmp_path):
    assert make(tmp_path, "demo", "ARGS=--seed 1").returncode == 0
    assert log_of(tmp_path) == ["venv", "pip", "mosaic run --seed 1"]
    assert make(tmp_path, "demo").returncode == 0
    assert make(tmp_path, "test").returncode == 0
    assert log_of(tmp_path) == ["mosaic run", "pytest"]
    newer = (tmp_path / ".venv" / ".installed").stat().st_mtime + 10
    os.utime(tmp_path / "constraints.txt", (newer, newer))
    assert make(tmp_path, "test").returncode == 0
    assert log_of(tmp_path) == ["pip", "pytest"]


def test_make_starts_anew_where_an_environment_was_never_finished(tmp_path):
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").write_text("half a file")
    (tmp_path / "offline").touch()
    assert make(tmp_path, "test").returncode != 0
    assert log_of(tmp_path) == ["venv", "pip"]
    (tmp_path / "offline").unlink()
    assert make(tmp_path, "test").returncode == 0
    assert log_of(tmp_path) == ["venv", "pip", "pytest"]


def test_make_never_empties_an_environment_of_another_name(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "kept").touch()
    assert make(tmp_path, "test", "VENV=mine").returncode == 0
    assert (tmp_path / "mine" / "kept").exists()


def test_make_fails_where_tests_fail(tmp_path):
    assert make(tmp_path, "test").returncode == 0
    (tmp_path / "failing").touch()
    assert make(tmp_path, "test").returncode != 0


def test_make_help_names_every_target(tmp_path):
    text = make(tmp_path).stdout
    targets = re.findall(r"^\.PHONY: (\S+)$", (REPO / "Makefile").read_text(), re.MULTILINE)
    assert {"demo", "test"} < set(targets)
    assert re.findall(r"^make (\S+)", text, re.MULTILINE) == targets
