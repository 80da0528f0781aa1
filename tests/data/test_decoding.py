"""Decoding over several processes: the same arrays as in one, and an end to everything when one of them fails."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
from layouts import encoded, load, noise, refused, write_classes, write_parquet

from mosaic_ray.data import image_decode
from mosaic_ray.data.progress import bar


@pytest.fixture
def workers(monkeypatch) -> list[subprocess.Popen]:
    """Use two decoding processes for any number of images, three images a task; return the started ones."""
    started = []
    genuine = image_decode._process
    monkeypatch.setattr("mosaic_ray.data.image_sources._TASK", 3)
    monkeypatch.setattr(image_decode, "_FEW", 0)
    monkeypatch.setattr(image_decode, "num_cpus", lambda: 2)
    monkeypatch.setattr(image_decode, "_process", lambda: started.append(genuine()) or started[-1])
    return started


def ended(processes: list[subprocess.Popen]) -> bool:
    return bool(processes) and all(process.poll() is not None for process in processes)


def test_several_processes_make_what_one_makes(tmp_path, workers):
    images = write_classes(tmp_path / "f", train=20)
    data = load(tmp_path / "here", f"folder:{tmp_path}/f")
    assert len(workers) == 2 and ended(workers)
    assert np.array_equal(data.train.images, images)
    assert data.train.labels.tolist() == [row // 20 for row in range(40)]
    assert data.facts.mean == pytest.approx(images.mean(axis=(0, 2, 3)) / 255, abs=5.1e-5)


def test_row_groups_of_any_size_are_read_in_order(tmp_path, workers):
    images = noise(22, 8, 8, 3)
    for split in ("train", "test"):
        path = tmp_path / "p" / f"{split}.parquet"
        write_parquet(path, [encoded(image) for image in images], [row % 3 for row in range(22)])
        pq.write_table(pq.read_table(path), path, row_group_size=8)
    data = load(tmp_path, "parquet:p")
    assert len(workers) == 2
    assert np.array_equal(data.train.images, images.transpose(0, 3, 1, 2))
    assert np.array_equal(data.test.images, data.train.images)


def test_bad_images_are_named_in_the_order_of_the_files(tmp_path, workers):
    write_classes(tmp_path / "f", train=20)
    for number in (17, 5, 11):
        (tmp_path / "f" / "train" / "bee" / f"{number:03}.png").write_text("")
    message = refused(tmp_path, "folder:f")
    assert "bee/005.png does not decode" in message and "and 2 others" in message
    assert ended(workers)
    (tmp_path / "f" / "train" / "ant" / "007.png").write_bytes(encoded(noise(9, 8, 3)))
    assert "ant/007.png is 9x8" in refused(tmp_path, "folder:f")
    assert ended(workers)


def test_damage_inside_a_parquet_file_is_reported_by_the_process_that_finds_it(tmp_path, workers):
    images = [encoded(image) for image in noise(30, 16, 16, 3)]
    for split in ("train", "test"):
        write_parquet(tmp_path / "p" / f"{split}.parquet", images, [row % 2 for row in range(30)])
    file = tmp_path / "p" / "train.parquet"
    with pq.ParquetFile(file) as opened:
        columns = (opened.metadata.row_group(0).column(number) for number in range(opened.metadata.num_columns))
        begin = next(c.dictionary_page_offset for c in columns if c.path_in_schema == "img.bytes")
    content = bytearray(file.read_bytes())
    content[begin : begin + 36] = b"\xff" * 36  # the head of the first page of images
    file.write_bytes(content)
    for knobs in ({}, {"image_size": 16, "channels": 3}):  # by this process, which looks at the first image, or others
        assert f"{file} cannot be read as parquet" in refused(tmp_path, "parquet:p", **knobs)
    assert ended(workers)


def test_a_process_that_dies_is_reported_with_its_images(tmp_path, workers, monkeypatch):
    write_classes(tmp_path / "f", train=20)
    genuine = image_decode._process

    def one_that_dies():
        process = genuine()
        os.kill(process.pid, signal.SIGKILL)
        return process

    monkeypatch.setattr(image_decode, "_process", one_that_dies)
    message = refused(tmp_path, "folder:f")
    assert "ant/000.png to " in message and "-9" in message
    assert ended(workers)
    assert not [*(tmp_path / "decoded").iterdir()]


def test_disk_errors_are_not_reported_as_images_that_do_not_decode(tmp_path, workers):
    write_classes(tmp_path / "f")
    tasks = [
        {
            "files": [str(path)],
            "target": str(tmp_path),  # a folder
            "offset": 0,
            "first": 0,
            "shape": [3, 8, 8],
            "square": False,
            "tally": False,
        }
        for path in sorted((tmp_path / "f").rglob("*.png"))[:2]
    ]
    with pytest.raises(IsADirectoryError):
        list(image_decode.run(tasks))
    assert ended(workers)


def test_a_decoding_process_ends_with_its_input_and_not_with_an_interrupt_of_the_terminal(tmp_path):
    process = image_decode._process()
    assert os.getsid(process.pid) == process.pid
    process.stdin.close()
    assert process.wait(timeout=60) == 0
    process.stdout.close()


def test_a_program_without_a_main_guard_can_decode(tmp_path):
    write_classes(tmp_path / "f", train=300)
    program = tmp_path / "program.py"
    program.write_text(
        "from mosaic_ray.data import image_decode\n"
        "from mosaic_ray.data.load import load_dataset\n"
        "from mosaic_ray.config.schema import DataConfig\n"
        "image_decode.num_cpus = lambda: 2\n"
        f"print(load_dataset(DataConfig(name='folder:f', root={str(tmp_path)!r})).train.images.shape)\n"
    )
    result = subprocess.run([sys.executable, program], capture_output=True, text=True)
    assert result.stdout == "(600, 3, 8, 8)\n", result.stderr
    assert result.stderr == ""


def test_a_task_travels_as_json(tmp_path):
    write_classes(tmp_path / "f")
    paths = sorted(map(str, (tmp_path / "f" / "train" / "ant").iterdir()))
    task = {"files": paths, "target": str(tmp_path / "array"), "offset": 0, "first": 2, "shape": [1, 4, 4]}
    (tmp_path / "array").touch()
    answer = image_decode.work(json.loads(json.dumps(task | {"square": True, "tally": True})))
    [[good, _, [[count, total, squares]]]] = answer["blocks"]
    array = np.fromfile(tmp_path / "array", np.uint8)[2 * 16 :].astype(int)
    assert (good, count, total, squares) == (6, 96, array.sum(), (array**2).sum())
    assert answer["coloured"] and not answer["bad"]


@pytest.mark.parametrize("kind", ["EPS", "TIFF"])
def test_pillow_is_held_to_the_formats_that_are_named(tmp_path, kind):
    write_classes(tmp_path / "f")
    (tmp_path / "f" / "train" / "ant" / "000.png").write_bytes(encoded(noise(8, 8, 3), kind))
    assert "000.png does not decode" in refused(tmp_path, "folder:f")


def test_progress_is_a_bar_on_a_terminal_and_nothing_elsewhere(tty, monkeypatch, capsys):
    with bar("decoding", 10) as advance:
        advance(5)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(sys, "stderr", tty)
    with bar("decoding [x]", 10) as advance:
        advance(5)
    assert "decoding [x]" in tty.getvalue() and "/10" in tty.getvalue()
    with bar("fetching", 4_000_000, done=1_000_000, size=True) as advance:
        advance(1_000_000)
    assert "MB" in tty.getvalue()


@pytest.mark.parametrize("kind", ["folder", "parquet"])
@pytest.mark.parametrize("device", ["pipe", "link to a pipe", "/dev/zero"])
def test_a_pipe_or_a_device_among_the_images_is_refused_at_once(tmp_path, kind, device):
    write_classes(tmp_path / "p")
    for split in ("train", "test"):
        write_parquet(tmp_path / "p" / f"{split}.parquet", [encoded(noise(8, 8, 3))] * 2, [0, 1])
    path = tmp_path / "p" / ("train/ant/000.png" if kind == "folder" else "train.parquet")
    path.unlink(missing_ok=True)
    if device == "pipe":
        os.mkfifo(path)
    elif device == "/dev/zero":
        path.symlink_to(device)
    else:
        os.mkfifo(tmp_path / "pipe")
        path.symlink_to(tmp_path / "pipe")
    line = refused(tmp_path, f"{kind}:p")
    assert path.name in line and ("pipe" in line or "device" in line)
