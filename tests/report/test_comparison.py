"""The table of a comparison: pairs, order, costs, and the files for a paper."""

from __future__ import annotations

import io
from collections.abc import Sequence
from statistics import fmean, stdev

import numpy as np
import pytest
from reports import Reader, make_sweep
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from trials import OMEGA, failed, printed, trial

from mosaic_ray.config.resolve import as_dict, override
from mosaic_ray.config.schema import ExperimentConfig
from mosaic_ray.report.api import load_sweep
from mosaic_ray.report.comparison import Comparison, compare
from mosaic_ray.report.export import files, latex, markdown, tex
from mosaic_ray.report.figures.sweep import bars
from mosaic_ray.report.html.render import render
from mosaic_ray.sweeps.results import TrialResult, result_rows

OMEGAS, METHODS = (0.01, 0.1), ("mosaic", "fedavg", "prototype_head")
POINTS = [{OMEGA: omega, "method": method} for omega in OMEGAS for method in METHODS]
CONFIG = override(ExperimentConfig(), {"generator.epochs": 0, "generator.steps": 10})

#: Final accuracies [points, seeds]; mosaic is ahead of fedavg by 0.10, 0.12 and 0.11 at the first omega.
FINALS = np.array(
    [[0.60, 0.72, 0.81], [0.50, 0.60, 0.70], [0.52, 0.50, 0.75], [0.9, 0.8, 0.7], [0.9, 0.8, 0.7], [0.95, 0.9, 0.82]]
)


def trials(finals: np.ndarray, points: Sequence[dict] = POINTS) -> list[TrialResult]:
    return [
        trial(point, seed, knobs, final=float(finals[point, seed]), control=0.5)
        for point, knobs in enumerate(points) for seed in range(finals.shape[1])
    ]  # fmt: skip


def table(results: list[TrialResult], against: str = "", points: Sequence[dict] = POINTS) -> Comparison:
    return compare(result_rows(results), points, CONFIG, against)


def test_differences_are_paired_by_seed_and_seeds_without_a_result_are_left_out():
    draws = np.random.default_rng(1)
    finals = draws.uniform(0.2, 0.9, (6, 5))
    lost = {(int(p), int(s)) for p, s in draws.integers(0, (6, 5), (7, 2))}
    results = [
        failed(r.point, r.seed, dict(r.knobs)) if (r.point, r.seed) in lost else r for r in trials(finals)
    ]  # fmt: skip
    order = draws.permutation(len(results))
    found = table([results[place] for place in order])
    for section, omega in enumerate(OMEGAS):
        for place, method in enumerate(found.sections[omega]):
            point, reference = 3 * section + place, 3 * section + 1
            pairs = [
                finals[point, s] - finals[reference, s]
                for s in range(5) if (point, s) not in lost and (reference, s) not in lost
            ]  # fmt: skip
            assert method.differences == (None if point == reference else pairs)
    for point, seed in lost:
        assert f"{POINTS[point]['method']} at omega {POINTS[point][OMEGA]:g} seed {seed}" in found.caption[-1]
    assert found.caption[-1].startswith("Left out of every pair") and found.caption[-1].count(" seed ") == len(lost)


def test_a_row_by_hand():
    found = table(trials(FINALS))
    assert found.heads == [
        "method", "final", "control", "gain", "vs fedavg", "p", "needed", "SGD steps", "up", "down",
    ]  # fmt: skip
    mosaic, fedavg, floor = map(found.cells, found.sections[0.01])
    difference = [10.0, 12.0, 11.0]
    assert mosaic[1] == f"71.0 ± {stdev([60, 72, 81]):.1f}" and mosaic[4] == "+11.0 ± 1.0*"
    assert fmean(difference) == 11 and mosaic[5:7] == ["0.003", "2"]
    assert fedavg[4:7] == ["-", "-", "-"] and floor[4] == "-1.0 ± 7.9" and floor[5] == "0.848"
    clients = CONFIG.partition.num_clients
    assert mosaic[8:] == [f"{7 / clients:.0f} B", f"{5 / clients:.0f} B"]
    same = found.cells(found.sections[0.1][0])
    assert same[4:7] == ["+0.0 ± 0.0", "1.000", "-"]


