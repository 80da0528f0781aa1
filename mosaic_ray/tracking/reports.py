"""Report a run to other projects' trackers, so that a tracker that fails, or does not answer, never disturbs the run.

Each tracker has a thread, which takes what the run logs from a queue. What was sent is kept beside the run's files in
``<tracker>.json``, so that a run that was killed goes on in the same run of the tracker and sends no point twice: a
resumed run logs all of its points again, and those that the file counts are left out.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import queue
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any

from ..core.serialization import from_json
from ..core.text import visible
from ..core.untrusted import parse_json
from .backends import BACKENDS, CLOSE_SECONDS, Backend, Point, RunInfo

if TYPE_CHECKING:
    import numpy as np

    from ..storage.filesystem import Files

#: Seconds for which points are gathered before they are sent.
GATHER_SECONDS = 5.0

#: Seconds that Ctrl-C waits for a tracker.
INTERRUPTED_SECONDS = 5.0

#: Bytes of the largest file of a record that is read.
MOST_BYTES = 64 << 20

Say = Callable[[str], None]


@dataclass(kw_only=True)
class Record:
    """The content of ``<tracker>.json``: the tracker's ``run``, and what was sent to it.

    ``request`` is a digest of the configuration and of the tracker's server or folder. ``steps`` and ``images``: by
    tag, the steps of all points; ``tables``: digests by name; ``number``: how many points and tables were sent.
    ``status``: how the run ended last, empty where it has not. ``sending``: numbers [tag, step, value, time] of which a
    kill left unknown whether they were sent; they are sent again as the same points.
    """

    request: str
    run: str = ""
    number: Annotated[int, (0, 1 << 53)] = 0
    configured: bool = False
    status: str = ""
    tables: dict[str, str] = field(default_factory=dict)
    steps: dict[str, list[int]] = field(default_factory=dict)
    images: dict[str, list[int]] = field(default_factory=dict)
    sending: list[list[Any]] = field(default_factory=list)

    def count(self, points: Sequence[Point]) -> None:
        """Note that ``points`` were sent."""
        for point in points:
            (self.steps if isinstance(point.value, float) else self.images).setdefault(point.tag, []).append(point.step)
        self.number += len(points)

    def counts(self) -> Counter[tuple[bool, str, int]]:
        """Return how often each point was sent, by whether it is a number, tag and step."""
        kinds = ((True, self.steps), (False, self.images))
        return Counter((kind, tag, step) for kind, tags in kinds for tag, steps in tags.items() for step in steps)

    @staticmethod
    def read(data: bytes, request: str) -> Record:
        """Return the record in ``data``, which anybody may have written; a new one where it does not fit."""
        with contextlib.suppress(ValueError, TypeError):
            found: Record = from_json(Record, parse_json(data))
            [(visible(tag), int(step), _number(value), float(when)) for tag, step, value, when in found.sending]
            if found.request == request and re.fullmatch(r"[\w. -]{0,200}", found.run):
                return found
        return Record(request=request)


def _number(value: float | None) -> float:
    return math.nan if value is None or not math.isfinite(value) else float(value)


class _Sender:
    """Sends the points of one run to one tracker, in a thread. ``files`` and ``place``: where the record lies."""

    def __init__(self, name: str, info: RunInfo, files: Files, place: str, request: str, anew: bool) -> None:
        self.name, self.failure = name, ""
        self._info, self._files, self._place, self._anew = info, files, f"{place}{name}.json", anew
        self._queue: queue.SimpleQueue[tuple[str, tuple[Any, ...]]] = queue.SimpleQueue()
        self._known = threading.Event()  # the tracker's run is known, or there will be none
        self._backend: Backend = BACKENDS[name]()
        self._request = hashlib.sha256(f"{self._backend.place} {request}".encode()).hexdigest()
        self._open = False
        self._thread = threading.Thread(target=self._work, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def put(self, kind: str, *content: Any) -> None:
        """Queue something to send."""
        if not self.failure:
            self._queue.put((kind, content))

    def run(self, seconds: float) -> str:
        """Return the id of the tracker's run, for which it waits; empty where there is none by then."""
        self._known.wait(seconds)
        return self._record.run if self._known.is_set() and not self.failure else ""

    def environment(self) -> dict[str, str]:
        return self._backend.environment()

    def join(self, seconds: float) -> None:
        """Wait until all is sent, once "close" was queued."""
        self._thread.join(seconds)
        if self._thread.is_alive():
            self.failure = "it did not take everything in time"

    def _work(self) -> None:
        try:
            self._serve()
        except BaseException as error:  # of any kind: a tracker's failure is no failure of the run
            self.failure = self.failure or f"{type(error).__name__}: {error}"
        finally:
            self._known.set()

    def _serve(self) -> None:
        self._record = self._read()
        if self._record.sending or not self._record.configured or self._record.status in ("failed", "killed"):
            self._begin()
        left = self._record.counts()
        self._known.set()
        while True:
            points: list[Point] = []
            rest: list[tuple[str, tuple[Any, ...]]] = []
            for kind, content in self._gather():
                if kind == "again":
                    left = self._record.counts() + _counts(points)
                elif kind != "point":
                    rest.append((kind, content))
                elif left[what := _key(point := Point(*content))] > 0:
                    left[what] -= 1
                else:
                    points.append(point)
            if points:
                self._begin()
                self._send(points)
            for kind, content in rest:
                if kind == "table":
                    self._table(*content)
                elif kind == "close":
                    if self._open:
                        self._backend.close(*content)
                        [self._record.status] = content
                        self._save()
                    return

    def _gather(self) -> list[tuple[str, tuple[Any, ...]]]:
        """Wait for something to send; return what comes within ``GATHER_SECONDS``, or until the end."""
        found = [self._queue.get()]
        until = time.monotonic() + GATHER_SECONDS
        while found[-1][0] != "close":
            try:
                found.append(self._queue.get(timeout=max(0.0, until - time.monotonic())))
            except queue.Empty:
                break
        return found

    def _begin(self) -> None:
        """Begin the tracker's run, or continue it, unless that was done."""
        if self._open:
            return
        self._record.run = self._backend.open(self._info, self._record.run)
        self._open = True
        if not self._record.configured:
            self._save()  # a kill from here on leaves a run that is continued
            self._backend.configure(self._info.config)
            self._record.configured = True
            self._save()
        if sending := self._record.sending:
            self._send([Point(visible(t, ""), int(step), _number(v), float(when), 0) for t, step, v, when in sending])

    def _table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        digest = hashlib.sha256(json.dumps([columns, rows], default=str).encode()).hexdigest()
        if self._record.tables.get(name) != digest:
            self._begin()
            self._backend.table(name, columns, rows, self._record.number)
            self._record.tables[name] = digest
            self._record.number += 1
            self._save()

    def _send(self, points: list[Point]) -> None:
        points = sorted(points, key=lambda point: not isinstance(point.value, float))
        points = [point._replace(number=self._record.number + place) for place, point in enumerate(points)]
        numbers = [point for point in points if isinstance(point.value, float)]
        self._record.sending = [[p.tag, p.step, p.value if math.isfinite(p.value) else None, p.time] for p in numbers]
        self._save()
        self._backend.write(points)
        self._record.count(points)
        self._record.sending = []
        self._save()

    def _read(self) -> Record:
        if not self._anew:
            with contextlib.suppress(OSError):
                return Record.read(self._files.read(self._place, MOST_BYTES), self._request)
        return Record(request=self._request)

    def _save(self) -> None:
        if self.failure:
            raise TimeoutError  # it was left behind, and another run may use the record by now
        self._files.put(self._place, json.dumps(vars(self._record)).encode())


