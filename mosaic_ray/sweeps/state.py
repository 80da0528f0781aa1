"""The state of a sweep on disk: its plan and the summaries of its trials, from which the same command resumes it.

Layout below ``<storage>/sweeps/<name>/``: plan.json, trials/<trial>/ (a run's files each), results.parquet and .csv.
The status in a trial's summary.json says whether it has finished; all other files can be made again from the store.
"""

from __future__ import annotations

import itertools
import json
import re
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ..config.fields import short_names, shown
from ..config.resolve import as_dict, dotted, override, without_share
from ..config.schema import ExperimentConfig
from ..config.validate import check
from ..core.errors import RequestError
from ..core.serialization import from_json
from ..core.untrusted import parse_json
from ..storage.hashing import plain, request_name

if TYPE_CHECKING:
    from ..storage.store import Store

#: The statuses of trials that are not run again. A failed one is run again by the same command.
FINISHED = ("done", "stopped")

#: Knobs that this machine may settle and that show in keys, by their names in plan.json.
REMEMBERED = {"precision": "runtime.precision", "device": "runtime.device"}

#: How many differences between two plans are named.
MOST_DIFFERENCES = 4


@dataclass(frozen=True, kw_only=True)
class PlanFile:
    """The request in plan.json, to which ``SweepState`` adds the session and the settled knobs.

    ``knobs`` are domains in words, ``points`` None where a search finds them, ``optuna`` the version that does.
    ``preset`` is the scale that the base began with, ``against`` a comparison's reference as it was typed; names and
    comparisons of plans leave both out.
    """

    space: str
    search: str | None = None
    samples: int | None = None
    seeds: list[int] | None = None
    scheduler: str | None = None
    knobs: dict[str, Any]
    points: list[dict[str, Any]] | None = None
    base: dict[str, Any] | None = None
    optuna: str | None = None
    preset: str | None = None
    against: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the content of plan.json, to which ``SweepState`` adds the session and the settled knobs."""
        return {n: value for n, value in asdict(self).items() if value or n not in ("optuna", "against")}

    @staticmethod
    def from_json(value: Any) -> PlanFile:
        """Check content read from JSON and return it; ``ValueError`` with the place of the first fault."""
        return from_json(PlanFile, value)


@dataclass(frozen=True)
class Trial:
    """One point with one seed. ``knobs``: the values that the point sets, without the seed."""

    name: str
    point: int
    seed: int
    knobs: dict[str, Any]
    config: ExperimentConfig

    @property
    def label(self) -> str:
        """The point and the seed as short text."""
        short = short_names(self.knobs)
        words = [f"{short[name]}={shown(value)}" for name, value in self.knobs.items()]
        return " ".join([*(words or ["base"]), f"seed={self.seed}"])


def make_trials(
    config: ExperimentConfig, points: Iterable[Mapping[str, Any]], seeds: Sequence[int], first: int = 0,
    settle: Callable[[ExperimentConfig], ExperimentConfig] = lambda config: config,
) -> list[Trial]:  # fmt: skip
    """Return a trial for every point and seed, in order; ``RequestError`` names a point that is not allowed.

    ``settle`` decides the devices of each.
    """
    trials = []
    for point, knobs in enumerate(points, first):
        for seed in seeds:
            try:
                made = settle(check(override(config, {**knobs, "seed": seed})))
            except RequestError as error:
                words = ", ".join(f"{name}={value}" for name, value in knobs.items())
                raise RequestError(f"point {point} of the sweep ({words or 'the base'}): {error}") from None
            trials.append(Trial(f"p{point:03d}s{seed}", point, seed, dict(knobs), made))
    return trials


def plan_name(plan_json: Mapping[str, Any]) -> str:
    """Return the default name of a sweep. The same request gives the same name, so that the same command resumes.

    It depends neither on optuna's version (with another one ``SweepState.begin`` refuses to resume) nor on the name of
    the preset, whose knobs are in the base, nor on the reference of a comparison.
    """
    plan_json = {name: value for name, value in plan_json.items() if name not in ("optuna", "preset", "against")}
    space, data = plan_json["space"].lstrip("-").removesuffix(".py"), plan_json["base"]["data"]["name"]
    return request_name("sweep", 1, plan_json, plain(space), plain(data))


class SweepState:
    """The files of the sweep ``name`` in ``store``."""

    def __init__(self, store: Store, name: str) -> None:
        self.store, self.name, self.place = store, name, f"sweeps/{name}"
        self.session: str | None = None
        self.settled: dict[str, Any] = {}

    def begin(self, plan_json: Mapping[str, Any], fresh: bool, settled: Mapping[str, Any]) -> None:
        """Write plan.json, or check that the one there is the same. ``fresh`` first moves the old files aside.

        ``settled``: this machine's values of knobs that may be ``auto``, by the names of ``REMEMBERED``. A resumed
        sweep keeps those that it began with (``self.settled``), since others would make every trial run again.
        ``RequestError`` for another plan under this name, and for damaged files.
        """
        plan_json = json.loads(json.dumps(plan_json))
        if fresh:
            self._move_aside()
        old = self._read("plan.json")
        try:
            trials = self.store.files.names(f"{self.place}/trials")
        except OSError as error:
            raise self._unreadable("trials", error) from None
        for trial in trials:
            if re.fullmatch(r"p\d+s\d+", trial):
                self.summary(trial)  # refuses a damaged file now, not while trials run
        if old is None:
            self.session, self.settled = uuid.uuid4().hex if fresh else None, dict(settled)
            self._write("plan.json", {**plan_json, "session": self.session, **settled})
            return
        self.session, self.settled = old.pop("session", None), {n: old.pop(n, value) for n, value in settled.items()}
        left, right = _flat({"optuna": plan_json.get("optuna")} | old), _flat(plan_json)  # an older plan names none
        differs = [
            f"{name} {_brief(left.get(name))} there, {_brief(right.get(name))} here"
            for name in dict.fromkeys([*right, *left])
            if left.get(name) != right.get(name)
        ]
        if differs:
            more = f" and {len(differs) - MOST_DIFFERENCES} more" if len(differs) > MOST_DIFFERENCES else ""
            raise RequestError(
                f"--name {self.name}: that sweep has another plan ({'; '.join(differs[:MOST_DIFFERENCES])}{more}); "
                "take another --name, or --fresh, which moves it aside"
            )
        if old.pop("against", None) != (against := plan_json.get("against")):
            more_of = {"against": against} if against else {}
            self._write("plan.json", {**old, **more_of, "session": self.session, **self.settled})

    def finished(self, trial: Trial) -> dict[str, Any] | None:
        """Return the summary of a trial that need not run again; None for any other trial."""
        summary = self.summary(trial.name)
        if summary is None or summary.get("status") not in FINISHED:
            return None
        try:
            there = without_share(override(ExperimentConfig(), summary["config"]))
            return summary if there == without_share(trial.config) else None
        except (RequestError, KeyError, TypeError, AttributeError):
            return None  # written by a version with other knobs

    def summary(self, trial: str) -> dict[str, Any] | None:
        """Return the content of a trial's summary.json; None where there is none yet."""
        return self._read(f"trials/{trial}/summary.json")

    def folder(self, trial: str) -> str:
        """Return the folder of a trial in the store."""
        return f"{self.place}/trials/{trial}"

    def record(self, trial: Trial, **entries: Any) -> dict[str, Any]:
        """Write the summary of a trial that could not write its own (its process died or was stopped)."""
        known = self.summary(trial.name) or {}
        base = {"method": trial.config.method, "seed": trial.seed, "config": as_dict(trial.config)}
        summary = {**base, **(known if known.get("status") == entries.get("status") else {}), **entries}
        self._write(f"trials/{trial.name}/summary.json", summary)
        return summary

    def _read(self, name: str) -> dict[str, Any] | None:
        try:
            return parse_json(self.store.files.read(f"{self.place}/{name}"))
        except FileNotFoundError:
            return None
        except ValueError:
            raise RequestError(
                f"--name {self.name}: {self.store.uri}/{self.place}/{name} is not whole; remove that file (results are "
                "found again in the store), or give --fresh or another --name"
            ) from None
        except OSError as error:
            raise self._unreadable(name, error) from None

    def _unreadable(self, name: str, error: OSError) -> RequestError:
        from ..storage.uri import reason

        return RequestError(f"--storage {self.store.uri}: {self.place}/{name} cannot be read: {reason(error)}")

    def _write(self, name: str, content: Mapping[str, Any]) -> None:
        self.store.write(f"{self.place}/{name}", (json.dumps(content, indent=1) + "\n").encode())

    def _move_aside(self) -> None:
        try:
            if self.store.files.names(self.place):
                places = (f"{self.place}.{number}" for number in itertools.count(1))
                aside = next(place for place in places if not self.store.files.names(place))
                self.store.files.move(self.place, aside)
        except (OSError, NotImplementedError) as error:
            raise RequestError(
                f"--fresh: {self.store.uri}/{self.place} cannot be moved aside ({error}); give another --name"
            ) from None


def _flat(plan: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of a plan one by one, points last: they often differ because another entry does."""
    parts = {name: plan.get(name) for name in ("base", "knobs", "points")}
    flat = {name: value for name, value in plan.items() if name not in (*parts, "preset", "against")}
    points = parts["points"] if isinstance(parts["points"], list) else []
    flat |= dotted(parts["base"]) if isinstance(parts["base"], Mapping) else {}
    flat |= {f"space's {name}": value for name, value in dotted({"knobs": parts["knobs"]}).items()}
    flat["number of points"] = len(points) or None
    return flat | dotted({f"point {number}": point for number, point in enumerate(points)})


def _brief(value: Any) -> str:
    text = "none" if value is None else value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
