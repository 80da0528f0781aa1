"""The notebooks of examples/ run, show what they are kept with, and are pages of the documentation."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")
nbformat = pytest.importorskip("nbformat")

REPO = Path(__file__).resolve().parents[2]


def script(name: str) -> Any:
    """The script docs/NAME.py as a module."""
    spec = importlib.util.spec_from_file_location(name, REPO / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def kept(name: str) -> Any:
    return nbformat.read(REPO / "examples" / f"{name}.ipynb", as_version=4)


def shown(book: Any) -> list[list[str]]:
    """What each cell of code shows, without numbers and pictures, which are not the same on every processor."""

    def words(output: Any) -> str:
        text = output.text if "text" in output else ", ".join(output.data) + output.data.get("text/html", "")
        return re.sub(r"\d+", "0", re.sub(r"fewer|more", "other", text))

    return [[words(output) for output in cell.outputs] for cell in book.cells if cell.cell_type == "code"]


@pytest.fixture
def book(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The notebook of this name, run in an empty folder with this checkout's package."""
    monkeypatch.setenv("PYTHONPATH", str(REPO))
    return script("run_notebooks").executed(REPO / "examples" / f"{request.param}.ipynb", tmp_path)


@pytest.mark.parametrize("book", ["first_run"], indirect=True)
def test_the_first_run(book):
    assert shown(book) == shown(kept("first_run"))
    install, run, rounds, partition, longer, found, model = (c for c in book.cells if c.cell_type == "code")
    lines = [line for cell in (install, run, rounds) for line in cell.source.splitlines() if line]
    assert install.source.startswith("%pip install") and len(lines) == 6  # from there to a result
    assert "points more than the control" in run.outputs[0].data["text/html"]
    assert "image/png" in rounds.outputs[0].data and "image/png" in partition.outputs[0].data
    assert {"warmup", "generators"} <= set(re.findall(r"\w+", found.outputs[0].data["text/plain"]))
    assert "finetune" not in found.outputs[0].data["text/plain"]
    digits = [int(digit) for digit in re.findall(r"\d", model.outputs[0].data["text/plain"])]
    assert sum(digit == label for label, digit in enumerate(digits)) >= 8
    assert all(0.5 < float(value) < 1 for value in re.findall(r"0\.\d+", longer.outputs[0].data["text/plain"]))


@pytest.mark.parametrize("book", ["own_method"], indirect=True)
def test_an_own_method(book):
    assert shown(book) == shown(kept("own_method"))
    write, run, shrunk, table = (cell for cell in book.cells if cell.cell_type == "code")
    plug_in = (REPO / "tests" / "plugins" / "lab" / "nearest_mean.py").read_text(encoding="utf-8")
    assert write.source + "\n" == f"%%writefile nearest_mean.py\n{plug_in}"
    assert "the distilled student" in run.outputs[0].data["text/html"]
    computed = re.findall(r"\w+", shrunk.outputs[0].data["text/plain"])
    assert "class_means" in computed and not {"warmup", "prototypes", "control"} & set(computed)
    rows = re.findall(r"<th>([\w. ]+)</th>\s*<td>([\d.]+)</td>\s*<td>([\d.]+)</td>", table.outputs[0].data["text/html"])
    assert [name for name, *_ in rows] == ["nearest_mean", "shrink 0.2", "prototype_head"]
    assert len({initial for _, initial, _ in rows}) == 1  # one warm-up


@pytest.mark.parametrize("name", ["first_run", "own_method"])
def test_what_is_kept_has_no_place_time_or_bar_of_progress(name):
    path = REPO / "examples" / f"{name}.ipynb"
    text = path.read_text(encoding="utf-8")
    assert path.stat().st_size < 150_000
    assert not re.search(r"/tmp/|/home/|/root/|━|execution\.|\"language_info\"", text)
    assert {output.output_type for cell in kept(name).cells for output in cell.get("outputs", ())} <= {
        "execute_result", "stream",
    }  # fmt: skip


def test_every_notebook_becomes_a_page():
    files = dict(script("write_pages").notebook_pages())
    pages = {name: text for name, text in files.items() if name.endswith(".md")}
    assert pages.keys() == {f"{path.stem}.md" for path in (REPO / "examples").glob("*.ipynb")}
    menu = (REPO / "mkdocs.yml").read_text(encoding="utf-8")
    for name, text in pages.items():
        assert f"notebooks/{name}" in menu
        for cell in kept(Path(name).stem).cells:
            assert cell.source in text
        pictures = re.findall(r"!\[[^]]+\]\(([^)]+)\)", text)
        assert all(files[picture].startswith(b"\x89PNG") for picture in pictures)
        assert "<style" not in text and len(re.findall("<table>", text)) >= 2
    assert len([name for name in files if name.endswith(".png")]) == 2
