"""Sweep plans: the shipped ones, the checks of a plan, and its points."""

from __future__ import annotations

import importlib
import json
import math
import pkgutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from cli_runner import refused_by
from hypothesis import given
from hypothesis import strategies as st

import tune_spaces
from mosaic_ray.config.presets import REFERENCE, SCALES
from mosaic_ray.config.resolve import KNOBS, check_value, flatten, override, resolve
from mosaic_ray.config.validate import check
from mosaic_ray.core.seeding import numpy_stream
from mosaic_ray.sweeps.space import (
    Choice,
    Range,
    SweepPlan,
    check_space,
    describe,
    grid_points,
    list_spaces,
    load_space,
    random_points,
    setting_knobs,
)

REPO = Path(__file__).resolve().parents[2]


SHIPPED = sorted(module.name for module in pkgutil.iter_modules(tune_spaces.__path__))


def plan_of(**fields) -> SweepPlan:
    return SweepPlan("a test", **fields)


# --- shipped spaces --------------------------------------------------------------------------------------------------


def test_the_shipped_spaces_are_these():
    names = [
        "ablation",
        "client_count",
        "lambdas_grid",
        "lambdas_omega",
        "meta_training",
        "omega_ladder",
        "rehearsal_omega",
        "smoke",
        "width_schemes",
    ]
    assert list(list_spaces()) == SHIPPED == names


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_spaces_name_their_source_and_have_valid_points(name):
    found, plan = load_space(name)
    assert found == name
    assert len(sys.modules[f"tune_spaces.{name}"].__doc__.splitlines()) > 2
    assert list_spaces()[name] == plan.summary
    assert len(plan.summary) <= 100 and "\n" not in plan.summary
    check_space(name, plan)
    base = resolve(plan.preset or "demo", file=plan.base)
    points = grid_points(plan)
    if not plan.points:
        points += random_points(plan, plan.samples, 0)
    for point in points:
        config = check(override(base, point))
        assert {knob: flatten(config)[knob] for knob in point} == point
        again = {knob: check_value(knob, value) for knob, value in json.loads(json.dumps(point)).items()}
        assert again == point and [*map(type, again.values())] == [*map(type, point.values())]


