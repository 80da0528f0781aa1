"""A click group that ends every failure in one line with the right exit status."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import sys
from collections.abc import Sequence
from typing import Any

import click

from ..core import errors
from ..core.errors import RequestError, RunError, neighbours


class CommandGroup(click.Group):
    """A group that ends every failure in one line on standard error.

    Exit status: 2 a wrong request, 1 a failed run, 130 interrupted.
    """

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command as click does; suggest close names where it is unknown."""
        if not args[0].startswith("-") and args[0] not in self.commands:
            raise RequestError(f'unknown command "{args[0]}"; {neighbours(args[0], self.commands)}')
        return super().resolve_command(ctx, args)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse as click does; print the help where there are no arguments."""
        if not args:
            click.echo(ctx.get_help())
            ctx.exit()
        return super().parse_args(ctx, args)

    def main(  # type: ignore[override]  # click overloads it by standalone_mode, fixed here
        self, args: Sequence[str] | None = None, prog_name: str | None = None, **extra: Any
    ) -> Any:
        """Parse the arguments, run the command and exit."""
        words = list(sys.argv[1:] if args is None else args)
        resumes = words[:1] in (["run"], ["sweep"], ["compare"], ["experiment"])
        errors.resume = f"to resume: {shlex.join(resume_command(words))}"
        interrupts = _Interrupts(f"mosaic: interrupted{f'; {errors.resume}' if resumes else ''}")
        try:
            extra |= {"standalone_mode": False, "obj": words}
            status = super().main(words, prog_name or "mosaic", **extra) or 0
        except click.ClickException as error:
            status = _complain(error.format_message(), 2)
        except RequestError as error:
            status = _complain(str(error), 2)
        except RunError as error:
            status = _complain("; ".join([str(error), *getattr(error, "__notes__", [])]), 1)
        except (click.Abort, KeyboardInterrupt):
            interrupts.told = True
            click.echo(interrupts.line, err=True)
            status = 130
        sys.exit(status)


class _Interrupts:
    """The handler of Ctrl-C, of a scheduler's SIGTERM and of a terminal that closes (SIGHUP, unless under nohup).

    The first one raises ``KeyboardInterrupt``. Another one, while the command tidies up, ends the process at once: with
    ``line`` unless that was printed, and without a traceback.
    """

    def __init__(self, line: str) -> None:
        self.line, self.told, self._came = line, False, False
        with contextlib.suppress(ValueError):  # not the main thread: no signal arrives there
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(number) != signal.SIG_IGN:
                    signal.signal(number, self)

    def __call__(self, number: int, frame: Any) -> None:
        if not self._came:
            self._came = True
            raise KeyboardInterrupt
        if not self.told:
            os.write(2, f"{self.line}\n".encode())
        os._exit(130)


def _complain(message: str, status: int) -> int:
    click.echo(f"mosaic: error: {' '.join(message.split())}", err=True)
    return status


def resume_command(words: Sequence[str]) -> list[str]:
    """Return the command line that resumes ``words``, with the program as the user typed it."""
    script = sys.argv[0]
    if os.path.basename(script) != "mosaic":  # `python -m mosaic_ray`, `python cli.py`
        program = sys.orig_argv[: len(sys.orig_argv) - len(sys.argv) + 1]
    else:
        program = ["mosaic" if shutil.which("mosaic") == os.path.abspath(script) else script]
    return [*program, *(w for w in words if w != "--fresh")]
