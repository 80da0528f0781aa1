"""Start or join Ray, and read what its cluster has."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..config.schema import ExperimentConfig
from ..core import errors
from ..core.errors import RequestError
from ..core.machine import memory, num_cpus
from . import ray_watch
from .ray_internals import auth_mode, errors_to_stderr, memory_shares, own_processes
from .ray_preflight import TOKEN_PLACES, check_cluster
from .resource_plan import HOST_BYTES, Node, on_ray_gpus

#: Set before Ray starts: short polls in Ray Train, no usage report, its own noise off (errors are never silenced).
RAY_ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "120",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_DEDUP_LOGS": "1",
}

#: How often Ray is started here: a busy machine may need longer than the time that Ray gives itself.
MAX_STARTS = 3

#: Where `ray up` leaves the cluster's file on its head.
BOOTSTRAP = "~/ray_bootstrap_config.yaml"

#: Bytes of memory per CPU, where a machine's memory is unknown.
MEMORY_A_CPU = 4 * 2**30


@dataclass(frozen=True)
class Resources:
    """The CPUs, GPUs and bytes of memory of a cluster.

    ``share``: of a GPU that one client's memory takes; ``gpu_bytes``: memory of the smallest GPU; ``bf16``: whether the
    GPUs compute in it. 0, None: not known. ``runs``: a sweep's trials at once, 0: no sweep. ``least_share``: of a GPU,
    for every client, after its memory ran out.
    """

    cpus: float
    gpus: float
    memory: float
    share: float = 0.0
    gpu_bytes: float = 0.0
    runs: int = 0
    least_share: float = 0.0
    bf16: bool | None = None


def local_resources() -> Resources:
    """Return this machine's CPUs, GPUs and available memory, without Ray."""
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return Resources(num_cpus(), gpus, memory().available)


def ray_start_options() -> list[str]:
    """Return the options by which ``ray start`` keeps to this machine's limits, as far as Ray does not read them."""
    options = zip(("--memory", "--object-store-memory"), memory_shares(memory()), strict=False)
    return [f"--num-cpus={num_cpus()}", *(f"{name}={share}" for name, share in options)]


def num_hosts(config: ExperimentConfig, resources: Resources) -> int:
    """Return the number of client actors: one per client if CPUs, GPUs, memory and ``runtime.max_hosts`` allow it.

    ``RequestError`` where not even one fits.
    """
    knobs = config.runtime
    for knob, asks, has, hint in (
        ("cpus_per_client", knobs.cpus_per_client, resources.cpus, "CPUs, so no client fits"),
        ("gpus_per_client", knobs.gpu_share, resources.gpus, "GPUs (0 runs clients on CPUs)"),
    ):
        if asks > has:
            raise RequestError(f"runtime.{knob} = {asks:g}: there are {has:g} {hint}")
    room = max(1, places(config, resources))
    return min(room, config.partition.num_clients, knobs.max_hosts or room)


def hosts_beside_server(config: ExperimentConfig, machines: Sequence[Node | Resources]) -> int:
    """Return ``num_hosts`` on all machines; on GPUs one place stays free, for the server's worker.

    Where there is only one place, the two take turns.
    """
    count = num_hosts(config, in_all(Resources(0, 0, 0), machines))
    return min(count, max(1, sum(places(config, m) for m in machines) - 1)) if on_ray_gpus(config) else count


