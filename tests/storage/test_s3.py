"""Object storage through pyarrow: s3:// against moto's server, gs:// as far as possible offline."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_runner import ask, refusal
from helpers import TINY, assert_same, stripes_dataset
from pyarrow import fs
from safetensors.numpy import load, load_file
from storing import FACTS, KEY, OTHER_KEY, PATIENCE_SECONDS, arrays, children, held, remains, same, start
from werkzeug.serving import make_server
from werkzeug.wrappers import Request, Response

import mosaic_ray.storage.filesystem as files_module
import mosaic_ray.storage.locks as leases_module
import mosaic_ray.storage.store as store_module
from mosaic_ray.config.resolve import override, to_toml
from mosaic_ray.core.errors import RequestError
from mosaic_ray.runs import runner
from mosaic_ray.storage.filesystem import Files
from mosaic_ray.storage.gc import verify
from mosaic_ray.storage.store import Store
from mosaic_ray.storage.uri import join, open_uri

pytest.importorskip("moto", reason="moto[server,s3] is not installed")


class S3:
    """moto's S3, which answers ``error`` to the requests that ``fails(request)`` picks."""

    def __init__(self) -> None:
        from moto.server import DomainDispatcherApplication, create_backend_app

        self._app = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        self.port = self._server.server_port
        self.fix()

    def fix(self) -> None:
        self.fails: Callable[[Request], bool] = lambda request: False
        self.error, self.failures = (503, "SlowDown"), 0

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def uri(self, path: str) -> str:
        return f"s3://{path}?endpoint_override=127.0.0.1:{self.port}&scheme=http"

    def _answer(self, environ: dict[str, Any], start_response: Any) -> Any:
        request = Request(environ)
        if self.fails(request):
            self.failures += 1
            request.get_data()  # a sender in mid-word would take the answer for a broken line
            status, code = self.error
            body = f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>no</Message></Error>'
            return Response(body, status, mimetype="application/xml")(environ, start_response)
        return self._app(environ, start_response)


@pytest.fixture(scope="module")
def server() -> Iterator[S3]:
    made = S3()
    yield made
    made.close()


