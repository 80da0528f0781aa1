"""Read what earlier runs left in a storage, without data sets and without writing anything."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from ..config.resolve import override
from ..config.schema import ExperimentConfig
from ..core.errors import RequestError, RunError
from ..core.untrusted import parse_json
from ..pipeline.graph import KeyInputs
from ..pipeline.stages import PARTITION
from ..storage.store import MANIFEST, OBJECTS, DamagedFile, StageResult, Store
from .plan import Chain, stage_keys
from .summary import StageRecord, Summary

#: What reading a file of an earlier run may raise; such a run counts as absent.
_UNREADABLE = (
    OSError, RunError, RequestError, DamagedFile, ValueError, LookupError, TypeError, AttributeError, RecursionError
)  # fmt: skip


@dataclass(frozen=True)
class EarlierRun:
    """A run or a trial: its folder's name in the storage, its configuration, its stages."""

    place: str
    config: ExperimentConfig
    stages: Mapping[str, StageRecord]


@dataclass(frozen=True)
class Earlier:
    """The runs in a ``store`` (None: nothing is stored). ``fresh``: their results are not to be used again."""

    store: Store | None = None
    runs: tuple[EarlierRun, ...] = ()
    fresh: bool = False

    @cached_property
    def partitions(self) -> dict[tuple[str, str], str]:
        """Map what is known of a partition without its data to the key of the stored one."""
        return {_unseen(run.config): run.stages["partition"].key for run in self.runs if "partition" in run.stages}

    @cached_property
    def _begun(self) -> frozenset[str]:
        with contextlib.suppress(OSError):
            return frozenset(self.store.files.names(OBJECTS) if self.store else ())
        return frozenset()

    def __contains__(self, key: object) -> bool:
        """Return whether a run would find the result under ``key``."""
        if self.store is None or self.fresh or key not in self._begun:
            return False
        with contextlib.suppress(OSError):
            return MANIFEST in self.store.files.names(f"{OBJECTS}/{key}")
        return False

    @cached_property
    def _sizes(self) -> dict[str, Sequence[int] | None]:
        return {}

    def sizes(self, config: ExperimentConfig) -> Sequence[int] | None:
        """Return the clients' training samples [K]; None if no earlier run had the partition of ``config``."""
        key = self.partitions.get(_unseen(config))
        if key is None or self.store is None:
            return None
        if key not in self._sizes:
            self._sizes[key] = None
            with contextlib.suppress(*_UNREADABLE):
                manifest = self.store.manifest(OBJECTS, key)
                if manifest is not None:
                    counts = StageResult(self.store, f"{OBJECTS}/{key}", manifest).load("shards")["counts"]
                    if counts.ndim == 2 and len(counts) == config.partition.num_clients:
                        self._sizes[key] = [int(size) for size in counts.sum(1)]
        return self._sizes[key]

    def chain(self, config: ExperimentConfig) -> Chain:
        """Return the keys of a run of ``config``: real ones if an earlier run had its partition."""
        return stage_keys(config, sizes=self.sizes(config), partition=self.partitions.get(_unseen(config)))


def _unseen(config: ExperimentConfig) -> tuple[str, str]:
    return config.data.root, PARTITION.keys(KeyInputs(config), {})[0]


def read_earlier(storage: str, fresh: bool = False) -> Earlier:
    """Read the summaries of the runs and trials in ``storage``; those that cannot be read are left out."""
    try:
        store = Store(storage, create=False)
    except RequestError:
        return Earlier()
    found = []
    for place in _places(store):
        with contextlib.suppress(*_UNREADABLE):
            summary = Summary.from_json(parse_json(store.files.read(f"{place}/summary.json")))
            config = override(ExperimentConfig(), summary.config or {})
            _unseen(config)  # reads user code that it names
            found.append(EarlierRun(place, config, summary.stages or {}))
    return Earlier(store, tuple(found), fresh)


def _places(store: Store) -> Iterator[str]:
    """Yield the folders of runs and trials."""
    with contextlib.suppress(OSError):
        yield from (f"runs/{name}" for name in store.files.names("runs"))
        for sweep in store.files.names("sweeps"):
            yield from (f"sweeps/{sweep}/trials/{name}" for name in store.files.names(f"sweeps/{sweep}/trials"))
