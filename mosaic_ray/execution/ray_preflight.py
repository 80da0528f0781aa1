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
from typing import Any

from ..core.errors import RequestError
from . import ray_internals

#: Seconds to wait for the connection, and for the answer of the head.
CONNECT_SECONDS, PATIENCE_SECONDS = 3.0, 7.0

TOKEN_PLACES = "~/.ray/auth_token or RAY_AUTH_TOKEN"


def check_cluster(address: str) -> str | None:
    """Raise a one-line ``RequestError`` unless the cluster at ``address`` (``auto``, ``HOST:PORT``) can be joined.

    Returns the RAY_AUTH_MODE to join in; None where Ray's own rules hold. Without that variable the cluster decides: a
    token is sent where the cluster wants one. Ray's own default depends on its release and on whether there is a token.
    """
    import psutil

    head = ray_internals.find_head() if address == "auto" else address
    if not head:
        raise RequestError(f"--address {address}: no Ray runs on this machine, and RAY_ADDRESS names none")
    host, _, port = head.partition("://")[2 if "://" in head else 0].rpartition(":")
    try:  # Ray would try for more than three minutes
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
    except (OSError, ValueError) as error:
        raise RequestError(f"--address {address}: no Ray cluster answers there ({error})") from None
    if "://" in head:
        return None  # the server of Ray's client protocol does the checks below
    asked, token = os.environ.get("RAY_AUTH_MODE", "").lower(), find_token()
    if asked == "token" and not token:  # Ray would abort the process
        raise RequestError(
            f"--address {address}: RAY_AUTH_MODE=token, but there is no token; put the cluster's into {TOKEN_PLACES}"
        )
    mode = asked or "disabled"
    found = _ask(address, head, mode)
    if found is None and not asked and token:
        mode = "token"
        found = _ask(address, head, mode)
    if found is None:
        advice = f"the cluster wants a token; put it into {TOKEN_PLACES}"
        if mode == "token":
            advice = f"the cluster does not take the token in {token}; put the cluster's own there"
        elif asked:
            advice = f"the cluster wants a token, and RAY_AUTH_MODE={asked} sends none; unset it"
            advice += f" (there is a token in {token})" if token else f", and put the token into {TOKEN_PLACES}"
        raise RequestError(f"--address {address}: {advice}")
    if not ray_internals.same_versions(found["versions"]):
        raise RequestError(
            f"--address {address}: the cluster runs Ray {found['versions']['ray_version']} on Python "
            f"{found['versions']['python_version']}, this is Ray {importlib.metadata.version('ray')} on Python "
            f"{platform.python_version()}; install the same here and there (constraints.txt pins Ray)"
        )
    own = {entry.address for entries in psutil.net_if_addrs().values() for entry in entries}
    if not own.intersection(found["nodes"]):
        raise RequestError(
            f"--address {address}: this machine is no node of that cluster; give the command on one (`ray exec`, `ray "
            "job submit`), or let this one join it by `ray start --address`"
        )
    return mode


def find_token() -> str:
    """Return the variable or the file that holds this user's token, as Ray looks for it; empty where there is none."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return "RAY_AUTH_TOKEN"
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()
    try:
        return str(path) if path.read_text().strip() else ""
    except (OSError, ValueError):
        return ""


def _ask(address: str, head: str, mode: str) -> Mapping[str, Any] | None:
    """Return the head's answer to a client in this RAY_AUTH_MODE; None where it wants a token, or another one."""
    try:
        return ray_internals.probe_head(head, PATIENCE_SECONDS, mode)
    except TimeoutError:
        raise RequestError(f"--address {address}: something listens there, but no Ray head answers") from None
    except ConnectionError as error:
        if any(word in str(error) for word in ("InvalidAuthToken", "AuthenticationError")):
            return None
        last = next((line for line in reversed(str(error).splitlines()) if line.strip()), "no reason given")
        raise RequestError(f"--address {address}: no Ray cluster answers there ({last.strip()})") from None
