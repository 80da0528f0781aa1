"""The trials that a sweep still has to run, and the results of those that have finished. Needs no Ray."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .console import SweepView
from .journal import Journal
from .results import HPARAMS_FILE, TrialResult, hparams_file, results_files, results_table
from .search import Search
from .state import SweepState, Trial


@dataclass
class TrialQueue:
    """Hands out the unfinished trials of ``search`` and keeps the results of all finished ones.

    ``swept``: names of the knobs that differ between points; ``setting``: the ones that choose data and
    partition. With ``strict_health`` a finished trial with a health finding of severity error is run again.
    ``journal``: the copy of the trials for optuna-dashboard.
    """

    search: Search
    state: SweepState
    view: SweepView
    swept: tuple[str, ...] = ()
    setting: tuple[str, ...] = ()
    strict_health: bool = False
    journal: Journal | None = None
    results: dict[str, TrialResult] = field(default_factory=dict)
    #: Trials that ran out of GPU memory beside others: they run again when fewer clients share a GPU.
    starved: list[Trial] = field(default_factory=list)
    _first: Trial | None = None
    _again: list[Trial] = field(default_factory=list)
    _trials: dict[str, Trial] = field(default_factory=dict)
    _reports: dict[str, dict[str, Any]] = field(default_factory=dict)

    def has_unfinished(self) -> bool:
        """Keep the results of the trials that finished earlier; return whether any trial is left to run."""
        try:
            self._first = self.next()
        except StopIteration:
            return False
        assert self._first is not None, "no trial is running, so the search cannot wait for one"
        return True

    def next(self) -> Trial | None:
        """Return the next trial to run, or None where a running one must finish first; ``StopIteration`` at the end."""
        if self.starved:
            raise StopIteration  # the trials that run now end before these begin again
        if self._first is not None:
            first, self._first = self._first, None
            return first
        if self._again:
            return self._again.pop(0)
        while (trial := self.search.next()) is not None:
            summary = self.state.finished(trial)
            health = summary.get("health", []) if summary and self.strict_health else []
            if summary is None or any(finding["severity"] == "error" for finding in health):
                self._trials[trial.name] = trial
                return trial
            self._keep(trial, summary)
            self.view.found(summary["status"], _selection(summary), trial.label, self._setting(trial))
        return None

    def start(self, name: str) -> None:
        """Note that the process of the trial ``name`` has started."""
        self._reports[name] = {}
        if self.journal:
            self.journal.start(self._trials[name])
        self.view.begin(name, self._trials[name].label)

    def report(self, name: str, result: Mapping[str, Any]) -> None:
        """Note a running trial's report: the ``stage`` it begins, a ``score`` at a ``rung``, its final ``status``."""
        self._reports[name] |= {key: result[key] for key in ("stage", "score", "rung", "status") if key in result}
        if self.journal and "score" in result:
            self.journal.score(name, result["rung"], result["score"])
        if "stage" in result:
            self.view.stage(name, result["stage"])

    def restart(self, name: str) -> None:
        """Note that the trial's process died and that Tune starts another."""
        label = self._trials[name].label
        self.view.say(f"{label}: its process died; it begins again at its last stored stage", "warning")

    def finish(self, name: str) -> None:
        """Keep the result of a trial that returned, or that the scheduler stopped before it reported a status."""
        trial, last = self._trials[name], self._reports[name]
        if last.get("status") == "starved":
            self.starved.append(trial)
            self.view.drop(name)
            return
        if "status" not in last:
            self.state.record(
                trial, status="stopped", stage=last.get("stage"),
                selection={"metric": "validation accuracy", "value": last.get("score")}, rung=last.get("rung"),
            )  # fmt: skip
        self._finish(trial)

    def fail(self, name: str, error: str) -> None:
        """Record that a trial failed because its processes kept dying, and keep its result."""
        trial, stage = self._trials[name], self._reports.get(name, {}).get("stage")
        self.state.record(trial, status="failed", stage=stage, round=None, client=None, error=error)
        self._finish(trial)

    def run_again(self) -> None:
        """Hand out the starved trials once more."""
        self._again, self.starved = self.starved, []

    def give_up(self) -> None:
        """Keep the starved trials as failed; their summaries say so already."""
        starved, self.starved = self.starved, []
        for trial in starved:
            self._finish(trial)

    def write(self) -> None:
        """Write results.parquet and results.csv of all trials that have finished so far."""
        for name, data in results_files(results_table(self.results.values())).items():
            self.state.store.write(f"{self.state.place}/{name}", data)

    def _finish(self, trial: Trial) -> None:
        summary = self.state.summary(trial.name)
        if summary is None:  # the trial could not write one; the storage may have failed
            summary = self.state.record(trial, status="failed", error="it left no summary", stage=None)
        kept = self._keep(trial, summary)
        if summary["status"] == "failed":
            self.view.say(f"{trial.label}: {summary['error']}", "warning")
        if summary["status"] != "done":  # a done trial wrote its own
            board = f"{self.state.folder(trial.name)}/tensorboard"
            self.state.store.write(f"{board}/{HPARAMS_FILE}", hparams_file(kept, self.swept))
        self.view.end(trial.name, summary["status"], _selection(summary), trial.label, self._setting(trial))
        self.write()

    def _setting(self, trial: Trial) -> str:
        return repr([trial.knobs.get(name) for name in self.setting])

    def _keep(self, trial: Trial, summary: Mapping[str, Any]) -> TrialResult:
        kept = TrialResult(trial.name, trial.point, trial.seed, trial.knobs, summary)
        self.results[trial.name] = kept
        if self.journal:
            self.journal.end(trial, summary, _selection(summary))
        self.search.finished(trial, _selection(summary))
        return kept


def _selection(summary: Mapping[str, Any]) -> float | None:
    return (summary.get("selection") or {}).get("value") if summary["status"] == "done" else None
