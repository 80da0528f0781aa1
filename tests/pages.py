"""Read the documentation: its pages, their code blocks, commands and links."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import click
from test_readme import mosaic_words

from mosaic_ray.cli.commands import mosaic

REPO = Path(__file__).resolve().parents[1]
DOCS = REPO / "docs"

#: Folders of pages that docs/write_pages.py writes.
MADE = ("gallery", "notebooks", "reference")

#: Every page that is written by hand, README.md first.
PAGES = [
    REPO / "README.md",
    *sorted(page for page in DOCS.rglob("*.md") if page.relative_to(DOCS).parts[0] not in MADE),
]

_BLOCK = re.compile(r"^( *)```(\w*)([^\n]*)\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
#: Words that stand for something that only the reader knows.
_PLACEHOLDER = re.compile(r"<[^>]+>|\.\.\.|\[--|\$|\b(?:PATH|NAME|FILE|FOLDER|PARQUET|COMMAND|AGE|HOST:PORT)\b")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, what its ``title`` names, and its text."""

    language: str
    title: str
    text: str


def blocks(page: Path, *languages: str) -> list[Block]:
    """The fenced blocks of ``page``, in order; of these languages alone where any are named."""
    found = []
    for indent, language, rest, text in _BLOCK.findall(page.read_text(encoding="utf-8")):
        title = re.search(r'title="([^"]+)"', rest)
        lines = "".join(line.removeprefix(indent) for line in text.splitlines(keepends=True))
        found.append(Block(language, title[1] if title else "", lines))
    return [block for block in found if not languages or block.language in languages]


def titled(page: str, title: str) -> str:
    """The text of the one block of ``page`` that has this title."""
    [block] = [block for block in blocks(DOCS / page) if block.title == title]
    return block.text


def shell_lines(page: Path) -> list[str]:
    """The lines of a page's shell blocks, continued ones joined, and commands that are quoted in them."""
    lines = []
    for block in blocks(page, "bash", "console"):
        for line in block.text.replace("\\\n", " ").splitlines():
            if block.language == "bash" or line.startswith("$ "):
                line = line.removeprefix("$ ").strip()
                lines += [line, *re.findall(r"'(mosaic [^']*)'", line)]
    return lines


def commands(page: Path) -> list[list[str]]:
    """The words after ``mosaic`` of every command that ``page`` shows, in blocks and in its sentences.

    Those with a placeholder are left out.
    """
    text = page.read_text(encoding="utf-8")
    quoted = re.findall(r"(?<!`)`(mosaic [^`]+)`(?!`)", re.sub(_BLOCK, "", text))
    lines = [line for line in (*shell_lines(page), *quoted) if line.startswith("mosaic ")]
    whole = [line for line in lines if not _PLACEHOLDER.search(line.partition(" #")[0])]
    return [words for line in whole if (words := mosaic_words(line))]


def parsed(words: list[str]) -> click.Context:
    """The context of the innermost command that ``words`` name, options read, nothing run."""
    context = mosaic.make_context("mosaic", list(words))
    while isinstance(context.command, click.Group) and (rest := [*context._protected_args, *context.args]):
        name, command, rest = context.command.resolve_command(context, rest)
        context = command.make_context(name, rest, parent=context)
    return context


def links(page: Path) -> list[str]:
    """The targets of links and images that stay within the project."""
    text = re.sub(_BLOCK, "", page.read_text(encoding="utf-8"))
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    return [target for target in targets if not re.match(r"[a-z]+:", target)]


def headings(page: Path) -> set[str]:
    """The anchors of a page's headings, as Markdown's table of contents makes them."""
    from markdown.extensions.toc import slugify

    text = re.sub(_BLOCK, "", page.read_text(encoding="utf-8"))
    return {slugify(re.sub(r"[`*]", "", title), "-") for title in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}


def make_targets(page: Path) -> list[str]:
    """Return the targets of ``make`` in shell blocks."""
    return [shlex.split(line, comments=True)[1] for line in shell_lines(page) if re.match(r"make [a-z]", line)]