def test_methods_stay_in_the_order_in_which_they_were_typed_and_fedavg_is_the_reference():
    for against, named in (("", "fedavg"), ("mosaic", "mosaic")):
        found = table(trials(FINALS), against)
        assert found.against == named and list(found.sections) == list(OMEGAS)
        assert [method.name for method in found.sections[0.1]] == list(METHODS)
    points = [{"method": "mosaic"}, {"method": "fedavg", "federation.strategy": "fedrolex"}]
    found = table(trials(FINALS[:2], points), points=points)
    assert found.against == "mosaic", "fedavg is not compared"
    assert [method.name for method in found.sections[None]] == ["mosaic", "fedrolex"]


def test_one_seed_has_differences_and_no_test():
    found = table(trials(FINALS[:, :1]))
    assert found.cells(found.sections[0.01][0])[4:7] == ["+10.0", "-", "-"]
    text = "\n".join(printed(found, 200))
    assert "seed 0, of the last state" in text and "without a test" in text and "±" not in text


@pytest.mark.parametrize("head", ["keep", "refit"])
def test_a_head_that_was_made_anew_is_named_below_the_table(head):
    rows = [row | {"finetune.head": head} for row in result_rows(trials(FINALS))]
    said = " ".join(compare(rows, POINTS, CONFIG, "").caption)
    assert ("with a head made anew" in said) == (head == "refit")


def test_knobs_of_one_method_alone_are_named_below_the_table():
    own = {"mosaic": {"warmup.lr": 0.02, "warmup.momentum": 0.0}}
    points = [point | own.get(point["method"], {}) for point in POINTS]
    said = table(trials(FINALS, points), points=points).caption
    assert "With knobs of their own: mosaic warmup.lr = 0.02, warmup.momentum = 0." in said
    assert not any("of their own" in line for line in table(trials(FINALS)).caption)
    control = [{"method": "fedavg"}, {"method": "fedavg", "warmup.num_rounds": CONFIG.warmup.num_rounds + 7}]
    found = table(trials(FINALS[:2], control), points=control)
    assert found.sections[None][1].name == "fedavg (+7 rounds)" and not any("of their own" in x for x in found.caption)


def test_the_highest_mean_is_bold_and_last_states_alone_count():
    found = table(trials(FINALS))
    assert found.best(0.01) == ["mosaic"] and found.best(0.1) == ["prototype_head"]
    assert table([failed(0)], points=POINTS[:1]).best(0.01) == []


def test_eighty_columns_hold_it_in_two_parts_and_wide_ones_in_one():
    found = table(trials(FINALS))
    lines = printed(found)
    assert max(map(len, lines)) <= 80
    assert [line.split()[0] for line in lines if line.startswith(METHODS)] == [*METHODS, *METHODS] * 2
    wide = printed(found, 160)
    assert [line.split()[0] for line in wide if line.startswith(METHODS)] == [*METHODS] * 2
    raw = io.TextIOWrapper(io.BytesIO(), "ascii")
    Console(file=raw, width=100).print(found)
    raw.flush()
    assert b"71.0 +- 10.5" in raw.buffer.getvalue()


LATEX = r"""\toprule
method & final & control & gain & vs mosaic\_\& & p & needed & SGD steps & up & down \\
\midrule
\multicolumn{10}{l}{$\omega = 0.01$} \\
mosaic & $\mathbf{71.0 \pm 10.5}$ & $50.0 \pm 0.0$ & $+21.0 \pm 10.5$ & -- & -- & -- & -- & 1 B & 0 B \\
fedavg & $60.0 \pm 10.0$ & $50.0 \pm 0.0$ & $+10.0 \pm 10.0$ & $-11.0 \pm 1.0^{*}$ & $0.003$ & $2$ & -- & 1 B & 0 B \\
\bottomrule
\end{tabular}
\end{table}
"""


