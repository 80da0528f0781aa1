"""CIFAR's pickles: they are read as written, with every protocol, and nothing in them runs."""

from __future__ import annotations

import os
import pickle

import numpy as np
import pytest
from layouts import (
    load,
    noise,
    refused,
    write_cifar10,
    write_cifar100,
)


@pytest.fixture(autouse=True)
def _no_root_of_the_user(monkeypatch, tmp_path):
    monkeypatch.delenv("MOSAIC_DATA", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


@pytest.mark.parametrize("protocol", range(6))
def test_cifar10_batches_are_read_as_written_under_every_protocol(tmp_path, protocol):
    written = write_cifar10(tmp_path, protocol)
    data = load(tmp_path, "cifar10")
    wanted = np.concatenate([written[f"data_batch_{n}"][0] for n in range(1, 6)]).reshape(-1, 3, 32, 32)
    assert np.array_equal(data.train.images, wanted)
    assert data.train.labels.tolist() == [label for n in range(1, 6) for label in written[f"data_batch_{n}"][1]]
    assert np.array_equal(data.test.images.reshape(20, -1), written["test_batch"][0])
    assert data.class_names[3] == "word 3"
    assert data.facts.mean == (0.4914, 0.4822, 0.4465)
    assert data.facts.std == (0.2023, 0.1994, 0.2010)


def test_cifar100_takes_fine_labels(tmp_path):
    images = write_cifar100(tmp_path)
    data = load(tmp_path, "cifar100")
    assert np.array_equal(data.train.images.reshape(200, -1), images)
    assert data.test.labels.tolist() == list(range(100))
    assert data.facts.num_classes == 100
    assert data.class_names[7] == "fine 7"


def test_a_pickle_as_python_2_wrote_it_is_read(tmp_path):
    write_cifar10(tmp_path)
    pixels = noise(1, 3072)
    content = (
        b"\x80\x02}q\x01(U\x04datacnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85U\x01btR"
        b"(K\x01K\x01M\x00\x0c\x86cnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        b"\x89T" + np.array(pixels.size, "<i4").tobytes() + pixels.tobytes() + b"tbU\x06labels]K\x07au."
    )
    (tmp_path / "cifar-10-batches-py" / "test_batch").write_bytes(content)
    data = load(tmp_path, "cifar10")
    assert np.array_equal(data.test.images.reshape(1, -1), pixels)
    assert data.test.labels.tolist() == [7]


def test_labels_may_be_arrays_or_numpy_numbers_and_the_meta_file_may_be_missing(tmp_path):
    written = write_cifar10(tmp_path)
    folder = tmp_path / "cifar-10-batches-py"
    (folder / "batches.meta").unlink()
    pixels, labels = written["test_batch"]
    for kind in (np.array(labels), np.array(labels, ">i2"), list(np.array(labels))):
        (folder / "test_batch").write_bytes(pickle.dumps({"data": np.asfortranarray(pixels), "labels": kind}, 2))
        data = load(tmp_path, "cifar10")
        assert np.array_equal(data.test.images.reshape(20, -1), pixels)
        assert data.test.labels.tolist() == labels
    assert data.class_names == tuple("0123456789")


class Harmful:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("function", [os.mkdir, eval, np.load, getattr])
def test_nothing_in_a_pickle_runs(tmp_path, function, protocol):
    write_cifar10(tmp_path)
    trace = tmp_path / "ran"
    argument = f"__import__('os').mkdir({str(trace)!r})" if function is eval else str(trace)
    file = tmp_path / "cifar-10-batches-py" / "test_batch"
    file.write_bytes(pickle.dumps({"data": Harmful(function, argument), "labels": [0]}, protocol))
    message = refused(tmp_path, "cifar10")
    assert str(file) in message
    assert "has no place" in message
    assert not trace.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not a pickle",
        pickle.dumps([1, 2]),
        pickle.dumps({"labels": [0]}),
        pickle.dumps({"data": noise(2, 3072), "labels": [0]}),
        pickle.dumps({"data": noise(2, 3071), "labels": [0, 1]}),
        pickle.dumps({"data": noise(2, 3072), "labels": [0, 10]}),
        pickle.dumps({"data": noise(2, 3072), "labels": ["a", "b"]}),
        pickle.dumps({"data": noise(2, 3072).astype(float), "labels": [0, 1]}),
        pickle.dumps({"data": noise(2, 3072).astype(object), "labels": [0, 1]}),
        pickle.dumps({"data": noise(2, 3072), "labels": [0, 1]})[:-40],
        pickle.dumps({"data": noise(2, 3072), "labels": [0, 1]}, 2)[:3000],
    ],
)
def test_damaged_cifar_batches_are_named(tmp_path, content):
    write_cifar10(tmp_path)
    file = tmp_path / "cifar-10-batches-py" / "data_batch_3"
    file.write_bytes(content)
    assert str(file) in refused(tmp_path, "cifar10")
