"""Fixtures of the strategies' tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import stripes_dataset
from strategy_runs import NETWORKS


@pytest.fixture(autouse=True)
def stripes_as_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mosaic_ray.data.load.load_dataset", lambda config: stripes_dataset())


@pytest.fixture
def networks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make ``strategy_networks:plain`` and ``:dropping`` networks that a configuration can name."""
    (tmp_path / "strategy_networks.py").write_text(NETWORKS)
    monkeypatch.chdir(tmp_path)
