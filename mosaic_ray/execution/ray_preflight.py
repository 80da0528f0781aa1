"""Check a Ray cluster before it is joined: it answers, it accepts this user's token, it runs the same versions.

``ray.init`` tries for twenty seconds or more, may end the process, and names neither the variable nor the versions. So
a process of its own asks the head first, for at most ``PATIENCE_SECONDS``.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import socket
from pathlib import Path

from ..core.errors import RequestError
from . import ray_internals

#: Seconds to wait for the connection, and for the answer of the head.
CONNECT_SECONDS, PATIENCE_SECONDS = 3.0, 7.0

TOKEN_PLACES = "~/.ray/auth_token or RAY_AUTH_TOKEN"


def check_cluster(address: str) -> None:
    """Raise a one-line ``RequestError`` unless the cluster at ``address`` (``auto``, ``HOST:PORT``) can be joined."""
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
        return  # the server of Ray's client protocol does the checks below
    token_mode = os.environ.get("RAY_AUTH_MODE") == "token"
    token = "RAY_AUTH_TOKEN" if os.environ.get("RAY_AUTH_TOKEN") else ""  # the variable or the file that holds it
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()
    if not token and path.is_file():
        token = str(path)
    if token_mode and not token:  # Ray would abort the process
        raise RequestError(
            f"--address {address}: RAY_AUTH_MODE=token, but there is no token; put the cluster's into {TOKEN_PLACES}"
        )
    try:
        found = ray_internals.probe_head(head, PATIENCE_SECONDS)
    except TimeoutError:
        raise RequestError(f"--address {address}: something listens there, but no Ray head answers") from None
    except ConnectionError as error:
        if any(word in str(error) for word in ("InvalidAuthToken", "AuthenticationError")):
            advice = "the cluster wants a token; set RAY_AUTH_MODE=token"
            if token_mode:
                advice = f"the cluster does not take the token in {token}; put the cluster's own there"
            elif token:
                advice += f" (there is one in {token})"
            else:
                advice += f", and put its token into {TOKEN_PLACES}"
            raise RequestError(f"--address {address}: {advice}") from None
        last = next((line for line in reversed(str(error).splitlines()) if line.strip()), "no reason given")
        raise RequestError(f"--address {address}: no Ray cluster answers there ({last.strip()})") from None
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
