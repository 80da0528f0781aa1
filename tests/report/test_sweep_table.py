"""A sweep's closing table: comparisons and layout."""

from __future__ import annotations

import io
import re
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from trials import LAMBDA_E, OMEGA, failed, grid, names_in_order, printed, trial

from mosaic_ray.core.types import STAGES
from mosaic_ray.report.sweep_table import sweep_table
from mosaic_ray.sweeps.results import TrialResult


def test_the_selection_chooses_and_test_accuracy_does_not() -> None:
    results = [
        trial(0, knobs={LAMBDA_E: 0.5}, final=0.99, selection=0.25),
        trial(1, knobs={LAMBDA_E: 2.0}, final=0.60, selection=0.75),
    ]
    lines = printed(sweep_table(results, (), (LAMBDA_E,)))
    assert names_in_order(lines) == ["p001", "p000"]
    assert "best by held-out prototypes (selection)" in lines
    by_hand = [line.split() for line in lines if line.startswith("p00")]
    assert by_hand == [["p001", "2", "75.0", "60.0", "87.5", "-27.5"], ["p000", "0.5", "25.0", "99.0", "87.5", "+11.5"]]


def test_mean_and_deviation_over_seeds_are_numpys() -> None:
    draws = np.random.default_rng(0).uniform(0.2, 0.9, (4, 3, 3))
    results = [
        trial(point, seed, {LAMBDA_E: float(point)}, selection=s, final=f, control=c)
        for point in range(4)
        for seed, (s, f, c) in enumerate(draws[point].tolist())
    ]
    lines = printed(sweep_table(results, (), (LAMBDA_E, "seed")))
    means = draws[:, :, 0].mean(axis=1)
    assert names_in_order(lines) == [f"p{point:03}" for point in np.argsort(-means)]
    assert any("mean ± sd of 3 seeds" in line for line in lines)
    for point, values in enumerate(100 * draws):
        selection, final, control = values.T
        cells = [str(point)]
        for column, sign in ((selection, ""), (final, ""), (control, ""), (final - control, "+")):
            cells.append(f"{column.mean():{sign}.1f} ±{column.std(ddof=1):.1f}")
        (line,) = [line for line in lines if line.startswith(f"p{point:03}")]
        assert re.split(r"  +", line)[1:] == cells


def test_points_are_compared_under_equal_conditions() -> None:
    results = [
        trial(3 * place + number, knobs={OMEGA: omega, LAMBDA_E: 0.5 + number}, selection=number / 10 + place / 100)
        for place, omega in enumerate((0.01, 1.0))
        for number in range(3)
    ]
    lines = printed(sweep_table(results, (OMEGA,), (OMEGA, LAMBDA_E)))
    assert names_in_order(lines) == ["p002", "p001", "p000", "p005", "p004", "p003"]
    assert [line for line in lines if "omega" in line] == [
        f"partition.omega = {omega}, best by held-out prototypes (selection)" for omega in ("0.01", "1")
    ]
    ladder = [trial(n, knobs={OMEGA: omega}, selection=omega) for n, omega in enumerate((0.01, 0.1, 1.0))]
    lines = printed(sweep_table(ladder, (OMEGA,), (OMEGA,)))
    assert names_in_order(lines) == ["p000", "p001", "p002"], "harder and easier problems are not ranked"
    assert not any("best" in line for line in lines)


@pytest.mark.parametrize(
    "values, metrics, expected",
    [
        ((None, None), ("held-out prototypes",) * 2, "nothing was chosen: selection values are missing"),
        ((0.1, None), ("held-out prototypes",) * 2, "nothing was chosen: selection values are missing"),
        (
            (0.1, 0.9),
            ("validation accuracy", "held-out prototypes"),
            "nothing was chosen: selection metrics differ",
        ),
    ],
)
def test_nothing_is_chosen_by_what_cannot_be_compared(values: Any, metrics: Any, expected: str) -> None:
    results = [trial(n, knobs={LAMBDA_E: n + 1.0}, selection=values[n], metric=metrics[n]) for n in (0, 1)]
    lines = printed(sweep_table(results, (), (LAMBDA_E,)))
    assert expected in lines and names_in_order(lines) == ["p000", "p001"]


