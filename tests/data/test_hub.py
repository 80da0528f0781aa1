"""Data sets of the Hugging Face Hub, through its own client and a server on this machine."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hub_server import Hub
from layouts import encoded, load, noise, refused, write_folder, write_parquet

from mosaic_ray.config.schema import DataConfig
from mosaic_ray.core.errors import RequestError
from mosaic_ray.data import hub
from mosaic_ray.data.catalog import fetch_dataset

needs_client = pytest.mark.skipif(not importlib.util.find_spec("huggingface_hub"), reason="no huggingface_hub")
NAMES = ["cat", "dog", "elk", "fox"]


@pytest.fixture(autouse=True)
def _no_root_of_the_user(monkeypatch, tmp_path):
    monkeypatch.delenv("MOSAIC_DATA", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


@pytest.fixture
def server(monkeypatch):
    from huggingface_hub import constants

    with Hub() as found:
        monkeypatch.setattr(constants, "ENDPOINT", found.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        template = found.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield found
        found.shutdown()


def files_of(folder: Path, place: str = "data", **knobs) -> dict[str, bytes]:
    """Write a small data set to ``folder``, and return its files by their path in a repository."""
    write_folder(folder, names=NAMES, columns=("image", "label"), **knobs)
    return {f"{place}/{path.name}".lstrip("/"): path.read_bytes() for path in folder.iterdir()}


@needs_client
def test_images_are_those_of_the_files_and_only_these_are_asked_for(tmp_path, server):
    files = files_of(tmp_path / "own")
    server.publish("me/pics", files | {"README.md": b"", "pics.py": b"raise SystemExit", "data/extra-0.parquet": b""})
    data, own = load(tmp_path, "hf:me/pics"), load(tmp_path, f"parquet:{tmp_path}/own")
    assert np.array_equal(data.train.images, own.train.images) and data.class_names == tuple(NAMES)
    assert np.array_equal(data.test.labels, own.test.labels)
    assert data.identity == own.identity, "the content decides"
    assert sorted(server.asked) == sorted(["list main", *files])
    assert load(tmp_path, "hf:me/pics").identity == data.identity
    assert len(server.asked) == 1 + len(files), "what is there is not asked for again"
    [folder] = (tmp_path / "hub").iterdir()
    assert sorted(path.name for path in folder.iterdir()) == [
        "source.json", *(f"{part}.parquet" for part in
        ("test-00000-of-00001", "train-00000-of-00002", "train-00001-of-00002")),
    ]  # fmt: skip


@needs_client
def test_a_revision_stays_and_main_is_renewed_by_a_fetch(tmp_path, server):
    first = server.publish("me/pics", files_of(tmp_path / "one"))
    before = load(tmp_path, "hf:me/pics").identity
    server.publish("me/pics", files_of(tmp_path / "two", num_train=24))
    config = DataConfig(root=str(tmp_path))
    assert load(tmp_path, "hf:me/pics").identity == before
    assert "brought" in fetch_dataset("hf:me/pics", config)
    after = load(tmp_path, "hf:me/pics").identity
    assert after != before == load(tmp_path, f"hf:me/pics@{first}").identity
    assert "unchanged" in fetch_dataset("hf:me/pics", config)
    assert load(tmp_path, "hf:me/pics").identity == after


@needs_client
def test_validation_stands_in_for_test_and_a_line_says_it(tmp_path, server, capsys):
    files = {path.replace("test", "validation"): content for path, content in files_of(tmp_path / "own").items()}
    server.publish("me/pics", files)
    assert len(load(tmp_path, "hf:me/pics").test) == 4
    [line] = capsys.readouterr().err.splitlines()
    assert "hf:me/pics has no split test; the test images are those of validation" in line
    server.publish("me/train", {path: content for path, content in files.items() if "train" in path})
    assert "no parquet files of train and of test or validation" in refused(tmp_path, "hf:me/train@main")


@needs_client
def test_configurations_are_named(tmp_path, server):
    one, two = files_of(tmp_path / "one", "small"), files_of(tmp_path / "two", "large", num_train=24)
    server.publish("me/pics", one | two)
    message = refused(tmp_path, "hf:me/pics")
    assert "several configurations, large, small" in message and "hf:me/pics/large" in message
    assert len(load(tmp_path, "hf:me/pics/small").train) == 20
    assert len(load(tmp_path, "hf:me/pics/large").train) == 24
    assert "no configuration smal; did you mean" in refused(tmp_path, "hf:me/pics/smal")
    server.publish("me/more", one | {f"data/{path.partition('/')[2]}": content for path, content in two.items()})
    assert len(load(tmp_path, "hf:me/more").train) == 24, "files in data are of no configuration"


@needs_client
def test_without_parquet_files_the_hubs_own_conversion_is_taken(tmp_path, server, capsys):
    files = files_of(tmp_path / "own")
    split = {"train": [], "test": []}
    for path, content in sorted(files.items()):
        split["train" if "train" in path else "test"].append(content)
    converted = {f"default/{s}/{i:04}.parquet": c for s, found in split.items() for i, c in enumerate(found)}
    server.publish("me/pics", {"images.zip": b""})
    server.publish("me/pics", converted, hub.CONVERTED)
    assert len(load(tmp_path, "hf:me/pics").train) == 20
    assert "conversion" in capsys.readouterr().err
    assert len(load(tmp_path, "hf:me/pics@refs/convert/parquet").train) == 20


@needs_client
def test_a_download_that_breaks_off_leaves_nothing_half_and_goes_on(tmp_path, server, monkeypatch):
    files = files_of(tmp_path / "own")
    server.publish("me/pics", files)
    server.broken = {"data/train-00001-of-00002.parquet"}
    message = refused(tmp_path, "hf:me/pics")
    assert "data/train-00001-of-00002.parquet: " in message and "ask again" in message
    assert not (tmp_path / "hub" / "me--pics").exists()
    asked, server.broken = len(server.asked), set()
    assert len(load(tmp_path, "hf:me/pics").train) == 20
    assert "data/train-00000-of-00002.parquet" not in server.asked[asked:]
    assert [path.name for path in (tmp_path / "hub").iterdir()] == ["me--pics"]


@needs_client
@pytest.mark.parametrize(
    "path",
    [
        "../train-0.parquet",
        "/etc/train.parquet",
        "data/../../train-0.parquet",
        "a\nb/train.parquet",
        ".x/train.parquet",
    ],
)
def test_a_path_that_leads_elsewhere_is_refused(tmp_path, server, path):
    server.publish("me/pics", files_of(tmp_path / "own") | {path: b"PAR1"})
    before = {*tmp_path.rglob("*")}
    assert "no plain path" in refused(tmp_path, "hf:me/pics")
    assert {*tmp_path.rglob("*")} - before <= {tmp_path / "hub"}


@needs_client
def test_a_data_set_without_images_or_labels_is_refused_in_a_line(tmp_path, server):
    table = pa.table({"text": ["a", "b"], "label": [0, 1]})
    sink = pa.BufferOutputStream()
    pa.parquet.write_table(table, sink)
    content = sink.getvalue().to_pybytes()
    server.publish("me/text", {"train.parquet": content, "test.parquet": content})
    assert 'has no column "img" or "image" with bytes' in refused(tmp_path, "hf:me/text")
    picture = encoded(noise(8, 8, 3))
    write_parquet(tmp_path / "own" / "p.parquet", [picture] * 2, ["a", "b"], columns=("image", "caption"))
    content = (tmp_path / "own" / "p.parquet").read_bytes()
    server.publish("me/captions", {"train.parquet": content, "test.parquet": content})
    assert "data.label_column names another" in refused(tmp_path, "hf:me/captions")


@needs_client
def test_what_the_hub_does_not_have_is_refused_with_what_to_put_where(tmp_path, server, monkeypatch):
    from huggingface_hub import constants

    server.publish("me/pics", files_of(tmp_path / "own"))
    server.publish("me/gated", {})
    server.gated = {"me/gated"}
    assert "the Hub has no such data set" in refused(tmp_path, "hf:me/pisc")
    assert "no such revision" in refused(tmp_path, "hf:me/pics@v9")
    assert "on request" in refused(tmp_path, "hf:me/gated")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    message = refused(tmp_path, "hf:me/pics@v1")
    folder = tmp_path / "hub" / "me--pics@v1"
    assert "HF_HUB_OFFLINE is set; to go without the Hub, put its train*.parquet and test*.parquet" in message
    assert message.endswith(f"in {folder}")
    write_folder(folder)  # as it says
    assert len(load(tmp_path, "hf:me/pics@v1").train) == 20
    assert "unchanged" in fetch_dataset("hf:me/pics@v1", DataConfig(root=str(tmp_path))), "a user's own files stay"


@needs_client
def test_a_hub_that_is_not_reached_is_refused_in_a_line(tmp_path, server, monkeypatch):
    from huggingface_hub import constants

    server.publish("me/pics", files_of(tmp_path / "own"))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "put its train*.parquet and test*.parquet" in refused(tmp_path, "hf:me/pics")


@pytest.mark.parametrize("name", ["hf:", "hf:mnist", "hf:../x", "hf:a/b/../c", "hf:a/b@", "hf:a/b@../x", "hf:a--b/c"])
def test_names_of_another_form_are_refused(tmp_path, name):
    assert "hf:OWNER/NAME" in refused(tmp_path, name)


def test_without_the_client_a_line_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "pip install 'mosaic-ray[hf]'" in refused(tmp_path, "hf:me/pics")
    write_folder(tmp_path / "hub" / "me--pics")
    assert len(load(tmp_path, "hf:me/pics").train) == 20, "files that are there need none"


def test_names_have_folders_of_their_own():
    names = ["hf:a/b", "hf:a/b@main", "hf:a/b/c", "hf:a/b@c", "hf:a/b/c/d", "hf:a/b/c--d", "hf:a/b@c/d", "hf:a/b@c--d"]
    assert len({hub.parse(name).folder for name in names}) == len(names)
    assert all("/" not in hub.parse(name).folder for name in names)


def test_columns_are_found_by_their_type_or_named(tmp_path):
    pictures = [encoded(image) for image in noise(4, 8, 8, 3)]
    for part in ("train", "test"):
        path = tmp_path / "p" / f"{part}.parquet"
        write_parquet(path, pictures, [0, 1, 0, 1], columns=("photo", "letter"), names=["x", "y"])
    message = refused(tmp_path, "parquet:p")
    assert '"img" or "image"' in message and "data.image_column" in message
    data = load(tmp_path, "parquet:p", image_column="photo")
    assert data.class_names == ("x", "y"), "the one column that the metadata calls a ClassLabel"
    assert load(tmp_path, "parquet:p", image_column="photo", label_column="id").train.labels.tolist() == [0, 1, 2, 3]
    assert '"letter" with bytes' in refused(tmp_path, "parquet:p", image_column="letter")
    assert 'whole numbers "photo"' in refused(tmp_path, "parquet:p", image_column="photo", label_column="photo")


@needs_client
def test_the_command_line_reads_a_data_set_of_the_hub(tmp_path, server):
    server.publish("me/pics", files_of(tmp_path / "own"))
    words = ["--preset", "demo", "--clients", "2", "--json", "--set", f"data.root={tmp_path}"]
    paths = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"HF_ENDPOINT": server.url, "PYTHONPATH": paths}
    for name, status, says in (("pics", 0, '"client_sizes"'), ("nothing", 2, "the Hub has no such data set")):
        request = [sys.executable, "-m", "mosaic_ray", "partition", "--dataset", f"hf:me/{name}", *words]
        done = subprocess.run(request, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == status and says in done.stdout + done.stderr
        assert (done.stdout + done.stderr).count("\n") == 1


def test_other_data_sets_are_still_fetched_by_name(tmp_path):
    with pytest.raises(RequestError, match="no data set to fetch"):
        fetch_dataset("hfx", DataConfig(root=str(tmp_path)))
