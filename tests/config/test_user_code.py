"""``load_object`` and ``digest_of``: objects of the user's own, by module or by file."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from mosaic_ray.config.user_code import digest_of, load_object
from mosaic_ray.core.errors import RequestError

SOURCE = """
from dataclasses import dataclass


@dataclass(frozen=True)
class Point:
    x: int


RATE = 0.25
NOTHING = None


def double(x):
    return 2 * x
"""


@pytest.fixture(params=["file", "folder", "module"])
def word(request, tmp_path, monkeypatch):
    """Write SOURCE below a working directory that Python does not import from; return the source part of the name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(tmp_path))])
    stem = f"my_points_{abs(hash(tmp_path))}"  # Python remembers imports
    path = Path("some folder", "my-points.py") if request.param == "folder" else Path(f"{stem}.py")
    path.parent.mkdir(exist_ok=True)
    path.write_text(SOURCE)
    return stem if request.param == "module" else str(path)


def file_of(word: str) -> Path:
    return Path(word if word.endswith(".py") else f"{word}.py")


def refused(word: str) -> str:
    with pytest.raises(RequestError) as caught:
        load_object("the knob", word)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_functions_classes_and_values_are_found(word):
    assert load_object("the knob", f"{word}:double")(4) == 8
    assert load_object("the knob", f"{word}:RATE") == 0.25
    assert load_object("the knob", f"{word}:Point") is load_object("the knob", f"{word}:Point")


def test_classes_can_be_pickled_here_and_in_a_process_that_loads_the_same_word(word):
    point = load_object("the knob", f"{word}:Point")(3)
    data = pickle.dumps(point)
    assert pickle.loads(data) == point
    code = (
        "import pickle, sys\nfrom mosaic_ray.config.user_code import load_object\n"
        f"load_object('the knob', {f'{word}:Point'!r})\nsys.path.insert(0, '.')\n"
        f"print(pickle.loads({data!r}).x)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "3\n"


def test_a_relative_path_is_looked_up_on_pythons_path_too(word, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    assert load_object("the knob", f"{word}:RATE") == 0.25


def test_a_file_that_changed_is_loaded_again(word):
    if word.endswith(".py"):  # a module is imported once
        assert load_object("the knob", f"{word}:RATE") == 0.25
        Path(word).write_text(SOURCE.replace("0.25", "0.5"))
        assert load_object("the knob", f"{word}:RATE") == 0.5


def test_the_digest_follows_the_file_and_not_the_name(word):
    digest = digest_of(f"{word}:double")
    assert len(digest) == 20 and digest == digest_of(f"{word}:Point") and digest_of("double") == ""
    file_of(word).write_text(SOURCE + "# other\n")
    assert digest_of(f"{word}:double") != digest


def test_errors_name_the_users_file_and_line(word):
    file = file_of(word) if word.endswith(".py") else file_of(word).absolute()
    file.write_text(SOURCE + "raise ValueError('two\\nlines')\n")
    for _ in range(2):  # nothing half-loaded stays behind
        assert refused(f"{word}:Point") == f"the knob: {file}, line 16: ValueError: two lines"
    file.write_text("def double(:\n")
    assert refused(f"{word}:double").startswith(f"the knob: {file}, line 1: SyntaxError: ")
    with pytest.raises(RequestError, match=r"^other: .*line 1: SyntaxError"):
        digest_of(f"{word}:double", "other")


def test_a_missing_name_is_refused_with_its_neighbours(word):
    assert refused(f"{word}:doubel") == 'the knob: no "doubel" there; did you mean "double"?'
    assert refused(f"{word}:NOTHING").startswith('the knob: no "NOTHING" there; ')


@pytest.mark.parametrize("word", ["plain", "a:b:c", "..:x", "a/b:x", ":x", "a:", "a.py:", "a.py:x-y", ""])
def test_a_malformed_word_is_refused(word):
    assert refused(word) == "the knob: it takes a name, module:name or FILE.py:name"


def test_a_missing_name_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert refused("no/such.py:x") == "the knob: no/such.py: No such file or directory"
    assert refused("no_such_lab.x:y") == (
        'the knob: no module "no_such_lab" on Python\'s path or in the working directory'
    )
