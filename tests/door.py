"""The command as a person meets it: asked in this process, and refused in one line."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from mosaic_ray.cli import commands as door
from mosaic_ray.core.errors import RequestError

REPO = Path(__file__).resolve().parents[1]


def ask(*words: str, **options: object) -> Result:
    """The command in this process."""
    return CliRunner().invoke(door.mosaic, words, **options)


def refusal(result: Result | subprocess.CompletedProcess[str], status: int = 2) -> str:
    """The one line of a refusal."""
    code = result.exit_code if isinstance(result, Result) else result.returncode
    assert code == status, (code, result.stderr, getattr(result, "exception", None))
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.startswith("mosaic: ")
    return result.stderr


def refused_by(call: Callable[..., object], *args: object) -> str:
    """The one line that ``call`` refuses with."""
    with pytest.raises(RequestError) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)
