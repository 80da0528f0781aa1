"""Code of the user's own, named as ``module:function``: found on Python's path or in the working directory, and blamed,
where it fails, by its own file and line.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import os
import sys
import traceback
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from ..core.errors import RequestError, neighbours


@contextlib.contextmanager
def users_code(what: str) -> Iterator[None]:
    """Runs the user's code: whatever it raises becomes a ``RequestError`` of one line that begins with ``what``.

    The working directory counts for imports. Standard output is kept for results: prints go beside it.
    """
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except (Exception, SystemExit) as error:
        _blame(what, error)
    finally:
        sys.path.remove(here)


def load_function(what: str, word: str) -> Callable[..., Any]:
    """The function that ``word``, module:function, names; to be called inside ``users_code`` too."""
    module, _, function = word.partition(":")
    if not all(part.isidentifier() for part in (*module.split("."), function)):
        raise RequestError(f"{what}: it takes a name or module:function")
    with users_code(what):
        return function_of(what, import_module(what, module), function)


def function_of(what: str, module: types.ModuleType, function: str) -> Callable[..., Any]:
    """What ``module`` can call under the name ``function``."""
    found = getattr(module, function, None)
    if not callable(found):
        others = [name for name, value in vars(module).items() if isinstance(value, types.FunctionType)]
        near = f"; {neighbours(function, others)}" if others else ""
        raise RequestError(f"{what}: no function {function}() there{near}")
    return found


def import_module(what: str, name: str) -> types.ModuleType:
    """The module ``name``; inside ``users_code``."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and f"{name}.".startswith(f"{error.name}."):  # not one that it asks for in turn
            raise RequestError(
                f'{what}: no module "{error.name}" on Python\'s path or in the working directory'
            ) from None
        raise


def source_digest(word: str) -> str:
    """20 hexadecimal digits that change with the file of ``word``, module:function; "" for a name without a colon.

    What that file imports in turn is not read: after a change there it takes another name, or ``--fresh``.
    """
    name, colon, _ = word.partition(":")
    if not colon:
        return ""
    what = f"model.classifier = {word}"
    with users_code(what):
        file = getattr(import_module(what, name), "__file__", None)
    if file is None:
        raise RequestError(f"{what}: {name} is no file; name the module that has the function")
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()[:20]


def _blame(what: str, error: BaseException) -> NoReturn:
    """``error`` in one line, with the user's own file and line: where it begins, not the library it ends in."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not _is_machinery(frame.filename)]
    reason = str(error)
    if isinstance(error, RequestError) and not frames:
        raise error  # this package's own word, not the user's
    if frames:
        file, line = [(f.filename, f.lineno) for f in frames if f.filename == frames[0].filename][-1]
    elif isinstance(error, SyntaxError):
        file, line, reason = error.filename, error.lineno, error.msg
    else:
        file, line = None, None
    where = "".join([f"{file}, " if file else "", f"line {line}: " if line else ""])
    reason = " ".join([f"{type(error).__name__}:", *reason.split()])
    raise RequestError(f"{what}: {where}{reason}") from None


def _is_machinery(file: str) -> bool:
    """Whether ``file`` belongs to what calls the user's code: this package, Python's importer, torch's modules."""
    package = os.path.dirname(os.path.dirname(__file__))
    torch = [os.path.dirname(sys.modules["torch"].__file__ or "")] if "torch" in sys.modules else []
    callers = [package, os.path.dirname(importlib.__file__), *torch]
    return file.startswith("<") or any(file.startswith(caller + os.sep) for caller in callers)
