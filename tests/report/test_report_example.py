"""The example reads a real run, and the run's page has every figure."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
from cli_runner import REPO
from helpers import TINY, stripes_dataset
from reports import Reader

from mosaic_ray.report.figures import run
from mosaic_ray.report.html.render import render
from mosaic_ray.runs import runner


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny run's."""
    storage = tmp_path_factory.mktemp("storage")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mosaic_ray.data.load.load_dataset", lambda config: stripes_dataset())
        runner.run(TINY, storage=str(storage), name="tiny", progress=False)
    return storage / "runs" / "tiny"


def test_the_example_reads_a_run_and_draws_it(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["look_at_a_run.py", str(folder)])
    runpy.run_path(str(REPO / "examples" / "look_at_a_run.py"), run_name="__main__")
    text = capsys.readouterr().out
    assert text.startswith("tiny done digits") and "warmup/accuracy" in text and "no samples" not in text
    drawn = {path.stem for path in (tmp_path / "figures").iterdir()}
    assert drawn == {"stages", "rounds", "per_class", "confusion_final", "partition", "samples", "time"}


def test_a_real_runs_page_has_every_figure(folder):
    page = render(folder)
    named = [a["aria-labelledby"].removesuffix("-words") for a in Reader(page).all("figure") if "role" in a]
    assert named == [figure.name for section in run.FIGURES.values() for figure in section]
    assert "Not shown" not in page
