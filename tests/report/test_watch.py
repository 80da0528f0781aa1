"""`mosaic report --watch`: the page is written again while a run or sweep is at work, and once at its end."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from cli_runner import REPO, ask, refusal
from reports import make_run, make_sweep
from storing import held, until
from trials import trial

from mosaic_ray.report.html import render
from mosaic_ray.report.html.blocks import FILE
from mosaic_ray.storage.store import Store
from mosaic_ray.sweeps.results import results_files, results_table

REFRESH = '<meta http-equiv="refresh" content="7">'


@pytest.fixture
def work(monkeypatch) -> list[Any]:
    """What happens in the pauses of a watch, in order."""
    left: list[Any] = []
    monkeypatch.setattr(render.time, "sleep", lambda seconds: left.pop(0)())
    return left


@pytest.fixture
def pages(monkeypatch) -> list[str]:
    """Every page that is written."""
    found: list[str] = []
    write = render._write

    def kept(target: Path, page: bytes) -> None:
        found.append(page.decode())
        write(target, page)

    monkeypatch.setattr(render, "_write", kept)
    return found


def test_a_runs_page_follows_its_files_and_ends_with_it(tmp_path, work, pages):
    folder = make_run(tmp_path)
    summary = (folder / "summary.json").read_text()
    (folder / "summary.json").unlink()
    lease = held(Store(tmp_path).try_lease("run-one"))

    def ends() -> None:
        (folder / "summary.json").write_text(summary)
        lease.release()

    def grows() -> None:
        row = {"stage": "control", "tag": "control/accuracy", "step": 3, "value": 0.5}
        with open(folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")

    work += [lambda: None, grows, lambda: None, ends]
    result = ask("report", str(folder), "--watch", "7")
    assert (result.exit_code, result.stdout, result.stderr) == (0, f"{folder / FILE}\n", ""), result.exception
    assert work == [] and len(pages) == 3, "written at first, after the metric, and at the end"
    assert [REFRESH in page for page in pages] == [True, True, False]
    assert "The run is unfinished" in pages[1] and "The final model is right" in pages[2]
    assert (folder / FILE).read_text() == pages[2] == render.render(folder)


def test_a_sweeps_page_shows_each_new_trial(tmp_path, work, pages):
    folder = make_sweep(tmp_path / "sweeps" / "s", [trial(0)])
    lease = held(Store(tmp_path).try_lease("sweep-s"))
    (tmp_path / "objects").mkdir()

    def another() -> None:
        for name, data in results_files(results_table([trial(0), trial(1, knobs={"meta.pool": "sum"})])).items():
            (folder / name).write_bytes(data)

    work += [another, lease.release]
    result = ask("report", str(folder), "--watch")
    assert result.exit_code == 0, result.exception
    trials = [len(set(re.findall(r"p00\ds0", page))) for page in pages]
    assert trials == [1, 2, 2] and ["refresh" in page for page in pages] == [True, True, False]


def test_what_is_not_at_work_is_written_once(tmp_path, work, pages):
    folder = make_run(tmp_path)
    for place in (folder, folder):
        result = ask("report", str(place), "--watch", "--out", str(tmp_path / "page.html"))
        assert result.stdout == f"{tmp_path / 'page.html'}\n"
    assert len(pages) == 2 and not any("refresh" in page for page in pages)


def test_a_folder_without_a_storage_above_it_is_not_at_work(tmp_path, work):
    folder = make_run(tmp_path / "st")
    alone = folder.rename(tmp_path / "alone")
    assert ask("report", str(alone), "--watch").exit_code == 0


def test_ctrl_c_ends_it_quietly_with_a_page_that_stays(tmp_path):
    folder = make_run(tmp_path)
    environment = os.environ | {"PYTHONPATH": str(REPO)}
    with held(Store(tmp_path).try_lease("run-one")):
        call = [sys.executable, "-m", "mosaic_ray", "report", str(folder), "--watch", "1"]
        process = subprocess.Popen(
            call, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # jobs in a shell's background ignore it
        )  # fmt: skip
        try:
            until(lambda: (folder / FILE).exists() or None)
            assert "refresh" in (folder / FILE).read_text()
            time.sleep(0.2)
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert (process.returncode, out, err) == (0, f"{folder / FILE}\n", "")
    assert "refresh" not in (folder / FILE).read_text()


@pytest.mark.parametrize("seconds", ["0", "1.5", "soon"])
def test_refusals(seconds, tmp_path):
    folder = make_run(tmp_path)
    assert f"--watch {seconds}: it takes a whole number" in refusal(ask("report", str(folder), "--watch", seconds))
    assert "there is no such folder" in refusal(ask("report", str(tmp_path / "x"), "--watch"))
