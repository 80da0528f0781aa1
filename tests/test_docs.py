"""The documentation is correct: its commands, knobs, links and examples, and the site that is built from it."""

from __future__ import annotations

import ast
import functools
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import click
import numpy as np
import pytest
import yaml
from cli_runner import ask
from filelock import FileLock
from pages import DOCS, MADE, PAGES, REPO, blocks, commands, headings, links, make_targets, parsed, titled

from mosaic_ray.cli.commands import mosaic
from mosaic_ray.cli.options import REQUEST
from mosaic_ray.cli.request import compare_plan, parse_config
from mosaic_ray.config import plugins
from mosaic_ray.config.fields import typed
from mosaic_ray.config.plugins import entries, load
from mosaic_ray.config.presets import preset_knobs
from mosaic_ray.config.resolve import KNOBS, SECTIONS, dotted, override, resolve
from mosaic_ray.config.schema import ExperimentConfig
from mosaic_ray.methods.base import Method
from mosaic_ray.pipeline.rounds import FinishedRound
from mosaic_ray.sweeps.space import Choice, check_space, grid_points, load_space, random_points

by_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPO)))

#: Names that a page makes up on the way.
OWN = {"my_leaves"}

#: The sections of knobs: the package's, and its strategies' and methods' own.
OWN_SECTIONS = [name for kind in ("methods", "strategies") for name in entries(kind) if load(kind, name).knobs]

#: Commands that a page shows with their error: (page, command, message).
CONSOLE = [
    (page.stem, *part.split("\n", 1))
    for page in PAGES
    for block in blocks(page, "console")
    for part in re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]
    if "mosaic: error:" in part
]
REFUSED = {command for _, command, _ in CONSOLE}


# --- what pages show -------------------------------------------------------------------------------------------------


@by_page
def test_commands_parse_and_ask_for_what_exists(page, monkeypatch):
    monkeypatch.syspath_prepend(REPO / "tests" / "plugins")
    for words in commands(page):
        if OWN & set(re.split(r"[ =]", " ".join(words))) or " ".join(["mosaic", *words]) in REFUSED:
            continue
        try:
            context = parsed(words)
        except click.exceptions.Exit:  # --help, --version
            continue
        except (click.MissingParameter, click.BadOptionUsage):
            assert len(words) <= 2, words  # a command's name in a sentence
            continue
        asked = context.params
        request = {key: value for key, value in asked.items() if key in REQUEST}
        if request.get("config"):
            request["config"] = None  # the reader's own file
        if ":" in (request.get("dataset") or ""):
            request["preset"] = "demo"  # the reader's own images choose no schedule here
        parse_config(**request, base=compare_plan(asked["methods"]).base if "methods" in asked else None)
        if asked.get("space") and ":" not in asked["space"] and not asked["space"].endswith(".py"):
            load_space(asked["space"])


def test_pages_show_commands():
    assert {page.name for page in PAGES if commands(page)} >= {"README.md", "index.md", "sweeps.md", "CLUSTER.md"}


def test_a_command_that_does_not_exist_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "Text with `mosaic rum`.\n\n```bash\nmosaic run --seeds 3  # no\nray exec x 'mosaic store lsd'\n```\n"
    )
    assert commands(page) == [["run", "--seeds", "3"], ["store", "lsd"], ["rum"]]
    for words in commands(page):
        with pytest.raises(Exception, match=r"unknown command|No such option"):
            parsed(words)


@by_page
def test_knobs_exist(page):
    text = page.read_text(encoding="utf-8")
    codes = (REPO / "mosaic_ray" / "core" / "health.py").read_text(encoding="utf-8")
    sections = "|".join([*SECTIONS, *OWN_SECTIONS])
    for name, value in re.findall(rf"`(?:--set )?((?:{sections})\.[a-z]\w*)(?: ?= ?([^`]+))?`", text):
        if name.endswith((".py", ".md")) or f'"{name}"' in codes or _in_code(*name.split(".")):
            continue
        assert name in KNOBS, f"{page.name}: no knob {name}"
        if value and not re.search(r"[A-Z]{3}|module:", value):
            typed(KNOBS[name], value, text=True)


