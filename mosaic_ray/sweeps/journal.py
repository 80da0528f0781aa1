"""A copy of a sweep's trials in Optuna's journal format, which optuna-dashboard shows while the sweep runs.

There is a study for each setting (see ``space.setting_knobs``), since trials in two settings do not compare. No point
follows from the journal: searches keep studies of their own, and each session of a sweep that runs a trial writes the
file anew.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..config.fields import short_names, shown
from ..config.resolve import KNOBS, check_value
from .space import Choice, SweepPlan
from .state import SweepState, Trial

#: Name of the journal in a sweep's folder.
FILE = "optuna-journal.log"


class Journal:
    """The journal of one sweep. What keeps it from being written is told once, and the sweep goes on without it."""

    def __init__(self, state: SweepState, plan: SweepPlan, setting: Sequence[str], say: Callable[[str], None]) -> None:
        """``say(line)`` tells the user; ``setting`` names the knobs that choose data and partition."""
        self._state, self._plan, self._setting, self._say = state, plan, tuple(setting), say
        self._studies: dict[str, int] = {}
        self._trials: dict[str, int] = {}  # that run, by name
        self._storage: Any = None
        self._found: list[tuple[Any, ...]] | None = []  # trials that ended before the first one of this session began

    def start(self, trial: Trial) -> None:
        """Show that a trial runs; one that begins again is there already."""
        if self._found is not None:
            found, self._found = self._found, None
            self._do(self._open)
            for ended in found:
                self._do(self._end, *ended)
        if trial.name not in self._trials:
            self._do(self._add, trial)

    def score(self, name: str, rung: int, score: float) -> None:
        """Show a running trial's score after a stage."""
        if name in self._trials:
            self._do(lambda: self._storage.set_trial_intermediate_value(self._trials[name], rung, score))

    def end(self, trial: Trial, summary: Mapping[str, Any], selection: float | None) -> None:
        """Show a trial's end; ``selection`` is the value that configurations are chosen by."""
        if self._found is not None:
            self._found.append((trial, summary, selection))
        else:
            self._do(self._end, trial, summary, selection)

    def _do(self, work: Callable[..., None], *args: Any) -> None:
        if self._storage is None and work != self._open:
            return
        try:
            work(*args)
        except Exception as error:  # a copy for the eyes ends no sweep
            self._storage, why = None, " ".join(f"{error}".split()) or type(error).__name__
            self._say(f"{FILE}: it is left out ({why}), so optuna-dashboard does not show this sweep")

    def _open(self) -> None:
        state = self._state
        if state.store.local_root is None:
            raise OSError("it takes a storage on a disk")
        import optuna
        from optuna.storages.journal import JournalFileBackend

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        for name in (FILE, f"{FILE}.lock"):  # of an earlier session, which may have been killed
            state.store.files.delete(f"{state.place}/{name}")
        backend = JournalFileBackend(str(state.store.local_root / state.place / FILE))
        self._storage = optuna.storages.JournalStorage(backend)

    def _add(self, trial: Trial) -> None:
        import optuna

        knobs = {name: _plain(value) for name, value in trial.knobs.items()}
        made = optuna.trial.create_trial(
            state=optuna.trial.TrialState.RUNNING,
            params=knobs,
            distributions={name: self._distribution(name) for name in knobs},
            user_attrs={"trial": trial.name, "seed": trial.seed},
        )
        self._trials[trial.name] = self._storage.create_new_trial(self._study(trial), made)

    def _end(self, trial: Trial, summary: Mapping[str, Any], selection: float | None) -> None:
        from optuna.trial import TrialState

        if trial.name not in self._trials:  # an earlier session ended it
            self._add(trial)
        number = self._trials.pop(trial.name)
        found = {"accuracy": summary.get("accuracy"), "error": summary.get("error"), "stage": summary.get("stage")}
        for name, value in found.items():
            if value is not None:
                self._storage.set_trial_user_attr(number, name, value)
        states = {"done": TrialState.FAIL if selection is None else TrialState.COMPLETE, "stopped": TrialState.PRUNED}
        state = states.get(summary["status"], TrialState.FAIL)
        self._storage.set_trial_state_values(number, state, None if state != TrialState.COMPLETE else [selection])

    def _study(self, trial: Trial) -> int:
        from optuna.study import StudyDirection

        short = short_names(self._setting)
        words = [f"{short[name]}={shown(trial.knobs[name])}" for name in self._setting if name in trial.knobs]
        name = " ".join([self._state.name, *words])
        if name not in self._studies:
            self._studies[name] = self._storage.create_new_study([StudyDirection.MAXIMIZE], name)
        return self._studies[name]

    def _distribution(self, name: str) -> Any:
        """Return the range of a knob's values, or all of them where they are no numbers."""
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        domain = self._plan.knobs.get(name)
        if domain is None:
            found = [point[name] for point in self._plan.points if name in point]
        else:
            found = list(domain.values) if isinstance(domain, Choice) else [domain.low, domain.high]
        values = [check_value(name, value) for value in found]
        if KNOBS[name].kind in (int, float) and not any(isinstance(value, str) for value in values):
            kind = IntDistribution if KNOBS[name].kind is int else FloatDistribution
            return kind(min(values), max(values), log=getattr(domain, "log", False))
        return CategoricalDistribution(list(dict.fromkeys(map(_plain, values))))


def _plain(value: Any) -> Any:
    """Return a list as text, since Optuna takes none."""
    return json.dumps(list(value)) if isinstance(value, tuple | list) else value
