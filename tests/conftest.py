"""Fixtures that several test modules share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder of real data sets; tests that need it skip where it is absent."""
    root = Path(os.environ.get("MOSAIC_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")
    if not (root / "FashionMNIST").is_dir():
        pytest.skip(f"no real data under {root} (set MOSAIC_DATA)")
    return root
