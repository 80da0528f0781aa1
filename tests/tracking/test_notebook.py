"""In a notebook: one piece of HTML that is replaced, no Ray left behind, interrupts in one line that can be resumed."""

from __future__ import annotations

import sys
import types

import pytest
from helpers import TINY, stripes_dataset
from terminals import Clock

from mosaic_ray.runs import runner
from mosaic_ray.sweeps.console import SweepView
from mosaic_ray.tracking import notebook, progress
from mosaic_ray.tracking.notebook import in_notebook
from mosaic_ray.tracking.progress import Lines, Notebook, Quiet, display_on
from mosaic_ray.tracking.tracker import Tracker


class Outputs(list):
    """Stands in for ``IPython``: the pictures of each display, the last one last."""

    def __init__(self, kernel: object) -> None:
        super().__init__()
        self.get_ipython = lambda: types.SimpleNamespace(kernel=kernel)

    def display(self, data, raw, display_id):
        assert raw and display_id
        self.append([data])
        return types.SimpleNamespace(update=lambda data, raw, pictures=self[-1]: pictures.append(data))


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Outputs:
    outputs = Outputs(kernel=object())
    monkeypatch.setitem(sys.modules, "IPython", outputs)
    monkeypatch.setitem(sys.modules, "IPython.display", outputs)
    return outputs


def test_notebooks_are_known_by_their_kernel(monkeypatch, kernel):
    assert in_notebook() and type(display_on(sys.stderr, None)) is Notebook
    assert type(display_on(sys.stderr, False)) is Quiet
    monkeypatch.setitem(sys.modules, "IPython", Outputs(kernel=None))  # IPython in a terminal
    assert not in_notebook() and type(display_on(sys.stderr, None)) is Lines
    monkeypatch.delitem(sys.modules, "IPython")
    assert not in_notebook()


def test_a_run_has_one_output_with_a_bar_for_each_stage(kernel, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("mosaic_ray.data.load.load_dataset", lambda config: stripes_dataset())
    summary = runner.run(TINY, storage=str(tmp_path))
    [pictures] = kernel
    last = pictures[-1]
    for stage in summary["stages"]:
        assert stage in last["text/html"] and stage in last["text/plain"]
    assert "generator.mode_collapse" in last["text/html"] and "━" in last["text/plain"]
    assert last["text/html"].startswith("<pre") and len(pictures) > 1
    captured = capsys.readouterr()
    assert captured.out == "" and "warmup" not in captured.err


def test_what_others_wrote_is_no_markup(kernel):
    with Tracker(None) as tracker, tracker.stage("<b>stage", 2) as stage:
        stage.advance(note="<img src=x>")
        tracker.warn("<script>alert(1)</script>[red]")
    html = kernel[0][-1]["text/html"]
    assert "&lt;b&gt;stage" in html and "&lt;img" in html and "&lt;script&gt;alert(1)&lt;/script&gt;[red]" in html
    assert "<script" not in html and "<img" not in html


def test_pictures_are_drawn_a_few_times_a_second(kernel, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(notebook.time, "monotonic", clock)
    monkeypatch.setattr(progress, "_now", clock)
    with Tracker(None) as tracker, tracker.stage("warmup", 100) as stage:
        begun = len(kernel[0])
        for _ in range(40):
            clock.now += 0.0625
            stage.advance()
        assert len(kernel[0]) - begun == 10
    assert "2.5 s" in kernel[0][-1]["text/plain"]


def test_a_stage_that_fails_is_shown_as_stopped(kernel):
    with pytest.raises(KeyboardInterrupt), Tracker(None) as tracker, tracker.stage("warmup", 2):
        raise KeyboardInterrupt
    assert "stopped" in kernel[0][-1]["text/plain"]


def test_a_sweep_has_one_output(kernel, capsys):
    with SweepView(2) as view:
        view.begin("a", "omega=<b>")
        view.stage("a", "warmup")
        view.end("a", "done", 0.5, "omega=<b>")
        view.say("a word", "warning")
    [pictures] = kernel
    html = pictures[-1]["text/html"]
    assert "1 done" in html and "best so far 50.0% (omega=&lt;b&gt;)" in html and "warning: a word" in html
    assert capsys.readouterr().err == ""


# --- a real kernel ---------------------------------------------------------------------------------------------------

SETUP = """
import os, signal, sys
import mosaic_ray as mr
LITTLE = {"warmup.num_rounds": 3, "warmup.local_steps": 2, "warmup.checkpoint_rounds": 1, "rehearsal.candidates": [],
          "finetune.num_rounds": 1, "finetune.local_steps": 1, "finetune.head": "keep"}
class Stop(mr.Callback):
    def on_round(self, stage, done, total):
        if done == 2:
            os.kill(os.getpid(), signal.SIGINT)
def go(**more):
    return mr.run("demo", LITTLE, method="fedavg", clients=3, storage="runs", **more)
"""


@pytest.mark.ray
def test_a_real_notebook(tmp_path):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    cells = [
        SETUP,
        "before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]\ngo(callbacks=[Stop()])",
        "'ray' in sys.modules and sys.modules['ray'].is_initialized(), "
        "before == [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]",
        "found = go()",
        "'ray' in sys.modules and sys.modules['ray'].is_initialized()",
        "found",
    ]
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in cells])
    client = nbclient.NotebookClient(
        book, timeout=300, allow_errors=True, resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    _, interrupted, left, resumed, left_again, shown = (cell["outputs"] for cell in book.cells)
    [error] = [output for output in interrupted if output.output_type == "error"]
    assert error.ename == "Interrupted" and error.traceback == ["interrupted; the same call resumes"]
    assert left[0].data["text/plain"] == "(False, True)"
    assert left_again[0].data["text/plain"] == "False"
    [picture] = [output for output in resumed if output.output_type == "display_data"]
    assert "warmup" in picture.data["text/html"] and "evaluate" in picture.data["text/html"]
    assert "Ray is up" in picture.data["text/html"]
    html, text = shown[0].data["text/html"], shown[0].data["text/plain"]
    assert "<table>" in html and "after the closing rounds" in html
    assert text.startswith("Run ") and len(text.splitlines()) <= 10
    assert not [output for output in resumed if output.output_type == "error"]
