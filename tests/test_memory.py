"""Freed memory goes back to the machine."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

HOLES = """
import re
import numpy as np
from mosaic_ray.runtime.memory import give_back

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


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries give back by themselves, or never")
def test_freed_memory_is_given_back() -> None:
    answer = subprocess.run([sys.executable, "-c", HOLES], capture_output=True, text=True, check=True)
    by_itself, asked = map(float, answer.stdout.split())
    assert by_itself < 20 and asked > 180  # MiB
