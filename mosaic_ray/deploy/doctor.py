"""Check this machine: its hardware, its packages, its storage and data, with a fix for each problem."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..config.schema import DataConfig
from ..core.errors import RequestError
from ..core.machine import memory, num_cpus
from ..core.units import GIB, size
from ..data.specs import folders
from ..execution.precision import has_native_bf16

LEAST_MEMORY = 2 * GIB  # one driver (0.7 GiB) and two client actors (0.3 to 0.6 GiB each)
LEAST_DISK = 1 * GIB
LEAST_SHARED_MEMORY = GIB // 2  # containers give 64 MiB by default


@dataclass(frozen=True)
class Check:
    """One line of the report: ``severity`` is ok, warning or problem; ``fix`` is advice, empty if none is needed."""

    what: str
    severity: str
    found: str
    fix: str = ""


def examine(data: DataConfig, storage: str, address: str | None = None) -> Iterator[Check]:
    """Yield every check, cheap ones first. Ray is started (or joined) only if ``address`` is given."""
    yield _python()
    yield from _packages()
    yield _cpu()
    yield _memory()
    yield from _shared_memory()
    yield from _torch()
    yield from _storage(storage)
    yield _data(data)
    if address is not None:
        yield _ray(address)


def _python() -> Check:
    good = sys.version_info >= (3, 11)
    fix = "" if good else "mosaic-ray needs Python 3.11 or newer"
    return Check("python", "ok" if good else "problem", f"{platform.python_version()} at {sys.executable}", fix)


def _packages() -> Iterator[Check]:
    """Compare each dependency with the lower bound that this distribution declares."""
    from packaging.requirements import Requirement

    try:
        declared = importlib.metadata.requires("mosaic-ray") or []
    except importlib.metadata.PackageNotFoundError:
        found = "mosaic-ray is not installed, so there is nothing to compare"
        yield Check("packages", "warning", found, "pip install -e .")
        return
    good = []
    for text in declared:
        need = Requirement(text)
        if need.marker is not None and not need.marker.evaluate({"extra": ""}):
            continue
        install = f"pip install '{need}'"
        try:
            version = importlib.metadata.version(need.name)
        except importlib.metadata.PackageNotFoundError:
            yield Check(need.name, "problem", "not installed", install)
            continue
        if need.specifier.contains(version, prereleases=True):
            good.append(f"{need.name} {version}")
        else:
            yield Check(need.name, "problem", f"{version}, where {need.specifier} is needed", install)
    yield Check("packages", "ok", ", ".join(good) or "none")


def _cpu() -> Check:
    cores = num_cpus()
    return Check("cpu", "ok", f"{cores} cores" if cores > 1 else "1 core")


def _check_amount(what: str, found: str, amount: float, least: float, fix: str) -> Check:
    return Check(what, "warning", found, fix) if amount < least else Check(what, "ok", found)


def _memory() -> Check:
    have = memory()
    found = f"{have.available / GIB:.1f} of {have.total / GIB:.1f} GiB available"
    fix = "close something, or keep to --host serial and the demo preset"
    return _check_amount("memory", found, have.available, LEAST_MEMORY, fix)


def _shared_memory() -> Iterator[Check]:
    """Check /dev/shm (Linux), which holds Ray's object store; objects that do not fit go to the disk."""
    shared = Path("/dev/shm")
    if sys.platform == "linux" and shared.is_dir():
        free = shutil.disk_usage(shared).free
        fix = "Ray will be slow; in a container give it more, such as --shm-size=2g"
        found = f"{free / GIB:.2f} GiB free in {shared}"
        yield _check_amount("shared memory", found, free, LEAST_SHARED_MEMORY, fix)


