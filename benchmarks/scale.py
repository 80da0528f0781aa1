"""Does the driver's memory depend on the number of clients?

    python benchmarks/scale.py --clients 10,100,1000

Federated rounds (`--method fedavg` on the bundled digits, dealt evenly) on two pretended nodes of one CPU each, each
number of clients in a process of its own. "Driver" is the most private memory (USS) of the process that folds updates,
looked at every 50 ms of the rounds; shared pages of the object store are nobody's own.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import click
import psutil

MIB = 2**20


def measure(clients: int, rounds: int) -> dict[str, float]:
    """Here, in this process: peak MiB of the driver, and seconds a client round."""
    import ray
    from ray.cluster_utils import Cluster

    from mosaic_ray.config.resolve import override, resolve
    from mosaic_ray.runs import runner

    knobs = {
        "method": "fedavg", "partition.num_clients": clients, "partition.sampler": "iid", "partition.min_size": 1,
        "warmup.num_rounds": rounds, "warmup.local_steps": 2, "finetune.num_rounds": 1, "runtime.precision": "fp32",
        "runtime.eval_rounds": 0,
    }  # fmt: skip
    config = override(resolve("demo"), knobs)
    peak, ended = 0, threading.Event()

    def log_validation() -> None:
        nonlocal peak
        while not ended.wait(0.05):
            peak = max(peak, psutil.Process().memory_full_info().uss)

    with tempfile.TemporaryDirectory(prefix="ms", dir="/tmp") as folder:
        os.environ["RAY_TMPDIR"] = folder
        cluster = Cluster()
        try:
            for _ in range(2):
                cluster.add_node(num_cpus=1, object_store_memory=200 * MIB, include_dashboard=False)
            ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
            thread = threading.Thread(target=log_validation)
            thread.start()
            began = time.perf_counter()
            summary = runner.run(config, storage=f"{folder}/s", address=cluster.address, progress=False)
            spent = time.perf_counter() - began
            ended.set()
            thread.join()
        finally:
            ray.shutdown()
            cluster.shutdown()
    return {"peak": peak / MIB, "accuracy": summary["accuracy"]["final"], "seconds": spent / clients / (rounds + 1)}


@click.command()
@click.option("--clients", default="10,100,1000", show_default=True)
@click.option("--rounds", default=3, show_default=True)
@click.option("--here", is_flag=True, hidden=True)
def main(clients: str, rounds: int, here: bool) -> None:
    """Run it."""
    if here:
        print(json.dumps(measure(int(clients), rounds)))
        return
    first = None
    print("| clients | driver, MiB | to the first | seconds a client round, to the first |\n|---|---|---|---|")
    for count in clients.split(","):
        command = [sys.executable, __file__, "--clients", count, "--rounds", str(rounds), "--here"]
        env = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *_more()])}
        done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        first = first or found
        print(
            f"| {int(count):,} | {found['peak']:.0f} | {found['peak'] / first['peak']:.3f} | "
            f"{found['seconds'] / first['seconds']:.2f} |",
            flush=True,
        )


def _more() -> list[str]:
    with contextlib.suppress(KeyError):
        return [os.environ["PYTHONPATH"]]
    return []


if __name__ == "__main__":
    main()
