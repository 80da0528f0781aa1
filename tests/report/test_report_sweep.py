"""A sweep's page: best configurations, spread, failures, shared stages, and the command."""

from __future__ import annotations

import re
import shlex
import tomllib
from dataclasses import replace

import pytest
from reports import Reader, make_sweep, write_run
from trials import LAMBDA_E, OMEGA, STOPPED, failed, grid, trial

from mosaic_ray.cli.request import compare_plan, sweep_request
from mosaic_ray.report.api import load_sweep
from mosaic_ray.report.figures import sweep as sweep_figures
from mosaic_ray.report.html import sweep as sweep_page
from mosaic_ray.report.html.blocks import FILE
from mosaic_ray.report.html.render import render
from mosaic_ray.report.load import NotAvailable
from mosaic_ray.runs.equal_compute import with_controls
from mosaic_ray.sweeps.runner import prepare


def compare() -> list:
    """Two methods at two omegas, two seeds each; mosaic is 10 points ahead at 0.1 and 5 behind at 1."""
    results = []
    for point, (omega, method) in enumerate((o, m) for o in (0.1, 1.0) for m in ("fedavg", "mosaic")):
        for seed in (0, 1):
            ahead = {("mosaic", 0.1): 0.1, ("mosaic", 1.0): -0.05}.get((method, omega), 0.0)
            final = 0.7 + ahead + 0.02 * seed
            knobs = {OMEGA: omega, "method": method}
            results.append(trial(point, seed, knobs, final=final, control=0.7, selection=final, metric="validation"))
    return results


@pytest.fixture(scope="module")
def read(tmp_path_factory) -> Reader:
    """A sweep of a grid, of which one trial failed, one was stopped, and one has a page."""
    folder = make_sweep(
        tmp_path_factory.mktemp("s") / "s", [*grid(), failed(24, 0, {OMEGA: 0.1}, stage="warmup", client=3)]
    )
    write_run(folder / "trials" / "p001s0", {"status": "done"})
    (folder / "trials" / "p001s0" / FILE).write_text("a page")
    return Reader(render(folder))


def test_it_holds_what_a_sweep_has(read):
    named = [a["aria-labelledby"].removesuffix("-words") for a in read.all("figure")]
    assert named == ["ladder", "response_0", "response_1", "response_2", "parallel", "sharing"]
    assert "By method (one method throughout)" in read.text("section")
    ids = [attributes["id"] for _, attributes in read.tags if "id" in attributes]
    assert len(ids) == len(set(ids)) and not read.all("script")


def test_the_best_come_first_with_mean_and_sd(read, tmp_path):
    sweep = load_sweep(make_sweep(tmp_path / "s"))
    (_, _, [best, *_]), _ = sweep.best()
    finals = [100 * row["accuracy_final"] for row in best]
    mean, sd = sum(finals) / 3, (sum((f - sum(finals) / 3) ** 2 for f in finals) / 2) ** 0.5
    assert f"{mean:.1f} ± {sd:.1f}" in read.text("table")
    assert f"partition.omega = 0.01, best by {best[0]['selection_metric']} (selection)" in read.words["h3"]


def test_what_is_chosen_is_chosen_by_selection_and_shown_beside_the_test(tmp_path):
    results = [
        trial(p, s, {LAMBDA_E: 1.0 + p}, selection=0.5 + p / 10 + s / 50, final=0.9 - p / 10, control=0.25)
        for p in (0, 1) for s in (0, 1)
    ]  # fmt: skip
    page = sweep_page.sweep_page(load_sweep(make_sweep(tmp_path / "s", results)), tmp_path)
    [table] = page.sections[0].tables
    assert list(table.heads) == ["configuration", "lambda_e", "seeds", "selection", "final", "control", "gain"]
    assert list(table.rows[0]) == ["p001", "2", "2", "61.0 ± 1.4", "80.0 ± 0.0", "25.0 ± 0.0", "+55.0 ± 0.0"]
    assert table.rows[1][0] == "p000" and table.best
    assert "lambda_e = 2 was chosen, with 80.0 % on test images" in page.verdict


def test_failures_are_listed_with_place_and_reason(read):
    assert "1 trial failed" in read.text("header") and "p024s0" in read.text("header")
    assert "stage warmup, client 3 no memory" in read.text("table")


def test_a_trials_page_is_linked_where_there_is_one(read):
    links = [a["href"] for a in read.all("a") if not a["href"].startswith("#")]
    assert links == ["trials/p001s0/report.html"]


def test_links_lead_from_where_the_page_is(tmp_path):
    folder = make_sweep(tmp_path / "s", [trial(0)])
    write_run(folder / "trials" / "p000s0", {"status": "done"})
    (folder / "trials" / "p000s0" / FILE).write_text("a page")
    page = sweep_page.sweep_page(load_sweep(folder), tmp_path / "pages")
    [table] = next(section for section in page.sections if section.title == "Trials").tables
    assert 'href="../s/trials/p000s0/report.html"' in table.rows[0][-1]


