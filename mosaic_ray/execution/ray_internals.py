"""Use Ray's private modules: the only file that may, since they change without notice."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

from ..core.errors import RequestError
from ..core.machine import Memory

#: The Ray release that this file was written for.
RAY_READ = "2.60"

#: Seconds to wait until Ray has recorded why a worker ended.
VERDICT_SECONDS = 2.0

#: The code of a process that asks a head for its versions and nodes. Ray may end a process that asks in vain.
HEAD_PROBE = """
import json, sys
from ray._raylet import GcsClient
from ray.core.generated.gcs_pb2 import GcsNodeInfo
head = GcsClient(address=sys.argv[1])
versions = json.loads(head.internal_kv_get(b"CLUSTER_METADATA", b"cluster", timeout=5))
nodes = head.get_all_node_info(timeout=5).values()
alive = [node.node_manager_address for node in nodes if node.state == GcsNodeInfo.GcsNodeState.ALIVE]
print(json.dumps({"versions": versions, "nodes": alive}))
"""


def _missing(what: str) -> RequestError:
    installed = importlib.metadata.version("ray")
    return RequestError(f"Ray {installed}: {what}; this was read from Ray {RAY_READ} (pip install 'ray=={RAY_READ}.*')")


def _private(path: str) -> Any:
    """Return the object at ``module:name.name`` in Ray; ``RequestError`` if this release does not have it."""
    module, _, names = path.partition(":")
    try:
        return functools.reduce(getattr, names.split("."), importlib.import_module(module))
    except (ImportError, AttributeError) as error:
        raise _missing(f"{module} has no {names} ({error})") from None


def own_processes() -> tuple[dict[str, int], str]:
    """Return the pids of this driver's raylet and, where it runs here, of its cluster's GCS; and the folder of logs.

    Both are empty for a driver that uses Ray's client protocol.
    """
    import psutil

    if (node := _private("ray._private.worker:_global_node")) is None:
        return {}, ""
    marks = {
        "raylet": f"--raylet_socket_name={node.raylet_socket_name}", "gcs_server": f"--session-name={node.session_name}"
    }  # fmt: skip
    running = [process.info for process in psutil.process_iter(["name", "cmdline", "pid"])]
    pids = {one["name"]: one["pid"] for one in running if marks.get(one["name"]) in (one["cmdline"] or ())}
    return pids, node.get_logs_dir_path()


def errors_to_stderr() -> None:
    """Let Ray's own errors go to standard error, which it prints on standard output, where results may be JSON.

    A task that Ray tries again is left out: a run says itself what it does about it.
    """
    from ray._private import worker

    def plainly(data: Mapping[str, Any], *_: Any, **__: Any) -> None:
        for line in data["lines"]:
            if "retries remaining" not in line:
                print(f"ray: {line.strip()}", file=sys.stderr)

    if hasattr(worker, "print_to_stdstream"):
        worker.print_to_stdstream = plainly


def memory_shares(memory: Memory) -> tuple[int, ...]:
    """Return the bytes for tasks and for the object store under a limit that Ray does not read; empty without one.

    Ray reads the machine's memory and the limit at the top of ``/sys/fs/cgroup`` (``core/machine.py`` reads more).
    """
    if memory.total >= _private("ray._common.utils:get_system_memory")():
        return ()
    store: int = _private("ray._private.utils:resolve_object_store_memory")(memory.available)
    return memory.available - store, store


def find_head() -> str | None:
    """Return the HOST:PORT of the cluster that ``auto`` means: RAY_ADDRESS, or one on this machine. None: no cluster.

    ``ray.init`` knows it too, but starts a cluster where it finds none.
    """
    try:
        return _private("ray._private.services:canonicalize_bootstrap_address")("auto") or None
    except (ConnectionError, ValueError, OSError):
        return None


@contextlib.contextmanager
def auth_mode(mode: str | None) -> Iterator[None]:
    """Let ``ray.init`` inside the block work in this RAY_AUTH_MODE, ``token`` or ``disabled``; None changes nothing."""
    if mode is None:
        yield
        return
    before = os.environ.get("RAY_AUTH_MODE")
    os.environ["RAY_AUTH_MODE"] = mode
    _private("ray._raylet:Config.initialize")("")  # Ray has read the variable already
    try:
        yield
    finally:
        if before is None:
            del os.environ["RAY_AUTH_MODE"]
        else:
            os.environ["RAY_AUTH_MODE"] = before


def probe_head(head: str, timeout: float, mode: str) -> Mapping[str, Any]:
    """Return the ``versions`` and the ``nodes`` (addresses of those alive) of the cluster at ``head``, HOST:PORT.

    ``mode``: the RAY_AUTH_MODE to ask in; ``token`` sends this user's token, ``disabled`` none.
    ``TimeoutError`` after ``timeout`` seconds without an answer; ``ConnectionError`` with the whole error output where
    the head refuses.
    """
    try:
        answer = subprocess.run(
            [sys.executable, "-c", HEAD_PROBE, head], capture_output=True, text=True, timeout=timeout,
            env=os.environ | {"RAY_AUTH_MODE": mode},
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise TimeoutError(f"no answer from {head}") from None
    if answer.returncode:
        last = (answer.stderr.strip().splitlines() or [""])[-1]
        if last.startswith(("ImportError", "ModuleNotFoundError", "AttributeError")):
            raise _missing(last)
        raise ConnectionError(answer.stderr)
    found: dict[str, Any] = json.loads(answer.stdout.splitlines()[-1])
    return found


def same_versions(cluster: Mapping[str, str]) -> bool:
    """Return whether Ray joins a cluster of these versions from here: its own Ray and Python."""
    try:
        _private("ray._private.utils:check_version_info")(cluster, "this machine")
    except RuntimeError:
        return False
    return True


def known_providers() -> list[str]:
    """Return the names that ``provider.type`` of a `ray up` file may have."""
    return list(_private("ray.autoscaler._private.providers:_NODE_PROVIDERS"))


def validate_cluster(content: dict[str, Any]) -> dict[str, Any]:
    """Return the content of a `ray up` file with Ray's defaults; raise what Ray raises if it refuses the file."""
    logging.getLogger("ray.autoscaler").setLevel(logging.ERROR)  # it logs every default that it fills in
    prepared: dict[str, Any] = _private("ray.autoscaler._private.util:prepare_config")(content)
    _private("ray.autoscaler._private.util:validate_config")(prepared)
    return prepared


def killed_for_memory(worker_id: str) -> bool:
    """Return whether Ray's memory monitor killed the worker with this id.

    The error of an actor that is started again does not contain it (Ray 2.60), and Ray's State API needs the dashboard,
    so this reads the table behind it. Ray answers "no" here where the worker's node died with it.
    """
    import ray

    connect = _private("ray._private.state:state._connect_and_get_accessor")
    reason = _private("ray.core.generated.common_pb2:WorkerExitType.NODE_OUT_OF_MEMORY")
    parse = _private("ray.core.generated.gcs_pb2:WorkerTableData.FromString")
    table, deadline = connect(), time.monotonic() + VERDICT_SECONDS
    while time.monotonic() < deadline:
        found = table.get_worker_info(ray.WorkerID.from_hex(worker_id))
        if found and not (row := parse(found)).is_alive:
            return bool(row.exit_type == reason)
        time.sleep(0.05)
    return False