def _in_code(module: str, name: str) -> bool:
    """Whether ``name`` is a module of the package ``module``, or defined in the module of that name."""
    package = REPO / "mosaic_ray"
    if (package / module / f"{name}.py").exists() or (package / module / name).is_dir():
        return True
    path = package / f"{module}.py"
    return path.exists() and bool(re.search(rf"^(def |class )?{name}\b", path.read_text("utf-8"), re.MULTILINE))


@by_page
def test_files_and_modules_exist(page):
    text = page.read_text(encoding="utf-8")
    folders = "mosaic_ray|tune_spaces|tests|benchmarks|docs|examples|clusters"
    made = {block.title for block in blocks(page)}  # by the page itself
    named = set(re.findall(rf"`((?:{folders})/[\w./-]+)`", text)) - made
    assert [path for path in sorted(named) if not (REPO / path).exists()] == []
    packages = {path.parent.name for path in (REPO / "mosaic_ray").glob("*/__init__.py")} - set(SECTIONS)
    modules = re.findall(rf"`({'|'.join(packages)})\.(?!py`|toml`)(\w+)(?:\.\w+)*`", text)
    assert [".".join(found) for found in modules if not _in_code(*found)] == []


@by_page
def test_blocks_of_code_are_whole(page):
    for block in blocks(page, "python"):
        ast.parse(block.text)
    for block in blocks(page, "toml"):
        if block.title.startswith("pyproject.toml"):
            continue
        values = dotted(tomllib.loads(block.text))
        preset_knobs(values.pop("preset", "demo"))
        override(ExperimentConfig(), values)


@by_page
def test_links_resolve(page):
    for target in links(page):
        place, _, anchor = target.partition("#")
        if "{" in place or place.removeprefix("../").split("/")[0] in MADE:
            continue  # made with the site, which checks these
        file = (page.parent / place).resolve() if place else page
        assert file.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in headings(file), f"{page.name}: {target}"


@by_page
def test_make_targets_exist(page):
    targets = re.findall(r"^([a-z-]+):.*##", (REPO / "Makefile").read_text(), re.MULTILINE)
    assert set(make_targets(page)) <= set(targets)


