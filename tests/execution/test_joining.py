"""Joining a cluster: a wrong address, token or version is reported in one line, and soon."""

from __future__ import annotations

import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from mosaic_ray.core.errors import RequestError
from mosaic_ray.execution import ray_internals, ray_preflight, ray_session
from mosaic_ray.execution.ray_preflight import check_cluster
from mosaic_ray.execution.ray_session import connect

VERSIONS = {"ray_version": ray.__version__, "python_version": platform.python_version()}


def answer(*nodes: str, **other: str) -> str:
    """Return code that prints a head's answer for a cluster of this version, with this machine as a node."""
    return f"print({json.dumps({'versions': VERSIONS | other, 'nodes': nodes or ['127.0.0.1']})!r})"


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """A user without a token."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.fixture
def address() -> Iterator[str]:
    """An address with a listening socket."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def head(monkeypatch):
    """``head(code)``: the head answers with the output of ``code``."""
    return lambda code: monkeypatch.setattr(ray_internals, "HEAD_PROBE", code)


def keep_token(home: Path) -> Path:
    path = home / ".ray" / "auth_token"
    path.parent.mkdir()
    path.write_text("secret")
    return path


def refused(address: str) -> str:
    with pytest.raises(RequestError) as caught:
        check_cluster(address)
    message = str(caught.value)
    assert message.startswith(f"--address {address}: ") and "\n" not in message and "secret" not in message
    return message


def test_a_cluster_of_this_version_is_joined(home, address, head):
    head(answer())
    check_cluster(address)


def test_a_cluster_that_this_machine_is_no_node_of(home, address, head):
    head(answer("198.51.100.1", "198.51.100.2"))
    assert "this machine is no node of that cluster" in refused(address)
    head(answer("198.51.100.1", "127.0.0.1"))
    check_cluster(address)


@pytest.mark.parametrize("name, other", [("ray_version", "2.1.0"), ("python_version", "3.9.1")])
def test_another_version_is_named_beside_this_one(home, address, head, name, other):
    head(answer(**{name: other}))
    message = refused(address)
    assert other in message and ray.__version__ in message and platform.python_version() in message


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nowhere.invalid:6379", "127.0.0.1:http", "ray://127.0.0.1:1"])
def test_an_address_where_nobody_listens(home, address):
    assert "no Ray cluster answers there" in refused(address)


def test_auto_where_no_ray_runs(home, monkeypatch):
    monkeypatch.setattr("ray._private.services.canonicalize_bootstrap_address", lambda address: None)
    assert refused("auto") == "--address auto: no Ray runs on this machine, and RAY_ADDRESS names none"


def test_auto_is_the_cluster_that_ray_finds(home, address, head, monkeypatch):
    monkeypatch.setattr("ray._private.services.canonicalize_bootstrap_address", lambda asked: address)
    head(f"import sys; assert sys.argv[1] == {address!r}; {answer()}")
    check_cluster("auto")


def test_something_else_that_listens(home, address, head, monkeypatch):
    monkeypatch.setattr(ray_preflight, "PATIENCE_SECONDS", 0.2)
    head("import time; time.sleep(60)")
    assert refused(address).endswith("something listens there, but no Ray head answers")


def test_a_probe_that_fails_gives_its_last_line(home, address, head):
    head("raise SystemExit('first\\nthe reason')")
    assert refused(address).endswith("no Ray cluster answers there (the reason)")


def test_a_ray_without_its_private_modules_is_named(home, address, head, monkeypatch):
    monkeypatch.setattr(ray_preflight, "PATIENCE_SECONDS", 60)  # a busy machine imports Ray slowly
    head("from ray._raylet import NoSuchClient")
    with pytest.raises(RequestError, match=r"^Ray \S+: ImportError: .*NoSuchClient.*read from Ray 2\.60"):
        check_cluster(address)
    head(answer())
    monkeypatch.delattr("ray._private.utils.check_version_info")
    with pytest.raises(RequestError, match=r"^Ray \S+: ray\._private\.utils has no check_version_info .*2\.60\.\*"):
        check_cluster(address)
    monkeypatch.setitem(sys.modules, "ray._private.state", None)  # an import of it fails
    with pytest.raises(RequestError, match=r"ray\._private\.state has no state\._connect_and_get_accessor"):
        ray_internals.killed_for_memory("00")


def test_patience_is_ten_seconds_at_most():
    assert ray_preflight.CONNECT_SECONDS + ray_preflight.PATIENCE_SECONDS <= 10


DENIED = "raise SystemExit('RPC error: InvalidAuthToken: ...')"



#: A head that takes nothing but a token, and the right one.
GUARDED = f"""
import os
if os.environ["RAY_AUTH_MODE"] != "token" or os.environ.get("RAY_AUTH_TOKEN", "right") != "right":
    {DENIED}
{answer()}
"""


def test_a_token_is_wanted_and_there_is_none(home, address, head):
    head(DENIED)
    assert refused(address).endswith(": the cluster wants a token; put it into ~/.ray/auth_token or RAY_AUTH_TOKEN")
    keep_token(home).write_text("\n")  # which is none to Ray either
    assert "the cluster wants a token; put it into" in refused(address)


def test_a_token_that_lies_there_is_sent_where_one_is_wanted(home, address, head):
    keep_token(home)
    head(GUARDED)
    assert check_cluster(address) == "token"


def test_a_token_that_lies_there_is_not_sent_where_none_is_wanted(home, address, head):
    keep_token(home)
    head(f"import os; assert os.environ['RAY_AUTH_MODE'] == 'disabled'; {answer()}")
    assert check_cluster(address) == "disabled"


