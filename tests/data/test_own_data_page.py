"""docs/howto/own-data.md, followed to the letter."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cli_runner import ask
from layouts import noise
from pages import DOCS, REPO, blocks, titled

PAGE = "howto/own-data.md"


def test_the_plug_in_of_the_page_is_a_data_set(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("bars.py").write_text(titled(PAGE, "bars.py"))
    result = ask("partition", "--dataset", "bars.py:load", "--clients", "4", "--json")
    assert result.exit_code == 0, result.stderr
    assert sum(json.loads(result.stdout)["client_sizes"]) == 400


@pytest.fixture
def package(tmp_path) -> Path:
    """A copy of the package with the file and the line that the page adds."""
    shutil.copytree(REPO / "mosaic_ray", tmp_path / "mosaic_ray", ignore=shutil.ignore_patterns("__pycache__"))
    for block in blocks(DOCS / PAGE, "python", "diff"):
        path = tmp_path / block.title
        if block.language == "diff":
            old, new = (
                "".join(line[1:] for line in block.text.splitlines(True) if line[0] in kinds) for kinds in (" -", " +")
            )
            assert path.read_text().count(old) == 1
            path.write_text(path.read_text().replace(old, new))
        elif block.title.startswith("mosaic_ray/"):
            path.write_text(block.text)
    return tmp_path


def test_the_data_set_of_the_page_ships(package):
    """``data list`` shows it without and with its file, and ``--dataset`` reads the file."""

    def mosaic(*words: str, status: int = 0) -> str:
        result = subprocess.run(
            [sys.executable, "-m", "mosaic_ray", *words, "--set", f"data.root={package}/root"],
            cwd=package, env=os.environ | {"PYTHONPATH": str(package)}, capture_output=True, text=True,
        )  # fmt: skip
        assert result.returncode == status, result.stderr
        return result.stdout or result.stderr

    def row() -> str:
        return " ".join(mosaic("data", "list").split()).partition("Stripes: grey images of 8x8; ")[2]

    assert row().startswith("not there")
    request = ("partition", "--dataset", "stripes", "--clients", "2", "--set", "partition.min_size=1", "--json")
    assert "mosaic data fetch stripes" in mosaic(*request, status=2)
    arrays = {}
    for part, count in (("train", 30), ("test", 10)):
        arrays |= {f"{part}_images": noise(count, 1, 8, 8), f"{part}_labels": np.arange(count) % 2}
    (package / "root").mkdir()
    np.savez(package / "root" / "stripes.npz", **arrays)
    assert sum(json.loads(mosaic(*request))["client_sizes"]) == 30
    assert row().startswith("0.0 MB")
