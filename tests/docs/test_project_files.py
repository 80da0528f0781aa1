"""License, citation, continuous integration and hooks: they parse, and name existing files and commands."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import yaml

from mosaic_ray import __version__

REPO = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["project"]
TARGETS = set(re.findall(r"^([a-z-]+):.*##", (REPO / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def read(place: str) -> str:
    return (REPO / place).read_text(encoding="utf-8")


def steps_of(workflow: dict) -> list[str]:
    """Return the commands that the jobs of ``workflow`` run, in order."""
    return [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]


def test_the_license_is_the_one_that_the_package_names():
    assert (PROJECT["license"], PROJECT["license-files"]) == ("Apache-2.0", ["LICENSE"])
    text = read("LICENSE")
    assert text.split()[:4] == ["Apache", "License", "Version", "2.0,"]
    assert all(f"\n   {number}. " in text for number in range(1, 10))
    assert "Copyright 2026 The mosaic_ray authors" in text and "[yyyy]" not in text
    assert not [line for line in PROJECT["classifiers"] if line.startswith("License ::")]


def test_a_typed_package_says_so():
    assert "Typing :: Typed" in PROJECT["classifiers"] and (REPO / "mosaic_ray" / "py.typed").exists()


def test_the_citation_has_what_readers_of_the_format_ask_for():
    citation = yaml.safe_load(read("CITATION.cff"))
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert (citation["version"], citation["license"]) == (__version__, PROJECT["license"])
    assert [author["name"] for author in citation["authors"]] == [author["name"] for author in PROJECT["authors"]]
    [paper] = citation["references"]
    assert all(author.keys() == {"given-names", "family-names"} for author in paper["authors"])
    assert paper["url"] == PROJECT["urls"]["Paper"]


def test_every_python_that_is_tested_is_declared():
    workflow = yaml.safe_load(read(".github/workflows/ci.yml"))
    tested = workflow["jobs"]["tests"]["strategy"]["matrix"]["python"]
    declared = re.findall(r"Python :: (3\.\d+)$", "\n".join(PROJECT["classifiers"]), re.MULTILINE)
    assert tested == declared
    assert PROJECT["requires-python"] == f">={tested[0]}"


def test_continuous_integration_makes_what_can_be_made():
    steps = steps_of(yaml.safe_load(read(".github/workflows/ci.yml")))
    made = {target for step in steps for target in re.findall(r"\bmake ([a-z-]+)", step)}
    assert made == {"lint", "types", "test", "wheel", "docs"}
    assert made <= TARGETS
    recipes = dict(re.findall(r"^([a-z-]+): .*\n((?:\t.*\n)+)", read("Makefile"), re.MULTILINE))
    assert re.findall(r"\$\(BIN\)/(\S+)", recipes["lint"] + recipes["types"]) == ["ruff", "lint-imports", "mypy"]


def test_hooks_run_the_projects_own_tools():
    repos = yaml.safe_load(read(".pre-commit-config.yaml"))["repos"]
    hooks = {hook["id"]: hook for repo in repos for hook in repo["hooks"]}
    assert {"check-toml", "check-yaml", "end-of-file-fixer", "trailing-whitespace"} <= hooks.keys()
    for name, program in (("ruff", "ruff"), ("import-linter", "lint-imports"), ("mypy", "mypy")):
        assert hooks[name]["language"] == "system"
        assert hooks[name]["entry"].split()[0] == f".venv/bin/{program}"


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "SECURITY.md", "CODE_OF_CONDUCT.md"])
def test_pages_at_the_root_name_files_and_targets_that_exist(page):
    text = read(page)
    local = [target for target in re.findall(r"\]\(([^)\s#]+)\)", text) if "://" not in target]
    assert local and not [target for target in local if not (REPO / target).exists()]
    assert set(re.findall(r"^make ([a-z-]+)", text, re.MULTILINE)) <= TARGETS
