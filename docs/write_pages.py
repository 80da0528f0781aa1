"""Write the pages that are not written by hand, before the site is built: `make docs` runs this.

The reference has all knobs, all commands and the docstrings of public modules; the notebooks of examples/ become pages;
the gallery has the reports of the commands on its page, which run for a minute or two the first time. All of it lies in
folders of docs/ that git ignores. The menu in mkdocs.yml names the pages, so that whatever reads it can build the site.
"""

from __future__ import annotations

import ast
import base64
import hashlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import yaml

from mosaic_ray.cli.commands import mosaic
from mosaic_ray.config.fields import Knob, knobs_of
from mosaic_ray.config.plugins import load
from mosaic_ray.config.registry import METHODS, STRATEGIES
from mosaic_ray.config.resolve import KNOBS, SECTIONS

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
PACKAGE = Path(importlib.util.find_spec("mosaic_ray").origin).parent

#: The subject of each section of knobs.
ABOUT = {
    "data": "Which images, in which size, and where they lie.",
    "partition": "How the images are dealt to the clients.",
    "model": "The network of clients and student.",
    "federation": "The clients of a round, and the aggregation of their updates.",
    "warmup": "The federated rounds before anything else.",
    "generator": "The generator that each client trains beside its frozen classifier.",
    "prototypes": "The class centroids that each client sends.",
    "meta": "The class experts and the meta model that speaks for them.",
    "distill": "What the student learns from the teacher, and when it stops.",
    "finetune": "The closing rounds, the student's and the control's alike.",
    "runtime": "Where things run. These knobs change speed; where one shows in a result, its meaning says so.",
}


# --- knobs -----------------------------------------------------------------------------------------------------------


