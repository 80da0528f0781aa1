"""A tiny finished run, an interrupted one, and every way in which a stored file can be changed by somebody else."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from helpers import TINY, interrupted, stripes_dataset

from mosaic_ray.config.resolve import override
from mosaic_ray.execution.placement import Placement
from mosaic_ray.runs.runner import execute
from mosaic_ray.storage.hashing import canonical_json
from mosaic_ray.storage.store import Store

#: As small as a run can be that still has every stage of Mosaic.
SMALLEST = override(
    TINY,
    {
        "partition.num_clients": 2, "partition.omega": 1.0, "warmup.num_rounds": 2, "warmup.local_steps": 1,
        "warmup.checkpoint_rounds": 1, "generator.steps": 2, "meta.updates": 2, "distill.steps": 2,
        "distill.check_steps": 1, "finetune.num_rounds": 2, "finetune.local_steps": 1,
    },
)  # fmt: skip

#: Names of storages that ``make_storages`` writes.
STATES = ("done", "interrupted")

#: Values of other types, sizes and depths.
ODD: tuple[Any, ...] = (None, True, -1, 10**18, 10**90, 0.5, "", "x", "\ud800", [], [[1]], {}, {"x": [None]})


def run_in(folder: Path, log: Callable[[str], None] | None = None) -> tuple[Any, ...]:
    """Run ``SMALLEST`` in a storage; return its numbers."""
    store = Store(str(folder), log=log)
    place = Placement("local")
    summary = execute(SMALLEST, stripes_dataset(), store, "runs/one", place, progress=False, tensorboard=False)
    return summary["accuracy"], summary["per_class_accuracy"], summary["label_counts"]


def make_storages(folder: Path) -> tuple[Any, ...]:
    """Write the storages ``STATES`` below ``folder``; return the run's numbers."""
    with interrupted(1, "closing"):
        run_in(folder / "interrupted")
    shutil.copytree(folder / "interrupted", folder / "done")
    numbers = run_in(folder / "done")
    run_in(folder / "done")  # so that the summary in it is one of found results
    return numbers


def stored_files(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.is_file())


# --- changes of a file, whatever it holds ----------------------------------------------------------------------------


