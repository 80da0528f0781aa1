"""Choose the next trial of a sweep: fixed points in order, or optuna's, the same ones in a resumed sweep.

Optuna's sampler learns from finished trials, which finish in any order. So point ``i`` is drawn once all points up to
``i - LAG`` have finished, and the sampler gets the scores of exactly those, in their order. The points are therefore a
function of the plan alone: neither the number of concurrent trials nor a kill and resume changes them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

from ..config.resolve import KNOBS, check_value
from ..config.schema import ExperimentConfig
from ..core.errors import RequestError
from ..core.seeding import derive
from .space import Choice, Range, SweepPlan, describe, grid_points, rounded, setting_knobs
from .state import Trial, make_trials

#: Unfinished points per setting before the next one waits.
LAG = 2


class FixedTrials:
    """Chooses trials that are known from the start, in order; ``total`` is their number."""

    def __init__(self, trials: Sequence[Trial]) -> None:
        self.total = len(trials)
        self._left = iter(trials)

    def next(self) -> Trial | None:
        """Return the next trial, or None where a running one must finish first; ``StopIteration`` at the end."""
        return next(self._left)

    def finished(self, trial: Trial, selection: float | None) -> None:
        """Take the selection of a finished trial, None where it failed or was stopped; no trial depends on it."""


class OptunaSearch:
    """One TPE study per setting (per omega, for example): a study over all would only find the easiest setting."""

    def __init__(
        self, plan: SweepPlan, samples: int, seeds: Sequence[int], base: ExperimentConfig,
        settle: Callable[[ExperimentConfig], ExperimentConfig] = lambda config: config,
    ) -> None:  # fmt: skip
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._base, self._seeds, self._samples, self._names = base, tuple(seeds), samples, tuple(plan.knobs)
        self._settle = settle
        self.total = samples * len(self._seeds)
        self._settings, self._domains = settings_of(plan), searched_knobs(plan)
        self._space = {name: _distribution(name, domain) for name, domain in self._domains.items()}
        count, per_study = len(self._settings), -(-samples // len(self._settings))
        self._studies = [
            optuna.create_study(
                direction="maximize",
                # every argument that decides draws and is not deprecated: defaults change with optuna's versions
                sampler=optuna.samplers.TPESampler(
                    seed=derive(base.seed, "optuna", number) % 2**32,
                    n_startup_trials=max(2, min(10, per_study // 3)),
                    n_ei_candidates=24,
                    multivariate=True,
                    group=False,
                    constant_liar=True,
                    constraints_func=None,
                ),
            )
            for number in range(count)
        ]
        self._asked: list[Any] = []  # optuna's trial of each point
        self._known = [0] * count  # number of points that each study has a score of
        self._scores: dict[int, dict[int, float | None]] = {}
        self._ready: list[Trial] = []

    def next(self) -> Trial | None:
        """Return the next trial as ``FixedTrials.next`` does."""
        if not self._ready:
            point = len(self._asked)
            if point == self._samples:
                raise StopIteration
            if not self._catch_up(point):
                return None
            setting = self._settings[point % len(self._settings)]
            asked = self._studies[point % len(self._studies)].ask(self._space)
            self._asked.append(asked)
            found = setting | {name: self._value(name, value) for name, value in asked.params.items()}
            knobs = {name: found[name] for name in self._names}
            self._ready = make_trials(self._base, [knobs], self._seeds, point, self._settle)
        return self._ready.pop(0)

    def finished(self, trial: Trial, selection: float | None) -> None:
        """Take a finished trial's selection; a point's score is the mean over its seeds, None where a seed has none."""
        self._scores.setdefault(trial.point, {})[trial.seed] = selection

    def _value(self, name: str, found: Any) -> Any:
        domain = self._domains[name]
        return check_value(name, domain.values[found]) if isinstance(domain, Choice) else rounded(name, domain, found)

    def _catch_up(self, point: int) -> bool:
        """Give the point's study the scores of its points up to ``LAG`` before this one; False where one still runs."""
        import optuna

        count = len(self._studies)
        number, index = point % count, point // count
        while self._known[number] <= index - LAG:
            earlier = number + count * self._known[number]
            scores = self._scores.get(earlier, {})
            if len(scores) < len(self._seeds):
                return False
            values = [score for score in scores.values() if score is not None]
            if len(values) < len(scores):
                self._studies[number].tell(self._asked[earlier], state=optuna.trial.TrialState.FAIL)
            else:
                self._studies[number].tell(self._asked[earlier], fmean(values))
            self._known[number] += 1
        return True


Search = FixedTrials | OptunaSearch


def settings_of(plan: SweepPlan) -> list[dict[str, Any]]:
    """Return every combination of the knobs that choose data and partition: taken in turn, never searched."""
    fixed = {name: plan.knobs[name] for name in setting_knobs(plan.knobs)}
    for name, domain in fixed.items():
        if not isinstance(domain, Choice) and not domain.grid:
            raise RequestError(
                f"--search optuna: {name} is a range ({describe(domain)}) without a grid, but it sets the problem, so "
                "its values are dealt in turn, not searched; give it a Choice, or take --search random"
            )
    return grid_points(replace(plan, knobs=fixed))


def searched_knobs(plan: SweepPlan) -> dict[str, Choice | Range]:
    """Return the knobs that optuna searches: all but the setting."""
    fixed = setting_knobs(plan.knobs)
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
        return optuna.distributions.CategoricalDistribution(range(len(domain.values)))  # by index: values may be lists
    if KNOBS[name].kind is int:
        return optuna.distributions.IntDistribution(int(domain.low), int(domain.high), log=domain.log)
    return optuna.distributions.FloatDistribution(domain.low, domain.high, log=domain.log)
