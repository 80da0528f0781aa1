"""A prepared sweep: its points, its plan.json and its resources."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import combinations, product
from pathlib import Path

import optuna
import pytest

from mosaic_ray.config.resolve import as_dict, override
from mosaic_ray.config.schema import ExperimentConfig
from mosaic_ray.core.errors import RequestError
from mosaic_ray.execution.resource_plan import Node
from mosaic_ray.sweeps.runner import SweepRequest, prepare, resources_of
from mosaic_ray.sweeps.space import Choice, Range, SweepPlan

pytestmark = pytest.mark.usefixtures("two_cpus")

REPO = Path(__file__).resolve().parents[2]


VALID = override(ExperimentConfig(), {"partition.validation_fraction": 0.1})


def request(plan: SweepPlan, **more: object) -> SweepRequest:
    return SweepRequest(VALID, "mine", plan, **more)


GRID = SweepPlan(
    "a test", {"partition.omega": Choice((0.1, 1)), "generator.lambda_d": Range(2, 10, grid=(2, 5))}, samples=3
)


def test_prepare_fills_in_plan_json():
    sweep = prepare(request(GRID, seeds=(1, 0)))
    assert sweep.plan_json == {
        "space": "mine", "search": "grid", "samples": None, "seeds": [1, 0], "scheduler": "fifo",
        "knobs": {"partition.omega": "0.1, 1", "generator.lambda_d": "2 .. 10"},
        "points": [trial.knobs for trial in sweep.trials if trial.seed == 1],
        "base": as_dict(VALID),
        "preset": None,
    }  # fmt: skip
    assert (sweep.swept, sweep.setting) == (("partition.omega", "generator.lambda_d"), ("partition.omega",))
    assert sweep.search.total == len(sweep.trials) == len(sweep.configs) == 8
    assert [sweep.search.next() for _ in range(8)] == list(sweep.trials)
    assert json.loads(json.dumps(sweep.plan_json)) == sweep.plan_json


def test_a_plan_names_the_optuna_that_searches():
    assert prepare(request(GRID, search="optuna")).plan_json["optuna"] == optuna.__version__
    assert "optuna" not in prepare(request(GRID, search="random")).plan_json


def test_more_samples_than_points_are_all_points():
    lists = replace(GRID, knobs={"partition.omega": Choice((0.1, 1)), "meta.pool": Choice(("mean", "sum"))})
    sweep = prepare(request(lists, search="random", samples=9))
    assert sweep.search.total == 4 and "--samples 9: the space has only 4 points" in sweep.note
    assert not prepare(request(lists, search="random", samples=4)).note


@pytest.mark.parametrize(
    "search, samples, count", [("", None, 4), ("random", None, 3), ("random", 5, 5), ("optuna", 5, 5)]
)
def test_how_many_points(search, samples, count):
    sweep = prepare(request(GRID, search=search, samples=samples, seeds=(0, 1)))
    assert sweep.search.total == 2 * count
    assert sweep.plan_json["samples"] == (None if not search else count)
    if search == "optuna":
        assert sweep.plan_json["points"] is None
    else:
        assert len(sweep.plan_json["points"]) == count


@pytest.mark.parametrize("search", ["grid", "random", "optuna"])
def test_the_machines_precision_is_not_part_of_the_plan(search):
    settled = override(VALID, {"runtime.precision": "fp32"})
    asked, made = prepare(request(GRID, search=search)), prepare(request(GRID, search=search), settled)
    assert asked.plan_json == made.plan_json
    assert {config.runtime.precision for config in made.configs} == {"fp32"}
    assert made.search.next().config.runtime.precision == "fp32"


def test_explicit_points_keep_the_base_itself():
    sweep = prepare(request(SweepPlan("a test", points=({}, {"meta.pool": "sum"}))))
    assert [trial.knobs for trial in sweep.trials] == [{}, {"meta.pool": "sum"}]
    assert (sweep.swept, sweep.setting) == (("meta.pool",), ())


WIDE = SweepPlan(
    "a test",
    {
        "generator.lambda_e": Range(0.5, 2.0),
        "data.name": Choice(("digits", "mnist")),
        "meta.pool": Choice(("mean", "sum")),
        "data.root": Choice(("a", "b", "c")),
        "partition.omega": Choice((0.1, 1.0)),
        "data.download": Choice((False, True)),
    },
    search="optuna",
)


def test_optuna_checks_every_pair_of_values_first():
    sweep = prepare(request(WIDE, samples=30))
    points = [trial.knobs for trial in sweep.trials]
    ends = {name: getattr(domain, "values", (0.5, 2.0)) for name, domain in WIDE.knobs.items()}
    for one, other in combinations(ends, 2):
        assert {(p[one], p[other]) for p in points} == set(product(ends[one], ends[other])), (one, other)
    assert len(points) == len({repr(point) for point in points})
    assert sweep.swept == tuple(WIDE.knobs)


def test_optuna_points_use_only_checked_data():
    sweep = prepare(request(WIDE, samples=30))
    known = {config.data for config in sweep.configs}
    for number in range(30):
        trial = sweep.search.next()
        assert trial.config.data in known
        sweep.search.finished(trial, float(number % 7))
    with pytest.raises(StopIteration):
        sweep.search.next()


def test_optuna_checks_both_ends_of_a_single_knob():
    plan = SweepPlan("a test", {"warmup.lr": Range(0.1, 0.2)}, search="optuna")
    assert [trial.knobs for trial in prepare(request(plan)).trials] == [{"warmup.lr": 0.1}, {"warmup.lr": 0.2}]


@pytest.mark.parametrize(
    "scheduler, search, ok", [("fifo", "grid", True), ("asha", "grid", False), ("fifo", "optuna", False)]
)
def test_asha_and_optuna_need_validation_images(scheduler, search, ok):
    blind = replace(request(GRID, scheduler=scheduler, search=search), config=ExperimentConfig())
    if ok:
        prepare(blind)
    else:
        with pytest.raises(RequestError, match=r"partition\.validation_fraction above 0"):
            prepare(blind)


def test_one_trial_without_validation_images_is_enough_to_refuse():
    plan = SweepPlan("a test", points=({}, {"partition.validation_fraction": 0.0}))
    with pytest.raises(RequestError, match="--scheduler asha"):
        prepare(request(plan, scheduler="asha"))


@pytest.mark.parametrize(
    "storage, bound", [("./runs", True), ("/a", True), ("file:///a", True), ("s3://b/c", False), ("gs://b", False)]
)
def test_trials_stay_on_this_node_where_the_storage_is_here(storage, bound):
    nodes = [Node("a", 4, 0, 8 * 2**30), Node("b", 4, 0, 8 * 2**30)]
    assert (resources_of(prepare(request(GRID)), nodes, storage).trials_on == 0) is bound