def test_latex_as_expected():
    """Of a configuration that is not known, so without steps; and a name with LaTeX's special characters."""
    found = compare(result_rows(trials(FINALS[:2], POINTS[:2])), POINTS[:2], None, "mosaic")
    renamed = Comparison("mosaic_&", found.seeds, found.sections)
    assert latex(renamed).endswith(LATEX)
    assert r"\usepackage{booktabs}" in latex(found)
    caption = next(line for line in latex(found).splitlines() if line.startswith(r"\caption"))
    assert "two-sided paired t-test" in caption and "seeds 0, 1, 2" in caption and "last state" in caption
    assert r"p $<$ 0.05" in caption and r"80 \% power" in caption and "for reporting only" in caption
    assert tex("a_b&c%$#{}~^\\") == r"a\_b\&c\%\$\#\{\}\textasciitilde{}\textasciicircum{}\textbackslash{}"


def test_markdown_is_escaped_and_has_a_part_for_each_omega():
    page = markdown(table(trials(FINALS)))
    assert r"| prototype\_head | **89.0 ± 6.6** |" in page and r"| +11.0 ± 1.0\* | 0.003 |" in page
    assert page.count("| --- |") == 2 and "**partition.omega = 0.01**" in page
    points = [{"method": "x.py:A|<b>"}]
    assert r"x.py:A\|\<b\>" in markdown(table(trials(FINALS[:1], [{}]), points=points))


def test_the_files_and_tensorboards_page(tmp_path):
    found = table(trials(FINALS))
    made = files(found)
    assert made["table.md"].decode() == markdown(found) and made["table.tex"].decode() == latex(found)
    assert made["figure.pdf"].startswith(b"%PDF") and made["figure.pdf"] == files(found)["figure.pdf"]
    for name, data in made.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    events = EventAccumulator(str(tmp_path / "table")).Reload()
    [tag] = events.Tags()["tensors"]
    assert events.Tensors(tag)[0].tensor_proto.string_val == [made["table.md"]]


def test_bars_are_means_with_one_deviation():
    drawing = bars(table(trials(FINALS)))
    over = drawing.figure.axes[0]
    assert [bar.get_height() for bar in over.patches] == pytest.approx(FINALS.mean(1))
    ends = [line.get_segments()[0][:, 1] for line in over.collections]
    assert np.ptp(ends, axis=1) == pytest.approx(2 * FINALS.std(1, ddof=1))
    assert [label.get_text() for label in over.get_xticklabels()] == ["omega 0.01", "omega 0.1"]


def test_the_report_shows_the_same_table(tmp_path):
    results = [*trials(FINALS)[:-1], failed(5, 2, POINTS[5], stage="warmup")]
    facts = {"space": "compare", "points": POINTS, "base": as_dict(CONFIG), "against": "mosaic"}
    folder = make_sweep(tmp_path / "s", results, **facts)
    sweep, read = load_sweep(folder), Reader(render(folder))
    expected = table(results, "mosaic")
    assert sweep.comparison == expected
    for method in (method for methods in expected.sections.values() for method in methods):
        assert " ".join(expected.cells(method)) in read.text("table")
    assert " ".join(expected.caption) in read.text("section")
    assert "at omega 0.01 the highest mean is that of mosaic: 71.0" in read.text("header").replace("At", "at")
    named = [a["aria-labelledby"].removesuffix("-words") for a in read.all("figure")]
    assert named[0] == "comparison" and sweep.plot("comparison").axes
    assert "--omegas 0.01,0.1 --against mosaic" in read.text("pre")
    assert load_sweep(make_sweep(tmp_path / "other", results)).comparison is None


def test_a_name_is_escaped_in_the_report(tmp_path):
    points = [{"method": "x.py:<script>"}]
    folder = make_sweep(tmp_path / "s", trials(FINALS[:1], [{}]), space="compare", points=points)
    assert "<script>" not in render(folder)
