"""docs/architecture.md names files and packages that exist, and lists every package in the order of imports."""

from __future__ import annotations

import importlib
import re
import tomllib
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
PAGE = (REPO / "docs" / "architecture.md").read_text(encoding="utf-8")


def paths(text: str) -> set[str]:
    """Return the quoted paths in ``text``: they have a slash and no brackets, or end in .py."""
    quoted = re.findall(r"`([\w./-]+)`", text)
    return {word for word in quoted if "/" in word or re.fullmatch(r"\w+\.py", word)}


def test_every_path_exists():
    named = paths(PAGE)
    assert len(named) > 50
    assert {path for path in named if not (REPO / path).exists()} == set()


def test_a_path_that_is_missing_is_found():
    found = paths("`mosaic_ray/old.py`, `old.py`, `mosaic_ray/old`, `runtime.gpus_per_client`, `--set`, `a(b)`")
    assert found == {"mosaic_ray/old.py", "old.py", "mosaic_ray/old"}


def test_the_table_lists_the_packages_in_the_order_of_the_import_rules():
    listed = re.findall(r"^\| `mosaic_ray/(\w+)` \|", PAGE, re.MULTILINE)
    rules = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]["contracts"]
    [layers] = [rule["layers"] for rule in rules if rule["type"] == "layers"]
    assert ["api", *listed] == layers  # a file, of which the page's text speaks
    assert set(listed) == {path.parent.name for path in (REPO / "mosaic_ray").glob("*/__init__.py")}


#: Names that the page mentions, by the module that it gives for them.
DEFINED = {
    "pipeline.graph": ("Stage",),
    "pipeline.context": ("RunContext",),
    "methods.base": ("Method",),
    "federated.strategies.base": ("Strategy",),
    "federated.strategies.fedprox": ("FedProxKnobs",),
    "federated.client": ("Task", "TrainTask", "Round", "ClientRound"),
    "federated.client_models": ("Federation", "RoundAggregator"),
    "execution.backend": ("ClientBackend", "SerialBackend", "RayBackend"),
    "core.types": ("Update",),
    "config.fields": ("knob", "changed_knobs"),
    "config.plugins": ("own_knobs", "identity"),
    "pipeline.rounds": ("federated_rounds",),
    "report.figures.run": ("FIGURES",),
    "report.figures.base": ("ReportFigure",),
    "report.figures.sweep": ("figures_of",),
}


@pytest.mark.parametrize("module", DEFINED)
def test_names_are_defined_in_the_files_that_the_page_gives(module):
    found = importlib.import_module(f"mosaic_ray.{module}")
    for name in DEFINED[module]:
        assert re.search(rf"\b{name}\b", PAGE), name
        value = getattr(found, name)
        assert getattr(value, "__module__", f"mosaic_ray.{module}") == f"mosaic_ray.{module}", name
