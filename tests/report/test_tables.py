"""The closing table of a run and the table of a partition."""

from __future__ import annotations

import io
import shlex
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from mosaic_ray.report.tables import closing_table, partition_table

REPO = Path(__file__).resolve().parents[2]


SUMMARY = {
    "method": "mosaic",
    "seed": 0,
    "accuracy": {"initial": 0.5, "teacher": None, "distilled": 0.6, "final": 0.75, "control": 0.7},
}


def lines_of(renderable: object) -> list[str]:
    """Return the output for a pipe: 80 columns, no terminal."""
    out = io.StringIO()
    Console(file=out, width=80, markup=False, emoji=False, highlight=False).print(renderable, crop=False)
    assert "\x1b" not in out.getvalue()
    return [line.rstrip() for line in out.getvalue().splitlines()]


def test_closing_table_shows_gain_cost_health_and_places():
    findings = [
        {"code": "a", "severity": severity, "stage": "generators", "client": client, "value": 1.0, "message": message}
        for severity, client, message in (
            ("info", None, "widths [1.0]"),
            ("error", 3, "lost " * 30),
            ("warning", 1, "w"),
        )
    ]
    path = "/far/" + "away/" * 30
    summary = SUMMARY | {
        "stages": {
            "partition": {"seconds": 9.0, "cached": True, "key": "a"},
            "warmup": {"seconds": 12.34, "cached": False, "key": "b"},
        },
        "communication_bytes": {"uplink": {"weights": 3 * 2**20, "prototypes": 1}, "downlink": {"weights": 2**19}},
        "health": findings,
        "paths": {"run": path, "tensorboard": path + "tensorboard"},
    }
    lines = lines_of(closing_table(summary))
    rows = [line.split() for line in lines]
    assert ["FedAvg", "after", "the", "warm-up", "50.0", "%"] in rows
    assert not any("teacher" in row for row in rows)
    assert ["(final)", "75.0", "%", "+5.0", "points"] in [row[-5:] for row in rows]
    assert ["partition", "9.0", "cached"] in rows
    assert ["computed", "in", "this", "run", "12.3"] in rows
    assert ["weights", "3.0", "MiB", "512.0", "KiB"] in rows
    assert ["prototypes", "1", "B", "0", "B"] in rows
    assert [row[0] for row in rows if row[:1] in (["error"], ["warning"], ["info"])] == ["error", "warning", "info"]
    assert " ".join(lines).count("lost") == 30
    assert any(line.endswith("widths [1.0]") for line in lines)
    assert f"files   {path}" in lines
    assert f"curves  tensorboard --logdir {path}tensorboard" in lines
    assert max(len(line) for line in lines if path not in line) <= 80


def test_the_command_for_curves_is_quoted():
    lines = lines_of(closing_table(SUMMARY | {"paths": {"tensorboard": "/my runs/it's"}}))
    [line] = [line for line in lines if line.startswith("curves")]
    assert shlex.split(line) == ["curves", "tensorboard", "--logdir", "/my runs/it's"]


def test_closing_table_leaves_out_missing_parts():
    lines = lines_of(closing_table({"accuracy": {"initial": None, "final": 0.5, "control": None}}))
    assert not [line for line in lines if "points" in line or "MiB" in line or "stage" in line]


def test_many_findings_are_counted():
    finding = {"code": "a", "severity": "info", "stage": "generators", "client": 0, "value": None, "message": "m"}
    lines = lines_of(closing_table(SUMMARY | {"health": [finding] * 30}))
    assert sum(line.startswith("info") for line in lines) == 12
    assert "and 18 more in summary.json" in lines


def test_advice_stands_once_with_the_first_finding_that_it_is_for():
    finding = {"code": "a", "severity": "warning", "stage": "generators", "client": 0, "message": "m", "advice": "do x"}
    lines = lines_of(closing_table(SUMMARY | {"health": [finding, finding | {"client": 1}]}))
    assert [line.split("client ")[1] for line in lines if line.startswith("warning")] == ["0  m; do x", "1  m"]


@pytest.mark.parametrize("num_classes", [2, 10, 100])
def test_partition_table_loses_no_digit(num_classes):
    counts = np.random.default_rng(0).integers(0, 14_000, (4, num_classes))
    lines = lines_of(partition_table(counts))
    assert max(map(len, lines)) <= 80
    for client, row in enumerate(counts):
        [cells] = [line.split() for line in lines if line.startswith(f"{client} ")]
        assert str(row.sum()) in cells
        if num_classes <= 10:
            assert cells == [str(client), *map(str, row), str(row.sum())]
        else:
            assert f"{row.argmax()}: {row.max()}" in " ".join(cells)