def test_a_user_who_disables_tokens_sends_none(home, address, head, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    head(GUARDED)
    advice = "the cluster wants a token, and RAY_AUTH_MODE=disabled sends none; unset it"
    assert refused(address).endswith(f"{advice}, and put the token into ~/.ray/auth_token or RAY_AUTH_TOKEN")
    path = keep_token(home)
    assert refused(address).endswith(f"{advice} (there is a token in {path})")


@pytest.mark.parametrize("mode", [None, "token"])
def test_the_wrong_token(home, address, head, monkeypatch, mode):
    if mode:
        monkeypatch.setenv("RAY_AUTH_MODE", mode)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
    head(GUARDED)
    assert refused(address).endswith(
        "the cluster does not take the token in RAY_AUTH_TOKEN; put the cluster's own there"
    )
    monkeypatch.setenv("RAY_AUTH_TOKEN", "right")
    assert check_cluster(address) == "token"


@pytest.mark.parametrize("before", [None, "token"])
def test_rays_mode_holds_inside_the_block(home, monkeypatch, before):
    from ray._raylet import AuthenticationMode, get_authentication_mode

    if before:
        monkeypatch.setenv("RAY_AUTH_MODE", before)
    for mode in ("token", "disabled"):
        with ray_internals.auth_mode(mode):
            assert get_authentication_mode() == getattr(AuthenticationMode, mode.upper())
            assert os.environ["RAY_AUTH_MODE"] == mode
        assert os.environ.get("RAY_AUTH_MODE") == before


def test_a_local_ray_that_cannot_keep_its_token_says_what_to_do(home, monkeypatch):
    """In this process: Ray makes the token before it starts any other."""
    (home / ".ray").touch()
    monkeypatch.setattr(ray, "init", lambda **options: ray._private.authentication.authentication_token_setup
                        .generate_and_save_token())  # fmt: skip
    with pytest.raises(RequestError) as caught:
        connect("local")
    said = str(caught.value)
    assert said.startswith("--address local: Ray does not start here (") and str(home / ".ray") in said
    assert said.endswith("it needs a token in ~/.ray/auth_token or RAY_AUTH_TOKEN, or RAY_AUTH_MODE=disabled")


def test_token_mode_without_a_token_is_refused_before_ray_aborts_the_process(home, address, head, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    head("raise AssertionError('nobody is to be asked')")
    assert "RAY_AUTH_MODE=token, but there is no token" in refused(address)


# --- a real head -----------------------------------------------------------------------------------------------------


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """A folder with a short path: Ray's sockets are in it, and paths of sockets are limited."""
    with tempfile.TemporaryDirectory(prefix="mj", dir="/tmp", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@pytest.mark.ray
@pytest.mark.slow
def test_a_real_head_in_token_mode(home, monkeypatch, short_folder):
    """Without, with the wrong and with the right token; the head starts with cluster.yaml's ``ray start`` command."""
    token, ray_command = "0123456789abcdef" * 3, str(Path(sys.executable).parent / "ray")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    address = f"127.0.0.1:{port}"
    started = subprocess.run(
        [
            ray_command, "start", "--head", f"--port={port}", "--node-ip-address=127.0.0.1", "--num-cpus=1",
            "--include-dashboard=false", "--object-store-memory=80000000", f"--temp-dir={short_folder}",
        ],
        env=os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}, capture_output=True, text=True,
    )  # fmt: skip
    assert started.returncode == 0, started.stderr
    try:
        assert "the cluster wants a token; put it into" in refused(address)
        monkeypatch.setenv("RAY_AUTH_TOKEN", "f" * 48)
        assert "does not take the token in RAY_AUTH_TOKEN" in refused(address)
        monkeypatch.setenv("RAY_AUTH_TOKEN", token)
        assert check_cluster(address) == "token"
        monkeypatch.setenv("RAY_AUTH_MODE", "token")
        assert check_cluster(address) == "token"
    finally:
        for process in _of_session(short_folder):
            process.kill()


def _of_session(folder: Path) -> list:
    """Return the processes with ``folder`` in their command line."""
    import psutil

    return [p for p in psutil.process_iter(["cmdline"]) if str(folder) in " ".join(p.info["cmdline"] or [])]


@pytest.mark.parametrize("failures, address", [(2, "local"), (3, "local"), (1, "127.0.0.1:1")])
def test_a_ray_that_is_slow_to_start_here_is_started_again(monkeypatch, failures, address):
    tried, slow = [], "The current node timed out during startup. This could happen because ..."

    def init(**options):
        tried.append(options["address"])
        if tried.count(address) <= failures:
            raise Exception(slow)  # Ray raises plain ones

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: tried.append("shutdown"))
    if failures == 2:
        ray_session._init(address, {})
    else:
        with pytest.raises(Exception, match="timed out during startup"):
            ray_session._init(address, {})
    starts = ["local", "shutdown", "local", "shutdown", "local"] if address == "local" else [address]
    assert tried == starts


ERRORS = """
import time
from mosaic_ray.execution.ray_session import connect
connect("local")
import ray
from ray._private.utils import push_error_to_driver
for message in ("Task f failed. There are infinite retries remaining.", "the disk is full"):
    push_error_to_driver(ray._private.worker.global_worker, "test", message)
time.sleep(3)
"""


@pytest.mark.ray
def test_rays_errors_go_to_standard_error_and_its_retries_nowhere():
    found = subprocess.run([sys.executable, "-c", ERRORS], text=True, capture_output=True, check=True)
    assert found.stdout == ""
    assert "ray: the disk is full\n" in found.stderr and "retries" not in found.stderr
