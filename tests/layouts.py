"""Data sets written small in their true layouts, loaded, and refused."""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mosaic_ray.config import DataConfig
from mosaic_ray.data.datasets import load_dataset
from mosaic_ray.errors import RequestError


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def load(root: Path, name: str, **knobs):
    return load_dataset(DataConfig(name=name, root=str(root), **knobs))


def refused(root: Path, name: str, **knobs) -> str:
    with pytest.raises(RequestError) as caught:
        load(root, name, **knobs)
    message = str(caught.value)
    assert "\n" not in message
    return message


def write_idx(path: Path, array: np.ndarray) -> None:
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    path.write_bytes(header + array.tobytes())


def write_mnist(root: Path, folder: str = "MNIST", num_train: int = 30, num_test: int = 12):
    raw = root / folder / "raw"
    raw.mkdir(parents=True)
    written = {}
    for split, count in (("train", num_train), ("t10k", num_test)):
        written[split] = noise(count, 28, 28, seed=count), (np.arange(count) % 10).astype(np.uint8)
        write_idx(raw / f"{split}-images-idx3-ubyte", written[split][0])
        write_idx(raw / f"{split}-labels-idx1-ubyte", written[split][1])
    return written


def write_cifar10(root: Path, protocol: int = 4) -> dict[str, tuple[np.ndarray, list[int]]]:
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    written = {}
    for number, name in enumerate([*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]):
        data, labels = noise(20, 3072, seed=number), [(number + i) % 10 for i in range(20)]
        written[name] = data, labels
        batch = {"batch_label": name, "labels": labels, "data": data, "filenames": ["a.png"] * 20}
        (folder / name).write_bytes(pickle.dumps(batch, protocol))
    words = {"label_names": [f"word {c}" for c in range(10)], "num_vis": 3072}
    (folder / "batches.meta").write_bytes(pickle.dumps(words, protocol))
    return written


def write_cifar100(root: Path) -> np.ndarray:
    folder = root / "cifar-100-python"
    folder.mkdir(parents=True)
    data = noise(200, 3072)
    for name, part in (("train", data), ("test", data[:100])):
        fine = np.arange(len(part)) % 100
        batch = {"data": part, "fine_labels": fine.tolist(), "coarse_labels": (fine // 5).tolist()}
        (folder / name).write_bytes(pickle.dumps(batch))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": [f"fine {c}" for c in range(100)]}))
    return data


def encoded(array: np.ndarray, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, kind)
    return buffer.getvalue()


def write_parquet(path: Path, images: list[bytes | None], labels, columns=("img", "label"), names=None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    column = pa.array([{"bytes": content, "path": None} for content in images], kind)
    table = pa.table({"id": pa.array(range(len(images))), columns[0]: column, columns[1]: pa.array(labels)})
    if names:
        features = {"info": {"features": {columns[1]: {"names": names, "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
    pq.write_table(table, path)


def write_folder(folder: Path, size: int = 8, num_train: int = 20, **knobs) -> np.ndarray:
    images = noise(num_train, size, size, 3)
    contents, labels = [encoded(image) for image in images], [i % 4 for i in range(num_train)]
    half = num_train // 2
    write_parquet(folder / "train-00000-of-00002.parquet", contents[:half], labels[:half], **knobs)
    write_parquet(folder / "train-00001-of-00002.parquet", contents[half:], labels[half:], **knobs)
    write_parquet(folder / "test-00000-of-00001.parquet", contents[:4], labels[:4], **knobs)
    return images.transpose(0, 3, 1, 2)
