"""Random kills over the demo and a sweep: does every run end with the numbers of an undisturbed one?

    python benchmarks/faults.py --kills 30 --seed 0

Half of the kills meet `mosaic run`, half a sweep of two points and two omegas, each in a new storage. At a drawn moment
of the undisturbed run's time a drawn process gets SIGKILL: the driver, a client actor, a trial's process (sweeps), or
the raylet, which is the whole node's end here. Where the command ends with a failure, the same command is given again,
as a user would. Compared are every accuracy and the student's bytes. One line a kill, and a table at the end. A kill
that comes after the command's end is printed, and not counted.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import click
import psutil

#: The demo on less: every stage, in moments.
LESS = (
    "partition.num_clients=3", "warmup.num_rounds=4", "generator.steps=30", "meta.updates=40", "distill.steps=40",
    "finetune.num_rounds=2", "runtime.precision=fp32",
)  # fmt: skip
SPACE = '''"""Two points at two omegas."""
from mosaic_ray.spaces import Choice, SweepPlan


def plan():
    knobs = {"partition.omega": Choice((0.1, 1.0)), "generator.lambda_d": Choice((2.0, 5.0))}
    return SweepPlan("faults", knobs=knobs, base={"algorithm": "distilled"})
'''
VICTIMS = {
    "driver": None,
    "client actor": "ray::ClientActor",
    "trial": "ray::ImplicitFunc",
    "raylet": "raylet/raylet",
}  # fmt: skip
TOO_LATE = ", too late"
#: A command that was killed is given again this often.
MAX_AGAIN = 3


def words(kind: str, storage: Path, space: Path) -> list[str]:
    """The command line."""
    sets = [word for item in LESS for word in ("--set", item)]
    what = ["sweep", "--space", str(space), "--search", "grid"]
    what = ["run", "--algorithm", "distilled"] if kind == "run" else what
    return [sys.executable, "-m", "mosaic_ray", *what, *sets, "--storage", str(storage)]


def begin(command: list[str]) -> subprocess.Popen[bytes]:
    """The command in a session of its own, so that all that it starts can be found and ended."""
    return subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True, stdin=subprocess.DEVNULL
    )


def outcome(storage: Path) -> dict[str, Any]:
    """Every run's and trial's accuracies, and the hash of its student."""
    found = {}
    for path in sorted(storage.rglob("summary.json")):
        summary = json.loads(path.read_text())
        student = (path.parent / "student.safetensors").read_bytes()
        found[path.parent.name] = (summary["accuracy"], hashlib.sha256(student).hexdigest())
    return found


def victims(root: psutil.Process, title: str | None) -> list[psutil.Process]:
    """The processes of a command that bear ``title``; the command itself without one."""
    if title is None:
        return [root]
    found = []
    for process in root.children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if title in " ".join(process.cmdline()):
                found.append(process)
    return found


def strike(running: subprocess.Popen[bytes], kind: str, moment: float, draws: random.Random) -> str:
    """Send SIGKILL to a random process ``moment`` seconds after the start; return its kind, or "too late"."""
    began, root = time.monotonic(), psutil.Process(running.pid)
    names = [name for name in VICTIMS if kind == "sweep" or name != "trial"]
    name = draws.choice(names)
    while running.poll() is None:
        if time.monotonic() - began >= moment and (found := victims(root, VICTIMS[name])):
            victim = draws.choice(found)
            family = root.children(recursive=True) if name == "driver" else []
            os.kill(victim.pid, signal.SIGKILL)
            psutil.wait_procs(family, timeout=30)  # a killed driver's Ray ends by itself; the next one starts anew
            return name
        time.sleep(0.05)
    return name + TOO_LATE


def kill_at_random(kills: int, seed: int, first: int = 1) -> Counter[tuple[str, str, str]]:
    """Kill until ``kills`` have met something; return how often each (command, process, end) came."""
    table: Counter[tuple[str, str, str]] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        space = Path(folder) / "faults_space.py"
        space.write_text(SPACE)
        wanted, spent = {}, {}
        for kind in ("run", "sweep"):
            storage, began = Path(folder) / kind, time.monotonic()
            subprocess.run(words(kind, storage, space), check=True, capture_output=True)
            wanted[kind], spent[kind] = outcome(storage), time.monotonic() - began
            print(f"undisturbed {kind}: {len(wanted[kind])} results", flush=True)
        for number in itertools.count(first - 1):
            if sum(count for (_, what, _), count in table.items() if not what.endswith(TOO_LATE)) == kills:
                break
            draws = random.Random(f"{seed} {number}")
            kind = ("run", "sweep")[number % 2]
            storage, moment = Path(folder) / f"{kind}{number}", draws.uniform(0.05, 0.95) * spent[kind]
            command = words(kind, storage, space)
            running = begin(command)
            what = strike(running, kind, moment, draws)
            output, again = running.communicate()[1].decode(), 0
            while running.returncode and again < MAX_AGAIN:
                running, again = begin(command), again + 1
                output = running.communicate()[1].decode()
            equal = running.returncode == 0 and outcome(storage) == wanted[kind]
            verdict = "equal" if equal else "NOT EQUAL" if running.returncode == 0 else "FAILED"
            table[kind, what, verdict] += 1
            last = "" if equal else f": {output.strip().splitlines()[-1:]}"
            print(
                f"{number + 1:3} {kind:5} {moment / spent[kind]:4.0%}  {what:24} again {again}  {verdict}{last}",
                flush=True,
            )
    return table


@click.command()
@click.option("--kills", default=30, show_default=True, help="So many that met something.")
@click.option("--seed", default=0, show_default=True)
@click.option("--first", default=1, show_default=True, help="Go on there; draws follow from a kill's number.")
def main(kills: int, seed: int, first: int) -> None:
    """Run it."""
    table = kill_at_random(kills, seed, first)
    print("\n| command | killed | runs | end | \n|---|---|---|---|")
    for (kind, what, verdict), count in sorted(table.items()):
        print(f"| {kind} | {what} | {count} | {verdict} |")


if __name__ == "__main__":
    main()