@pytest.mark.parametrize("page, command, says", CONSOLE, ids=[command for _, command, _ in CONSOLE])
def test_refusals_are_word_for_word(page, command, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MOSAIC_DATA", raising=False)
    result = ask(*command.split()[1:])
    assert (result.exit_code, result.stderr) == (2, says)


# --- examples --------------------------------------------------------------------------------------------------------


def written(page: str, title: str, folder: Path) -> Path:
    """A block of a page as the file that its title names."""
    path = folder / title
    path.write_text(titled(page, title))
    return path


@pytest.mark.parametrize(
    "page, title, points",
    [("own-space", "my_space.py", 6), ("own-space", "one_at_a_time.py", 4), ("own-method", "mine.py", 2)],
)
def test_spaces_can_be_swept(page, title, points, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(REPO / "tests" / "plugins")
    name, plan = load_space(str(written(f"howto/{page}.md", title, tmp_path)))
    check_space(name, plan)
    assert len(grid_points(plan)) == points
    if plan.knobs:
        finite = all(isinstance(domain, Choice) for domain in plan.knobs.values())
        assert len(random_points(plan, 8, 0)) == (min(8, points) if finite else 8)


def test_the_space_of_the_page_is_planned(two_cpus, tmp_path):
    written("howto/own-space.md", "my_space.py", tmp_path)
    result = ask("sweep", "--space", "my_space.py", "--dry-run")
    assert result.exit_code == 0, result.stderr
    assert "12 trials" in result.stdout


def test_the_folder_that_the_page_writes_is_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(titled("howto/own-data.md", "write_folder.py"), "write_folder.py", "exec"), {"__name__": "__main__"})
    words = ("--clients", "4", "--omega", "0.5", "--set", f"data.root={tmp_path}", "--json")
    result = ask("partition", "--dataset", "folder:shades", *words)
    assert result.exit_code == 0, result.stderr
    assert sum(json.loads(result.stdout)["client_sizes"]) == 120


def test_the_samples_of_several_modalities_that_the_page_writes_are_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = titled("howto/modalities.md", "write_samples.py")
    exec(compile(code, "write_samples.py", "exec"), {"__name__": "__main__"})
    sets = ("data.modalities=[image,caption]", "data.text_length=16", "partition.modalities=[image,caption]")
    words = [word for item in (*sets, f"data.root={tmp_path}") for word in ("--set", item)]
    result = ask("partition", "--dataset", "parquet:signs", "--clients", "4", *words, "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert sum(found["client_sizes"]) == 600
    assert found["modalities"] == [["image"], ["caption"]] * 2


def test_the_network_of_the_page_is_taken(tmp_path, monkeypatch):
    from mosaic_ray.core.types import DataFacts
    from mosaic_ray.runs.checks import check_models

    monkeypatch.chdir(tmp_path)
    written("howto/own-model.md", "nets.py", tmp_path)
    monkeypatch.delitem(sys.modules, "nets", raising=False)
    for knobs in ({}, {"federation.widths": (1.0, 0.5), "federation.strategy": "fedrolex"}):
        config = override(resolve(), {"model.classifier": "nets:build", "partition.num_clients": 2} | knobs)
        check_models(config, DataFacts("digits", 10, 1, 8, (0.3,), (0.3,)))
    monkeypatch.delitem(sys.modules, "nets", raising=False)


#: Page -> the file in tests/plugins that it shows.
PLUGINS = {"howto/own-method.md": "lab/nearest_mean.py", "howto/own-strategy.md": "lab/median.py"}

#: A small experiment on digits.
SMALL = [
    "partition.num_clients=2", "partition.omega=0.5", "model.width=4", "warmup.num_rounds=3", "warmup.local_steps=4",
    "finetune.num_rounds=1", "finetune.local_steps=1", "runtime.precision=fp32", "runtime.eval_rounds=0",
]  # fmt: skip


@pytest.mark.parametrize("page", PLUGINS)
def test_the_code_of_the_page_is_the_tested_plug_in(page):
    assert titled(page, PLUGINS[page]) == (REPO / "tests" / "plugins" / PLUGINS[page]).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "page, words",
    [
        (page, words)
        for page in PLUGINS
        for words in commands(DOCS / page)
        if words[0] == "run" and any(":" in word for word in words)
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value[1:3]),
)
def test_the_commands_of_the_page_run_its_plug_in(page, words, tmp_path):
    (tmp_path / "lab").mkdir()
    (tmp_path / "lab" / "__init__.py").touch()
    written(page, PLUGINS[page], tmp_path)
    small = [word for knob in SMALL for word in ("--set", knob)]
    method = () if "--method" in words else ("--method", "fedavg")
    done = subprocess.run(
        [sys.executable, "-m", "mosaic_ray", *words, *method, "--host", "serial", "--json", *small],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(REPO)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    own = {name: value for name, value in dotted(summary["config"]).items() if name.split(".")[0] not in SECTIONS}
    for name, _, value in (word.partition("=") for word in words if word.startswith(("nearest_mean.", "median."))):
        assert own[name] == float(value)
    if "--method" in words:
        assert summary["accuracy"]["distilled"] > summary["accuracy"]["initial"]
    else:
        assert summary["accuracy"]["distilled"] is None


def test_the_method_of_the_page_that_distils_in_every_round_shrinks_heads():
    [block] = [block for block in blocks(DOCS / "howto/own-method.md", "python") if not block.title]
    defined: dict[str, object] = {"Method": Method}
    exec(compile(block.text, "own-method.md", "exec"), defined)
    models = {"cnn": {"head.weight": np.ones((2, 3)), "head.bias": np.ones(2)}}
    shrunk, arrays = defined["Shrinking"]().after_round(None, FinishedRound(0, 1, models, [], {}))
    assert arrays == {}
    assert np.allclose(shrunk["cnn"]["head.weight"], 0.99)
    assert np.array_equal(shrunk["cnn"]["head.bias"], np.ones(2))


@pytest.mark.parametrize("page, kind", [("howto/own-method.md", "methods"), ("howto/own-strategy.md", "strategies")])
def test_the_entry_point_of_the_page_is_read(page, kind, monkeypatch):
    table = tomllib.loads(titled(page, "pyproject.toml of your package"))
    [[name, value]] = table["project"]["entry-points"][f"mosaic_ray.{kind}"].items()
    asked = []
    point = importlib.metadata.EntryPoint(name, value, f"mosaic_ray.{kind}")
    monkeypatch.syspath_prepend(REPO / "tests" / "plugins")
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: asked.append(group) or [point])
    for cached in (plugins.entries, plugins.load):
        monkeypatch.setattr(plugins, cached.__name__, functools.lru_cache(cached.__wrapped__))
    assert plugins.load(kind, name).name == name
    assert asked == [f"mosaic_ray.{kind}"]


# --- the site --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def site(tmp_path_factory) -> Path:
    """The site, built from a copy of this checkout's documentation by the steps of `make docs`; any warning fails.

    It is built once for all processes of a test session, with empty pages in the place of the gallery's reports.
    """
    for name in ("material", "mkdocstrings"):
        pytest.importorskip(name)
    base = tmp_path_factory.getbasetemp()
    place = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "checkout"
    with FileLock(f"{place}.lock"):
        if not place.exists():
            _build_site(place.with_name("building"))
            place.with_name("building").rename(place)
    return place / "site"


#: The reports of the gallery, and words that they hold.
REPORTS = {"run": "points", "sweep": "3 finished trials", "compare": "The highest mean is that of"}


def _build_site(place: Path, gallery: bool = False) -> None:
    for name in ("docs", "examples", "mosaic_ray", "tune_spaces"):
        shutil.copytree(REPO / name, place / name, ignore=shutil.ignore_patterns(*MADE, "__pycache__"))
    shutil.copy(REPO / "mkdocs.yml", place)
    recipe = re.search(r"^docs: .*\n((?:\t.*\n)+)", (REPO / "Makefile").read_text(), re.MULTILINE)[1]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(place)}
    if not gallery:
        (place / "docs" / "gallery").mkdir()
        for name in REPORTS:
            (place / "docs" / "gallery" / f"{name}.html").write_text("<!doctype html>\n")
    for step in re.findall(r"^\t\$\(BIN\)/python (.*?)(?: \$\(ARGS\))?$", recipe, re.MULTILINE):
        command = [sys.executable, *step.split()]
        if not gallery and step.endswith("write_pages.py"):
            command.append("--without-gallery")
        done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.ray
