"""Helpers for tests of the store and of leases: results, storage of two kinds, competing processes."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from pyarrow import fs

import mosaic_ray.storage.store as store_module
from mosaic_ray.storage.locks import Lease
from mosaic_ray.storage.store import Store

FACTS = {"rounds": [1, 2], "accuracy": 0.1 + 0.2, "name": "zażółć", "none": None, "yes": True}


def arrays(fill: float = 1.0) -> dict[str, np.ndarray]:
    return {"w": np.full((3, 2), fill, np.float32), "num_batches_tracked": np.array(7, np.int64)}


def same(got: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> bool:
    return list(got) == list(wanted) and all(
        got[n].dtype == a.dtype and got[n].shape == a.shape and got[n].tobytes() == np.asarray(a, order="C").tobytes()
        for n, a in wanted.items()
    )


KEY = "warmup-0123456789abcdef0123"
OTHER_KEY = "warmup-ffffffffffffffffffff"
PATIENCE_SECONDS = 60.0


def payload(store: Store, kind: str = "objects") -> Path:
    (found,) = Path(store.local_root or "").glob(f"{kind}/{KEY}/part-*.safetensors")
    return found


def bucket(folder: str) -> tuple[fs.FileSystem, str]:
    """A file system that is not known to be local, such as s3:// and gs://."""
    os.makedirs(folder, exist_ok=True)
    return fs.SubTreeFileSystem(folder, fs.LocalFileSystem()), "prefix"


def remains(store: Store) -> list[str]:
    return store.files.names("leases")


def until(found: Callable[[], Any]) -> Any:
    """Wait until ``found`` returns something, and return it."""
    end = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < end:
        if (answer := found()) is not None:
            return answer
        time.sleep(0.005)
    raise AssertionError("it never came")


def held(lease: Lease | None) -> Lease:
    assert lease is not None
    return lease


PRELUDE = """
import hashlib, json, os, sys, time
from pathlib import Path
import numpy as np
from pyarrow import fs
import mosaic_ray.storage.locks as leases_module
import mosaic_ray.storage.store as store_module
folder = Path(sys.argv[1])
if folder.name == "other":
    store_module.open_uri = lambda uri: (fs.SubTreeFileSystem(uri, fs.LocalFileSystem()), "prefix")
leases_module.HEARTBEAT_SECONDS, leases_module.TTL_SECONDS = 0.02, float("inf")
store, key, notes = store_module.Store(str(folder)), "warmup-0123456789abcdef0123", folder.parent
"""


def child(code: str, *words: str) -> subprocess.Popen[str]:
    """A process that runs ``code``, with this checkout and the test helpers at hand."""
    here = [str(Path(__file__).parent), str(Path(store_module.__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    return subprocess.Popen(
        [sys.executable, "-c", code, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(here)},
    )  # fmt: skip


@contextlib.contextmanager
def children(code: str, *argvs: list[str]) -> Iterator[list[subprocess.Popen[str]]]:
    """One process for each list of words; killed at the end where they still run."""
    started = [child(code, *words) for words in argvs]
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.communicate()


def start(*processes: subprocess.Popen[str]) -> None:
    """Start them when all are ready."""
    for process in processes:
        assert process.stdout and process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin
        process.stdin.write("g")
        process.stdin.flush()
