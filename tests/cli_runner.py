"""Call the `mosaic` command in this process, and check its one-line errors."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from mosaic_ray.cli.commands import mosaic
from mosaic_ray.core.errors import RequestError

REPO = Path(__file__).resolve().parents[1]


def ask(*words: str, **options: object) -> Result:
    """Call the command in this process."""
    return CliRunner().invoke(mosaic, words, **options)


def refusal(result: Result | subprocess.CompletedProcess[str], status: int = 2) -> str:
    """Check that ``result`` is a one-line error with this exit status; return the line."""
    code = result.exit_code if isinstance(result, Result) else result.returncode
    assert code == status, (code, result.stderr, getattr(result, "exception", None))
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.startswith("mosaic: ")
    return result.stderr


def refused_by(call: Callable[..., object], *args: object) -> str:
    """Return the one-line ``RequestError`` of ``call``."""
    with pytest.raises(RequestError) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)
