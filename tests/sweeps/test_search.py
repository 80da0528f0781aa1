"""The searches and ASHA: points are a function of the plan alone, and optuna's improve."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mosaic_ray.config.resolve import flatten, override
from mosaic_ray.config.schema import ExperimentConfig
from mosaic_ray.core.errors import RequestError
from mosaic_ray.sweeps.search import LAG, FixedTrials, OptunaSearch, Search, searched_knobs, settings_of
from mosaic_ray.sweeps.space import Choice, Range, SweepPlan
from mosaic_ray.sweeps.state import Trial, make_trials

BASE = override(ExperimentConfig(), {"partition.validation_fraction": 0.1})
OMEGAS = (0.01, 0.1, 1.0)
PLAN = SweepPlan(
    "a test",
    {
        "generator.lambda_e": Range(0.5, 2.0),
        "partition.omega": Choice(OMEGAS),
        "generator.lambda_d": Range(2.0, 10.0),
        "meta.pool": Choice(("mean", "sum")),
    },
)
ONE_SETTING = SweepPlan("a test", {name: d for name, d in PLAN.knobs.items() if name != "partition.omega"})

Score = Callable[[Trial], float | None]


def concave(trial: Trial) -> float:
    """Best at lambda_e 1.5, lambda_d 8."""
    section = trial.config.generator
    return 1.0 - (section.lambda_e - 1.5) ** 2 - ((section.lambda_d - 8.0) / 4) ** 2


def played(
    search: Search, score: Score, *, slots: int = 1, order: random.Random | None = None, found: int = 0
) -> list[Trial]:
    """Every trial in the order in which it is handed out.

    ``slots`` trials run at once and finish in a random ``order``; the first ``found`` have finished before.
    """
    order = order or random.Random(0)
    handed: list[Trial] = []
    under_way: list[Trial] = []
    while True:
        try:
            trial = search.next() if len(under_way) < slots else None
        except StopIteration:
            if not under_way:
                return handed
            trial = None
        if trial is None:
            assert under_way, "no trial runs and none is handed out: the sweep would hang"
            ended = under_way.pop(order.randrange(len(under_way)))
            search.finished(ended, score(ended))
        else:
            handed.append(trial)
            if len(handed) <= found:
                search.finished(trial, score(trial))
            else:
                under_way.append(trial)


def optuna(plan: SweepPlan = PLAN, samples: int = 12, seeds: Sequence[int] = (0,), base=BASE) -> OptunaSearch:
    return OptunaSearch(plan, samples, seeds, base)


def section_knobs(trials: Sequence[Trial]) -> list[dict]:
    return [trial.knobs for trial in trials]


def refusal(call, *args) -> str:
    """Return the one-line error of ``call``."""
    with pytest.raises(RequestError) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- fixed trials -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slots", [1, 3, 100])
def test_fixed_trials_come_in_order(slots):
    trials = make_trials(BASE, [{"warmup.lr": 0.1}, {}, {"warmup.lr": 0.2}], (1, 0))
    listed = FixedTrials(trials)
    assert listed.total == 6
    assert played(listed, lambda trial: None, slots=slots) == trials
    with pytest.raises(StopIteration):
        listed.next()


def test_fixed_trials_never_wait():
    listed = FixedTrials(make_trials(BASE, [{}], (0, 1, 2)))
    assert [listed.next().seed for _ in range(3)] == [0, 1, 2]


# --- optuna: a function of the plan alone ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def in_turn() -> list[Trial]:
    """The twelve points with two seeds, one trial at a time."""
    return played(optuna(seeds=(3, 1)), concave)


@settings(max_examples=15)
@given(order=st.randoms(use_true_random=False), slots=st.integers(1, 30), found=st.integers(0, 24))
def test_points_depend_on_neither_order_nor_concurrency(in_turn, order, slots, found):
    assert played(optuna(seeds=(3, 1)), concave, order=order, slots=slots, found=found) == in_turn


def test_no_argument_of_the_sampler_that_decides_draws_is_left_to_its_default(monkeypatch):
    import optuna as package

    given_words: list[set[str]] = []
    real = package.samplers.TPESampler
    monkeypatch.setattr(package.samplers, "TPESampler", lambda **words: given_words.append(set(words)) or real(**words))
    optuna(ONE_SETTING)
    deprecated = {"consider_prior", "prior_weight", "consider_magic_clip", "consider_endpoints", "gamma", "weights"}
    left = set(inspect.signature(real.__init__).parameters) - given_words[0] - deprecated
    assert left == {"self", "warn_independent_sampling"}


def test_the_same_plan_gives_the_same_points(in_turn):
    again = played(optuna(seeds=(3, 1)), concave)
    assert [(t.name, t.point, t.seed, t.config) for t in again] == [
        (t.name, t.point, t.seed, t.config) for t in in_turn
    ]
    assert [t.name for t in again[:4]] == ["p000s3", "p000s1", "p001s3", "p001s1"]
    assert len(again) == optuna(seeds=(3, 1)).total == 24


@pytest.mark.parametrize("changed", [{"seed": 5}, {"samples": 40}])
def test_another_plan_has_other_points(in_turn, changed):
    base = override(BASE, {"seed": changed.get("seed", 0)})
    other = played(optuna(seeds=(3, 1), base=base, samples=changed.get("samples", 12)), concave)
    assert section_knobs(other[:24]) != section_knobs(in_turn)


@pytest.mark.parametrize("plan, count", [(PLAN, 3), (ONE_SETTING, 1)])
def test_a_point_depends_only_on_earlier_points_of_its_setting(plan, count):
    samples = 5 * count
    points = section_knobs(played(optuna(plan, samples), concave))
    moved = set()
    for known in range(samples):

        def otherwise(trial: Trial, known: int = known) -> float:
            return 9.0 if trial.point == known else concave(trial)

        again = section_knobs(played(optuna(plan, samples), otherwise))
        changed = [point for point in range(samples) if again[point] != points[point]]
        may_know = {point for point in range(known + LAG * count, samples) if point % count == known % count}
        assert set(changed) <= may_know, known
        moved |= set(changed)
    assert moved, "no score changed any point"


def test_the_search_waits_for_earlier_scores():
    search = optuna(samples=12)
    first = [search.next() for _ in range(3 * LAG)]
    assert None not in first
    assert search.next() is None is search.next()
    for trial in first[1:]:
        search.finished(trial, 1.0)
    assert search.next() is None, "the seventh point follows the first"
    search.finished(first[0], 1.0)
    assert search.next().point == 6


def test_a_point_finishes_with_its_last_seed():
    search = optuna(ONE_SETTING, seeds=(0, 1))
    trials = [search.next() for _ in range(2 * LAG)]
    search.finished(trials[0], 1.0)
    assert search.next() is None
    search.finished(trials[1], 1.0)
    assert search.next().name == f"p00{LAG}s0"


# --- optuna: settings ------------------------------------------------------------------------------------------------


def test_settings_are_taken_in_turn():
    plan = SweepPlan("a test", PLAN.knobs | {"partition.num_clients": Choice((5, 10))})
    trials = played(optuna(plan, 14), lambda trial: trial.config.partition.omega)  # the largest is always best
    dealt = [(t.knobs["partition.omega"], t.knobs["partition.num_clients"]) for t in trials]
    assert dealt == ([(omega, clients) for omega in OMEGAS for clients in (5, 10)] * 3)[:14]
    assert [list(t.knobs) for t in trials] == [list(plan.knobs)] * 14


def test_settings_do_not_affect_each_other():
    alone = section_knobs(played(optuna(samples=15), concave))

    def loud(trial: Trial) -> float:
        return concave(trial) * (-50.0 if trial.knobs["partition.omega"] == 0.1 else 1.0)

    other = section_knobs(played(optuna(samples=15), loud))
    assert other[0::3] == alone[0::3]
    assert other[2::3] == alone[2::3]
    assert other[1::3] != alone[1::3]


def test_fewer_samples_than_settings():
    assert [t.knobs["partition.omega"] for t in played(optuna(samples=2), concave)] == [0.01, 0.1]


def test_a_range_in_the_setting_needs_a_grid():
    plan = SweepPlan("a test", PLAN.knobs | {"partition.omega": Range(0.01, 1.0, log=True)})
    line = refusal(optuna, plan)
    assert line.startswith("--search optuna: partition.omega is a range (0.01 .. 1 (log)) without a grid")
    plan = SweepPlan("a test", PLAN.knobs | {"partition.omega": Range(0.01, 1, grid=(0.01, 1))})
    assert [t.knobs["partition.omega"] for t in played(optuna(plan, 4), concave)] == [0.01, 1.0, 0.01, 1.0]


def test_nothing_to_search_is_refused():
    plan = SweepPlan("a test", {"partition.omega": Choice(OMEGAS), "data.name": Choice(("digits", "mnist"))})
    line = refusal(optuna, plan)
    assert "(partition.omega, data.name)" in line and "--search grid" in line


def test_settings_and_searched_knobs():
    assert settings_of(PLAN) == [{"partition.omega": omega} for omega in OMEGAS]
    assert settings_of(ONE_SETTING) == [{}]
    assert list(searched_knobs(PLAN)) == ["generator.lambda_e", "generator.lambda_d", "meta.pool"]


# --- optuna: scores --------------------------------------------------------------------------------------------------


def test_a_points_score_is_the_mean_over_its_seeds():
    def spread(trial: Trial) -> float:
        return concave(trial) + {0: 0.3, 1: -0.1, 2: -0.2}[trial.seed]

    seeds = (0, 1, 2)
    trials = played(optuna(ONE_SETTING, seeds=seeds), spread, slots=6, order=random.Random(4))
    first = [t.knobs for t in trials if t.seed == 0]
    assert first == [t.knobs for t in trials if t.seed == 1]
    assert first == section_knobs(played(optuna(ONE_SETTING), concave))
    last = played(optuna(ONE_SETTING, seeds=seeds), lambda t: spread(t) if t.seed == 2 else -9.0 * concave(t))
    assert [t.knobs for t in last if t.seed == 0] != first


def test_a_point_with_a_failed_seed_has_no_score():
    def failing(known: float) -> Score:
        def score(trial: Trial) -> float | None:
            if trial.point in (1, 4):
                return None if trial.seed == 1 else known
            return concave(trial)

        return score

    one, other = (played(optuna(ONE_SETTING, seeds=(0, 1)), failing(known)) for known in (-9.0, 9.0))
    assert one == other
    assert one != played(optuna(ONE_SETTING, seeds=(0, 1)), concave)


def test_a_search_goes_on_where_everything_fails():
    assert len(played(optuna(), lambda trial: None, slots=4)) == 12


def test_later_points_score_better():
    first, last = [], []
    for seed in range(3):
        trials = played(optuna(ONE_SETTING, 40, base=override(BASE, {"seed": seed})), concave)
        first += [concave(trial) for trial in trials[:10]]
        last += [concave(trial) for trial in trials[-10:]]
    assert fmean(last) > fmean(first) + 0.2


# --- optuna: values --------------------------------------------------------------------------------------------------


def test_every_kind_of_knob():
    plan = SweepPlan(
        "a test",
        {
            "federation.widths": Choice(([1.0], (1.0, 1.0))),
            "meta.pool": Choice(("mean", "sum")),
            "warmup.shuffle": Choice((True, False)),
            "generator.steps": Range(10, 13),
            "generator.latent_dim": Range(1.0, 1000.0, log=True),
            "warmup.lr": Range(1e-4, 1, log=True),
            "generator.tau": Choice((300, 100.0)),
            "generator.lambda_d": Range(1.23456789, 1.23456999),
        },
    )
    values: dict[str, set] = {}
    for trial in played(optuna(plan, 60), lambda trial: trial.config.warmup.lr):
        assert {name: flatten(trial.config)[name] for name in trial.knobs} == trial.knobs
        for name, value in trial.knobs.items():
            values.setdefault(name, set()).add(value)
            assert type(value) is type(flatten(BASE)[name]), name
    assert values["federation.widths"] == {(1.0,), (1.0, 1.0)}
    assert values["meta.pool"] == {"mean", "sum"}
    assert values["warmup.shuffle"] == {True, False}
    assert values["generator.steps"] == {10, 11, 12, 13}
    assert values["generator.tau"] == {100, 300}
    assert 1 <= min(values["generator.latent_dim"]) < 20
    assert 1e-4 <= min(values["warmup.lr"]) < max(values["warmup.lr"]) <= 1.0
    assert 1.23456789 <= min(values["generator.lambda_d"]) <= max(values["generator.lambda_d"]) <= 1.23456999
    assert all(float(f"{value:.6g}") == value for value in values["warmup.lr"])


# --- halving ---------------------------------------------------------------------------------------------------------


class Halving:
    """The scheduler with trials that are names alone; ``result`` says whether a trial goes on."""

    def __init__(self, setting: Sequence[str] = ("partition.omega", "seed"), num_rounds: int = 3) -> None:
        from mosaic_ray.sweeps.tune import HalvingBySetting

        self.scheduler = HalvingBySetting(setting, num_rounds)
        self.trials: dict[str, SimpleNamespace] = {}

    def result(self, trial: str, result: dict[str, object], **config: object) -> bool:
        if trial not in self.trials:
            self.trials[trial] = SimpleNamespace(trial_id=trial, config={"seed": 0, **config})
            self.scheduler.on_trial_add(None, self.trials[trial])
        answer = self.scheduler.on_trial_result(None, self.trials[trial], result)
        assert answer in ("CONTINUE", "STOP")
        return answer == "CONTINUE"

    def score(self, trial: str, rung: int, score: float, **config: object) -> bool:
        return self.result(trial, {"rung": rung, "score": score, "training_iteration": 1}, **config)


LAB = Path(__file__).parents[1] / "plugins/lab"


@pytest.mark.parametrize(
    "method, own",
    [
        ("mosaic", {"teacher": 2, "distill": 4}),
        ("fedavg", {}),
        (f"{LAB / 'nearest_mean.py'}:NEAREST_MEAN", {"class_means": 4}),
    ],
)
def test_the_stages_of_a_method_have_rungs(method, own):
    from mosaic_ray.sweeps.tune import rungs

    assert rungs(override(BASE, {"method": method})) == {"warmup": 1, "finetune": 4} | own


def test_the_worse_half_at_a_rung_is_stopped():
    halving = Halving()
    goes_on = [halving.score(f"t{i}", 2, score) for i, score in enumerate((0.5, 0.4, 0.6, 0.45, 0.7, 0.49))]
    assert goes_on == [True, False, True, False, True, False]
    assert halving.score("t0", 4, 0.1), "the first at a rung has no other to compare with"
    assert not halving.score("t2", 4, 0.05)
    assert halving.score("t4", 4, 0.2)


def test_halving_compares_within_a_setting():
    halving = Halving()
    for name, omega, seed, score in (
        ("easy", 1.0, 0, 0.9), ("hard", 0.01, 0, 0.2), ("seed", 1.0, 1, 0.3), ("base", None, 0, 0.1),
    ):  # fmt: skip
        assert halving.score(name, 1, score, **{"seed": seed} | ({"partition.omega": omega} if omega else {}))
    assert not halving.score("worse", 1, 0.8, **{"partition.omega": 1.0})
    assert halving.score("better", 1, 0.25, **{"partition.omega": 0.01})


def test_other_knobs_are_what_halving_compares():
    halving = Halving()
    assert halving.score("one", 1, 0.9, **{"generator.lambda_d": 2.0})
    assert not halving.score("two", 1, 0.8, **{"generator.lambda_d": 5.0})


def test_ties_go_on():
    """Trials that share a warm-up have the same score after it."""
    halving = Halving()
    assert all(halving.score(f"t{i}", rung, 0.5) for rung in (1, 2, 4) for i in range(9))


def test_a_result_without_a_score_stops_no_trial():
    halving = Halving()
    assert halving.score("good", 2, 0.9)
    for result in ({"stage": "warmup"}, {"status": "done"}, {"status": "failed", "score": 0.0, "rung": 2}, {}):
        assert halving.result("bad", result)
    assert not halving.score("bad", 2, 0.1)


@pytest.mark.parametrize("num_rounds", [0, 1, 3, 4, 5, 40])
def test_the_best_trial_runs_to_its_end(num_rounds):
    halving = Halving(num_rounds=num_rounds)
    rungs = [1, 2, 4, *range(5, 5 + num_rounds)]
    for rung in rungs:
        assert halving.score("worse", rung, 0.5) or rung > 1
        assert halving.score("best", rung, 0.6)


def test_a_restarted_trial_is_not_compared_twice_at_a_rung():
    halving = Halving()
    assert halving.score("t0", 1, 0.5) and halving.score("t0", 2, 0.5)
    assert halving.score("t1", 1, 0.9) and halving.score("t1", 2, 0.9)
    assert halving.score("t0", 1, 0.5) and halving.score("t0", 2, 0.5), "its process died and started again"


@pytest.mark.parametrize("num_rounds", [0, 4, 12])
def test_no_trial_is_stopped_at_the_last_round(num_rounds):
    halving = Halving(num_rounds=num_rounds)
    assert halving.score("best", 4 + num_rounds, 0.9)
    assert halving.score("worst", 4 + num_rounds, 0.1)