def _key(point: Point) -> tuple[bool, str, int]:
    return isinstance(point.value, float), point.tag, point.step


def _counts(points: Sequence[Point]) -> Counter[tuple[bool, str, int]]:
    return Counter(map(_key, points))


class Reports:
    """Reports one run to trackers; a context manager, whose end is the run's.

    ``say`` prints a line about a tracker that failed: each does so once, and the run goes on without it.
    """

    def __init__(self, say: Say) -> None:
        self._say, self._senders, self._said = say, list[_Sender](), set[str]()

    def add(self, name: str, *how: Any) -> None:
        """Begin to report to the tracker ``name``; ``how``: the other arguments of ``_Sender``."""
        try:
            self._senders.append(_Sender(name, *how))
        except (Exception, SystemExit) as error:
            self._warn(name, f"{type(error).__name__}: {error}")

    def __enter__(self) -> Reports:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        calm = kind is None or issubclass(kind, Exception)
        status = "done" if kind is None else "failed" if calm else "killed"
        until = time.monotonic() + (CLOSE_SECONDS if calm else INTERRUPTED_SECONDS)
        for sender in self._senders:
            sender.put("close", status)
        for sender in self._senders:
            sender.join(max(0.0, until - time.monotonic()))
        self.complain(self._say)

    def __bool__(self) -> bool:
        return bool(self._senders)

    def begin_again(self) -> None:
        """Note that the run logs from its first point on, once more."""
        self._put("again")

    def scalar(self, tag: str, step: int, value: float) -> None:
        """Report a number."""
        self._put("point", visible(tag, ""), int(step), _number(value), time.time(), 0)

    def image(self, tag: str, step: int, array: np.ndarray) -> None:
        """Report an image uint8 [H, W] or [C, H, W]."""
        if array.ndim == 3:
            array = array[0] if len(array) == 1 else array.transpose(1, 2, 0)
        self._put("point", visible(tag, ""), int(step), array, time.time(), 0)

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Report the table of results, again where it has changed."""
        shown = [[visible(cell, "") if isinstance(cell, str) else cell for cell in row] for row in rows]
        self._put("table", name, [visible(column, "") for column in columns], shown)

    def runs(self) -> dict[str, str]:
        """Return the id of each tracker's run, for which it waits."""
        until = time.monotonic() + CLOSE_SECONDS
        found = {sender.name: sender.run(max(0.0, until - time.monotonic())) for sender in self._senders}
        self.complain(self._say)
        return {name: run for name, run in found.items() if run}

    def environment(self) -> dict[str, str]:
        """Return environment variables with which another process reports to the same place."""
        found: dict[str, str] = {}
        for sender in self._senders:
            with contextlib.suppress(Exception):
                found |= sender.environment()
        return found

    def complain(self, say: Say) -> None:
        """Say which trackers failed since the last call."""
        for sender in self._senders:
            if sender.failure:
                self._warn(sender.name, sender.failure, say)

    def _warn(self, name: str, why: str, say: Say | None = None) -> None:
        if name not in self._said:
            self._said.add(name)
            line = visible(" ".join(f"tracker {name}: {why}".split()), "")
            (say or self._say)(f"{line[:400]}; the run goes on without it")

    def _put(self, kind: str, *content: Any) -> None:
        for sender in self._senders:
            sender.put(kind, *content)


