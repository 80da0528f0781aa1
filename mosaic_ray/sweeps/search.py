"""Which point a sweep tries next: listed points in order, or optuna's, chosen so that a resumed sweep chooses the same.

Optuna's sampler learns from trials that have ended, and in what order they end is chance. So point ``i`` is asked for
only when all points up to ``i - LAG`` have ended, and is told of exactly those, in their order: the points are a
function of the plan alone, whatever the number of concurrent trials, killed and resumed or not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any, Protocol

from ..config.resolve import KNOBS, check_value
from ..config.schema import ExperimentConfig
from ..core.errors import RequestError
from ..core.seeding import derive
from .space import Choice, Range, SweepPlan, conditions, describe, grid_points
from .state import Trial, make_trials

#: Points under way at once, per condition, that a later point may know nothing of.
LAG = 2


class Search(Protocol):
    """Hands out trials, and is told how they ended."""

    total: int

    def next(self) -> Trial | None:
        """The next trial; None where one must end first. ``StopIteration`` at the end."""

    def ended(self, trial: Trial, selection: float | None) -> None: ...


class Listed:
    """Trials known from the start."""

    def __init__(self, trials: Sequence[Trial]) -> None:
        self.total = len(trials)
        self._left = iter(trials)

    def next(self) -> Trial | None:
        """See ``Search``."""
        return next(self._left)

    def ended(self, trial: Trial, selection: float | None) -> None:
        """Nothing depends on it."""


class Optuna:
    """A TPE study per condition (per omega, say): a study over omegas would only find out which problem is easiest."""

    def __init__(self, plan: SweepPlan, samples: int, seeds: Sequence[int], base: ExperimentConfig) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._base, self._seeds, self._samples, self._names = base, tuple(seeds), samples, tuple(plan.knobs)
        self.total = samples * len(self._seeds)
        self._conditions, self._domains = problems(plan), searched(plan)
        self._space = {name: _distribution(name, domain) for name, domain in self._domains.items()}
        count, per_study = len(self._conditions), -(-samples // len(self._conditions))
        self._studies = [
            optuna.create_study(
                direction="maximize",
                sampler=optuna.samplers.TPESampler(
                    seed=derive(base.seed, "optuna", number) % 2**32, n_startup_trials=max(2, min(10, per_study // 3))
                ),
            )
            for number in range(count)
        ]
        self._asked: list[Any] = []  # optuna's trial of each point
        self._told = [0] * count  # points of each study that it knows the end of
        self._scores: dict[int, dict[int, float | None]] = {}
        self._ready: list[Trial] = []

    def next(self) -> Trial | None:
        """See ``Search``."""
        if not self._ready:
            point = len(self._asked)
            if point == self._samples:
                raise StopIteration
            if not self._catch_up(point):
                return None
            condition = self._conditions[point % len(self._conditions)]
            asked = self._studies[point % len(self._studies)].ask(self._space)
            self._asked.append(asked)
            found = condition | {name: self._value(name, value) for name, value in asked.params.items()}
            self._ready = make_trials(self._base, [{name: found[name] for name in self._names}], self._seeds, point)
        return self._ready.pop(0)

    def ended(self, trial: Trial, selection: float | None) -> None:
        """See ``Search``; a point's score is the mean over its seeds, and none where a seed has none."""
        self._scores.setdefault(trial.point, {})[trial.seed] = selection

    def _value(self, name: str, found: Any) -> Any:
        domain = self._domains[name]
        if isinstance(domain, Choice):
            return check_value(name, domain.values[found])
        rounded = found if isinstance(found, int) else float(f"{found:.6g}")  # what is shown is what was run
        return check_value(name, min(max(rounded, domain.low), domain.high))

    def _catch_up(self, point: int) -> bool:
        """Tell the point's study of its points up to ``LAG`` before this one; False where one of them is under way."""
        import optuna

        count = len(self._studies)
        number, index = point % count, point // count
        while self._told[number] <= index - LAG:
            known = number + count * self._told[number]
            scores = self._scores.get(known, {})
            if len(scores) < len(self._seeds):
                return False
            values = list(scores.values())
            if None in values:
                self._studies[number].tell(self._asked[known], state=optuna.trial.TrialState.FAIL)
            else:
                self._studies[number].tell(self._asked[known], fmean(values))
            self._told[number] += 1
        return True


def problems(plan: SweepPlan) -> list[dict[str, Any]]:
    """Every combination of the knobs that set the problem: they are dealt in turn, never searched."""
    fixed = {name: plan.knobs[name] for name in conditions(plan.knobs)}
    for name, domain in fixed.items():
        if not isinstance(domain, Choice) and not domain.grid:
            raise RequestError(
                f"--search optuna: {name} is a range ({describe(domain)}) without a grid, but it sets the problem, so "
                "its values are dealt in turn, not searched; give it a Choice, or take --search random"
            )
    return grid_points(replace(plan, knobs=fixed))


def searched(plan: SweepPlan) -> dict[str, Choice | Range]:
    """The knobs that do not set the problem."""
    fixed = conditions(plan.knobs)
    found = {name: domain for name, domain in plan.knobs.items() if name not in fixed}
    if not found:
        raise RequestError(
            f"--search optuna: it does not search what sets the problem ({', '.join(fixed)}), and the space has no "
            "other knobs; take --search grid"
        )
    return found


def _distribution(name: str, domain: Choice | Range) -> Any:
    import optuna

    if isinstance(domain, Choice):
        return optuna.distributions.CategoricalDistribution(range(len(domain.values)))  # by place: values may be lists
    if KNOBS[name].type is int:
        return optuna.distributions.IntDistribution(int(domain.low), int(domain.high), log=domain.log)
    return optuna.distributions.FloatDistribution(domain.low, domain.high, log=domain.log)