def test_methods_compare_within_each_omega(tmp_path):
    sweep = load_sweep(make_sweep(tmp_path / "s", compare()))
    means = sweep_figures.methods(sweep).table
    assert means["mean"].round(6).tolist() == [0.71, 0.81, 0.71, 0.66] and (means["trials"] == 2).all()
    assert means["sd"].round(6).tolist() == [0.014142] * 4
    by_name = {figure.name: figure for section in sweep_figures.figures_of(sweep).values() for figure in section}
    words = by_name["methods"](sweep).words
    assert (
        "at omega=0.1 mosaic is ahead with 81.0 ± 1.4 %" in words
        and "at omega=1 fedavg is ahead with 71.0 ± 1.4 %" in words
    )
    assert "mosaic from 81.0 % to 66.0 %" in by_name["ladder"](sweep).words
    labels = [text.get_text() for text in sweep.plot("methods").axes[0].get_yticklabels()]
    assert labels == ["fedavg", "mosaic"] * 2
    verdict = sweep_page.verdict(sweep, sweep.best())
    assert "At partition.omega = 0.1, method = mosaic was chosen, with 81.0 % on test images, +11.0 points" in verdict
    assert "at partition.omega = 1, method = fedavg was chosen" in verdict


def test_methods_do_not_compare_where_numbers_differ_too(tmp_path):
    mixed = [trial(0, 0, {"method": "fedavg", LAMBDA_E: 1.0}), trial(1, 0, {"method": "mosaic", LAMBDA_E: 2.0})]
    with pytest.raises(NotAvailable, match="lambda_e"):
        load_sweep(make_sweep(tmp_path / "s", mixed)).plot("methods")


def test_a_response_shows_every_value_and_the_seeds_spread(tmp_path):
    results = [
        trial(p, seed, {LAMBDA_E: value}, final=0.5 + value / 10 + seed / 50)
        for p, value in enumerate((0.5, 1.0, 2.0)) for seed in (0, 1)
    ]  # fmt: skip
    sweep = load_sweep(make_sweep(tmp_path / "s", results))
    means = sweep_figures.response(sweep, LAMBDA_E).table
    assert means[LAMBDA_E].tolist() == [0.5, 1.0, 2.0] and means["mean"].round(6).tolist() == [0.56, 0.61, 0.71]
    assert means["sd"].round(6).tolist() == [0.014142] * 3
    over = sweep.plot("response", knob=LAMBDA_E).axes[0]
    assert len(over.lines[0].get_xdata()) == 6, "each trial is a mark"
    with pytest.raises(NotAvailable, match="omega does not vary"):
        sweep.plot("ladder")
    with pytest.raises(NotAvailable, match="one value"):
        sweep.plot("response", knob="generator.lambda_d")


def test_without_methods_the_ladder_compares_the_roles(tmp_path):
    results = [trial(p, 0, {OMEGA: w}, final=w, control=w / 2) for p, w in enumerate((0.1, 0.5, 0.9))]
    means = sweep_figures.ladder(load_sweep(make_sweep(tmp_path / "s", results))).table
    assert set(means["series"]) == {"initial", "distilled", "final", "control"}
    assert means[means["series"] == "control"]["mean"].tolist() == [0.05, 0.25, 0.45]


def test_stages_that_trials_shared_are_counted(tmp_path):
    results = [trial(0, 0), trial(0, 1, cached=("warmup", "teacher")), trial(1, 0, cached=("warmup",)), STOPPED]
    frame = sweep_figures.sharing(load_sweep(make_sweep(tmp_path / "s", results))).table
    assert frame.loc["warmup"].tolist() == [1, 2, 2.0, 128.0] and frame.loc["teacher"].tolist() == [2, 1, 4.0, 64.0]


def test_a_sweep_under_way_says_how_many_trials_are_planned(tmp_path):
    plan = {"points": [{LAMBDA_E: value} for value in (1.0, 2.0, 3.0)], "seeds": [0, 1]}
    page = sweep_page.sweep_page(
        load_sweep(make_sweep(tmp_path / "s", [trial(0, 0, {LAMBDA_E: 1.0})], **plan)), tmp_path
    )
    assert (page.cards[0].label, page.cards[0].value) == ("trials", "1 of 6")


def test_nothing_chosen_and_nothing_ended_are_reported(tmp_path):
    blind = load_sweep(make_sweep(tmp_path / "a", [trial(0, 0, {LAMBDA_E: 1.0}, selection=None)]))
    assert "1 finished trial reach" in sweep_page.verdict(blind, blind.best())
    empty = Reader(render(make_sweep(tmp_path / "b", [])))
    assert "No trial has ended yet" in empty.text("header") and not empty.all("figure")
    lost = Reader(render(make_sweep(tmp_path / "c", [failed(0)])))
    assert "No trial has ended well yet" in lost.text("header") and "no memory" in lost.text("table")


