"""The two ways in which a request ends badly, each with an address.

``RequestError`` is the user's to mend (exit status 2); ``RunError`` is a failure met while computing (exit status 1).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class RequestError(Exception):
    """A wrong request: one line that names the knob or file, its value, and what it may be."""


class RunError(Exception):
    """A run that failed: carries the stage, and where they apply the round and the client."""

    def __init__(
        self,
        message: str,
        *,
        stage: str | None = None,
        round: int | None = None,  # the field's word; shadows a builtin on purpose
        client: int | None = None,
    ) -> None:
        self.stage, self.round, self.client = stage, round, client
        self.message = message
        super().__init__(message)

    def __reduce__(self):
        return _run_error, (self.message, self.stage, self.round, self.client)

    def at(self, stage: str) -> RunError:
        """The same failure with its stage, where that was not known yet."""
        return RunError(self.message, stage=self.stage or stage, round=self.round, client=self.client)

    def __str__(self) -> str:
        named = (("stage", self.stage), ("round", self.round), ("client", self.client))
        where = ", ".join(f"{word} {value}" for word, value in named if value is not None)
        return f"{where}: {self.message}" if where else self.message


def _run_error(message: str, stage: str | None, round: int | None, client: int | None) -> RunError:
    return RunError(message, stage=stage, round=round, client=client)


def neighbours(word: str, known: Iterable[str], limit: int = 3) -> str:
    """``'did you mean "x" or "y"?'``, or the whole list where nothing is near."""
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
    return f"there are {len(known)}; `mosaic show demo` lists them"
