"""The laws of the house: who may import whom (read from the source), and what stays unloaded (seen in a process)."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
PACKAGE = REPO / "mosaic_ray"

#: From the top down; a room may import itself and what stands below it.
ROOMS = (
    "__main__", "cli", "report_cli", "store_cli", "study_cli", "sweep_cli", "options", "asking", "words",
    "sweep_launch", "sweep", "search", "ledger", "studies", "launch", "experiment", "report", "stages", "runtime",
    "methods", "algorithm", "models", "data",
)  # fmt: skip
#: The package's own ``__init__`` is "".
FOUNDATIONS = {
    "", "config", "presets", "records", "seeding", "errors", "knobs", "rooms", "roster", "spaces", "user_code",
}  # fmt: skip
RAY_ROOMS = {
    "runtime.cluster", "runtime.cluster_file", "runtime.cohort", "runtime.distiller", "runtime.fold",
    "runtime.joining", "sweep",
}  # fmt: skip

SOURCES = sorted(PACKAGE.rglob("*.py"))


def module_of(path: Path) -> str:
    """``runtime/cohort.py`` as ``runtime.cohort``; the package itself as the empty name."""
    parts = list(path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> Iterator[str]:
    """Full names of all that ``path`` imports, anywhere in it; ``from a import b`` gives ``a.b``."""
    package = ["mosaic_ray", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            head = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{head}.{alias.name}" for alias in node.names)


def rank(module: str) -> int:
    """Height of a module's room, 0 at the top; foundations are the lowest."""
    room = module.split(".")[0]
    return len(ROOMS) if room in FOUNDATIONS else ROOMS.index(room)


def own(name: str) -> str | None:
    """The room's name in ``mosaic_ray.room...``; None for others' modules."""
    head, _, rest = name.partition(".")
    if head != "mosaic_ray":
        return None
    room = rest.split(".")[0]
    return room if room in ROOMS or room in FOUNDATIONS else ""  # a name of the package's own __init__


def loaded_by(statement: str, watched: set[str]) -> set[str]:
    """Which of ``watched`` a fresh interpreter has loaded after ``statement``."""
    code = f"{statement}\nimport sys\nprint(*sorted({watched!r} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPO)
    return set(result.stdout.split())


def test_every_module_has_a_room():
    assert SOURCES
    for path in SOURCES:
        room = module_of(path).split(".")[0]
        assert room in FOUNDATIONS or room in ROOMS, f"{path.name}: give it a place in ROOMS"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_law_1_imports_point_down(path):
    here = module_of(path)
    for name in imports(path):
        assert not name.startswith("tune_spaces"), f"{here} imports {name}: spaces are reached by name only"
        room = own(name)
        if room is not None:
            assert rank(room) >= rank(here), f"{here} imports {name}, which stands above it"


def test_law_1_can_fail(tmp_path, monkeypatch):
    monkeypatch.setattr(f"{__name__}.PACKAGE", tmp_path)
    (tmp_path / "data").mkdir()
    source = tmp_path / "data" / "x.py"
    source.write_text(
        "def f():\n    from ..runtime.cohort import fold\n    from .. import config\n    import ray.util\n"
    )
    found = list(imports(source))
    assert found == ["mosaic_ray.runtime.cohort.fold", "mosaic_ray.config", "ray.util"]
    assert [own(name) for name in found] == ["runtime", "config", None]
    assert rank("runtime") < rank(module_of(source)) < rank("config")


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_law_2_ray_stays_in_its_rooms(path):
    if module_of(path) not in RAY_ROOMS:
        assert not [name for name in imports(path) if name.split(".")[0] == "ray"]


def test_law_3_the_door_is_light():
    heavy = {"ray", "torch", "torchvision", "pandas", "tensorboard", "pyarrow", "sklearn", "numpy", "rich"}
    assert loaded_by("import mosaic_ray.cli", heavy) == set()


def test_law_3_can_fail():
    assert loaded_by("import mosaic_ray.records", {"numpy", "torch"}) == {"numpy"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_law_4_torchvision_reads_data_and_nothing_else(path):
    if module_of(path) != "data.datasets":
        assert not [name for name in imports(path) if name.split(".")[0] == "torchvision"]


def test_law_4_client_actors_load_no_torchvision():
    names = {"torchvision", "torch"}
    assert loaded_by("import mosaic_ray.runtime.cohort, mosaic_ray.methods.client_work", names) <= {"torch"}


def test_foundations_load_neither_torch_nor_ray():
    modules = ", ".join(f"mosaic_ray.{name}" for name in sorted(FOUNDATIONS - {""}))
    assert loaded_by(f"import {modules}", {"torch", "ray", "rich", "pyarrow"}) == set()