def test_a_comparison_says_so_and_how_to_do_it_again(tmp_path):
    plan = compare_plan("fedrolex,mosaic+fedrolex")
    words = {"seed": None, "sets": ("federation.widths=[1.0,0.5]",)}
    facts = prepare(sweep_request("compare", words, plan=plan, seeds="0,1")).plan_json
    page = sweep_page.sweep_page(load_sweep(make_sweep(tmp_path / "s", [], **facts)), tmp_path)
    texts = {text.title: text.body for section in page.sections for text in section.texts}
    base = tmp_path / "base.toml"
    base.write_text(next(body for title, body in texts.items() if "base.toml" in title))
    command = shlex.split(texts["Command"])
    assert command[:4] == ["mosaic", "compare", "--methods", "fedavg+fedrolex,mosaic+fedrolex"]
    assert command[4:] == ["--config", "base.toml", "--name", "s", "--seeds", "0,1"]
    again = {"seed": None, "sets": (), "config": str(base)}
    assert prepare(sweep_request("compare", again, plan=compare_plan(command[3]), seeds="0,1")).plan_json == facts


def test_a_control_with_equal_compute_is_named_and_asked_for_again(tmp_path):
    words = {"seed": None, "sets": ()}
    request = sweep_request("compare", words, plan=compare_plan("fedavg,mosaic"), seeds="0")
    points = with_controls(request.config, request.plan.points)
    more = points[2]["warmup.num_rounds"] - request.config.warmup.num_rounds
    facts = prepare(replace(request, plan=replace(request.plan, points=points))).plan_json
    results = [trial(number, 0, dict(point)) for number, point in enumerate(points)]
    folder = make_sweep(tmp_path / "s", results, **facts)
    page = sweep_page.sweep_page(load_sweep(folder), tmp_path)
    texts = {text.title: text.body for section in page.sections for text in section.texts}
    asked = ["mosaic", "compare", "--methods", "fedavg,mosaic", "--equal-compute", "--config", "base.toml"]
    assert shlex.split(texts["Command"])[:7] == asked
    [methods] = [section for section in page.sections if section.title == "Methods"]
    names = [row[0] for table in methods.tables for row in table.rows]
    assert names == ["fedavg", "mosaic", f"fedavg (+{more} rounds)"] and more > 0


def test_the_command_of_a_grid_names_its_values(tmp_path):
    given = ("federation.widths=[1.0,0.5],rho:3", "partition.omega=0.1,1", 'data.root="a, b",c')
    sets = {"seed": None, "sets": ("federation.strategy=fedrolex",)}
    facts = prepare(sweep_request(None, sets, grid=given, search="optuna", samples="4")).plan_json
    page = sweep_page.sweep_page(load_sweep(make_sweep(tmp_path / "s", [], **facts)), tmp_path)
    assert f"optuna search by optuna {facts['optuna']} over" in page.about
    [section] = [section for section in page.sections if section.title == "Reproduce"]
    texts = {text.title: text.body for text in section.texts}
    base = tmp_path / "base.toml"
    base.write_text(next(body for title, body in texts.items() if "base.toml" in title))
    command = shlex.split(texts["Command"])
    words = [word.removeprefix("--grid=") for word in command if word.startswith("--grid=")]
    again = {"seed": None, "sets": (), "config": str(base)}
    assert prepare(sweep_request(None, again, grid=words, search="optuna", samples="4", seeds="0")).plan_json == facts
    assert command[:2] == ["mosaic", "sweep"] and "--space" not in command and "--space takes" not in section.lead


@pytest.mark.parametrize("space, options", [("smoke", {}), ("lambdas_omega", {"samples": "3", "seeds": "0,1"})])
def test_the_command_asks_for_the_same_trials(tmp_path, space, options):
    words = dict.fromkeys(["search", "samples", "seeds", "max_concurrent"]) | {"scheduler": "fifo"} | options
    sweep = prepare(sweep_request(space, {"seed": None, "sets": ("warmup.num_rounds=4",)}, **words))
    page = sweep_page.sweep_page(load_sweep(make_sweep(tmp_path / "s", [], **sweep.plan_json)), tmp_path)
    texts = {text.title: text.body for section in page.sections for text in section.texts}
    base = tmp_path / "base.toml"
    base.write_text(next(body for title, body in texts.items() if "base.toml" in title))
    assert tomllib.loads(base.read_text())["warmup"]["num_rounds"] == 4
    asked = dict(re.findall(r"--(\S+) (\S+)", " ".join(shlex.split(texts["Command"]))))
    assert asked.pop("config") == "base.toml" and asked.pop("name") == "s"
    again = dict.fromkeys(["search", "samples", "seeds", "max_concurrent"]) | asked
    assert (
        prepare(sweep_request(again.pop("space"), {"seed": None, "sets": (), "config": str(base)}, **again)).plan_json
        == sweep.plan_json
    )
