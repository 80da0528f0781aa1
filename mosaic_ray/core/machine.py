"""Read how many processors and how much memory this process may use: of the machine, a container or a Slurm job.

psutil reads the whole machine. Ray 2.60 reads one control group more, the one at the top of ``/sys/fs/cgroup``, which
is a container's own; jobs of Slurm and systemd are in groups further down. Control groups are read as in
https://docs.kernel.org/admin-guide/cgroup-v2.html and .../cgroup-v1/, Slurm's variables as in the manual of ``sbatch``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

#: Where control groups are mounted, and the file that names those of this process.
CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")


@dataclass(frozen=True)
class Memory:
    """Bytes of memory: the ``total`` that this process may use with others, and how much is ``available`` now."""

    total: int
    available: int


def num_cpus() -> int:
    """Return the number of CPUs that this process may use, at least 1.

    It is the least of the CPU affinity, the quotas of the control groups (rounded down) and Slurm's CPUs of this node
    and of a task.
    """
    bounds = [len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1]
    for group in _own_groups("cpu"):
        quota = _words(group / "cpu.max") or _words(group / "cpu.cfs_quota_us") + _words(group / "cpu.cfs_period_us")
        if len(quota) == 2 and quota[0].isdigit():  # no limit: max, or -1
            bounds.append(int(quota[0]) // int(quota[1]))
    bounds += [cpus for name in ("CPUS_ON_NODE", "CPUS_PER_TASK") if (cpus := _slurm(name))]
    return max(1, min(bounds))


def memory() -> Memory:
    """Return this machine's memory, or what the tightest limit leaves: a control group's, or Slurm's for this node.

    Pages of files do not count as used, since the kernel takes them back.
    """
    import psutil

    machine = psutil.virtual_memory()
    totals, available = [machine.total], [machine.available]
    for group in _own_groups("memory"):
        limit = _words(group / "memory.max") or _words(group / "memory.limit_in_bytes")
        used = _words(group / "memory.current") or _words(group / "memory.usage_in_bytes")
        if limit and used and limit[0].isdigit():
            words = _words(group / "memory.stat")
            stat = dict(zip(words[::2], words[1::2], strict=False))
            files = [stat.get(f"total_{name}", stat.get(name, 0)) for name in ("inactive_file", "active_file")]
            totals.append(int(limit[0]))
            available.append(int(limit[0]) - int(used[0]) + sum(map(int, files)))
    if mebibytes := _slurm("MEM_PER_NODE") or _slurm("MEM_PER_CPU") * _slurm("CPUS_ON_NODE"):
        totals.append(mebibytes * 2**20)
    return Memory(min(totals), max(0, min(*totals, *available)))


def _own_groups(controller: str) -> Iterator[Path]:
    """Yield the folder of this process's control group and of each one above it, of version 1 or 2.

    In a container the names may be the host's, of which there is only the top here.
    """
    try:
        lines = OWN_CGROUPS.read_text().splitlines()
    except OSError:  # no Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers or controller in controllers.split(","):
            top = CGROUPS / controller if controllers else CGROUPS
            parts = Path(path.lstrip("/")).parts
            for depth in range(len(parts) if ".." not in parts else 0, -1, -1):
                yield top.joinpath(*parts[:depth])


def _words(path: Path) -> list[str]:
    """Return the words of a file; none if it cannot be read."""
    try:
        return path.read_text().split()
    except OSError:
        return []


def _slurm(name: str) -> int:
    """Return a number that Slurm set for this job; 0 without one."""
    value = os.environ.get(f"SLURM_{name}", "")
    return int(value) if value.isdigit() else 0