def test_pages_are_written_before_the_build_and_again_only_where_they_change(site):
    docs = site.parent / "docs"
    (docs / "reference" / "code" / "gone.md").touch()
    (docs / "reference" / "knobs.md").write_text("")
    before = {path: path.stat().st_mtime_ns for path in docs.rglob("*.*")}
    environment = os.environ | {"PYTHONPATH": str(site.parent)}
    command = [sys.executable, str(docs / "write_pages.py"), "--without-gallery"]
    subprocess.run(command, cwd=site, env=environment, check=True)
    after = {path: path.stat().st_mtime_ns for path in docs.rglob("*.*")}
    assert before.items() ^ after.items() == {
        (docs / "reference" / "code" / "gone.md", before[docs / "reference" / "code" / "gone.md"]),
        *((docs / "reference" / "knobs.md", times[docs / "reference" / "knobs.md"]) for times in (before, after)),
    }
    assert "hooks" not in yaml.safe_load((REPO / "mkdocs.yml").read_text(encoding="utf-8"))


@pytest.mark.parametrize("package", ["distillation", "federated", "federated.strategies", "methods.mosaic"])
def test_the_menu_has_every_module_of_a_package_that_is_shown_whole(package):
    listed = re.findall(rf"reference/code/mosaic_ray\.{package}\.(\w+)\.md", (REPO / "mkdocs.yml").read_text())
    folder = REPO.joinpath("mosaic_ray", *package.split("."))
    assert set(listed) == {path.stem for path in folder.glob("[!_]*.py")}


