"""Decoded copies: made once, checked when opened, made afresh when damaged or out of date, by one process at a time."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from layouts import load, refused, write_classes, write_folder

from mosaic_ray.config.schema import DataConfig
from mosaic_ray.data import image_cache, image_cache_build, image_decode
from mosaic_ray.data.catalog import clean


@pytest.fixture(autouse=True)
def _no_root_of_the_user(monkeypatch, tmp_path):
    monkeypatch.delenv("MOSAIC_DATA", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


@pytest.fixture
def decodings(monkeypatch) -> list[int]:
    """How many images each decoding has read."""
    counted = []
    genuine = image_decode.run

    def run(tasks):
        counted.append(sum(map(image_decode.count, tasks)))
        return genuine(tasks)

    monkeypatch.setattr(image_decode, "run", run)
    return counted


@pytest.fixture(params=["folder", "parquet"])
def name(request, tmp_path) -> str:
    if request.param == "folder":
        write_classes(tmp_path / "pictures")
    else:
        write_folder(tmp_path / "pictures")
    return f"{request.param}:pictures"


def only_copy(root: Path) -> Path:
    [kept] = (root / "decoded").iterdir()
    return kept


def test_images_are_decoded_once_for_each_size_and_the_arrays_may_be_written_to(tmp_path, name, decodings):
    first = load(tmp_path, name)
    again = load(tmp_path, name)
    assert len(decodings) == 1
    assert (again.identity, again.facts, again.class_names) == (first.identity, first.facts, first.class_names)
    again.train.images[:] = 0
    third = load(tmp_path, name)
    assert np.array_equal(third.train.images, first.train.images), "writing to the arrays leaves the file alone"
    small = load(tmp_path, name, image_size=16)
    assert load(tmp_path, name, image_size=16).identity == small.identity != first.identity
    assert len(decodings) == 2


def test_clean_removes_copies_that_nobody_read_for_a_while(tmp_path, name, decodings):
    load(tmp_path, name)
    config = DataConfig(root=str(tmp_path))
    os.utime(only_copy(tmp_path) / "facts.json", (0, 0))
    load(tmp_path, name)  # reads it, so it is young again
    assert clean(config, 3600) == [f"removed 0.0 MB in {tmp_path / 'decoded'}"]
    os.utime(only_copy(tmp_path) / "facts.json", (0, 0))
    [line, _] = clean(config, 3600, dry_run=True)
    assert line.startswith(f"would remove {only_copy(tmp_path).name}: ")
    assert len(clean(config, 3600)) == 2 and not list((tmp_path / "decoded").iterdir())
    assert len(decodings) == 1
    load(tmp_path, name)
    assert len(decodings) == 2
    assert clean(DataConfig(root=str(tmp_path / "absent")), 0) == [f"{tmp_path}/absent/decoded: no decoded copies"]


def test_an_identity_is_that_of_the_images_wherever_they_lie(tmp_path):
    for place in ("a", "b", "c"):
        write_classes(tmp_path / place)
    path = tmp_path / "c" / "train" / "ant" / "000.png"
    path.write_bytes((tmp_path / "c" / "train" / "ant" / "001.png").read_bytes())
    found = [load(tmp_path, f"folder:{place}").identity for place in ("a", "b", "c")]
    assert found[0] == found[1] != found[2]


def damages():
    return {
        "cut": lambda content: content[:-9],
        "empty": lambda content: b"",
        "head": lambda content: b"\x93NUMPY" + content[6:40],
        "last byte": lambda content: content[:-1] + bytes([content[-1] ^ 1]),
        "middle": lambda content: content[:200] + bytes([content[200] ^ 4]) + content[201:],
    }


@pytest.mark.parametrize("file", ["train_images.npy", "test_images.npy", "train_labels.npy", "facts.json"])
@pytest.mark.parametrize("damage", damages())
def test_a_damaged_copy_is_decoded_afresh(tmp_path, decodings, capsys, file, damage):
    write_classes(tmp_path / "pictures")
    first = load(tmp_path, "folder:pictures")
    path = only_copy(tmp_path) / file
    before = path.read_bytes()
    path.write_bytes(damages()[damage](before))
    assert load(tmp_path, "folder:pictures").identity == first.identity
    assert len(decodings) == 2, "the old copy is not used"
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and str(path) in message and "afresh" in message
    assert load(tmp_path, "folder:pictures").identity == first.identity
    assert len(decodings) == 2, "and kept again"
    assert file == "facts.json" or path.read_bytes() == before


def test_a_missing_file_counts_as_damage(tmp_path, decodings):
    write_classes(tmp_path / "pictures")
    load(tmp_path, "folder:pictures")
    for file in ("test_labels.npy", "facts.json"):
        (only_copy(tmp_path) / file).unlink()
        load(tmp_path, "folder:pictures")
    assert len(decodings) == 3


def test_large_copies_are_looked_at_in_parts_but_whole_when_their_times_differ(tmp_path, monkeypatch, decodings):
    monkeypatch.setattr(image_decode, "BLOCK_BYTES", 2 * 192)  # two images of 8x8
    monkeypatch.setattr(image_cache, "SPOT_BYTES", 2 * 192)
    write_classes(tmp_path / "pictures", train=20, test=1)
    load(tmp_path, "folder:pictures")
    path = only_copy(tmp_path) / "train_images.npy"
    hashed = []
    genuine = image_cache.zlib.crc32
    monkeypatch.setattr(
        image_cache.zlib, "crc32", lambda content, *rest: hashed.append(content) or genuine(content, *rest)
    )

    def blocks_read() -> int:
        """How many of the 20 blocks of training images an opening hashes."""
        hashed.clear()
        load(tmp_path, "folder:pictures")
        of_test = 1
        return sum(getattr(content, "shape", None) == (2, 3, 8, 8) for content in hashed) - of_test

    assert blocks_read() == 1
    shutil.copy(path, path.with_suffix(".other"))  # the same bytes, written at another time
    path.with_suffix(".other").replace(path)
    assert blocks_read() == 20
    assert blocks_read() == 1, "its new time is known"
    content = path.read_bytes()
    path.write_bytes(content[:700] + bytes([content[700] ^ 1]) + content[701:])
    load(tmp_path, "folder:pictures")
    assert len(decodings) == 2


def test_parts_that_are_looked_at_change_so_damage_under_an_old_time_is_found_in_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(image_decode, "BLOCK_BYTES", 192)
    monkeypatch.setattr(image_cache, "SPOT_BYTES", 4 * 192)
    write_classes(tmp_path / "pictures", train=8)
    first = load(tmp_path, "folder:pictures")
    path = only_copy(tmp_path) / "train_images.npy"
    stat, content = path.stat(), path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    for microseconds in range(4):
        monkeypatch.setattr(image_cache.time, "time_ns", lambda now=microseconds: 1000 * now)
        data = load(tmp_path, "folder:pictures")
    assert data.identity == first.identity
    assert path.read_bytes() == content


# ---------------------------------------------------------------- images that change


@pytest.mark.parametrize("few", [True, False])
def test_a_copy_follows_its_folder(tmp_path, monkeypatch, decodings, few):
    monkeypatch.setattr(image_cache, "EACH", 1000 if few else 0)
    write_classes(tmp_path / "f")
    seen = {load(tmp_path, "folder:f").identity}
    ant = tmp_path / "f" / "train" / "ant"
    (ant / "new.png").write_bytes((ant / "000.png").read_bytes())
    seen.add(load(tmp_path, "folder:f").identity)
    (ant / "001.png").unlink()
    seen.add(load(tmp_path, "folder:f").identity)
    shutil.copytree(tmp_path / "f" / "train" / "bee", tmp_path / "f" / "train" / "cat")
    seen.add(load(tmp_path, "folder:f").identity)
    assert len(seen) == len(decodings) == 4
    with open(ant / "000.png", "r+b") as file:  # in place: only the file's own time changes
        file.write((ant / "002.png").read_bytes())
        file.truncate()
    assert (load(tmp_path, "folder:f").identity in seen) is not few
    assert len([*(tmp_path / "decoded").iterdir()]) == 1, "copies that are out of date do not pile up"


# ---------------------------------------------------------------- images that do not decode


def test_bad_images_are_left_out_and_counted_where_that_is_asked_for(tmp_path, capsys, decodings, monkeypatch):
    monkeypatch.setattr(image_decode, "BLOCK_BYTES", 3 * 192)
    images = write_classes(tmp_path / "f", train=10)
    bad = [tmp_path / "f" / "train" / place for place in ("ant/000.png", "ant/004.png", "bee/009.png")]
    for path in bad:
        path.write_bytes(path.read_bytes()[:50])
    refused(tmp_path, "folder:f")
    assert not [*(tmp_path / "decoded").iterdir()], "no unfinished copy is left"
    kept = [row for row in range(20) if row not in (0, 4, 19)]
    for _ in range(2):
        data = load(tmp_path, "folder:f", skip_bad=True)
        message = capsys.readouterr().err
        assert message.count("\n") == 1 and "3 of 24 images" in message and all(str(path) in message for path in bad)
        assert np.array_equal(data.train.images, images[kept])
        assert data.train.labels.tolist() == [row // 10 for row in kept]
        assert len(data.test) == 4
    assert data.facts.mean == pytest.approx(images[kept].mean(axis=(0, 2, 3)) / 255, abs=5.1e-5)
    assert decodings == [24, 24]
    assert "and 2 others" in refused(tmp_path, "folder:f")
    (tmp_path / "f" / "train" / "ant" / "001.png").write_text("")
    load(tmp_path, "folder:f", skip_bad=True)
    assert "4 of 24" in (message := capsys.readouterr().err) and message.rstrip().endswith(", ...")


def test_a_class_of_which_nothing_decodes_is_refused_even_then(tmp_path):
    write_classes(tmp_path / "f")
    for path in (tmp_path / "f" / "train" / "bee").iterdir():
        path.write_text("")
    assert "one class, ant" in refused(tmp_path, "folder:f", skip_bad=True)


def test_bad_rows_of_parquet_are_left_out(tmp_path, capsys):
    from layouts import encoded, noise, write_parquet

    images = noise(6, 8, 8, 3)
    contents = [encoded(image) for image in images]
    for split in ("train", "test"):
        write_parquet(tmp_path / "p" / f"{split}.parquet", [contents[0], b"x", *contents[2:]], [0, 1, 0, 1, 0, 1])
    data = load(tmp_path, "parquet:p", skip_bad=True)
    assert np.array_equal(data.train.images, images[[0, 2, 3, 4, 5]].transpose(0, 3, 1, 2))
    assert data.train.labels.tolist() == [0, 0, 1, 0, 1]
    assert f"{tmp_path}/p/train.parquet: image 1" in capsys.readouterr().err


# ---------------------------------------------------------------- several at once, and where nothing can be kept

LOAD = """
import sys
from mosaic_ray.data import image_decode
from mosaic_ray.data.load import load_dataset
from mosaic_ray.config.schema import DataConfig
count, genuine = [], image_decode.run
image_decode.run = lambda tasks: count.append(1) or genuine(tasks)
sys.stdin.readline()
data = load_dataset(DataConfig(name="folder:f", root=sys.argv[1]))
print(len(count), data.identity, data.train.images.sum())
"""


def test_of_processes_that_miss_the_same_copy_one_decodes_and_the_others_wait(tmp_path):
    write_classes(tmp_path / "f", train=100)
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    processes = [subprocess.Popen([sys.executable, "-c", LOAD, str(tmp_path)], text=True, **pipes) for _ in range(3)]
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    answers = [process.communicate() for process in processes]
    assert all(process.returncode == 0 for process in processes), answers
    counts, identities, sums = zip(*(out.split() for out, _ in answers), strict=True)
    assert sorted(counts) == ["0", "0", "1"]
    assert len({*identities}) == len({*sums}) == 1
    assert {line for _, err in answers for line in err.splitlines()} <= {
        f"mosaic: warning: another process is at work in {tmp_path / 'decoded'}; waiting for it"
    }
    assert only_copy(tmp_path)


def test_without_locks_two_makers_do_no_harm(tmp_path, monkeypatch):
    write_classes(tmp_path / "f")
    others = []
    genuine = image_cache_build.build_cache

    def make(*arguments):
        made = genuine(*arguments)
        monkeypatch.setattr(image_cache_build, "build_cache", genuine)
        others.append(load(tmp_path, "folder:f"))  # meanwhile another process has made the same
        return made

    def no_locks(*arguments):
        raise OSError("no locks here")

    monkeypatch.setattr("fcntl.flock", no_locks)
    monkeypatch.setattr(image_cache_build, "build_cache", make)
    data = load(tmp_path, "folder:f")
    assert data.identity == others[0].identity
    assert np.array_equal(data.train.images, others[0].train.images)
    assert only_copy(tmp_path)


def test_what_a_killed_process_left_is_removed_by_the_next_one(tmp_path):
    write_classes(tmp_path / "f")
    left = tmp_path / "decoded" / ".unfinished-abc" / "copy"
    left.mkdir(parents=True)
    (left / "train_images.npy").write_bytes(b"\0" * 100)
    load(tmp_path, "folder:f")
    assert "unfinished" not in only_copy(tmp_path).name


def test_where_nothing_can_be_kept_the_images_are_decoded_each_time(tmp_path, decodings, capsys):
    images = write_classes(tmp_path / "f")
    (tmp_path / "file").write_text("not a folder")
    (tmp_path / "shared").mkdir(mode=0o555)
    for _ in range(2):
        for root in ("file", "shared"):
            data = load(tmp_path / root, f"folder:{tmp_path}/f")
            assert np.array_equal(data.train.images, images)
            assert f"{tmp_path / root} cannot be written to" in capsys.readouterr().err
    assert len(decodings) == 4
    assert not [*(tmp_path / "shared").iterdir()]


def test_a_full_disk_is_reported_and_nothing_is_left(tmp_path, monkeypatch):
    write_classes(tmp_path / "f")

    def full(tasks):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(image_decode, "run", full)
    message = refused(tmp_path, "folder:f")
    assert "No space left on device" in message and str(tmp_path / "decoded") in message
    assert not [*(tmp_path / "decoded").iterdir()]


def test_facts_are_plain(tmp_path):
    write_classes(tmp_path / "f")
    load(tmp_path, "folder:f")
    facts = json.loads((only_copy(tmp_path) / "facts.json").read_text())["facts"]
    assert facts["class_names"] == ["ant", "bee"]
    assert facts["parts"]["train_images"]["shape"] == [12, 3, 8, 8]
