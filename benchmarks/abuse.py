"""Attempts to break it, counted: bad requests, hostile stored files, random kills.

    PYTHONPATH=tests python benchmarks/abuse.py --files 60 --kills 100 --seed 0

- **Bad requests** are those of ``tests/bad_requests.py``, each a process of its own. The right end: status 2, and one
  line on standard error.
- **Hostile files**: a stored file, folder, manifest or part of a tiny run is changed as ``tests/hostile.py`` does, at
  random. Then every ``mosaic store`` command looks at the storage, and the run is asked for again. The right end: each
  command succeeds or says one line, and the run has equal numbers.
- **Random kills** are those of ``faults.py``: a process of a run or of a sweep gets SIGKILL at a random moment, and the
  same command is given again. The right end: equal numbers.

An attempt that takes longer than ``DEADLINE`` counts as one that waits for ever. Memory is the most that the process
of a request took. Prints a line for every attempt that ends otherwise, and a table.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import faults
import hostile
from bad_requests import BAD, FILES
from cli_runner import ask

from mosaic_ray.config.resolve import KNOBS

#: Seconds for one attempt.
DEADLINE = 300


class WaitsForEver(Exception):
    """An attempt took longer than ``DEADLINE``."""


@contextmanager
def deadline() -> Iterator[None]:
    """Raise ``WaitsForEver`` in the block after ``DEADLINE`` seconds."""

    def waits(*_: object) -> None:
        raise WaitsForEver

    before = signal.signal(signal.SIGALRM, waits)
    signal.alarm(DEADLINE)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def bad_requests(count: int, draw: random.Random) -> Iterator[tuple[list[str], list[str]]]:
    """Yield bad requests and words of their one line: the listed ones, and nonsense for knobs that are drawn."""
    for case in BAD[:count]:
        words, parts = getattr(case, "values", case)
        yield list(words), list(parts)
    numbers = [name for name, knob in KNOBS.items() if knob.kind in (int, float)]
    for _ in range(count - len(BAD)):
        name, word = draw.choice(numbers), draw.choice(["1e26", "-1e26", "inf", "nan", "x", "", "[1]", "\x1b[2J"])
        yield ["run", "--dry-run", "--set", f"{name}={word}"], [name]


def request(words: list[str], parts: list[str], folder: Path) -> tuple[str, int]:
    """Give one bad request in ``folder``; return how it ended and the peak of its memory in bytes."""
    command = [sys.executable, "-m", "mosaic_ray", *words]
    where = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryFile() as said:
        running = subprocess.Popen(
            command, cwd=folder, env=where, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=said
        )
        try:
            with deadline():
                _, status, used = os.wait4(running.pid, 0)
        except WaitsForEver:
            running.kill()
            _, _, used = os.wait4(running.pid, 0)
            return "waits for ever", used.ru_maxrss * 1024
        said.seek(0)
        lines = [line for line in said.read().decode().splitlines() if "warning:" not in line]
    right = os.waitstatus_to_exitcode(status) == 2 and len(lines) == 1 and all(part in lines[0] for part in parts)
    end = "one line" if right else f"status {os.waitstatus_to_exitcode(status)}: {lines[-1:]}"
    return end, used.ru_maxrss * 1024


def command_ends(words: list[str]) -> bool:
    """Whether a command, called in this process, succeeds or ends in one line."""
    done = ask(*words)
    lines = [line for line in done.stderr.splitlines() if "warning:" not in line]
    return (done.exception is None or isinstance(done.exception, SystemExit)) and len(lines) <= (done.exit_code > 0)


def hostile_file(draw: random.Random, stored: Path, numbers: Any, root: Path) -> tuple[str, str]:
    """Change one stored file at random; return what was done to which, and how the commands and the run ended."""
    shutil.copytree(stored / draw.choice(hostile.STATES), root)
    kind = draw.choice(["file", "folder", "manifest", "part"])
    if kind == "file":
        path, change = draw.choice(hostile.stored_files(root)), draw.choice(sorted(hostile.CHANGES))
        hostile.CHANGES[change](path, draw)
    elif kind == "folder":
        places = [*sorted(root.glob("objects/*")), *root.glob("checkpoints/*"), root / "runs" / "one"]
        path, change = draw.choice(places), draw.choice(sorted(hostile.FOLDER_CHANGES))
        hostile.FOLDER_CHANGES[change](path, draw)
    else:
        path = draw.choice(sorted(root.rglob("manifest.json")))
        change = (hostile.change_manifest if kind == "manifest" else hostile.change_part)(path, draw)
    what = f"{kind} {path.relative_to(root)}: {change}"
    try:
        with deadline():
            for words in (["verify"], ["ls"], ["gc", "--dry-run", "--older-than", "0s"]):
                if not command_ends(["store", *words, "--storage", str(root)]):
                    return what, f"store {words[0]}: more than one line"
            return what, "equal numbers" if hostile.run_in(root) == numbers else "OTHER NUMBERS"
    except WaitsForEver:
        return what, "waits for ever"
    except Exception as error:
        return what, f"{type(error).__name__}: {error}"


@click.command()
@click.option("--requests", default=60, show_default=True)
@click.option("--files", default=60, show_default=True)
@click.option("--kills", default=0, show_default=True, help="Minutes each.")
@click.option("--seed", default=0, show_default=True)
def main(requests: int, files: int, kills: int, seed: int) -> None:
    """Run it."""
    table: dict[str, Counter[bool]] = {}
    notes = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file, text in FILES.items():
            (folder / file).write_text(text)
        found, most = table.setdefault("bad requests", Counter()), 0
        for words, parts in bad_requests(requests, random.Random(seed)):
            end, memory = request(words, parts, folder)
            found[end == "one line"] += 1
            most = max(most, memory)
            if end != "one line":
                print(f"request {words}: {end}", flush=True)
        notes["bad requests"] = f"one line, status 2; peak memory {most / 2**30:.2f} GiB"

        found, began = table.setdefault("hostile files", Counter()), time.monotonic()
        numbers = hostile.make_storages(folder / "stored")
        mine = folder / "outside" / "mine.txt"  # links lead to this folder, and nothing may be written there
        mine.parent.mkdir()
        mine.write_text("mine")
        for number in range(files):
            root = folder / f"tried-{number}"
            what, end = hostile_file(random.Random(f"{seed} {number}"), folder / "stored", numbers, root)
            if [path.name for path in mine.parent.iterdir()] != ["mine.txt"] or mine.read_text() != "mine":
                end = "it wrote outside of the storage"
            found[end == "equal numbers"] += 1
            shutil.rmtree(root)
            if end != "equal numbers":
                print(f"{what}: {end}", flush=True)
        notes["hostile files"] = "equal numbers, commands with one line at most"
        print(f"hostile files: {time.monotonic() - began:.0f} s", flush=True)
    if kills:
        found = table.setdefault("random kills", Counter())
        for (_, what, verdict), count in faults.kill_at_random(kills, seed).items():
            if not what.endswith(faults.TOO_LATE):
                found[verdict == "equal"] += count
        notes["random kills"] = "equal numbers after the same command"
    print("\n| attempts | tried | right end | other | what the right end is |\n|---|---|---|---|---|")
    for kind, found in table.items():
        print(f"| {kind} | {found.total()} | {found[True]} | {found[False]} | {notes[kind]} |")


if __name__ == "__main__":
    main()