@pytest.fixture
def s3(server: S3, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> S3:
    """A server with an empty bucket named ``bucket``; credentials are in the environment."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setattr(files_module, "_PAUSES", (0.005, 0.05))
    monkeypatch.setattr(leases_module, "_CHECK_SECONDS", 0.01)
    monkeypatch.chdir(tmp_path)
    server.fix()
    endpoint = f"127.0.0.1:{server.port}"
    root = fs.S3FileSystem(
        endpoint_override=endpoint, scheme="http", allow_bucket_creation=True, allow_bucket_deletion=True
    )
    if root.get_file_info("bucket").type != fs.FileType.NotFound:
        root.delete_dir("bucket")
    root.create_dir("bucket")
    return server


def is_part(request: Request) -> bool:
    return request.method == "PUT" and "partNumber" in request.args


# ---------------------------------------------------------------- the store's contract


def test_the_stores_contract_on_s3(s3: S3, logged: list[str], tmp_path: Path) -> None:
    one, two = Store(s3.uri("bucket/some/prefix"), log=logged.append), Store(s3.uri("bucket/some/prefix"))
    one.check_writable()
    assert one.local_root is None and one.get(KEY) is None and one.files.names("objects") == []
    big = {"w": np.random.default_rng(0).normal(size=(13 << 20) // 8)}  # more than one part of an upload
    with held(one.try_lease(KEY)):
        assert two.try_lease(KEY) is None
        for number in (1, 2):
            one.save_checkpoint(KEY, {"round": number}, {"w": arrays(number)})
        kept = two.load_checkpoint(KEY)
        assert kept is not None and kept.facts == {"round": 2} and same(kept.load("w"), arrays(2))
        one.put(KEY, FACTS, {"global": arrays(), "big": big})
        one.drop_checkpoint(KEY)
    got = two.get(KEY)
    assert got is not None and got.facts == FACTS and same(got.load("big"), big) and same(got.load("global"), arrays())
    assert two.load_checkpoint(KEY) is None and remains(two) == []
    (tmp_path / "run/tensorboard").mkdir(parents=True)
    (tmp_path / "run/tensorboard/events").write_bytes(b"x")
    one.upload(tmp_path / "run", "runs/mine")
    assert two.files.read("runs/mine/tensorboard/events") == b"x" and two.files.names("runs") == ["mine"]
    with pytest.raises(FileNotFoundError):
        two.files.read("runs/other/summary.json")
    one.discard(KEY)
    one.discard(KEY)
    assert two.get(KEY) is None and not logged


WRITER = """
import sys
import numpy as np
import mosaic_ray.storage.locks as leases_module
from mosaic_ray.storage.store import Store
store, key, number = Store(sys.argv[1]), "warmup-0123456789abcdef0123", float(sys.argv[2])
print("ready", flush=True)
sys.stdin.read(1)
for turn in range(15):
    store.put(key, {"n": number}, {"p": {"w": np.full(1000, number)}, "same": {"w": np.zeros(1000)}})
    found = store.get(key)
    assert found is not None and (found.load("p")["w"] == found.facts["n"]).all()
"""


def test_two_processes_that_write_one_key_never_spoil_it(s3: S3, logged: list[str]) -> None:
    uri = s3.uri("bucket/p")
    with children(WRITER, [uri, "1"], [uri, "2"]) as writers:
        start(*writers)
        for process in writers:
            process.communicate(timeout=PATIENCE_SECONDS)
            assert process.returncode == 0
    store = Store(uri, log=logged.append)
    found = store.get(KEY)
    assert found is not None and (found.load("p")["w"] == found.facts["n"]).all() and not logged
    assert not verify(store).damaged


def test_a_third_of_all_requests_refused_as_by_a_busy_s3_changes_nothing(s3: S3, logged: list[str]) -> None:
    draws = random.Random(0)
    s3.fails = lambda request: draws.random() < 0.3
    store = Store(s3.uri("bucket/p"), log=logged.append)
    for number in range(6):
        key = f"warmup-{number:020d}"
        with held(store.try_lease(key)):
            store.put(key, FACTS, {"global": arrays(number)})
        got = store.get(key)
        assert got is not None and same(got.load("global"), arrays(number))
    assert s3.failures > 20 and not logged and remains(store) == []


def test_an_upload_with_failing_parts_shows_nothing(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files_module, "PATIENCE_SECONDS", 0.2)
    files = Files(*open_uri(s3.uri("bucket/p")))
    files.put("old", b"old")
    s3.fails = lambda request: is_part(request) and request.args["partNumber"] == "2"
    for name in ("old", "new"):
        with pytest.raises(OSError, match="part"):
            files.put(name, bytes(13 << 20))
    s3.fix()
    assert files.names("") == ["old"] and files.read("old") == b"old"


def test_what_a_bucket_holds_is_listed_verified_and_freed(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases_module, "TTL_SECONDS", 0.3)
    uri = s3.uri("bucket/p")
    store = Store(uri)
    store.put(KEY, {}, {"p": arrays()})
    store.save_checkpoint(KEY, {}, {"p": arrays()})
    store.files.put(f"leases/{OTHER_KEY}~{'0' * 32}", b"")
    listed = json.loads(ask("store", "ls", "--storage", uri, "--json").stdout)
    assert [row["key"] for row in listed["results"]] == [KEY] == [row["key"] for row in listed["checkpoints"]]
    assert time.time() - datetime.fromisoformat(listed["results"][0]["when"]).timestamp() < PATIENCE_SECONDS
    assert "2 results and checkpoints" in ask("store", "verify", "--storage", uri).stdout
    freed = json.loads(ask("store", "gc", "--storage", uri, "--older-than", "0s", "--json").stdout)
    assert freed["bytes"] == listed["bytes"] > 0 and len(freed["freed"]) == 3
    assert store.files.tree("") == {} and store.files.names("objects") == []


def test_names_are_joined_before_the_query() -> None:
    assert join("s3://b/p/?a=1&b=2", "runs/x") == "s3://b/p/runs/x?a=1&b=2"
    assert join("gs://b", "runs/x") == "gs://b/runs/x"
    store = Store("s3://b/p?endpoint_override=127.0.0.1:9&scheme=http")
    assert store.where("runs/x") == "s3://b/p/runs/x?endpoint_override=127.0.0.1:9&scheme=http"
    assert open_uri(store.where("runs/x"))[1] == "b/p/runs/x"


def test_a_local_place_is_a_path(tmp_path: Path) -> None:
    assert Store(tmp_path.as_uri()).where("runs/x") == str(tmp_path / "runs/x")


# ---------------------------------------------------------------- whole runs


SMALL = override(TINY, {"warmup.num_rounds": 2, "generator.steps": 4, "meta.updates": 4, "distill.steps": 4})


@pytest.mark.slow
def test_a_run_on_s3_ends_as_on_a_disk_and_resumes(
    s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("mosaic_ray.data.load.load_dataset", lambda config: stripes_dataset())
    here = runner.run(SMALL, storage=str(tmp_path / "disk"), progress=False)
    (tmp_path / "small.toml").write_text(to_toml(SMALL))
    uri = s3.uri("bucket/p")
    command = ["run", "--config", str(tmp_path / "small.toml"), "--storage", uri, "--name", "one", "--json"]
    monkeypatch.setattr(files_module, "PATIENCE_SECONDS", 0.2)
    s3.fails = lambda request: "objects/distill-" in request.path and request.method in ("POST", "PUT")
    broken = ask(*command)
    last = broken.stderr.splitlines()[-1]
    assert broken.exit_code == 1 and "Traceback" not in broken.stderr, broken.stderr
    assert "stage distill" in last and "SLOW_DOWN" in last
    s3.fix()
    store = Store(uri)
    assert remains(store) == [] and not verify(store).damaged
    resumed = ask(*command)
    assert resumed.exit_code == 0, resumed.stderr
    summary = json.loads(resumed.stdout)
    cached = {name for name, stage in summary["stages"].items() if stage["cached"]}
    assert cached == {"partition", "warmup", "generators", "prototypes", "teacher"}
    assert summary["accuracy"] == here["accuracy"] and summary["per_class_accuracy"] == here["per_class_accuracy"]
    assert json.loads(store.files.read("runs/one/summary.json")) == summary
    student = load_file(Path(here["paths"]["run"]) / "student.safetensors")
    assert_same(load(store.files.read("runs/one/student.safetensors")), student)
    assert any(name.startswith("events") for name in store.files.names("runs/one/tensorboard"))


# ---------------------------------------------------------------- refusals before a run starts


@pytest.mark.usefixtures("two_cpus")
class TestRefused:
    """In one line with exit status 2, by `mosaic run` and `mosaic store`; Ray cannot even be imported."""

    @pytest.fixture(params=["run", "store"])
    def line(self, request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[str], str]:
        def asked(uri: str) -> str:
            words = ["run"] if request.param == "run" else ["store", "ls"]
            message = refusal(ask(*words, "--storage", uri))
            assert f"--storage {uri.replace('key:secret@', '...@')}: " in message and list(tmp_path.iterdir()) == []
            return message

        return asked

    @pytest.mark.parametrize("code", ["AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch"])
    def test_bad_or_no_credentials(
        self, s3: S3, line: Callable[[str], str], monkeypatch: pytest.MonkeyPatch, code: str
    ) -> None:
        if code == "AccessDenied":
            for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
                monkeypatch.delenv(name)
        s3.fails, s3.error = (lambda request: True), (403, code)
        assert "AWS_ACCESS_KEY_ID" in line(s3.uri("bucket/p")) and s3.failures <= 3, "not tried again"

    def test_a_missing_bucket(self, s3: S3, line: Callable[[str], str]) -> None:
        message = line(s3.uri("nowhere/p"))
        assert "make the bucket first" in message or "nothing is stored there" in message

    def test_an_endpoint_where_nobody_answers(
        self, s3: S3, line: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(store_module, "OPENING_SECONDS", 0.2)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        message = line(f"s3://bucket/p?endpoint_override=127.0.0.1:{port}&scheme=http")
        assert "Could not connect" in message and "endpoint_override=HOST:PORT" in message

    @pytest.mark.slow
    def test_an_endpoint_that_never_answers(self, s3: S3, line: Callable[[str], str]) -> None:
        with socket.create_server(("127.0.0.1", 0), backlog=20) as silent:
            silent.settimeout(0.1)
            message = line(f"s3://bucket/p?endpoint_override=127.0.0.1:{silent.getsockname()[1]}&scheme=http")
            asked = 0
            with contextlib.suppress(TimeoutError):
                while True:
                    silent.accept()[0].close()
                    asked += 1
        assert "imeout" in message and 1 <= asked <= 2, "each waits for 3 seconds"

    @pytest.mark.parametrize(
        "uri, why",
        [
            ("s3://bucket/p?bogus=1&region=us-east-1", "bogus"),
            ("s3://", "no bucket"),
            ("gs://", "no bucket"),
            ("gs://bucket/p?bogus=1", "bogus"),
            ("ftp9://host/p", "ftp9"),
            ("s3://key:secret@bucket/p", "no secrets"),
        ],
    )
    def test_an_empty_uri(self, s3: S3, line: Callable[[str], str], uri: str, why: str) -> None:
        assert why in line(uri)

    @pytest.mark.parametrize("word", ["absent", "a/file"])
    @pytest.mark.parametrize("command", ["ls", "gc", "verify"])
    def test_a_folder_that_is_none(self, tmp_path: Path, word: str, command: str) -> None:
        (tmp_path / "a").write_text("")
        assert "nothing is stored there" in refusal(ask("store", command, "--storage", word))
        assert not (tmp_path / "absent").exists()

    @pytest.mark.slow
    def test_google_without_credentials(
        self, line: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Google's client looks for them in the environment, in HOME and on the machine."""
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS", raising=False)
        monkeypatch.setenv("GCE_METADATA_HOST", "127.0.0.1:9")
        assert "GOOGLE_APPLICATION_CREDENTIALS" in line("gs://bucket/p")


@pytest.mark.parametrize("words", [["run"], ["store", "ls"], ["doctor"]])
def test_google_that_never_answers_is_given_up(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Google's client itself waits for two minutes."""
    monkeypatch.setattr(files_module, "ANSWER_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0), backlog=20) as silent:
        uri = f"gs://anonymous@bucket/p?endpoint_override=127.0.0.1:{silent.getsockname()[1]}&scheme=http"
        asked = ask(*words, "--storage", uri)
        silent.settimeout(5)
        silent.accept()[0].close()  # it was asked
    said = f"{uri}: no answer within 0.5 s; check the network and the URI"
    if words == ["doctor"]:
        assert asked.exit_code == 1 and re.search(f"^problem +storage: {re.escape(said)}", asked.stdout, re.MULTILINE)
    else:
        assert f"--storage {said}" in refusal(asked)


def test_google_uris_are_understood() -> None:
    filesystem, root = open_uri("gs://anonymous@bucket/some/p?endpoint_override=127.0.0.1:9&scheme=http")
    assert isinstance(filesystem, fs.GcsFileSystem) and root == "bucket/some/p"
    assert Store("gs://anonymous@bucket/p").local_root is None


def test_a_uri_may_hold_a_user_but_no_password() -> None:
    with pytest.raises(RequestError) as caught:
        Store("hdfs://me:mine@host/p")
    assert "mine" not in str(caught.value)