def _flip(path: Path, draw: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def _instead(make: Callable[[Path], object]) -> Callable[[Path, random.Random], None]:
    def change(path: Path, draw: random.Random) -> None:
        path.unlink()
        make(path)

    return change


def _folder(path: Path) -> None:
    path.mkdir()
    (path / "mine.txt").write_text("mine")


def _swap(path: Path, draw: random.Random) -> None:
    root = next(above for above in path.parents if (above / "objects").is_dir())
    others = [p for p in stored_files(root) if p.suffix == path.suffix and p != path]
    other = draw.choice(others or [path])
    data = path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(data)


CHANGES: dict[str, Callable[[Path, random.Random], object]] = {
    "deleted": lambda path, draw: path.unlink(),
    "empty": lambda path, draw: path.write_bytes(b""),
    "truncated": lambda path, draw: os.truncate(path, draw.randrange(path.stat().st_size + 1)),
    "lengthened": lambda path, draw: os.truncate(path, path.stat().st_size + draw.choice([1, 1 << 40])),
    "flipped": _flip,
    "noise": lambda path, draw: path.write_bytes(draw.randbytes(300)),
    "other JSON": lambda path, draw: path.write_text(json.dumps(draw.choice(ODD))),
    "deep": lambda path, draw: path.write_text("[" * 5000 + "]" * 5000),
    "deep object": lambda path, draw: path.write_text('{"key":' * 5000 + "1" + "}" * 5000),
    "a huge number": lambda path, draw: path.write_text('{"status": ' + "1" * 4001 + "}"),
    "swapped": _swap,
    "a folder": _instead(_folder),
    "a pipe": _instead(os.mkfifo),
    "a link to a pipe": _instead(lambda path: (os.mkfifo(f"{path}.fifo"), path.symlink_to(f"{path}.fifo"))),
    "a link to a device": _instead(lambda path: path.symlink_to("/dev/zero")),
    "a link to nothing": _instead(lambda path: path.symlink_to("/nowhere/at/all")),
    "a link to itself": _instead(lambda path: path.symlink_to(path.name)),
    "a link outside": _instead(lambda path: path.symlink_to(outside(path) / "mine.txt")),
}


def outside(path: Path) -> Path:
    """Return the folder beside the storage of ``path`` that nothing may change."""
    return next(above for above in path.parents if (above / "outside").is_dir()) / "outside"


# --- changes of a folder ---------------------------------------------------------------------------------------------


def _elsewhere(path: Path, draw: random.Random) -> None:
    shutil.rmtree(path)
    path.symlink_to(outside(path), target_is_directory=True)


def _no_folder(make: Callable[[Path], object]) -> Callable[[Path, random.Random], None]:
    def change(path: Path, draw: random.Random) -> None:
        shutil.rmtree(path)
        make(path)

    return change


FOLDER_CHANGES: dict[str, Callable[[Path, random.Random], object]] = {
    "a link outside": _elsewhere,
    "a link up": _no_folder(lambda path: path.symlink_to("..", target_is_directory=True)),
    "a pipe": _no_folder(os.mkfifo),
    "a file": _no_folder(lambda path: path.write_text("mine")),
    "empty": _no_folder(lambda path: path.mkdir()),
}


# --- changes that keep every checksum right --------------------------------------------------------------------------


def seal(path: Path, manifest: Any) -> None:
    """Write a manifest with the right checksum, if it is one at all."""
    if isinstance(manifest, dict):
        manifest.pop("sha256", None)
        manifest["sha256"] = hashlib.sha256(canonical_json(manifest)).hexdigest()
    path.write_text(json.dumps(manifest))


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every (container, key) in a JSON value."""
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield value, key
        yield from _places(item)


def change_manifest(path: Path, draw: random.Random) -> str:
    """Replace or remove one value of a manifest, and seal it; return what was done."""
    manifest = json.loads(path.read_text())
    del manifest["sha256"]
    container, key = draw.choice(list(_places(manifest)))
    where, odd = f"{key!r} of {str(container)[:60]}", draw.choice((*ODD, "../../outside/mine.txt", "part-../x"))
    if isinstance(container, dict) and draw.random() < 0.3:
        del container[key]
    else:
        container[key] = odd
    seal(path, manifest)
    return f"{where}: {odd!r}"


def _other_arrays(arrays: dict[str, np.ndarray], draw: random.Random) -> dict[str, np.ndarray]:
    """Return arrays of which one has another name, shape, type or value, such that its reader can know it."""
    name = draw.choice(list(arrays))
    array, rest = arrays[name], {other: value for other, value in arrays.items() if other != name}
    huge = np.full_like(array, 10**9 if array.dtype.kind == "i" and array.dtype.itemsize > 4 else 0)
    return draw.choice(
        [
            rest,
            rest | {"other": array},
            arrays | {"more": array},
            arrays | {name: array[None]},
            arrays | {name: np.concatenate([array.reshape(-1)] * 2)},
            arrays | {name: array.astype(np.float64 if array.dtype != np.float64 else np.float32)},
            arrays | {name: np.full_like(array, np.nan) if array.dtype.kind == "f" else huge},
        ]
    )


def change_part(path: Path, draw: random.Random) -> str:
    """Replace one part of the result with the manifest ``path`` by another that is sealed; return its name."""
    manifest = json.loads(path.read_text())
    if not manifest["files"]:
        return "nothing"
    part = draw.choice(list(manifest["files"]))
    entry = manifest["files"][part]
    source = path.parent / entry["name"]
    if draw.random() < 0.2:
        data, names = draw.randbytes(200), entry["arrays"]
    else:
        arrays = safetensors.numpy.load(source.read_bytes())
        arrays = _other_arrays(arrays, draw) if arrays else {"more": np.zeros(1)}
        data, names = safetensors.numpy.save(arrays), list(arrays)
    digest = hashlib.sha256(data).hexdigest()
    entry |= {"name": f"part-{digest[:12]}.safetensors", "size": len(data), "sha256": digest, "arrays": names}
    (path.parent / entry["name"]).write_bytes(data)
    seal(path, manifest)
    return part
