"""Fetching over a server of this machine: ranges, broken transfers, wrong files, and what to do by hand."""

from __future__ import annotations

import gzip
import hashlib
import io
import re
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from cli_runner import ask, refusal
from layouts import load, refused, write_cifar10, write_food, write_mnist, write_svhn, write_tiny

from mosaic_ray.config.registry import DATASETS
from mosaic_ray.data import download as downloads
from mosaic_ray.data.download import download
from mosaic_ray.data.specs import Resource, spec_of


class Server(ThreadingHTTPServer):
    """Serves ``files``; breaks an answer off after ``limit`` bytes for the first ``breaks`` times."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.files: dict[str, bytes] = {}
        self.asked: list[tuple[str, str | None]] = []
        self.limit, self.breaks, self.ranges = 0, 0, True

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/{name}"


class _Answer(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        name, wanted = self.path.lstrip("/"), self.headers.get("Range")
        self.server.asked.append((name, wanted))
        content = self.server.files.get(name)
        if content is None:
            self.send_error(404)
            return
        start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1]) if wanted and self.server.ranges else 0
        if start and start >= len(content):
            self.send_response(416)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        if self.server.breaks:
            self.server.breaks -= 1
            self.wfile.write(content[start : start + self.server.limit])
            self.close_connection = True
            return
        self.wfile.write(content[start:])

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    served = Server()
    thread = threading.Thread(target=served.serve_forever, args=(0.01,))
    thread.start()
    yield served
    served.shutdown()
    thread.join()
    served.server_close()


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


def tarred(folder: Path) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        archive.add(folder, folder.name)
    return buffer.getvalue()


def zipped(folder: Path) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for path in sorted(folder.rglob("*")):
            archive.write(path, path.relative_to(folder.parent))
    return buffer.getvalue()


def replace_resources(monkeypatch, name: str, *resources: Resource) -> None:
    """Give the record of the data set ``name`` other files to download."""
    module, _, record = DATASETS[name].target.partition(":")
    monkeypatch.setattr(f"{module}.{record}", replace(spec_of(name), resources=resources))


@pytest.fixture
def offered(server, tmp_path, monkeypatch) -> Server:
    """Small files of every data set, at the paths of its own server."""
    made = tmp_path / "made"
    write_mnist(made)
    write_mnist(made, "FashionMNIST")
    write_svhn(made)
    write_cifar10(made)
    write_tiny(made)
    write_food(made)
    for name in ("mnist", "fmnist", "svhn", "cifar10", "tiny_imagenet", "food101"):
        resources = []
        for resource in spec_of(name).resources:
            source = made / resource.gives[0]
            if resource.path.endswith(".gz") and not resource.path.endswith(".tar.gz"):
                content = gzip.compress(source.read_bytes())
            elif resource.gives == (resource.path,):
                content = source.read_bytes()
            else:
                top = made / Path(resource.gives[0]).parts[0]
                content = zipped(top) if resource.path.endswith(".zip") else tarred(top)
            server.files[resource.path] = content
            resources.append(Resource((server.url(resource.path),), md5(content), resource.path, resource.gives))
        replace_resources(monkeypatch, name, *resources)
    return server


def left_in(root: Path) -> list[str]:
    return [path.name for path in root.rglob("*") if path.name.endswith((".part", ".gz", ".zip")) or ".un" in path.name]


@pytest.mark.parametrize("name", ["mnist", "fmnist", "svhn", "cifar10", "tiny_imagenet", "food101"])
def test_the_loader_reads_the_fetched_files(tmp_path, offered, name):
    came = download(name, tmp_path / "new")
    data, made = load(tmp_path / "new", name), load(tmp_path / "made", name)
    assert data.identity == made.identity
    assert sorted(came) == sorted(given for resource in spec_of(name).resources for given in resource.gives)
    assert not left_in(tmp_path / "new"), "archives that were downloaded are not kept"
    asked = len(offered.asked)
    assert download(name, tmp_path / "new") == []
    assert len(offered.asked) == asked, "no file is requested again"


def test_a_run_may_download_what_is_missing(tmp_path, offered):
    assert "no " in refused(tmp_path / "new", "svhn")
    assert len(load(tmp_path / "new", "svhn", download=True).train) == 40
    (tmp_path / "new" / "test_32x32.mat").unlink()
    load(tmp_path / "new", "svhn", download=True)
    assert [name for name, _ in offered.asked] == ["train_32x32.mat", "test_32x32.mat", "test_32x32.mat"]


def test_a_transfer_that_breaks_off_goes_on_where_it_was(tmp_path, offered):
    offered.limit, offered.breaks = 500, 3
    download("cifar10", tmp_path / "new")
    ranges = [wanted for _, wanted in offered.asked]
    assert ranges == [None, "bytes=500-", "bytes=1000-", "bytes=1500-"]
    assert load(tmp_path / "new", "cifar10").identity == load(tmp_path / "made", "cifar10").identity


def test_a_later_call_goes_on_too(tmp_path, offered):
    [resource] = spec_of("cifar10").resources
    whole = offered.files[resource.path]
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / f"{resource.path}.part").write_bytes(whole[:700])
    download("cifar10", tmp_path / "new")
    assert offered.asked == [(resource.path, "bytes=700-")]
    for beginning in (b"?" * 700, whole + b"more"):  # of another file, or too much: begun once more
        offered.asked.clear()
        root = tmp_path / str(len(beginning))
        root.mkdir()
        (root / f"{resource.path}.part").write_bytes(beginning)
        download("cifar10", root)
        assert [wanted for _, wanted in offered.asked] == [f"bytes={len(beginning)}-", None]
        assert load(root, "cifar10").identity == load(tmp_path / "made", "cifar10").identity
    root = tmp_path / "all"
    root.mkdir()
    (root / f"{resource.path}.part").write_bytes(whole)
    download("cifar10", root)
    assert load(root, "cifar10").identity == load(tmp_path / "made", "cifar10").identity


def test_a_server_without_ranges_sends_the_whole_again(tmp_path, offered):
    offered.ranges, offered.limit, offered.breaks = False, 900, 1
    download("cifar10", tmp_path / "new")
    assert len(offered.asked) == 2
    assert load(tmp_path / "new", "cifar10").identity == load(tmp_path / "made", "cifar10").identity


def test_a_server_that_gets_nowhere_is_given_up_and_what_came_is_kept(tmp_path, offered):
    offered.limit, offered.breaks = 0, 10**6
    message = failure(tmp_path / "new", "cifar10")
    assert "broke off after 0 of" in message
    offered.limit, offered.breaks, offered.ranges = 900, 10**6, False
    failure(tmp_path / "new", "cifar10")
    assert (tmp_path / "new" / "cifar-10-python.tar.gz.part").stat().st_size == 900


def failure(root: Path, name: str) -> str:
    return refusal(ask("data", "fetch", name, "--set", f"data.root={root}"))


def test_a_file_of_another_checksum_is_not_taken(tmp_path, offered):
    [resource] = spec_of("cifar10").resources
    offered.files[resource.path] = b"something else"
    message = failure(tmp_path / "new", "cifar10")
    assert md5(b"something else") in message and resource.md5 in message
    assert not (tmp_path / "new" / "cifar-10-batches-py").exists()
    assert len(offered.asked) == 1 and not left_in(tmp_path / "new")


def test_the_next_mirror_is_asked_where_one_fails(tmp_path, offered, monkeypatch):
    first, *others = spec_of("mnist").resources
    mirrors = (offered.url("nowhere"), offered.url("svhn"), *first.urls)
    offered.files["svhn"] = b"another file"
    replace_resources(monkeypatch, "mnist", replace(first, urls=mirrors), *others)
    download("mnist", tmp_path / "new")
    assert [name for name, _ in offered.asked[:3]] == ["nowhere", "svhn", first.path]
    assert load(tmp_path / "new", "mnist").identity == load(tmp_path / "made", "mnist").identity


def test_offline_it_says_which_file_from_where_goes_where_and_takes_it_then(tmp_path, offered, monkeypatch):
    files = dict(offered.files)
    offered.files.clear()
    root = tmp_path / "new"
    message = failure(root, "mnist")
    for resource in spec_of("mnist").resources:
        assert f"{resource.urls[0]} (MD5 {resource.md5}) at {root / resource.path}" in message
        (root / resource.path).write_bytes(files[resource.path])
    assert "Traceback" not in message and "404" in message
    assert ask("data", "fetch", "mnist", "--set", f"data.root={root}").exit_code == 0
    assert load(root, "mnist").identity == load(tmp_path / "made", "mnist").identity
    assert (root / spec_of("mnist").resources[0].path).exists(), "a file that was put there by hand is left there"


def test_a_file_put_there_by_hand_is_checked(tmp_path, offered):
    (tmp_path / "new").mkdir()
    archive = tmp_path / "new" / "cifar-10-python.tar.gz"
    archive.write_bytes(b"half of it")
    message = failure(tmp_path / "new", "cifar10")
    assert str(archive) in message and md5(b"half of it") in message
    assert archive.exists() and not offered.asked


def test_a_folder_that_lacks_files_is_put_aside(tmp_path, offered):
    write_cifar10(tmp_path / "new")
    folder = tmp_path / "new" / "cifar-10-batches-py"
    (folder / "data_batch_4").unlink()
    (folder / "notes.txt").write_text("mine")
    download("cifar10", tmp_path / "new")
    assert load(tmp_path / "new", "cifar10").identity == load(tmp_path / "made", "cifar10").identity
    assert (tmp_path / "new" / "cifar-10-batches-py.incomplete-1" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("filters", [True, False])
def test_an_archive_cannot_write_elsewhere(tmp_path, server, monkeypatch, filters):
    if not filters:  # as Python before 3.11.4
        monkeypatch.delattr(tarfile, "data_filter", raising=False)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        member = tarfile.TarInfo("../escaped")
        member.size = 4
        archive.addfile(member, io.BytesIO(b"evil"))
    server.files["x.tar.gz"] = buffer.getvalue()
    resource = Resource((server.url("x.tar.gz"),), md5(buffer.getvalue()), "x.tar.gz", ("cifar-100-python/train",))
    replace_resources(monkeypatch, "cifar100", resource)
    assert "escaped" in failure(tmp_path / "new" / "root", "cifar100")
    assert not [*tmp_path.rglob("escaped")]


def test_two_processes_at_once_fetch_once(tmp_path, offered):
    begin = threading.Barrier(2)

    def one() -> None:
        begin.wait()
        came.append(download("svhn", tmp_path / "new"))

    came: list[list[str]] = []
    threads = [threading.Thread(target=one) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(came) == 2 and len(offered.asked) == 2, "two files, each asked for by one of them"


def test_a_folder_that_cannot_be_written_is_reported(tmp_path, offered):
    (tmp_path / "file").write_text("not a folder")
    assert str(tmp_path / "file") in failure(tmp_path / "file" / "below", "svhn")


def test_unknown_and_bundled_data_sets_are_refused(tmp_path):
    assert 'did you mean "cifar10"' in refusal(ask("data", "fetch", "cifar-10"))
    assert "bundled" in ask("data", "fetch", "digits").stdout


def test_addresses_and_checksums_are_torchvisions():
    from torchvision import datasets

    for name, source in (("mnist", datasets.MNIST), ("fmnist", datasets.FashionMNIST)):
        for resource, (file, checksum) in zip(spec_of(name).resources, source.resources, strict=True):
            assert resource.urls == tuple(mirror + file for mirror in source.mirrors)
            assert resource.md5 == checksum
    for name, source in (("cifar10", datasets.CIFAR10), ("cifar100", datasets.CIFAR100)):
        [resource] = spec_of(name).resources
        assert (resource.urls, resource.md5, resource.path) == ((source.url,), source.tgz_md5, source.filename)
    for resource, split in zip(spec_of("svhn").resources, ("train", "test"), strict=True):
        assert ((*resource.urls, resource.path, resource.md5)) == tuple(datasets.SVHN.split_list[split])
    [food] = spec_of("food101").resources
    assert (food.urls, food.md5) == ((datasets.Food101._URL,), datasets.Food101._MD5)
    assert downloads._TIMEOUT_SECONDS > 0
