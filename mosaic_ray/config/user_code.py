"""Load the user's own code, named ``module:name`` or ``FILE.py:name``, from Python's path or the working directory.

Where it fails, the error names the user's own file and line.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import os
import re
import sys
import types
from collections.abc import Iterator
from typing import Any, NoReturn

from ..core.errors import RequestError, neighbours


@contextlib.contextmanager
def users_code(what: str) -> Iterator[None]:
    """Run the user's code, and turn an exception into a ``RequestError`` of one line that begins with ``what``.

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


def load_object(what: str, word: str, *, function: bool = False) -> Any:
    """Return the object that ``word`` names: ``package.module:name``, or ``path/to/file.py:name``.

    A relative path counts from the working directory, then from the directories of Python's path: Ray puts the
    directory that a command was started in there. If the object is callable, call it inside ``users_code`` too.
    Raises ``RequestError``, which begins with ``what``, for a malformed word, an unknown name (with ``function``: of
    something callable) and a module that fails.
    """
    kind = "function" if function else "name"
    source, name = _split(what, word, kind)
    with users_code(what):
        module = _load_source(what, source)
        found = getattr(module, name, None)
    if found is None or (function and not callable(found)):
        others = [n for n, o in vars(module).items() if n[0] != "_" and (not function or inspect.isfunction(o))]
        missing = f"function {name}()" if function else f'"{name}"'
        raise RequestError(f"{what}: no {missing} there" + (f"; {neighbours(name, others)}" if others else ""))
    return found


def digest_of(word: str, what: str = "") -> str:
    """Return 20 hexadecimal digits that change with the file of ``word``; "" for a name without a colon.

    ``word`` is as in ``load_object``; errors begin with ``what``, or else with ``word``. The files that this file
    imports are not read: after a change there, rename it or take ``--fresh``.
    """
    what = what or word
    if ":" not in word:
        return ""
    source, _ = _split(what, word)
    with users_code(what):
        file = getattr(_load_source(what, source), "__file__", None)
    if file is None:
        raise RequestError(f"{what}: {source} is no file; name the module that has the function")
    import hashlib
    from pathlib import Path

    return hashlib.sha256(Path(file).read_bytes()).hexdigest()[:20]


def load_file(what: str, path: str) -> types.ModuleType:
    """Return the module of the file ``path``; call it inside ``users_code``.

    The module's name in ``sys.modules`` holds the file's stem and digest, so that its classes can be pickled, and a
    file that changed is another module. No bytecode is read or written.
    """
    import hashlib
    from pathlib import Path

    places = [path, *(os.path.join(folder, path) for folder in sys.path)]
    path = next(filter(os.path.isfile, places), path)
    try:
        source = Path(path).read_bytes()
    except OSError as error:
        where = what if what.endswith(path) else f"{what}: {path}"
        raise RequestError(f"{where}: {error.strerror}") from None
    name = f"user_{re.sub(r'[^a-zA-Z0-9_]', '_', Path(path).stem)}_{hashlib.sha256(source).hexdigest()[:20]}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None, path
        module = sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
        try:
            exec(compile(source, path, "exec", dont_inherit=True), vars(module))
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def is_file_module(module: types.ModuleType) -> bool:
    """Return whether ``load_file`` made the module, so that other processes cannot import it by name."""
    return module.__name__.startswith("user_")


def _split(what: str, word: str, kind: str = "name") -> tuple[str, str]:
    """Return the module or file, and the name in it."""
    source, _, name = word.rpartition(":")
    if not (name.isidentifier() and (source.endswith(".py") or all(map(str.isidentifier, source.split("."))))):
        raise RequestError(f"{what}: it takes a name, module:{kind} or FILE.py:{kind}")
    return source, name


def _load_source(what: str, source: str) -> types.ModuleType:
    if source.endswith(".py"):
        return load_file(what, source)
    try:
        return importlib.import_module(source)
    except ModuleNotFoundError as error:
        if error.name and f"{source}.".startswith(f"{error.name}."):  # not one that it asks for in turn
            missing = f'no module "{error.name}" on Python\'s path or in the working directory'
            raise RequestError(f"{what}: {missing}") from None
        raise


def _blame(what: str, error: BaseException) -> NoReturn:
    """``error`` in one line, with the user's own file and line: where it begins, not the library it ends in."""
    import traceback  # here, so that the command starts quickly

    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not _is_machinery(frame.filename)]
    file, line, reason = None, None, str(error)
    if isinstance(error, RequestError) and not frames:
        raise error  # this package's own word, not the user's
    if frames:
        file, line = [(f.filename, f.lineno) for f in frames if f.filename == frames[0].filename][-1]
    elif isinstance(error, SyntaxError):
        file, line, reason = error.filename, error.lineno, error.msg
    where = "".join([f"{file}, " if file else "", f"line {line}: " if line else ""])
    reason = " ".join([f"{type(error).__name__}:", *reason.split()])
    raise RequestError(f"{what}: {where}{reason}") from None


def _is_machinery(file: str) -> bool:
    """Whether ``file`` belongs to a caller of the user's code: this package, Python's importer, torch's modules."""
    package = os.path.dirname(os.path.dirname(__file__))
    torch = [os.path.dirname(sys.modules["torch"].__file__ or "")] if "torch" in sys.modules else []
    callers = [package, os.path.dirname(importlib.__file__), *torch]
    return file.startswith("<") or any(file.startswith(caller + os.sep) for caller in callers)
