"""Files and JSON of unknown origin: only regular files and bounded objects are read."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mosaic_ray.core import untrusted
from mosaic_ray.core.untrusted import open_regular, parse_json, read_regular


def test_a_regular_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert read_regular(tmp_path / "a", 3) == b"abc"
    with pytest.raises(OSError, match="3 bytes are too many"):
        read_regular(tmp_path / "a", 2)


def test_nothing_else_is_opened(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "zeros").symlink_to("/dev/zero")
    kinds = {"pipe": "a pipe", "link": "a symbolic link", ".": "a folder", "zeros": "a symbolic link"}
    for name, kind in kinds.items():
        with pytest.raises(OSError, match=f"it is {kind}, not a file"):
            open_regular(tmp_path / name)
    with open_regular(tmp_path / "link", follow=True) as file:
        assert file.read() == b"abc"
    with pytest.raises(OSError, match="it is a device"):
        open_regular(tmp_path / "zeros", follow=True)
    with pytest.raises(FileNotFoundError):
        open_regular(tmp_path / "nothing")


def test_a_bounded_object_is_parsed() -> None:
    assert parse_json(b'{"a": [1, 2.5, null, "\\ud83d\\ude00"]}') == {"a": [1, 2.5, None, "\U0001f600"]}
    assert parse_json('{"n": ' + "9" * 100 + "}")["n"] == 10**100 - 1


@pytest.mark.parametrize(
    "text",
    ["", "[]", "3", "null", "{", "[" * 100_000, '{"a":' * 100_000, '{"n": ' + "9" * 101 + "}", '{"a": "\\ud800"}',
     '{"\\udc00": 1}', b"\xff\xfe{}", "\ud800"],
    ids=lambda text: str(text)[:12],
)  # fmt: skip
def test_other_text_is_a_value_error(text: str | bytes) -> None:
    with pytest.raises(ValueError, match=r"\S"):
        parse_json(text)


def test_too_much_text_and_too_many_objects_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(untrusted, "MAX_CONTAINERS", 3)
    assert parse_json('{"a": [[]]}')
    with pytest.raises(ValueError, match="too large"):
        parse_json('{"a": [[], []]}')
    monkeypatch.setattr(untrusted, "MAX_JSON", 4)
    with pytest.raises(ValueError, match="too large"):
        parse_json('{"a": 1}')
