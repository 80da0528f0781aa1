"""Before a Ray cluster is joined: does one answer at the address, does it take this user's token, is it this version?

Ray itself tries for twenty seconds and more, may end the process, and names neither the variable nor the versions. So
a process of its own asks the head first, within ``PATIENCE_SECONDS`` all in all.
"""

from __future__ import annotations

import json
import os
import platform
import socket
import subprocess
import sys
from pathlib import Path

from ..core.errors import RequestError

#: To reach the address, and to have an answer from the head there.
KNOCK_SECONDS, PATIENCE_SECONDS = 3.0, 7.0

PLACES = "~/.ray/auth_token or RAY_AUTH_TOKEN"

_PROBE = """
import json, sys
from ray._raylet import GcsClient
from ray.core.generated.gcs_pb2 import GcsNodeInfo
head = GcsClient(address=sys.argv[1])
versions = json.loads(head.internal_kv_get(b"CLUSTER_METADATA", b"cluster", timeout=5))
nodes = head.get_all_node_info(timeout=5).values()
alive = [node.node_manager_address for node in nodes if node.state == GcsNodeInfo.GcsNodeState.ALIVE]
print(json.dumps({"versions": versions, "nodes": alive}))
"""

_NO_TOKEN = "InvalidAuthToken", "AuthenticationError"


def check_cluster(address: str) -> None:
    """``RequestError`` in one line unless the cluster at ``address`` (``auto``, ``HOST:PORT``) can be joined."""
    head = _head_of(address)
    _knock(address, head)
    if "://" in head:
        return  # Ray's client protocol; its server answers for itself
    _check_token_is_there(address)
    try:
        asked = subprocess.run(
            [sys.executable, "-c", _PROBE, head], capture_output=True, text=True, timeout=PATIENCE_SECONDS
        )
    except subprocess.TimeoutExpired:
        raise RequestError(f"--address {address}: something listens there, but no Ray head answers") from None
    if asked.returncode:
        if any(word in asked.stderr for word in _NO_TOKEN):
            raise RequestError(f"--address {address}: {_token_advice()}")
        last = next((line for line in reversed(asked.stderr.splitlines()) if line.strip()), "no reason given")
        raise RequestError(f"--address {address}: no Ray cluster answers there ({last.strip()})")
    found = json.loads(asked.stdout.splitlines()[-1])
    _check_versions(address, found["versions"])
    if not set(found["nodes"]) & _own_addresses():
        raise RequestError(
            f"--address {address}: this machine is no node of that cluster; give the command on one (`ray exec`, `ray "
            "job submit`), or let this one join it by `ray start --address`"
        )


def _own_addresses() -> set[str]:
    """The IP addresses of this machine."""
    import psutil

    return {entry.address for entries in psutil.net_if_addrs().values() for entry in entries}


def _head_of(address: str) -> str:
    """``address``, or where it is ``auto`` that of the cluster that Ray would find."""
    from ray._private.services import canonicalize_bootstrap_address

    if address != "auto":
        return address
    try:
        head = canonicalize_bootstrap_address(address)
    except (ConnectionError, ValueError, OSError):
        head = None
    if not head:
        raise RequestError(f"--address {address}: no Ray runs on this machine, and RAY_ADDRESS names none")
    return head


def _knock(address: str, head: str) -> None:
    """Whether anything listens at all: Ray would try for minutes (measured: over three)."""
    host, _, port = head.partition("://")[2 if "://" in head else 0].rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), KNOCK_SECONDS).close()
    except (OSError, ValueError) as error:
        raise RequestError(f"--address {address}: no Ray cluster answers there ({error})") from None


def _token_place() -> str:
    """Where this user's token is, in words; empty where there is none."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return "RAY_AUTH_TOKEN"
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()
    return str(path) if path.is_file() else ""


def _check_token_is_there(address: str) -> None:
    """In token mode without a token Ray aborts the process."""
    if os.environ.get("RAY_AUTH_MODE") == "token" and not _token_place():
        raise RequestError(
            f"--address {address}: RAY_AUTH_MODE=token, but there is no token; put the cluster's into {PLACES}"
        )


def _token_advice() -> str:
    place = _token_place()
    if os.environ.get("RAY_AUTH_MODE") == "token":
        return f"the cluster does not take the token in {place}; put the cluster's own there"
    if place:
        return f"the cluster wants a token; set RAY_AUTH_MODE=token (there is one in {place})"
    return f"the cluster wants a token; set RAY_AUTH_MODE=token, and put its token into {PLACES}"


def _check_versions(address: str, cluster: dict[str, str]) -> None:
    """Ray joins only its own version, under the same Python."""
    import ray
    from ray._private.utils import check_version_info

    try:
        check_version_info(cluster, "this machine")
    except RuntimeError:
        raise RequestError(
            f"--address {address}: the cluster runs Ray {cluster['ray_version']} on Python "
            f"{cluster['python_version']}, this is Ray {ray.__version__} on Python {platform.python_version()}; "
            "install the same here and there (constraints.txt pins Ray)"
        ) from None
