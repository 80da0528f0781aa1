"""Measure the cost of tracking: demo-like runs with TensorBoard, metrics and pictures against runs without, in turn.

    python benchmarks/tracking.py --pairs 5             # whole runs, each a process of its own
    python benchmarks/tracking.py --pairs 5 --replayed  # one whole run, then cached ones: they write and draw the same

Runs are on the serial host; pairs begin with one or the other by turns. CPU time is the process's own, all threads, so
other work on the machine does not count.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile

import click

RUN = """
import json, sys, time
from mosaic_ray.runs import runner
from mosaic_ray.config.resolve import override, resolve
from mosaic_ray.config.validate import check
from mosaic_ray.tracking import tracker

order, words = sys.argv[1], sys.argv[2:]
config = check(override(resolve("demo"), {"runtime.host": "serial"} | dict(w.split("=", 1) for w in words), text=True))
original = tracker.Tracker
for tracked in order:
    began, used = time.perf_counter(), time.process_time()
    tracker.Tracker = original if tracked == "+" else lambda run_dir, **how: original(None, **how)
    runner.run(config, storage=STORAGE, progress=False, name="run")
    print(json.dumps({"cpu": time.process_time() - used, "wall": time.perf_counter() - began}))
"""


def measured(order: str, knobs: tuple[str, ...]) -> list[dict[str, float]]:
    """CPU and wall seconds of runs in one process and one new storage; ``order``: + with tracking, - without."""
    with tempfile.TemporaryDirectory() as storage:
        words = [sys.executable, "-c", f"STORAGE = {storage!r}\n{RUN}", order, *knobs]
        done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


@click.command()
@click.option("--pairs", default=5, show_default=True)
@click.option("--set", "knobs", multiple=True, help="SECTION.KNOB=VALUE beside the demo's.")
@click.option("--replayed", is_flag=True, help="Cached runs: their extra time, as a share of one whole run.")
def main(pairs: int, knobs: tuple[str, ...], replayed: bool) -> None:
    """Tracking on against off, medians."""
    order = "".join(("+-", "-+")[number % 2] for number in range(pairs))
    if replayed:
        whole, _, first, *runs = measured("--+" + order, knobs)
    else:
        runs = [run for sign in order for run in measured(sign, knobs)]
    for what in ("cpu", "wall"):
        on, off = ([run[what] for run, sign in zip(runs, order, strict=True) if sign == wanted] for wanted in "+-")
        base, loading = statistics.median(off), 0.0
        more = statistics.median(on) - base
        if replayed:  # TensorBoard is loaded once, by the first run that writes for it
            base, loading = whole[what], first[what] - statistics.median(on)
        each = ", ".join(f"{a:.2f} / {b:.2f}" for a, b in zip(on, off, strict=True))
        click.echo(
            f"{what}: on / off {1 + (more + loading) / base:.4f} ({more:.2f} s, {loading:.2f} s to load TensorBoard, "
            f"of {base:.1f} s; on / off {each})"
        )


if __name__ == "__main__":
    main()
