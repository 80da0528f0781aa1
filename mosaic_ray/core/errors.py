"""Errors that end a command: ``RequestError`` (exit status 2) and ``RunError`` (exit status 1)."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

#: How to go on after a process that ends at once. The command line puts its own command here.
resume = "the same command resumes"


class RequestError(Exception):
    """A wrong request of the user: one line that names the option, knob or file, its value, and allowed values."""


class Interrupted(KeyboardInterrupt):
    """Raised from Python in place of ``KeyboardInterrupt``: one line that says how to go on, alone in a notebook."""

    def _render_traceback_(self) -> list[str]:  # IPython's way to show an exception
        return [str(self)]


class RunError(Exception):
    """A failure of a run, with its stage and, where they apply, its round and client."""

    def __init__(
        self, message: str, *, stage: str | None = None, round: int | None = None, client: int | None = None
    ) -> None:
        self.stage, self.round, self.client = stage, round, client
        self.message = message
        super().__init__(message)

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(RunError, stage=self.stage, round=self.round, client=self.client), (self.message,)

    def at(self, stage: str) -> RunError:
        """Return the same error with ``stage``, unless it has a stage already."""
        return RunError(self.message, stage=self.stage or stage, round=self.round, client=self.client)

    def __str__(self) -> str:
        named = (("stage", self.stage), ("round", self.round), ("client", self.client))
        where = ", ".join(f"{word} {value}" for word, value in named if value is not None)
        return f"{where}: {self.message}" if where else self.message


class OutOfGpuMemory(RunError):
    """A client's work did not fit into its share of a GPU."""

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(OutOfGpuMemory, stage=self.stage, round=self.round, client=self.client), (self.message,)

    def at(self, stage: str) -> OutOfGpuMemory:
        """Add the stage as ``RunError.at`` does, keeping the type: a sweep runs the trial again."""
        return OutOfGpuMemory(self.message, stage=self.stage or stage, round=self.round, client=self.client)


def neighbours(word: str, known: Iterable[str], lister: str = "`mosaic show demo`", limit: int = 3) -> str:
    """Return ``'did you mean "x" or "y"?'`` with up to ``limit`` names close to ``word``, else a list of all names."""
    import difflib  # here, so that the command starts quickly

    known = sorted(known)
    last = {name.rsplit(".", 1)[-1]: name for name in known}
    near = difflib.get_close_matches(word, known, limit, 0.6)
    near += [
        last[n] for n in difflib.get_close_matches(word.rsplit(".", 1)[-1], last, limit, 0.7) if last[n] not in near
    ]
    if near:
        return "did you mean " + " or ".join(f'"{n}"' for n in near[:limit]) + "?"
    if len(known) <= 24:
        return "it may be " + ", ".join(known)
    return f"there are {len(known)}; {lister} lists them"