def test_fewer_seeds_are_marked_and_what_is_left_out_is_counted() -> None:
    results = [
        trial(point, seed, {LAMBDA_E: 1.0 + point}, selection=1 - point / 20)
        for point in range(14)
        for seed in range(3)
        if (point, seed) not in {(1, 2), (5, 0), (5, 1)}
    ]
    results += [failed(1, 2, {LAMBDA_E: 2.0}), TrialResult("p005s0", 5, 0, {}, {"status": "stopped"}), failed(20)]
    lines = printed(sweep_table(results, (), (LAMBDA_E,)))
    assert lines[0] == "configurations 15, trials 42: 39 done, 1 stopped early, 2 failed"
    assert [line.split()[0] for line in lines if re.match(r"p\d{3}\*? ", line)] == [
        "p000", "p001*", "p002", "p003", "p004", "p005*", "p006", "p007", "p008", "p009",
    ]  # fmt: skip
    assert "* seeds finished: p001 2, p005 1 of 3" in lines and "and 4 more in results.csv" in lines
    (alone,) = [line for line in lines if line.startswith("p005*")]
    assert "±" not in alone, "one seed has no deviation"


def test_stages_are_counted_as_computed_and_found() -> None:
    results = [trial(n, cached=() if n < 2 else STAGES[:5]) for n in range(12)] + [failed(12)]
    lines = printed(sweep_table(results, (), (LAMBDA_E,)))
    rows = {line.split()[0]: line.split()[1:] for line in lines if line.startswith(STAGES)}
    assert list(rows) == list(STAGES)
    assert rows["warmup"] == ["2", "10", "4.0", "640.0"] and rows["distill"] == ["12", "0", "24.0", "0.0"]


def test_failures_are_listed_with_their_address() -> None:
    results = [
        failed(0, stage="warmup", round=4, client=3, error="stage warmup, round 4, client 3: NaN in [red]\nweights"),
        failed(1, error="disk full"),
    ]
    lines = printed(sweep_table(results, (), (LAMBDA_E,)))
    assert lines[0] == "configurations 2, trials 2: 2 failed"
    expected = [re.split(r"  +", line) for line in lines if re.match(r"p\d{3}s\d", line)]
    assert expected == [
        ["p000s0", "stage warmup, round 4, client 3", "NaN in [red] weights"],
        ["p001s0", "-", "disk full"],
    ]
    many = printed(sweep_table([failed(n) for n in range(30)], (), ()))
    assert "and 18 more in results.csv" in many


SWEPT = (OMEGA, *(f"generator.lambda_{x}" for x in "edi"))


def test_it_fits_eighty_columns_and_paths_stay_whole() -> None:
    folder = "/somewhere/" + "far" * 40 + "/sweeps/name"
    lines = printed(sweep_table(grid(), (OMEGA,), SWEPT, folder))
    assert [line for line in lines if len(line) > 80] == [
        f"files   {folder}", f"curves  tensorboard --logdir {folder}",
    ]  # fmt: skip
    (head,) = {line for line in lines if line.startswith("point")}
    assert head.split() == ["point", "lambda_e", "lambda_d", "lambda_i", "selection", "final", "control", "gain"]
    assert not any("\x1b" in line for line in lines)


def test_many_knobs_go_into_one_column_and_names_stay_unambiguous() -> None:
    flips = [{}, {"warmup.lr": 0.5}, {"finetune.lr": 0.25}, {"meta.pool": "sum"}, {"meta.select": False}]
    flips += [{"prototypes.rounds": "all"}, {"generator.drop_class0_bug": True}, {"distill.jsd": "bhattacharyya"}]
    swept = tuple(dict.fromkeys(name for knobs in flips for name in knobs))
    results = [trial(n, knobs=knobs, selection=1 - n / 10) for n, knobs in enumerate(flips)]
    lines = printed(sweep_table(results, (), swept))
    assert max(map(len, lines)) <= 80
    rows = [line.split()[0:1] + line.split()[5:] for line in lines if line.startswith("p00")]
    assert rows == [
        ["p000", "-"], ["p001", "warmup.lr=0.5"], ["p002", "finetune.lr=0.25"], ["p003", "pool=sum"],
        ["p004", "select=false"], ["p005", "rounds=all"], ["p006", "drop_class0_bug=true"],
        ["p007", "jsd=bhattacharyya"],
    ]  # fmt: skip
    assert "unless noted otherwise: warmup.lr=0.01, finetune.lr=0.0001, pool=mean" in " ".join(lines)


def test_a_terminal_without_unicode_can_show_it() -> None:
    raw = io.BytesIO()
    console = Console(file=io.TextIOWrapper(raw, "ascii"), width=100, color_system=None)
    console.print(sweep_table(grid(), (OMEGA,), SWEPT))
    console.file.flush()
    assert b"mean +- sd of 3 seeds" in raw.getvalue()


def test_an_empty_sweep_has_a_table() -> None:
    assert printed(sweep_table([], (OMEGA,), SWEPT)) == ["configurations 0, trials 0: none ended"]