def _torch() -> Iterator[Check]:
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a shared library is missing or damaged
        reason = " ".join(str(error).split())
        yield Check("torch", "problem", f"cannot be imported ({reason})", "pip install --force-reinstall torch")
        return
    if torch.cuda.is_available():
        gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        yield Check("gpu", "ok", ", ".join(f"{gpu.name} with {gpu.total_memory / GIB:.0f} GiB" for gpu in gpus))
    elif Path("/proc/driver/nvidia/version").exists():
        fix = "its driver may be too old for it, or CUDA_VISIBLE_DEVICES hides it"
        yield Check("gpu", "warning", f"there is one that torch {torch.__version__} cannot use", fix)
    else:
        yield Check("gpu", "ok", "none; everything runs on the CPU")
    for place in ("the GPU", "the CPU") if torch.cuda.is_available() else ("the CPU",):
        native = has_native_bf16(cuda=place == "the GPU")
        yield Check("bf16", "ok", f"native on {place}" if native else f"not native on {place}; fp32 is used")
        yield _bf16_speed(place)


def _bf16_speed(place: str) -> Check:
    """Time a matrix product in bf16 and in fp32. It is advice: ``runtime.precision=auto`` never follows a time."""
    import torch

    device = "cuda" if place == "the GPU" else "cpu"

    def seconds(kind: torch.dtype) -> float:
        factor, times = torch.ones(512, 512, dtype=kind, device=device), []
        for _ in range(6):
            began = time.perf_counter()
            float((factor @ factor)[0, 0])  # waits for the device
            times.append(time.perf_counter() - began)
        return min(times)

    try:
        ratio = seconds(torch.float32) / seconds(torch.bfloat16)
    except (RuntimeError, AssertionError) as error:  # AssertionError: a torch without CUDA
        return Check("bf16 speed", "warning", f"{place} cannot multiply matrices ({str(error).splitlines()[0]})")
    advice = "advice only: runtime.precision=auto follows what the processor declares"
    return Check("bf16 speed", "ok", f"{ratio:.2g} times that of fp32 on {place} ({advice})")


def _storage(storage: str) -> Iterator[Check]:
    if "://" in storage:
        from ..storage.store import Store

        try:
            Store(storage).check_writable()
        except RequestError as error:
            yield Check("storage", "problem", str(error).removeprefix("--storage "))
        else:
            yield Check("storage", "ok", f"{storage} is writable")
        return
    wanted = Path(storage).expanduser().absolute()
    place = next(p for p in (wanted, *wanted.parents) if p.exists())
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        reason = "not writable" if place.is_dir() else "a file"
        yield Check("storage", "problem", f"{wanted}: {place} is {reason}", "name another folder by --storage")
    else:
        yield Check("storage", "ok", f"{wanted} is writable")
        free = shutil.disk_usage(place).free
        found = f"{size(free, 'GiB')} free for {wanted}"
        yield _check_amount("disk", found, free, LEAST_DISK, "free some space, or name another folder by --storage")


def _data(data: DataConfig) -> Check:
    from ..data.paths import data_root

    root = data_root(data)
    if (data.root or os.environ.get("MOSAIC_DATA")) and not root.is_dir():
        return Check("data", "warning", f"{root} is not a folder", "fix MOSAIC_DATA or --set data.root")
    there = {name: folder for name, folder in folders().items() if (root / folder).exists()}
    absent = [name for name in folders() if name not in there]
    found = f"digits (bundled){''.join(f', {name} ({folder})' for name, folder in there.items())} under {root}"
    if absent:
        return Check("data", "ok", f"{found}; not there: {', '.join(absent)}", "`mosaic data fetch NAME` fetches one")
    return Check("data", "ok", found)


def _ray(address: str) -> Check:
    try:
        from ..execution.ray_session import connect, disconnect

        have = connect(address)
    except (RequestError, ImportError) as error:
        return Check("ray", "problem", str(error), "run without it: --host serial")
    disconnect()
    return Check("ray", "ok", f"{address}: {have.cpus:g} CPUs, {have.gpus:g} GPUs, {size(have.memory, 'GiB')}")
