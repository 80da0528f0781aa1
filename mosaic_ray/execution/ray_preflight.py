"""Check a Ray cluster before it is joined: it answers, it accepts this user's token, it runs the same versions.

``ray.init`` tries for twenty seconds or more, may end the process, and names neither the variable nor the versions. So
a process of its own asks the head first, for at most ``PATIENCE_SECONDS``.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import socket
from collections.abc import Mapping
from pathlib import Path

from ..core.errors import RequestError
from . import ray_internals

#: Seconds to wait for the connection, and for the answer of the head.
CONNECT_SECONDS, PATIENCE_SECONDS = 3.0, 7.0

TOKEN_PLACES = "~/.ray/auth_token or RAY_AUTH_TOKEN"

_NO_TOKEN = "InvalidAuthToken", "AuthenticationError"


def check_cluster(address: str) -> None:
    """Raise a one-line ``RequestError`` unless the cluster at ``address`` (``auto``, ``HOST:PORT``) can be joined."""
    head = _find_head(address)
    _check_port(address, head)
    if "://" in head:
        return  # Ray's client protocol, whose server does the checks below
    _check_token(address)
    try:
        found = ray_internals.probe_head(head, PATIENCE_SECONDS)
    except TimeoutError:
        raise RequestError(f"--address {address}: something listens there, but no Ray head answers") from None
    except ConnectionError as error:
        if any(word in str(error) for word in _NO_TOKEN):
            raise RequestError(f"--address {address}: {_token_advice()}") from None
        last = next((line for line in reversed(str(error).splitlines()) if line.strip()), "no reason given")
        raise RequestError(f"--address {address}: no Ray cluster answers there ({last.strip()})") from None
    _check_versions(address, found["versions"])
    if not set(found["nodes"]) & _own_addresses():
        raise RequestError(
            f"--address {address}: this machine is no node of that cluster; give the command on one (`ray exec`, `ray "
            "job submit`), or let this one join it by `ray start --address`"
        )


def _own_addresses() -> set[str]:
    """Return the IP addresses of this machine."""
    import psutil

    return {entry.address for entries in psutil.net_if_addrs().values() for entry in entries}


def _find_head(address: str) -> str:
    """Return ``address``, or the address of the cluster that Ray finds for ``auto``."""
    head = ray_internals.find_head() if address == "auto" else address
    if not head:
        raise RequestError(f"--address {address}: no Ray runs on this machine, and RAY_ADDRESS names none")
    return head


def _check_port(address: str, head: str) -> None:
    """Raise ``RequestError`` unless something listens at ``head``; Ray would try for more than three minutes."""
    host, _, port = head.partition("://")[2 if "://" in head else 0].rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
    except (OSError, ValueError) as error:
        raise RequestError(f"--address {address}: no Ray cluster answers there ({error})") from None


def _find_token() -> str:
    """Return the variable or the file that holds this user's token; empty without a token."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return "RAY_AUTH_TOKEN"
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()
    return str(path) if path.is_file() else ""


def _check_token(address: str) -> None:
    """Refuse token mode without a token, for which Ray aborts the process."""
    if os.environ.get("RAY_AUTH_MODE") == "token" and not _find_token():
        raise RequestError(
            f"--address {address}: RAY_AUTH_MODE=token, but there is no token; put the cluster's into {TOKEN_PLACES}"
        )


def _token_advice() -> str:
    """Return what to do about a token that the cluster refuses."""
    token = _find_token()
    if os.environ.get("RAY_AUTH_MODE") == "token":
        return f"the cluster does not take the token in {token}; put the cluster's own there"
    if token:
        return f"the cluster wants a token; set RAY_AUTH_MODE=token (there is one in {token})"
    return f"the cluster wants a token; set RAY_AUTH_MODE=token, and put its token into {TOKEN_PLACES}"


def _check_versions(address: str, cluster: Mapping[str, str]) -> None:
    """Refuse a cluster of another Ray, or under another Python: Ray joins neither."""
    if not ray_internals.same_versions(cluster):
        raise RequestError(
            f"--address {address}: the cluster runs Ray {cluster['ray_version']} on Python "
            f"{cluster['python_version']}, this is Ray {importlib.metadata.version('ray')} on Python "
            f"{platform.python_version()}; install the same here and there (constraints.txt pins Ray)"
        )
