"""Wrong requests, streams that fail and errors that nobody foresaw end in one line; no output acts on a terminal."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import click
import pytest
from bad_requests import BAD, FILES
from cli_runner import ask, refusal
from reports import make_run

import mosaic_ray
from mosaic_ray.cli import commands, store
from mosaic_ray.cli.options import print_parts
from mosaic_ray.config.resolve import KNOBS, check_value, resolve
from mosaic_ray.core.errors import RequestError
from mosaic_ray.core.machine import Memory
from mosaic_ray.core.text import csv_cell, visible
from mosaic_ray.data.specs import spec_of
from mosaic_ray.execution.gpu_memory import surely_taken, work_of
from mosaic_ray.execution.ray_session import Resources
from mosaic_ray.runs import checks
from mosaic_ray.runs.checks import check_memory
from mosaic_ray.tracking.progress import display_on

ROOT = Path(mosaic_ray.__file__).parents[1]


@pytest.fixture
def no_ray(monkeypatch, tmp_path):
    """A working folder with the files of bad requests, in which Ray does not start."""
    import ray

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr(ray, "init", refuse)
    monkeypatch.chdir(tmp_path)
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)


@pytest.mark.parametrize("words, parts", BAD)
def test_a_bad_request_is_refused_in_one_line_before_ray_starts(no_ray, words, parts):
    line = refusal(ask(*words))
    assert all(part in line for part in parts), line
    assert line.rstrip("\n").isprintable() and len(line) < 1000


@pytest.mark.parametrize("name", [name for name, knob in KNOBS.items() if knob.kind in (int, float)])
@pytest.mark.parametrize("word", ["1e26", "-1e26", "inf", "-inf", "nan", "1e999"])
def test_every_number_has_bounds_and_is_finite(name, word):
    with pytest.raises(RequestError, match=re.escape(f"{name} = {word}: it takes ")):
        check_value(name, word, text=True)


def test_minus_zero_is_zero():
    assert str(check_value("warmup.weight_decay", "-0.0", text=True)) == "0.0"


def test_work_that_fits_is_not_refused_for_memory(monkeypatch):
    config, there = resolve("demo+distilled"), Resources(4, 0, 2**30)
    taken = surely_taken(work_of(config, spec_of("digits").facts, 0))
    assert {"warmup", "generators", "teacher", "distill"} < taken.keys()
    most = max(needs for _, needs in taken.values())
    monkeypatch.setattr(checks, "memory", lambda: Memory(most, most))
    check_memory(config, spec_of("digits").facts, 0, replace(there, memory=most))
    with pytest.raises(RequestError, match="GiB of memory at least"):
        monkeypatch.setattr(checks, "memory", lambda: Memory(most - 1, most - 1))
        check_memory(config, spec_of("digits").facts, 0, replace(there, memory=most - 1))


# --- errors that nobody foresaw --------------------------------------------------------------------------------------


def commands_of(found: click.Command, *before: str) -> list[tuple[str, ...]]:
    """Return the words of every command below ``found``."""
    if isinstance(found, click.Group):
        return [words for name, below in found.commands.items() for words in commands_of(below, *before, name)]
    return [before]


@pytest.mark.parametrize("words", commands_of(commands.mosaic), ids=" ".join)
def test_an_error_that_nobody_foresaw_is_one_line_and_its_traceback_a_file(words, monkeypatch, tmp_path):
    def broken(*_: object) -> None:
        raise KeyError("key\x1b")

    monkeypatch.setattr(click.Command, "invoke", broken)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    arguments = {"show": ["demo"], "report": ["."], "fetch": ["digits"], "import": ["--from", ".", "mine"]}
    arguments |= {"diff": ["one", "two"], "completion": ["bash"]}
    line = refusal(ask(*words, *arguments.get(words[-1], [])), 1)
    path = re.fullmatch(r"mosaic: error: KeyError: .*key\\x1b.*; log: (.*error\.log)\n", line)[1]
    text = Path(path).read_text()
    assert "Traceback" in text and "in broken" in text


@pytest.mark.parametrize("error", [MemoryError(), RecursionError("too deep"), OSError(errno.EACCES, "no", "there")])
def test_such_an_error_is_named_even_where_no_file_can_be_written(error, monkeypatch, tmp_path):
    def broken(*_: object) -> None:
        raise error

    monkeypatch.setattr(click.Command, "invoke", broken)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "absent"))
    assert type(error).__name__ in refusal(ask("presets"), 1)


# --- streams ---------------------------------------------------------------------------------------------------------


def process(*words: str, **streams: object) -> subprocess.CompletedProcess[str]:
    """Call the command in a process of its own; standard error is kept unless ``streams`` names it."""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | streams
    call = [sys.executable, "-m", "mosaic_ray", *words]
    return subprocess.run(call, text=True, check=False, env=os.environ | {"PYTHONPATH": str(ROOT)}, **streams)


def test_a_full_standard_output_is_one_line():
    with open("/dev/full", "w") as full:
        ended = process("presets", stdout=full)
    assert ended.returncode == 1
    assert ended.stderr == "mosaic: error: standard output: No space left on device\n"


def test_a_reader_that_went_away_is_no_error():
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as pipe:
        ended = process("presets", stdout=pipe)
    assert (ended.returncode, ended.stderr) == (1, "")


@pytest.mark.parametrize("words, status", [(["presets"], 0), (["run", "--omega", "0"], 2)])
def test_a_full_standard_error_changes_no_status(words, status):
    with open("/dev/full", "w") as full:
        assert process(*words, stderr=full).returncode == status


def test_a_run_goes_on_when_nobody_reads_its_progress():
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    display_on(Gone(), None).say("round 1", "")


# --- what is shown ---------------------------------------------------------------------------------------------------


HOSTILE = "a\x1b[31mb\u202ec\x9bd\r"


def test_visible_text_has_no_active_character_and_keeps_the_rest():
    assert visible(HOSTILE, "") == r"a\x1b[31mb\u202ec\x9bd\r"
    assert visible("größe 中文 a\tb\n\u00a0é") == "größe 中文 a\tb\n\u00a0é"
    assert visible("a\tb\n\udcff", "") == r"a\tb\n\udcff"


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(x)", "\t=1"])
def test_no_cell_of_a_name_is_a_formula(text):
    assert csv_cell(text) == f"'{text}"
    assert csv_cell("a=1") == "a=1"


def test_tables_messages_and_lists_show_no_control_character(capsys):
    from rich.table import Table

    table = Table()
    table.add_column(HOSTILE)
    table.add_row(HOSTILE)
    print_parts(table, HOSTILE)
    commands.listing(HOSTILE, {HOSTILE: HOSTILE})
    display_on(sys.stderr, None).say(HOSTILE, "warning")
    shown = capsys.readouterr()
    assert not re.search("[\x1b\x9b\u202e\r]", shown.out + shown.err)
    assert shown.out.count(r"\x1b[31m") >= 4 and r"\x1b[31m" in shown.err


def test_store_ls_and_the_report_escape_names_on_the_disk(tmp_path):
    folder = make_run(tmp_path, "evil\x1b[31m\nname", error="\x1b]0;title\x07")
    listed = ask("store", "ls", "--storage", str(tmp_path))
    assert listed.exit_code == 0 and "\x1b" not in listed.stdout
    assert r"run evil\x1b[31m\nname" in " ".join(listed.stdout.split())
    assert ask("report", str(folder), "--out", str(tmp_path / "page.html")).exit_code == 0
    page = (tmp_path / "page.html").read_text()
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", page)
    assert r"evil\x1b[31m" in page


def test_own_class_names_appear_in_the_report_escaped(tmp_path):
    names = ["$x^{$<b>", "cat\x1b[31m", "=dog"]
    folder = make_run(tmp_path)
    (folder / "label_counts.json").write_text(json.dumps({"class_names": names}))
    assert ask("report", str(folder)).exit_code == 0
    page = (folder / "report.html").read_text()
    assert "\x1b" not in page and "<b>" not in page
    for label in ("$x^{$&lt;b&gt; (0)", r"cat\x1b[31m (1)", "=dog (2)"):
        assert page.count(label) >= 6, label


def test_a_warning_of_the_store_shows_no_control_character(tmp_path, capsys):
    (tmp_path / "objects").mkdir()
    store._open(str(tmp_path)).log(HOSTILE)
    assert "\x1b" not in capsys.readouterr().err


# --- `report --out` --------------------------------------------------------------------------------------------------


def test_out_is_written_into_links_devices_and_standard_output(tmp_path):
    folder = make_run(tmp_path / "st")
    words = ("report", str(folder), "--out")
    (tmp_path / "file.html").write_text("before")
    (tmp_path / "link.html").symlink_to("file.html")
    assert ask(*words, str(tmp_path / "link.html")).exit_code == 0
    assert (tmp_path / "link.html").is_symlink()
    page = (tmp_path / "file.html").read_text()
    assert page.startswith("<!doctype html>") or page.lower().startswith("<!doctype html>")

    with open(tmp_path / "out.html", "w") as out:
        assert process(*words, "/dev/stdout", stdout=out).returncode == 0
    assert (tmp_path / "out.html").read_text() == page
    ended = ask(*words, "/dev/full")
    assert "--out /dev/full: No space left on device" in refusal(ended)
    assert not Path("/dev/full").is_file()
    os.mkfifo(tmp_path / "pipe")
    with subprocess.Popen(["cat", str(tmp_path / "pipe")], stdout=subprocess.PIPE, text=True) as reader:
        assert ask(*words, str(tmp_path / "pipe")).exit_code == 0
        assert reader.stdout.read() == page


def test_ctrl_c_while_modules_are_read_is_one_line(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n\n\nclass Interrupts:\n    def find_spec(self, name, *_):\n"
        "        if name == 'mosaic_ray.cli.commands':\n            raise KeyboardInterrupt\n\n\n"
        "sys.meta_path.insert(0, Interrupts())\n"
    )
    where = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    for words in (["-m", "mosaic_ray"], ["-c", "from mosaic_ray.cli import main"], [str(ROOT / "cli.py")]):
        call = [sys.executable, *words, "presets"]
        ended = subprocess.run(call, text=True, capture_output=True, check=False, env=where)
        assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "mosaic: interrupted\n")


def test_a_working_directory_that_was_removed_is_one_line(tmp_path, monkeypatch):
    lost = tmp_path / "lost"
    lost.mkdir()
    monkeypatch.chdir(lost)
    lost.rmdir()
    try:
        assert "the working directory was removed; change to another one" in refusal(ask("run"))
        assert ask("--help").exit_code == 0
    finally:
        os.chdir(tmp_path)
