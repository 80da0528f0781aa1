"""A terminal and a clock for tests of live views."""

from __future__ import annotations

import io


class Terminal(io.StringIO):
    """A stream that says whether it is a terminal, and counts its flushes."""

    def __init__(self, tty: bool = True) -> None:
        super().__init__()
        self.tty, self.flushes = tty, 0

    def isatty(self) -> bool:
        return self.tty

    def flush(self) -> None:
        self.flushes += 1
        super().flush()


class Clock:
    """Stands still until a test sets ``now`` (seconds)."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now