def places(config: ExperimentConfig, machine: Node | Resources) -> int:
    """Return how many client actors a machine holds."""
    cpus, share = config.runtime.cpus_per_client, config.runtime.gpu_share
    bounds = [int(machine.cpus / cpus + 1e-9), max(1, int(machine.memory * 0.7 / HOST_BYTES))]
    if share:
        per_gpu = int(1 / share + 1e-9) if share <= 1 else 0
        bounds.append(per_gpu * int(machine.gpus) or int(machine.gpus // share))
    return min(bounds)


def connect(address: str = "local") -> Resources:
    """Start Ray here (``local``) or join a cluster (``auto``, ``HOST:PORT``); return its resources.

    Safe to call again: a Ray that this process has joined already is used as it is.
    """
    for name, value in RAY_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import ray

    if not ray.is_initialized():
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        mode = None
        if address == "local":
            options |= {"num_cpus": num_cpus(), "include_dashboard": False}
            options |= zip(("_memory", "object_store_memory"), memory_shares(memory()), strict=False)
        else:
            mode = check_cluster(address)
        errors_to_stderr()
        on_term = signal.getsignal(signal.SIGTERM)
        try:
            with auth_mode(mode):
                _init(address, options)
        except Exception as error:  # Ray raises plain ones too
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            what = f"no Ray cluster answers there ({reason})"
            if address == "local":
                what = f"Ray does not start here ({reason})"
                if "token" in reason.lower() or isinstance(error, OSError):  # it makes one for each user
                    what += f"; it needs a token in {TOKEN_PLACES}, or RAY_AUTH_MODE=disabled"
            raise RequestError(f"--address {address}: {what}") from None
        with contextlib.suppress(ValueError, TypeError):  # not the main thread; a handler that is not Python's
            signal.signal(signal.SIGTERM, on_term)  # Ray's own prints a stack and aborts
        if hasattr(os, "pidfd_open"):  # Linux
            _watch(own=address == "local")
    return all_resources()


def is_up() -> bool:
    """Return whether this process has started or joined Ray."""
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())


#: What ends the watchers of Ray's processes.
_goodbyes: list[Callable[[], None]] = []


def _init(address: str, options: Mapping[str, Any]) -> None:
    """Start or join Ray; start it again, up to ``MAX_STARTS`` times, where it gave up its start after 30 seconds."""
    import ray

    for left in reversed(range(MAX_STARTS)):
        try:
            ray.init(address=address, **options)
            return
        except Exception as error:
            if address != "local" or not left or "timed out during startup" not in str(error):
                raise
            ray.shutdown()


def _watch(own: bool) -> None:
    """End this process in one line, with status 1, when its raylet dies, or the GCS of its ``own`` Ray.

    Ray would end it too, at once or after a minute, without that line. Another cluster's GCS may be started again.
    """
    import ray

    found, logs = own_processes()
    watched = [f"{name}:{pid}" for name, pid in found.items() if own or name == "raylet"]
    if not watched:
        return
    watcher: Any = subprocess.Popen(
        [sys.executable, "-IS", ray_watch.__file__, f" (its logs: {logs}); {errors.resume}", *watched],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, start_new_session=True,
    )  # fmt: skip

    def goodbye() -> None:
        with contextlib.suppress(OSError, ValueError):  # it ended before
            watcher.stdin.write(b".")
            watcher.stdin.close()
        watcher.wait()

    def follow() -> None:
        with watcher.stdout:
            died = watcher.stdout.read(1)
        if died and ray.is_initialized():
            watcher.stdin.close()
            watcher.wait()
            os._exit(1)
        goodbye()  # Ray was shut down

    threading.Thread(target=follow, daemon=True).start()
    atexit.register(goodbye)  # before Ray's own, which stops these processes
    _goodbyes.append(goodbye)


def all_resources() -> Resources:
    """Return the resources of all nodes that are up together, free or in use."""
    import ray

    total = ray.cluster_resources()
    return Resources(total.get("CPU", 0.0), total.get("GPU", 0.0), total.get("memory", 0.0))


def in_all(there: Resources, to_come: Sequence[Node | Resources]) -> Resources:
    """Return the sum of ``there`` and of the nodes ``to_come``."""
    every: list[Resources | Node] = [there, *to_come]
    sums = {kind: sum(getattr(n, kind) for n in every) for kind in ("cpus", "gpus", "memory")}
    return replace(there, **sums)


def machines_to_come(bootstrap: str = BOOTSTRAP) -> list[Node]:
    """Return the workers that the autoscaler may start beside the nodes that are up; none if this is unknown.

    They are read from the file that ``ray up`` leaves on the cluster's head, so they are known to drivers on the head
    only. A type counts once the file has its ``resources``; a type without memory counts 4 GiB a CPU.
    """
    import ray
    import yaml

    try:
        cluster = yaml.safe_load(Path(bootstrap).expanduser().read_text(encoding="utf-8"))
        types, head = dict(cluster["available_node_types"]), cluster["head_node_type"]
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError):
        return []
    up = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    left = int(cluster.get("max_workers", 2)) + 1 - len(up)
    found: list[Node] = []
    for name, kind in types.items():
        has = kind.get("resources") or {}
        cpus, gpus = float(has.get("CPU", 0)), float(has.get("GPU", 0))
        alike = sum((n.get("CPU", 0.0), n.get("GPU", 0.0)) == (cpus, gpus) for n in up)
        most = int(kind.get("max_workers", 0)) - max(0, alike - (name == head))
        for number in range(max(0, min(most, left - len(found)))):
            memory = float(has.get("memory") or cpus * MEMORY_A_CPU)
            found.append(Node(f"{name} {number + 1}, to come", cpus, gpus, memory, to_come=True))
    return found


def nodes(expect: bool = False) -> list[Node]:
    """Return the nodes of the cluster that this process has joined, this one first; named by Ray's ids.

    ``expect``: add the nodes that the cluster may still start, at the end.
    """
    import ray

    own = ray.get_runtime_context().get_node_id()
    found = []
    for facts in ray.nodes():
        if facts["Alive"]:
            has = facts["Resources"]
            found.append(Node(facts["NodeID"], has.get("CPU", 0.0), has.get("GPU", 0.0), has.get("memory", 0.0)))
    return sorted(found, key=lambda node: (node.name != own, node.name)) + (machines_to_come() if expect else [])


def gpu_kinds() -> tuple[list[str], bool]:
    """Return Ray's ``accelerator_type:...`` resources of the nodes that are up and have GPUs, and if there are any."""
    import ray

    with_gpus = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("GPU", 0) >= 1]
    kinds = {name for has in with_gpus for name in has if name.startswith("accelerator_type:")}
    return sorted(kinds), bool(with_gpus)


def own_node() -> dict[str, float]:
    """Return a request for Ray's ``node:<ip>`` resource, which pins a task to this node."""
    import ray

    return {f"node:{ray.util.get_node_ip_address()}": 1e-3}


def disconnect() -> None:
    """Leave Ray; stop a Ray that ``connect`` started here. Nothing happens without Ray."""
    while _goodbyes:
        atexit.unregister(goodbye := _goodbyes.pop())
        goodbye()
    if is_up():
        import ray

        ray.shutdown()
