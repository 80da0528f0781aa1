"""Stored files that somebody else changed: a run ends with the same numbers, and a command in success or in one line.

A run needs nothing that is stored, so the numbers must be equal whatever was done to it.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cli_runner import ask
from hostile import CHANGES, FOLDER_CHANGES, STATES, change_manifest, change_part, make_storages, run_in, stored_files
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from mosaic_ray.core.errors import RequestError
from mosaic_ray.report.load import read_run

#: Seconds after which a command counts as one that waits for ever.
FOR_EVER = 300
#: Bytes of address space that damage may cost.
MORE_MEMORY = 3 << 30

EXAMPLES = 8
few = settings(max_examples=EXAMPLES, suppress_health_check=list(HealthCheck), derandomize=True)
many = settings(max_examples=300, suppress_health_check=list(HealthCheck))
a_state, a_seed = st.sampled_from(STATES), st.integers(0, 2**32)

Stored = tuple[Path, tuple[Any, ...]]


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stored]:
    """A folder with the storages ``STATES``, and the numbers of the run; nothing is synced to the disk.

    The process gets ``MORE_MEMORY`` at most.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        folder = tmp_path_factory.mktemp("stored")
        numbers, before = make_storages(folder), resource.getrlimit(resource.RLIMIT_AS)
        now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + MORE_MEMORY, before[1]))
        yield folder, numbers
        resource.setrlimit(resource.RLIMIT_AS, before)


@contextlib.contextmanager
def copy_of(stored: Stored, state: str) -> Iterator[Path]:
    """A copy of a storage beside a folder that must not change; the block may not wait for ever."""

    def waits(*_: object) -> None:
        raise AssertionError("it waits for ever")

    root, before = stored[0] / "tried" / "storage", signal.signal(signal.SIGALRM, waits)
    signal.alarm(FOR_EVER)
    try:
        shutil.copytree(stored[0] / state, root)
        mine = root.parent / "outside" / "mine.txt"
        mine.parent.mkdir()
        mine.write_text("mine")
        yield root
        assert [path.name for path in mine.parent.iterdir()] == ["mine.txt"] and mine.read_text() == "mine"
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        shutil.rmtree(root.parent)


def one_line(*words: str) -> str:
    """Call a command that ends with success, or with status 1 or 2; return its output, where an error is one line."""
    done = ask(*words)
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    assert done.exit_code in (0, 1, 2)
    errors = [line for line in done.stderr.splitlines() if not line.startswith("warning: ")]
    assert len(errors) <= (done.exit_code > 0) and "Traceback" not in done.stderr, done.stderr
    return done.output


def check(root: Path, numbers: tuple[Any, ...]) -> None:
    """Call every command on a changed storage, and the run again."""
    one_line("store", "verify", "--storage", str(root))
    one_line("store", "ls", "--storage", str(root))
    one_line("store", "gc", "--dry-run", "--older-than", "0s", "--storage", str(root))
    with contextlib.suppress(RequestError):
        run = read_run(root / "runs" / "one")
        for what in (lambda: run.generators, run.samples, run.progress, lambda: run.confusion("final")):
            with contextlib.suppress(LookupError):
                what()
    said: list[str] = []
    assert run_in(root, said.append) == numbers, said
    assert all("\n" not in line for line in said)
    assert run_in(root, said.append) == numbers
    found = ask("store", "verify", "--storage", str(root), "--json")
    assert not {name for name in json.loads(found.stdout)["damaged"] if "damaged-" not in name} or found.exit_code


def changed_file(stored: Stored, state: str, change: str, seed: int) -> None:
    draw = random.Random(seed)
    with copy_of(stored, state) as root:
        path = draw.choice(stored_files(root))
        note(f"{change}: {path.relative_to(root)}")
        CHANGES[change](path, draw)
        check(root, stored[1])


def changed_folder(stored: Stored, state: str, change: str, seed: int) -> None:
    draw = random.Random(seed)
    with copy_of(stored, state) as root:
        path = draw.choice([*sorted(root.glob("objects/*")), *root.glob("checkpoints/*"), root / "runs" / "one"])
        note(f"{change}: {path.relative_to(root)}")
        FOLDER_CHANGES[change](path, draw)
        check(root, stored[1])


def changed_and_sealed(stored: Stored, state: str, change: Callable[[Path, random.Random], str], seed: int) -> None:
    draw = random.Random(seed)
    with copy_of(stored, state) as root:
        path = draw.choice(sorted(root.rglob("manifest.json")))
        note(f"{path.relative_to(root)}: {change(path, draw)}")
        check(root, stored[1])


@few
@given(a_state, st.sampled_from(sorted(CHANGES)), a_seed)
def test_a_file_that_was_changed(stored: Stored, state: str, change: str, seed: int) -> None:
    changed_file(stored, state, change, seed)


@few
@given(a_state, st.sampled_from(sorted(FOLDER_CHANGES)), a_seed)
def test_a_folder_that_was_replaced(stored: Stored, state: str, change: str, seed: int) -> None:
    changed_folder(stored, state, change, seed)


@few
@given(a_state, a_seed)
def test_a_manifest_that_was_changed_and_sealed(stored: Stored, state: str, seed: int) -> None:
    changed_and_sealed(stored, state, change_manifest, seed)


@few
@given(a_state, a_seed)
def test_a_part_that_was_changed_and_sealed(stored: Stored, state: str, seed: int) -> None:
    changed_and_sealed(stored, state, change_part, seed)


@pytest.mark.slow
@many
@given(st.data())
def test_hundreds_of_changes(stored: Stored, data: st.DataObject) -> None:
    kinds: list[Callable[[], None]] = [
        lambda: changed_file(stored, state, data.draw(st.sampled_from(sorted(CHANGES))), seed),
        lambda: changed_folder(stored, state, data.draw(st.sampled_from(sorted(FOLDER_CHANGES))), seed),
        lambda: changed_and_sealed(stored, state, change_manifest, seed),
        lambda: changed_and_sealed(stored, state, change_part, seed),
    ]
    state, seed = data.draw(a_state), data.draw(a_seed)
    data.draw(st.sampled_from(kinds))()
