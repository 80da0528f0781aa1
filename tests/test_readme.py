"""The README shows commands that exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click

from mosaic_ray.cli.commands import mosaic
from mosaic_ray.cli.options import REQUEST
from mosaic_ray.cli.request import parse_config

REPO = Path(__file__).resolve().parents[1]


def readme_commands() -> list[str]:
    """The lines of README.md's bash blocks, continued lines joined, comments cut, lines with placeholders left out."""
    text = (REPO / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    blocks = re.findall(r"^```(?:bash|sh|console)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [line.strip().removeprefix("$ ") for block in blocks for line in block.splitlines()]
    return [line for line in lines if line and not re.search(r"<[^>]+>|\.\.\.|\[--|\b(?:PATH|NAME|FILE)\b", line)]


def parse(words: list[str]) -> click.Context:
    """``words`` through the same parsers that a call goes through, without running."""
    outer = mosaic.make_context("mosaic", list(words))
    name, command, rest = mosaic.resolve_command(outer, [*outer._protected_args, *outer.args])
    return command.make_context(name, rest, parent=outer)


def mosaic_words(line: str) -> list[str] | None:
    """Return the words after ``mosaic``, ``python cli.py`` or ``python -m mosaic_ray``; None in other lines."""
    words = shlex.split(line, comments=True)
    for size, program in ((1, r"(\S*/)?mosaic"), (2, r"\S*python3? cli\.py"), (3, r"\S*python3? -m mosaic_ray")):
        if re.fullmatch(program, " ".join(words[:size])):
            ends = [i for i, word in enumerate(words) if word in {"|", ">", "&&", ";", "2>", "&"}]
            return words[size : ends[0] if ends else None]
    return None


def test_readme_commands_parse():
    asked = [words for words in map(mosaic_words, readme_commands()) if words is not None]
    assert asked, "README.md shows no mosaic command"
    for words in asked:
        try:
            context = parse(words)
        except click.exceptions.Exit:  # --help, --version
            continue
        request = {key: value for key, value in context.params.items() if key in REQUEST}
        if context.info_name in {"run", "partition"} and not request.get("config"):
            parse_config(**request)


def test_readme_make_targets_exist():
    targets = re.findall(r"^([a-z-]+):.*##", (REPO / "Makefile").read_text(), re.MULTILINE)
    named = [shlex.split(line, comments=True)[1] for line in readme_commands() if re.match(r"make [a-z]", line)]
    assert named, "README.md shows no make target"
    assert set(named) <= set(targets)


def test_readme_is_short_and_shows_a_report():
    text = (REPO / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 60
    [picture] = re.findall(r"!\[[^]]+\]\(([^)]+)\)", text)
    assert (REPO / picture).stat().st_size < 150_000 and (REPO / picture).read_bytes().startswith(b"\x89PNG")
    writer = (REPO / "docs" / "picture.py").read_text(encoding="utf-8")
    assert picture == "/".join(re.search(r'ROOT / "(\w+)" / "(\w+)" / "(\w+\.png)"', writer).groups())