def test_listing_loads_nothing_heavy():
    heavy = {"torch", "ray", "numpy", "pandas", "pyarrow", "rich", "optuna"}
    code = (
        "import contextlib, io, sys\nfrom mosaic_ray.sweeps.space import list_spaces\n"
        f"assert len(list_spaces()) == {len(SHIPPED)}\nprint(*sorted({heavy!r} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPO)
    assert result.stdout.split() == []


def test_the_default_space_is_the_one_asked_for():
    plan = load_space("lambdas_omega")[1]
    assert (plan.search, plan.samples) == ("random", 16)
    grid = {tuple(point.values()) for point in grid_points(plan)}
    lambdas = {(e, d, i) for e in (0.5, 1, 2) for d in (2, 5, 10) for i in (5, 10, 15)}
    assert grid == {(*point, omega) for point in lambdas for omega in (0.01, 0.1, 1.0)}
    assert {tuple(point.values()) for point in grid_points(load_space("lambdas_grid")[1])} == lambdas
    bounds = {k: (d.low, d.high) for k, d in plan.knobs.items() if isinstance(d, Range)}
    assert bounds == {
        "generator.lambda_e": (0.5, 2), "generator.lambda_d": (2, 10), "generator.lambda_i": (5, 15)
    }  # fmt: skip


def test_the_smoke_space_shares_all_but_generators_at_each_omega():
    points = grid_points(load_space("smoke")[1])
    assert len(points) == 6 and len({point["partition.omega"] for point in points}) == 2
    assert {knob.split(".")[0] for point in points for knob in point} == {"partition", "generator"}


@pytest.mark.parametrize("scale", sorted(SCALES))
def test_the_ablation_flips_every_switch_of_the_reference_once(scale):
    """On every scale each point sets knobs of the base to the reference's values."""
    plan = load_space("ablation")[1]
    first, *points = grid_points(plan)
    assert first == {}
    base = resolve(f"{scale}+{plan.base['algorithm']}")
    for point in points:
        config = check(override(base, point))
        assert all(flatten(base)[knob] != value == REFERENCE[knob] for knob, value in point.items())
        assert config != base
    leading = [next(iter(point)) for point in points]
    differing = {knob for knob, value in REFERENCE.items() if value != KNOBS[knob].default}
    assert sorted(leading) == sorted(differing - set(importlib.import_module("tune_spaces.ablation").BUDGETS))
    assert {knob for point in points for knob in point} >= differing - {"meta.updates", "meta.patience", "distill.lr"}
    assert [point for point in points if len(point) > 1 and {*point} not in (
        {"meta.input", "meta.init"}, {"generator.lambda_i", "generator.tau"},
        {"partition.policy", "partition.max_tries"},
    )] == []  # fmt: skip


def test_meta_training_gives_every_arm_the_same_updates():
    plan = load_space("meta_training")[1]
    assert plan.seeds == (0, 1, 2) and list(plan.knobs) == ["meta.data"]
    assert set(plan.knobs["meta.data"].values) == set(KNOBS["meta.data"].metadata["choices"])
    base = resolve("demo", file=plan.base)
    assert not base.meta.select  # no early end


# --- grids -----------------------------------------------------------------------------------------------------------

FLOATS = ("generator.lambda_e", "generator.lambda_d", "generator.lambda_i", "warmup.lr")
AXES = st.dictionaries(
    st.sampled_from(FLOATS), st.lists(st.integers(1, 9), min_size=1, max_size=3, unique=True), min_size=1, max_size=3
)


@given(AXES, st.booleans())
def test_a_grid_is_the_product_with_the_last_knob_fastest(axes, ranged):
    made = {k: Range(0.5, 10.0, grid=tuple(v)) if ranged else Choice(tuple(v)) for k, v in axes.items()}
    expected = [[]]
    for knob, values in axes.items():
        expected = [[*head, (knob, float(value))] for head in expected for value in values]
    found = [list(point.items()) for point in grid_points(plan_of(knobs=made))]
    assert found == expected
    assert all(type(value) is float for point in found for _, value in point)


def test_explicit_points_stand_as_they_are_but_typed():
    given_points = ({}, {"generator.lambda_e": 1, "federation.widths": [1]}, {"warmup.num_rounds": 3.0})
    found = grid_points(plan_of(points=given_points))
    assert found == [{}, {"generator.lambda_e": 1.0, "federation.widths": (1.0,)}, {"warmup.num_rounds": 3}]
    assert type(found[1]["generator.lambda_e"]) is float and type(found[2]["warmup.num_rounds"]) is int


# --- draws -----------------------------------------------------------------------------------------------------------


@st.composite
def ranges(draw):
    """A knob of either kind of number and a range of it."""
    if draw(st.booleans()):
        low, high = sorted(draw(st.lists(st.integers(1, 3000), min_size=2, max_size=2, unique=True)))
        return "generator.steps", Range(low, high, log=draw(st.booleans()))
    numbers = st.floats(1e-6, 1e6, allow_nan=False, allow_subnormal=False)
    low, high = sorted(draw(st.lists(numbers, min_size=2, max_size=2, unique=True)))
    return "generator.lambda_e", Range(low, high, log=draw(st.booleans()))


@given(ranges(), st.integers(0, 2**31), st.integers(0, 12))
def test_draws_stay_inside_bounds_and_more_samples_begin_with_the_fewer(ranged, seed, fewer):
    knob, domain = ranged
    plan = plan_of(knobs={knob: domain})
    check_space("mine", plan)
    points = random_points(plan, 16, seed)
    assert points[:fewer] == random_points(plan, fewer, seed)
    for point in points:
        value = point[knob]
        assert domain.low <= value <= domain.high and type(value) is KNOBS[knob].type
        assert value in (domain.low, domain.high) or type(value) is int or value == float(f"{value:.6g}")
        assert check_value(knob, json.loads(json.dumps(value))) == value


@given(st.permutations(["generator.lambda_e", "generator.steps", "partition.omega"]), st.integers(0, 99))
def test_the_order_of_knobs_moves_no_draw_and_neither_does_one_more(order, seed):
    domains = {
        "generator.lambda_e": Range(0.5, 2.0), "generator.steps": Range(10, 999, log=True),
        "partition.omega": Choice((0.01, 0.1, 1.0)),
    }  # fmt: skip
    whole = random_points(plan_of(knobs=domains), 8, seed)
    assert random_points(plan_of(knobs={k: domains[k] for k in order}), 8, seed) == whole
    for knob in ("generator.lambda_e", "generator.steps"):
        alone = random_points(plan_of(knobs={knob: domains[knob]}), 8, seed)
        assert alone == [{knob: point[knob]} for point in whole]


@given(AXES, st.integers(0, 99), st.integers(1, 30))
def test_lists_of_values_are_drawn_without_repetition(axes, seed, samples):
    plan = plan_of(knobs={knob: Choice(tuple(values)) for knob, values in axes.items()})
    every = grid_points(plan)
    found = random_points(plan, samples, seed)
    assert len(found) == min(samples, len(every)) and all(point in every for point in found)
    assert all(point not in found[:i] for i, point in enumerate(found))
    assert found == random_points(plan, len(every), seed)[:samples], "a larger sweep begins with a smaller one"


def test_another_seed_draws_other_points():
    plan = plan_of(knobs={"warmup.num_rounds": Choice(tuple(range(1, 101)))})
    assert random_points(plan, 8, 0) != random_points(plan, 8, 1)


def test_a_draw_has_an_address():
    knob, domain = "generator.lambda_d", Range(2.0, 10.0)
    points = random_points(plan_of(knobs={knob: domain}), 40, 5)
    expected = [float(f"{numpy_stream(5, 'space', knob, i).uniform(2.0, 10.0):.6g}") for i in range(40)]
    assert [point[knob] for point in points] == expected
    assert len(set(expected)) == 40
    assert random_points(plan_of(knobs={knob: domain}), 40, 6) != points


def test_rounding_leaves_no_range():
    partial_width = plan_of(knobs={"generator.lambda_e": Range(0.12345671, 0.12345678)})  # both round to 0.123457
    assert {point["generator.lambda_e"] for point in random_points(partial_width, 5, 0)} == {0.12345678}


def test_draws_cover_what_they_may_be():
    knobs = {
        "generator.steps": Range(1, 4), "meta.updates": Range(1, 4, log=True), "warmup.lr": Range(1e-4, 1.0, log=True),
        "meta.pool": Choice(("mean", "sum")),
    }  # fmt: skip
    points = random_points(plan_of(knobs=knobs), 2000, 0)
    whole = [sum(point["generator.steps"] == n for point in points) / 2000 for n in (1, 2, 3, 4)]
    assert whole == pytest.approx([0.25] * 4, abs=0.05)
    logs = [sum(point["meta.updates"] == n for point in points) / 2000 for n in (1, 2, 3, 4)]
    total = math.log(4.5 / 0.5)
    assert logs == pytest.approx([math.log((n + 0.5) / (n - 0.5)) / total for n in (1, 2, 3, 4)], abs=0.05)
    assert sum(point["warmup.lr"] < 1e-2 for point in points) / 2000 == pytest.approx(0.5, abs=0.05)
    assert sum(point["meta.pool"] == "sum" for point in points) / 2000 == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize(
    "points, fields, says",
    [
        (
            grid_points,
            {"knobs": {"warmup.lr": Range(0.001, 0.1, log=True)}},
            "--search grid: warmup.lr is a range (0.001 .. 0.1 (log)) without a grid; take --search random",
        ),
        (
            lambda plan: random_points(plan, 4, 0),
            {"points": ({},)},
            "--search random: the space lists its points; take --search grid",
        ),
    ],
)
def test_a_search_that_the_space_cannot_give_is_refused(points, fields, says):
    assert refused_by(points, plan_of(**fields)) == says


# --- what a plan may say ---------------------------------------------------------------------------------------------

FINE = {"generator.lambda_e": Choice((1.0,))}


@pytest.mark.parametrize(
    "fields, says",
    [
        ({}, "it has neither knobs nor points"),
        ({"knobs": FINE, "points": ({},)}, "it has knobs and points"),
        ({"knobs": [1]}, "knobs map a knob's name"),
        ({"points": {"generator.lambda_e": 1}}, "points are a tuple of mappings"),
        ({"points": (3,)}, "points: 3 does not map"),
        ({"points": ({"generator.lambda_e": 1}, {"generator.lambda_e": 1.0})}, "points: {'generator.lambda_e': 1.0} "),
        ({"points": ({"generator.lambda_e": Choice((1,))},)}, "generator.lambda_e = Choice(values=(1,)): it takes a n"),
        ({"points": ({"lambda_e": 1},)}, 'unknown knob "lambda_e"; did you mean "generator.lambda_e"'),
        ({"points": ({"seed": 1},)}, "seed: a space leaves seeds to --seeds"),
        ({"knobs": {"seed": Choice((0, 1))}}, "seed: a space leaves seeds to --seeds"),
        ({"knobs": {"algorithm": Choice(("fixed",))}}, "algorithm: a preset of many knobs"),
        ({"knobs": {7: Choice((0, 1))}}, "7: a knob goes by its dotted name"),
        ({"knobs": {"partition.omegas": Choice((1,))}}, 'unknown knob "partition.omegas"; did you mean "partition.om'),
        ({"knobs": {"partition.omegas": Range(1, 2)}}, 'unknown knob "partition.omegas"; did you mean "partition.om'),
        ({"knobs": {"partition.omega": Choice(())}}, "partition.omega: the Choice is empty"),
        ({"knobs": {"partition.omega": Choice(0.1)}}, "partition.omega: Choice takes a tuple"),
        ({"knobs": {"partition.omega": (0.1, 1.0)}}, "partition.omega = (0.1, 1.0): it takes a Choice or a Range"),
        ({"knobs": {"partition.omega": Choice((0.1, 0))}}, "partition.omega = 0: it takes a number above 0"),
        ({"knobs": {"partition.omega": Choice((1, 0.1, 1.0))}}, "partition.omega: 1 is there twice"),
        ({"knobs": {"partition.num_clients": Choice((2.5,))}}, "partition.num_clients = 2.5: it takes a whole number"),
        ({"knobs": {"meta.pool": Choice(("max",))}}, "meta.pool = max: it takes one of mean, sum"),
        ({"knobs": {"meta.pool": Range("mean", "sum")}}, "meta.pool: a Range is for numbers"),
        ({"knobs": {"distill.guard": Range(False, True)}}, "distill.guard: a Range is for numbers"),
        ({"knobs": {"partition.omega": Range(0, 1)}}, "partition.omega = 0: it takes a number above 0"),
        ({"knobs": {"partition.omega": Range(1, float("inf"))}}, "partition.omega = inf: it takes a number above 0"),
        ({"knobs": {"partition.omega": Range(1, 0.1)}}, "partition.omega: the Range 1 .. 0.1 needs low < high"),
        ({"knobs": {"partition.omega": Range(1, 1)}}, "partition.omega: the Range 1 .. 1 needs low < high"),
        ({"knobs": {"generator.lambda_e": Range(0, 1, log=True)}}, "generator.lambda_e: the Range 0 .. 1 (log) needs"),
        ({"knobs": {"generator.lambda_e": Range(1, 2, grid=(3,))}}, "generator.lambda_e: 3 of the grid is outside"),
        ({"knobs": {"generator.lambda_e": Range(1, 2, grid=(1, 1.0))}}, "generator.lambda_e: 1 is there twice"),
        ({"knobs": {"generator.lambda_e": Range(1, 2, grid=("x",))}}, 'generator.lambda_e = "x": it takes a number'),
        ({"knobs": {"generator.lambda_e": Range(1, 2, grid=1)}}, "generator.lambda_e: the grid of a Range is a tuple"),
        ({"knobs": {"generator.steps": Range(0.5, 2)}}, "generator.steps = 0.5: it takes a whole number"),
        ({"knobs": FINE, "base": {"partition.omga": 1}}, 'unknown knob "partition.omga"; did you mean "partition.omeg'),
        ({"knobs": FINE, "base": {"partition.omega": -1}}, "partition.omega = -1: it takes a number above 0"),
        ({"knobs": FINE, "base": ()}, "base maps knobs to values"),
        ({"knobs": FINE, "preset": "demoo"}, 'preset demoo: unknown preset "demoo"; did you mean "demo"?'),
        ({"knobs": FINE, "preset": None}, "preset = None: it takes the name of a preset"),
        ({"knobs": FINE, "search": "gird"}, "search = gird: it takes one of grid, random, optuna"),
        ({"knobs": FINE, "samples": 0}, "samples = 0: it takes a whole number at least 1"),
        ({"knobs": FINE, "samples": True}, "samples = True: it takes a whole number at least 1"),
        ({"knobs": FINE, "seeds": 3}, "seeds = 3: it takes a tuple of whole numbers"),
        ({"knobs": FINE, "seeds": (-1,)}, "seed = -1: it takes a whole number at least 0"),
        ({"knobs": FINE, "seeds": (1.0,)}, "seeds: 1.0 is not a whole number"),
        ({"knobs": FINE, "seeds": (1, 1)}, "seeds: 1 is there twice"),
        ({"knobs": FINE, "summary": ""}, "summary = '': it takes a line of text"),
    ],
)  # fmt: skip
def test_an_impossible_plan_is_refused_in_one_line(fields, says):
    assert refused_by(check_space, "mine", SweepPlan(**({"summary": "a test"} | fields))).startswith(
        f"--space mine: {says}"
    )


def test_a_possible_plan_passes():
    knobs = {
        "federation.widths": Choice(([1.0], (1.0, 0.5))), "distill.guard": Choice((True, False)),
        "generator.steps": Range(10, 20, grid=[10, 20], log=True),
    }  # fmt: skip
    plan = plan_of(knobs=knobs, preset="fmnist_small+paper", base={"partition.omega": 1}, seeds=[0, 7], search="optuna")
    check_space("mine", plan)
    assert grid_points(plan)[-1] == {
        "federation.widths": (1.0, 0.5), "distill.guard": False, "generator.steps": 20
    }  # fmt: skip
    check_space("mine", replace(plan, knobs={}, points=[{}, {"generator.lambda_e": 1}]))


# --- words -----------------------------------------------------------------------------------------------------------


def test_setting_knobs():
    names = ["generator.lambda_e", "partition.omega", "data.name", "warmup.lr", "partition.num_clients", "seed"]
    assert setting_knobs(names) == ("partition.omega", "data.name", "partition.num_clients")
    excluded = {"data.root", "data.download", "partition.policy", "partition.max_tries"}
    assert set(setting_knobs(KNOBS)) == {k for k in KNOBS if k.split(".")[0] in ("data", "partition")} - excluded
    assert excluded <= set(KNOBS)


@pytest.mark.parametrize(
    "domain, says",
    [
        (Range(0.5, 2.0, grid=(0.5, 1.0)), "0.5 .. 2"),
        (Range(1e-5, 0.1, log=True), "1e-05 .. 0.1 (log)"),
        (Range(10, 1000), "10 .. 1000"),
        (Choice((0.01, 0.1, 1.0)), "0.01, 0.1, 1"),
        (Choice((0.1234567890123,)), "0.1234567890123"),
        (Choice(("mean", "sum")), "mean, sum"),
        (Choice((True, False)), "true, false"),
        (Choice(([1.0, 0.5], (1.0,))), "[1, 0.5], [1]"),
        (Choice(("a,b", "c", " d", 'a"b', "")), """"a,b", c, " d", 'a"b', \"\""""),
    ],
)
def test_a_domain_in_words(domain, says):
    assert describe(domain) == says


def test_a_plan_sweeps_the_knobs_of_its_own_plugin(tmp_path):
    """The plug-in is named by the plan's base, or by the point itself."""
    lab = Path(__file__).parents[1] / "plugins/lab/median.py"
    for name in ("one", "two"):
        (tmp_path / f"{name}.py").write_text(lab.read_text().replace('"median"', f'"{name}"'))
    one, two = ({"federation.strategy": f"{tmp_path / name}.py:MEDIAN"} for name in ("one", "two"))
    check_space("mine", SweepPlan("a knob", knobs={"one.step": Choice((0.5, 1.0))}, base=one))
    check_space("mine", SweepPlan("points", points=({}, two | {"two.step": 0.5})))
    wrong = SweepPlan("a knob", knobs={"one.step": Choice(("fast",))}, base=one)
    assert refused_by(check_space, "mine", wrong).startswith('--space mine: one.step = "fast"')
