"""The import rules: layers and circles (import-linter reads pyproject.toml), and modules that stay unloaded."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
PACKAGE = REPO / "mosaic_ray"
SOURCES = sorted(PACKAGE.rglob("*.py"))
IDS = [str(path.relative_to(PACKAGE)) for path in SOURCES]

#: The packages that may import ray.
RAY_PACKAGES = {"execution", "sweeps"}


def imports(path: Path) -> Iterator[str]:
    """Yield the absolute names that ``path`` imports from other projects, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def loaded_by(statement: str, watched: set[str]) -> set[str]:
    """Return which of ``watched`` a fresh interpreter has loaded after ``statement``."""
    code = f"{statement}\nimport sys\nprint(*sorted({watched!r} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPO)
    return set(result.stdout.split())


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    """Run import-linter on the contracts of ``folder``'s pyproject.toml."""
    code = "import sys; sys.path.insert(0, '.'); from importlinter.cli import lint_imports; sys.exit(lint_imports())"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder)


def test_law_1_layers_and_no_circles():
    result = lint_imports(REPO)
    assert result.returncode == 0, result.stdout + result.stderr


def test_law_1_can_fail(tmp_path):
    (tmp_path / "pyproject.toml").write_text((REPO / "pyproject.toml").read_text())
    for folder in [path for path in PACKAGE.rglob("*") if path.is_dir() and path.name != "__pycache__"]:
        (tmp_path / folder.relative_to(REPO)).mkdir(parents=True)
    for path in SOURCES:
        (tmp_path / path.relative_to(REPO)).write_text(path.read_text())
    core = tmp_path / "mosaic_ray" / "core" / "errors.py"
    core.write_text(core.read_text() + "\nfrom ..config import fields as fields\n")
    result = lint_imports(tmp_path)
    assert result.returncode == 1
    assert "mosaic_ray.core.errors -> mosaic_ray.config.fields" in result.stdout


def test_the_root_holds_only_what_users_import():
    assert {path.name for path in PACKAGE.glob("*.py")} == {"__init__.py", "__main__.py", "api.py", "spaces.py"}


@pytest.mark.parametrize("path", SOURCES, ids=IDS)
def test_law_2_ray_stays_in_its_packages(path):
    if path.relative_to(PACKAGE).parts[0] not in RAY_PACKAGES:
        assert not [name for name in imports(path) if name.split(".")[0] == "ray"]


@pytest.mark.parametrize("path", SOURCES, ids=IDS)
def test_law_2_rays_private_modules_are_imported_in_one_file(path):
    private = ("ray._private", "ray._raylet", "ray.core")
    if path.name != "ray_internals.py":
        assert not [name for name in imports(path) if name.startswith(private)]


def test_law_3_the_command_is_light():
    heavy = {"ray", "torch", "torchvision", "pandas", "tensorboard", "pyarrow", "sklearn", "numpy", "rich"}
    assert loaded_by("import mosaic_ray.cli", heavy) == set()


def test_law_3_can_fail():
    assert loaded_by("import mosaic_ray.core.types", {"numpy", "torch"}) == {"numpy"}


@pytest.mark.parametrize("path", SOURCES, ids=IDS)
def test_law_4_torchvision_reads_data_and_nothing_else(path):
    if path.relative_to(PACKAGE).parts[0] != "data":
        assert not [name for name in imports(path) if name.split(".")[0] == "torchvision"]


def test_law_4_client_actors_load_no_torchvision():
    names = {"torchvision", "torch"}
    assert loaded_by("import mosaic_ray.execution.backend, mosaic_ray.federated.client", names) <= {"torch"}


REHEARSAL = {
    "generator.family": "cvae", "generator.lambda_i": 0.0, "distill.steps": 0, "rehearsal.weight": 1.0,
    "finetune.head": "lda_head", "finetune.bn": "exact",
}  # fmt: skip


@pytest.mark.parametrize("knobs", [{}, REHEARSAL], ids=["distillation", "rehearsal"])
def test_a_whole_run_loads_neither_torchs_compiler_nor_scikit_learn(knobs):
    """Each takes a process seconds, and every client actor is one."""
    run = (
        "import sys, tempfile; sys.path.insert(0, 'tests'); import helpers; "
        "from mosaic_ray.data import load; from mosaic_ray.runs import runner; "
        "load.load_dataset = lambda config: helpers.stripes_dataset(); "
        f"runner.run(helpers.override(helpers.TINY, {knobs}), storage=tempfile.mkdtemp(), progress=False)"
    )
    assert loaded_by(run, {"torch", "torch._dynamo", "sklearn", "scipy"}) == {"torch"}


def test_listing_methods_loads_no_torch():
    modules = [f"mosaic_ray.methods.{name}" for name in ("dense", "dfrd", "fedcvae", "fedftg", "mosaic")]
    assert loaded_by(f"import {', '.join(modules)}", {"torch"}) == set()


def test_configuration_loads_neither_torch_nor_ray():
    modules = [f"mosaic_ray.config.{path.stem}" for path in (PACKAGE / "config").glob("[!_]*.py")]
    modules += ["mosaic_ray.core.errors", "mosaic_ray.core.seeding", "mosaic_ray.core.types", "mosaic_ray.spaces"]
    assert loaded_by(f"import {', '.join(modules)}", {"torch", "ray", "rich", "pyarrow"}) == set()