@pytest.mark.ray
def test_the_site_has_every_page_and_loads_nothing_from_elsewhere(site):
    for page in PAGES[1:]:
        assert (site / page.relative_to(DOCS)).with_suffix(".html").exists(), page
    loading = re.compile(r'(?:src="|<link[^>]*href="|@import\s+|url\()["\']?(?:https?:)?//[^"\')>\s]*')
    for path in [*site.rglob("*.html"), *site.rglob("*.css")]:
        found = [tag for tag in loading.findall(path.read_text(encoding="utf-8")) if 'rel="canonical"' not in tag]
        assert not found, (path.name, found)
    assert not list(site.rglob("*.py"))


@pytest.mark.ray
def test_the_gallery_shows_its_reports(site):
    page = (site / "gallery.html").read_text(encoding="utf-8")
    assert re.findall(r'<iframe class="report" src="gallery/(\w+).html"', page) == [*REPORTS]
    assert all(f'<a href="gallery/{name}.html"' in page for name in REPORTS)


@pytest.mark.ray
@pytest.mark.slow
def test_the_gallery_has_the_reports_of_its_commands(tmp_path):
    """Minutes; `make docs` makes them, too."""
    _build_site(tmp_path / "checkout", gallery=True)
    site = tmp_path / "checkout" / "site"
    for name, words in REPORTS.items():
        report = (site / "gallery" / f"{name}.html").read_text(encoding="utf-8")
        assert f"<h1>{name}</h1>" in report and words in report
        assert str(site.parent) not in report and sys.executable not in report


@pytest.mark.ray
def test_the_site_can_be_searched(site):
    index = json.loads((site / "search" / "search_index.json").read_text(encoding="utf-8"))
    places = {entry["location"].partition("#")[0] for entry in index["docs"]}
    assert {"concepts.html", "howto/own-space.html", "reference/knobs.html"} <= places
    # opened from a disk, where pages may fetch nothing and start no workers
    assert (site / "search" / "search_index.js").read_text(encoding="utf-8").startswith("var __index")
    assert 'src="assets/iframe-worker.js"' in (site / "index.html").read_text(encoding="utf-8")


@pytest.mark.ray
def test_the_reference_has_every_knob_command_and_module(site):
    knobs = (site / "reference" / "knobs.html").read_text(encoding="utf-8")
    for name, knob in KNOBS.items():
        assert f'<code id="{name}">' in knobs
        for choice in knob.metadata["choices"] or ():
            assert f"<code>{choice}</code>" in knobs
    assert '<code id="fedprox.mu">' in knobs  # own knobs of strategies that ship
    letters = set(re.findall(r"\(([A-Z]\d+)\)", " ".join(knob.metadata["help"] for knob in KNOBS.values())))
    linked = set(re.findall(r'\(<a href="../algorithm.html#([A-Z]\d+)">\1</a>\)', knobs))
    assert "G9" in letters
    assert linked == letters
    algorithm = (site / "algorithm.html").read_text(encoding="utf-8")
    assert all(f'id="{letter}"' in algorithm for letter in linked)
    page = (site / "reference" / "commands.html").read_text(encoding="utf-8")
    todo = [("mosaic", mosaic)]
    while todo:
        words, command = todo.pop()
        if isinstance(command, click.Group):
            todo += [(f"{words} {name}", inner) for name, inner in command.commands.items()]
        for option in (opt for param in command.params for opt in param.opts if opt.startswith("--")):
            assert words == "mosaic" or option in page
        assert words == "mosaic" or f'id="{words.replace(" ", "-")}"' in page, words
    for module in (
        "distillation.losses",
        "federated.client",
        "data.partition",
        "spaces",
        "storage.store",
        "runs.experiment",
    ):
        code = (site / "reference" / "code" / f"mosaic_ray.{module}.html").read_text(encoding="utf-8")
        assert "doc-function" in code or "doc-class" in code, module