@dataclass(frozen=True)
class Tracking:
    """Which trackers runs report to. It changes no number, no key and no name of a run.

    ``group`` and ``parents``: see ``RunInfo``. ``environment``: variables for a trial's process, perhaps with secrets.
    """

    trackers: tuple[str, ...] = ()
    group: str = ""
    parents: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)

    def within(self, reports: Reports, group: str) -> Tracking:
        """Return the trackers of the runs in ``group``, whose own run is that of ``reports``."""
        if not self.trackers:
            return self
        return replace(self, group=group, parents=reports.runs(), environment=reports.environment())

    def open(
        self, files: Files, place: str, name: str, kind: str, config: Mapping[str, Any], say: Say, *,
        request: Mapping[str, Any] | None = None, anew: bool = False,
    ) -> Reports:  # fmt: skip
        """Begin to report a run, or go on with it.

        Args:
            files: the storage; ``place`` is what its file names there begin with, such as ``runs/demo/``.
            name: the run's name, shown.
            kind: see ``RunInfo``.
            config: values by dotted name.
            say: prints a line about a tracker that failed.
            request: what makes it the same run; by default ``config``.
            anew: do not go on with an earlier run.
        """
        reports = Reports(say)
        shown = {visible(key, ""): visible(v, "") if isinstance(v, str) else v for key, v in config.items()}
        info = RunInfo(visible(name, ""), kind, visible(self.group, ""), shown, self.parents)
        same = json.dumps(dict(request or config), sort_keys=True, default=str)
        for tracker in self.trackers:
            reports.add(tracker, info, files, place, same, anew)
        return reports
