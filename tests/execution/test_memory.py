"""Freed memory is kept if it is used again soon, and returned to the machine when a process is idle."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

HOLES = """
import re
import numpy as np
from mosaic_ray.execution.malloc import give_back

def resident():
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024

blocks = [np.ones(64 << 10, np.uint8) for _ in range(3200)]  # small enough for the heap, 200 MiB together
last = np.ones(64 << 10, np.uint8)  # above them, so that the heap cannot shrink by itself
full = resident()
blocks.clear()
kept = resident()
give_back()
print(full - kept, full - resident())
"""


TURNS = """
import resource, sys
import numpy as np
from mosaic_ray.execution.malloc import keep_freed

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def turn():
    buffers = [np.ones(4 << 20, np.uint8) for _ in range(24)]  # 96 MiB, freed in the order of asking

if sys.argv[1] == "kept":
    keep_freed()
turn()
before = faults()
for _ in range(5):
    turn()
print(faults() - before)
"""

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries do as they like")


@glibc
def test_a_process_that_trains_does_not_fetch_its_buffers_anew_each_step() -> None:
    fetched = [
        int(subprocess.run([sys.executable, "-c", TURNS, how], capture_output=True, text=True, check=True).stdout)
        for how in ("kept", "as usual")
    ]
    assert fetched[0] < 0.01 * fetched[1], fetched


@glibc
def test_freed_memory_is_given_back() -> None:
    answer = subprocess.run([sys.executable, "-c", HOLES], capture_output=True, text=True, check=True)
    by_itself, asked = map(float, answer.stdout.split())
    assert by_itself < 20 and asked > 180  # MiB