def knobs_page() -> str:
    """Return the name, default, range and meaning of every knob, section by section."""
    parts = [
        "# Knobs",
        "Every knob, generated from the code. Set one with `--set SECTION.KNOB=VALUE`, or in a TOML file given by "
        "`--config`; `mosaic show demo` prints all of them as such a file. The defaults below hold where the preset "
        "sets no other value. Letters in brackets, such as (G9), link to the list of points in which "
        "[the authors' code, the paper's text and this project differ](../algorithm.md#2-where-the-sources-differ); "
        "`mosaic show reference` and `mosaic show paper` print their values.",
        "## For the whole run {#run}",
        _table(knob for name, knob in KNOBS.items() if "." not in name),
    ]
    for section in (section for section in SECTIONS if any(name.startswith(f"{section}.") for name in KNOBS)):
        rows = [knob for name, knob in KNOBS.items() if name.startswith(f"{section}.")]
        parts += [f"## {section}", ABOUT.get(section, ""), _table(rows)]
    parts += [
        "## Own knobs of strategies and methods {#own}",
        "They count where `federation.strategy` or `method` names their strategy or method. Plug-ins add theirs "
        "([Your own method](../howto/own-method.md), [Your own strategy](../howto/own-strategy.md)).",
        _table(own_knobs()),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def own_knobs() -> Iterator[Knob]:
    """Yield the own knobs of the strategies and methods that ship."""
    for kind, names in (("strategies", STRATEGIES), ("methods", METHODS)):
        for found in (load(kind, name) for name in names):
            if found.knobs is not None:
                yield from knobs_of(found.knobs, f"{found.name}.")


def _table(knobs: Any) -> str:
    rows = ["| knob | default | values | meaning |", "|---|---|---|---|"]
    for knob in knobs:
        name = f'<code id="{knob.name}">{knob.name}</code>'
        meaning = with_links(_cell(knob.metadata["help"]))
        rows.append(f"| {name} | {_code(knob.default)} | {_allowed(knob)} | {meaning} |")
    return "\n".join(rows)


def with_links(text: str) -> str:
    """Return ``text`` with a link to docs/algorithm.md from each letter in brackets, such as (G9) or (P1, P3)."""
    link = r"[\1](../algorithm.md#\1)"
    return re.sub(r"\([A-Z]\d+(?:, [A-Z]\d+)*\)", lambda found: re.sub(r"([A-Z]\d+)", link, found[0]), text)


def _allowed(knob: Knob) -> str:
    """Return the type and range of a knob in few words."""
    meta = knob.metadata
    if meta["choices"]:
        return ", ".join(f"`{choice}`" for choice in meta["choices"])
    kind = {int: "whole number", float: "number", bool: "`true`, `false`", str: "text"}.get(knob.kind)
    if kind is not None and knob.kind != knob.type:
        kind = f"`auto`, or {kind}"
    if kind is None:
        kind = "list of names" if knob.type == tuple[str, ...] else "a rule, or list of numbers"
    high = "" if meta["high"] is None else f"{meta['high']:,.10g}"
    if meta["low"] is not None:
        return f"{kind}, {meta['low']:g} to {high}" if high else f"{kind}, {meta['low']:g} or more"
    if meta["above"] is not None:
        return f"{kind} above {meta['above']:g}" + (f", at most {high}" if high else "")
    return kind


def _code(value: Any) -> str:
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, tuple):
        return f"`[{', '.join(str(item) for item in value)}]`"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`" if value != "" else "empty"


def _cell(text: str) -> str:
    """Escape ``text`` for a cell of a table."""
    return text.replace("|", "\\|").replace("*", "\\*").replace("<", "&lt;")


# --- commands --------------------------------------------------------------------------------------------------------


def commands_page() -> str:
    """Return every command with its options."""
    parts = [
        "# Commands",
        "Every command with its options, generated from the code; `mosaic COMMAND --help` prints the same. The exit "
        "status is 0 when done, 2 for a wrong request, 1 for a run that failed, 130 when interrupted "
        "([Troubleshooting](../howto/troubleshooting.md)).",
    ]
    for words, command in commands(mosaic, ("mosaic",)):
        if len(words) == 1:  # the group itself
            continue
        parts += [f"{'#' * len(words)} {' '.join(words)}", _paragraph(command.help or "")]
        arguments = [param for param in command.params if isinstance(param, click.Argument)]
        usage = [*words, *(param.make_metavar(click.Context(command)) for param in arguments)]
        if isinstance(command, click.Group):
            continue
        options = [param for param in command.params if isinstance(param, click.Option) and not param.hidden]
        parts.append(f"```\n{' '.join(usage)}{' [OPTIONS]' if options else ''}\n```")
        if options:
            parts.append("\n".join(["| option | meaning |", "|---|---|", *map(_option, options)]))
    return "\n\n".join(parts) + "\n"


def commands(command: click.Command, words: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Yield ``command`` and all its subcommands in the order of their definition."""
    yield words, command
    if isinstance(command, click.Group):
        for name, inner in command.commands.items():
            yield from commands(inner, (*words, name))


def _option(option: click.Option) -> str:
    names = ", ".join(f"`{name}`" for name in option.opts)
    metavar = "" if option.is_flag else f" `{option.metavar or option.type.name.upper()}`"
    shown = option.show_default and option.default is not None and not option.is_flag
    default = f" [default: {option.default}]" if shown else ""
    return f"| {names}{metavar} | {_cell(option.help or '')}{default} |"


def _paragraph(text: str) -> str:
    return "\n\n".join(" ".join(part.split()) for part in text.split("\n\n")).replace("<", "&lt;")


# --- modules ---------------------------------------------------------------------------------------------------------


def modules() -> dict[str, list[str]]:
    """Return the full names of the modules that the menu of mkdocs.yml has below Code, by heading."""
    menu = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    [reference] = [entry["Reference"] for entry in menu if "Reference" in entry]
    [code] = [entry["Code"] for entry in reference if "Code" in entry]
    parts = {heading: pages for entry in code if isinstance(entry, dict) for heading, pages in entry.items()}
    return {heading: [Path(page).stem for page in pages] for heading, pages in parts.items()}


def code_pages() -> Iterator[tuple[str, str]]:
    """Yield the name and text of a page for each module, and of their index."""
    index = [
        "# Code",
        "The public modules, generated from their docstrings. Shapes are in square brackets: K clients, C classes, N "
        "images or samples, B images of a batch, d features. [Architecture](../../architecture.md) lists all packages, "
        "the rules for imports, and where to change things.",
    ]
    for heading, names in modules().items():
        rows = []
        for name in names:
            rows.append(f"| [`{name}`]({name}.md) | {_cell(summary_of(name))} |")
            yield f"code/{name}.md", f"# {name.removeprefix('mosaic_ray.')}\n\n::: {name}\n"
        index += [f"## {heading}", "\n".join(["| module | content |", "|---|---|", *rows])]
    yield "code/index.md", "\n\n".join(index) + "\n"


def summary_of(name: str) -> str:
    """Return the first sentence of a module's docstring without importing the module."""
    place = PACKAGE.joinpath(*name.split(".")[1:])
    path = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(text.partition("\n\n")[0].split())


# --- notebooks -------------------------------------------------------------------------------------------------------


def notebook_pages() -> Iterator[tuple[str, str | bytes]]:
    """Yield the name and content of a page for each notebook in examples/, and of the pictures in it."""
    for path in sorted((ROOT / "examples").glob("*.ipynb")):
        parts = []
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            source = "".join(cell["source"])
            parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
            for output in cell.get("outputs", ()):
                data = {kind: "".join(text) for kind, text in output.get("data", {}).items()}
                if "image/png" in data:
                    picture = f"{path.stem}_{len(parts)}.png"
                    parts.append(f"![What the cell above shows]({picture})")
                    yield picture, base64.b64decode(data["image/png"])
                elif "text/html" in data:
                    parts.append(_plain_html(data["text/html"]))
                else:
                    parts.append(f"```text\n{''.join(output.get('text', data.get('text/plain', ''))).rstrip()}\n```")
        parts.append(f"The notebook is `examples/{path.name}` of the checkout.")
        yield f"{path.stem}.md", "\n\n".join(parts) + "\n"


def _plain_html(text: str) -> str:
    """Return the HTML of an output on one line, which Markdown leaves as it is, in the site's own style."""
    text = re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r"<(table|tr)\b[^>]*>", r"<\1>", text)
    return f"<div>{' '.join(text.split())}</div>"


# --- the gallery -----------------------------------------------------------------------------------------------------


#: The command of this checkout; reports quote it as it is named here.
_MOSAIC = "import sys; sys.argv[0] = 'mosaic'; from mosaic_ray.cli import main; main()"


def make_gallery(again: bool = False) -> None:
    """Run the commands of docs/gallery.md and copy the reports that they write; not if that was done before.

    The commands run in build/gallery, and what they store stays there, so that a change of one runs little else.
    """
    text, work, out = (DOCS / "gallery.md").read_text(encoding="utf-8"), ROOT / "build" / "gallery", DOCS / "gallery"
    [(title, file)] = re.findall(r'^```toml title="([^"]+)"\n(.*?)^```', text, re.MULTILINE | re.DOTALL)
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]
    reports = [words[-1] for words in lines if "--out" in words]
    made, digest = work / "made", hashlib.sha256(repr((file, lines)).encode()).hexdigest()
    there = made.exists() and made.read_text() == digest and all((out / name).exists() for name in reports)
    if there and not again:
        return
    print("the gallery's runs, a minute or two ...", flush=True)
    work.mkdir(parents=True, exist_ok=True)
    (work / title).write_text(file, encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    for words in lines:
        done = subprocess.run(
            [sys.executable, "-c", _MOSAIC, *words[1:]], cwd=work, env=environment, capture_output=True, text=True
        )
        if done.returncode:
            sys.exit(f"{shlex.join(words)}: {done.stderr}")
    out.mkdir(exist_ok=True)
    for name in reports:
        shutil.copy(work / name, out / name)
    made.write_text(digest)


# --- files -----------------------------------------------------------------------------------------------------------


def write(folder: Path, files: Mapping[str, str | bytes]) -> None:
    """Make ``folder`` hold ``files``, contents by name, and no others; write only files that change."""
    wanted = {folder / name: text.encode() if isinstance(text, str) else text for name, text in files.items()}
    for stale in {path for path in folder.rglob("*") if path.is_file()} - wanted.keys():
        stale.unlink()
    for path, content in wanted.items():
        if not path.exists() or path.read_bytes() != content:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)


if __name__ == "__main__":
    write(DOCS / "reference", {"knobs.md": knobs_page(), "commands.md": commands_page()} | dict(code_pages()))
    write(DOCS / "notebooks", dict(notebook_pages()))
    if "--without-gallery" not in sys.argv[1:]:
        make_gallery(again="--gallery" in sys.argv[1:])
