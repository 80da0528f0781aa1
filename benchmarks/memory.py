"""Peak memory of a command and all its processes, as proportional set size (shared pages counted once).

    python benchmarks/memory.py mosaic run --clients 100

Samples /proc every half second; everything that shares the command's session counts (Ray's servers and actors too).
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path


def session_pss(session: int) -> int:
    """Return the proportional set size, in bytes, of all processes with the session's mark in their environment."""
    mark, total = f"MEASURED_SESSION={session}".encode(), 0
    for process in Path("/proc").iterdir():
        if not process.name.isdigit():
            continue
        try:
            if mark not in (process / "environ").read_bytes().split(b"\0"):
                continue
            lines = (process / "smaps_rollup").read_text().splitlines()
        except OSError:  # it ended meanwhile
            continue
        total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
    return total


def main() -> None:
    """Run the command in argv and print the peak on standard error."""
    session = os.getpid()
    process = subprocess.Popen(sys.argv[1:], env=os.environ | {"MEASURED_SESSION": str(session)})
    peak = 0
    while process.poll() is None:
        peak = max(peak, session_pss(session))
        time.sleep(0.5)
    sys.stderr.write(f"peak proportional set size: {peak / 2**30:.2f} GiB; exit status {process.returncode}\n")
    sys.exit(process.returncode)


if __name__ == "__main__":
    main()
