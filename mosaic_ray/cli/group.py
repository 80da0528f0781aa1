"""A click group that ends every failure in one line with the right exit status."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shlex
import signal
import sys
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import click

from ..core import errors
from ..core.errors import RequestError, RunError, neighbours
from ..core.text import visible

#: Options of which an empty value would mean that they are absent.
WITHOUT_IT = ("address", "cluster", "config", "from", "out", "output", "png", "preset", "space", "storage")


class CommandGroup(click.Group):
    """A group that ends every failure in one line on standard error.

    Exit status: 2 a wrong request, 1 a failed run or a fault that nobody foresaw, 130 interrupted.
    """

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command as click does; suggest close names where it is unknown."""
        if not args[0].startswith("-") and args[0] not in self.commands and not ctx.resilient_parsing:
            raise RequestError(f'unknown command "{args[0]}"; {neighbours(args[0], self.commands)}')
        return super().resolve_command(ctx, args)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse as click does; print the help where there are no arguments."""
        if not args and not ctx.resilient_parsing:  # as when a shell completes
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
        unforeseen = None
        try:
            _refuse_empty(words)
            _refuse_lost_folder(words)
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
            say(interrupts.line)
            status = 130
        except Exception as error:
            status, unforeseen = 1, error
        if (full := _flush_stdout(unforeseen)) and status != 2:
            status = _complain(f"standard output: {full}", status or 1)
        elif unforeseen:
            _complain(_kept(unforeseen), status)
        _spare_stderr()
        sys.exit(status)


class _Interrupts:
    """The handler of Ctrl-C, of a scheduler's SIGTERM and of a terminal that closes (SIGHUP, unless under nohup).

    The first one raises ``KeyboardInterrupt``. Another one, while the command tidies up, ends the process at once, and
    those that it started: with ``line`` unless that was printed, and without a traceback.
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
            with contextlib.suppress(OSError):
                os.write(2, f"{self.line}\n".encode())
        with contextlib.suppress(Exception):
            import psutil

            for child in psutil.Process().children(recursive=True):
                child.kill()
        os._exit(130)


def _complain(message: str, status: int) -> int:
    say(f"mosaic: error: {visible(' '.join(message.split()))}")
    return status


def say(line: str) -> None:
    with contextlib.suppress(OSError):  # nobody reads it
        click.echo(line, err=True)


def _refuse_empty(words: Sequence[str]) -> None:
    """Raise ``RequestError`` for an option with an empty value, as an unset variable of a shell leaves it."""
    for option, value in pairwise([*words, "-"]):
        name = re.fullmatch(r"--([\w-]+)(=?)", option)
        if name and (name[2] or not value) and name[1] in WITHOUT_IT:
            raise RequestError(f"--{name[1]} '': it is empty; give a value, or leave the option out")


def _refuse_lost_folder(words: Sequence[str]) -> None:
    """Raise ``RequestError`` where the working directory was removed: neither torch nor Ray can start there."""
    try:
        os.getcwd()
    except FileNotFoundError:
        if "--help" not in words:
            raise RequestError("the working directory was removed; change to another one") from None


def _flush_stdout(earlier: Exception | None) -> str:
    """Write what is left of standard output; return why that fails, empty if it does not or if its reader went away.

    ``earlier``: an error that ended the command, and may have been that of a print.
    """
    try:
        sys.stdout.flush()
        if isinstance(earlier, OSError) and _frames(earlier) & {"echo", "_write_buffer"}:  # of click, of rich
            raise earlier
    except OSError as error:
        with contextlib.suppress(OSError, ValueError):  # Python tries once more at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return "" if error.errno == errno.EPIPE else os.strerror(error.errno or errno.EIO)
    except (AttributeError, ValueError):  # it was closed
        pass
    return ""


def _frames(error: Exception) -> set[str]:
    import traceback  # here, so that the command starts quickly

    return {frame.name for frame in traceback.extract_tb(error.__traceback__)}


def _spare_stderr() -> None:
    """Drop what standard error cannot take; Python would try once more at its end, and exit with status 120."""
    try:
        sys.stderr.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def _kept(error: Exception) -> str:
    """Write the traceback of an ``error`` that nobody foresaw into a new folder; return a line that names the file."""
    what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    with contextlib.suppress(OSError, MemoryError):
        import tempfile
        import traceback

        path = os.path.join(tempfile.mkdtemp(prefix="mosaic-"), "error.log")
        with open(path, "w", encoding="utf-8", errors="backslashreplace") as file:
            traceback.print_exception(error, file=file)
        what += f"; log: {path}"
    return what


def resume_command(words: Sequence[str]) -> list[str]:
    """Return the command line that resumes ``words``, with the program as the user typed it."""
    import shutil

    script = sys.argv[0]
    if os.path.basename(script) != "mosaic":  # `python -m mosaic_ray`, `python cli.py`
        program = sys.orig_argv[: len(sys.orig_argv) - len(sys.argv) + 1]
    else:
        program = ["mosaic" if shutil.which("mosaic") == os.path.abspath(script) else script]
    return [*program, *(w for w in words if w != "--fresh")]
