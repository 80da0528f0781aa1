"""Write small data sets in their true layouts, load them, and check refusals."""

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
from scipy.io import savemat

from mosaic_ray.config.schema import DataConfig
from mosaic_ray.core.errors import RequestError
from mosaic_ray.data.load import load_dataset


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


def write_svhn(root: Path, counts: tuple[int, int] = (40, 20)) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Write images [n, 3, 32, 32] and labels 1..10 in MATLAB's files of X [32, 32, 3, n] and y [n, 1]."""
    root.mkdir(parents=True, exist_ok=True)
    written = {}
    for split, number in zip(("train", "test"), counts, strict=True):
        written[split] = noise(number, 3, 32, 32, seed=number), np.arange(number) % 10 + 1
        images, labels = written[split]
        content = {"X": images.transpose(2, 3, 1, 0), "y": labels[:, None].astype(np.uint8)}
        savemat(root / f"{split}_32x32.mat", content, do_compression=True)
    return written


def picture(height: int, width: int, seed: int = 0, channels: int = 3) -> np.ndarray:
    """Return uint8 [H, W, C]: a smooth image, which a JPEG keeps to a few levels."""
    forms = Image.fromarray(noise(4, 4, 3, seed=seed)).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(forms if channels == 3 else forms.convert("L"))


def write_tiny(root: Path, classes: int = 3, each: int = 4) -> list[str]:
    """Write Tiny-ImageNet's layout; return the wnids in the order of ``wnids.txt``, which is not sorted."""
    base = root / "tiny-imagenet-200"
    wnids = [f"n{number:08}" for number in range(classes)][::-1]
    for number, wnid in enumerate(wnids):
        folder = base / "train" / wnid / "images"
        folder.mkdir(parents=True)
        for index in range(each):
            image = picture(64, 64, seed=100 * number + index, channels=1 if index == 1 else 3)
            (folder / f"{wnid}_{index}.JPEG").write_bytes(encoded(image.squeeze(), "JPEG"))
        (folder.parent / f"{wnid}_boxes.txt").write_text(f"{wnid}_0.JPEG\t0\t0\t63\t63\n")
    (base / "val" / "images").mkdir(parents=True)
    lines = []
    for index in range(2 * classes):
        content = encoded(picture(64, 64, seed=1000 + index), "JPEG")
        (base / "val" / "images" / f"val_{index}.JPEG").write_bytes(content)
        lines.append(f"val_{index}.JPEG\t{wnids[index % classes]}\t0\t32\t44\t62\n")
    (base / "val" / "val_annotations.txt").write_text("".join(lines))
    (base / "wnids.txt").write_text("\n".join(wnids) + "\n")
    (base / "words.txt").write_text("".join(f"{wnid}\tword {wnid[-1]}, synonym\n" for wnid in [*wnids, "n99999999"]))
    return wnids


FOOD = ("apple_pie", "waffles")
FOOD_SIZES = ((384, 512), (512, 306), (100, 80), (64, 64))


def write_food(root: Path, kind: str = "json") -> None:
    """Write Food-101's layout: photographs of several sizes, four a class for training and two for the test."""
    meta = root / "food-101" / "meta"
    meta.mkdir(parents=True)
    (meta / "classes.txt").write_text("\n".join(FOOD))
    rows: dict[str, dict[str, list[str]]] = {"train": {}, "test": {}}
    for number, name in enumerate(reversed(FOOD)):
        folder = root / "food-101" / "images" / name
        folder.mkdir(parents=True)
        for index in range(6):
            content = encoded(picture(*FOOD_SIZES[index % 4], seed=10 * number + index), "JPEG")
            (folder / f"{1000 - index}.jpg").write_bytes(content)
            rows["train" if index < 4 else "test"].setdefault(name, []).append(f"{name}/{1000 - index}")
    for split, by_class in rows.items():
        lines = [row for found in by_class.values() for row in found]
        (meta / f"{split}.{kind}").write_text(json.dumps(by_class) if kind == "json" else "\n".join(lines) + "\n")


def write_classes(
    folder: Path, names: tuple[str, ...] = ("ant", "bee"), train: int = 6, test: int = 2, size: int = 8
) -> np.ndarray:
    """Write ImageFolder's layout, as PNG; return the training images uint8 [N, 3, size, size], class by class."""
    images = noise(len(names) * (train + test), size, size, 3)
    for number, name in enumerate(names):
        for split, start, count in (("train", 0, train), ("test", train, test)):
            place = folder / split / name
            place.mkdir(parents=True)
            for index in range(count):
                image = images[number * (train + test) + start + index]
                (place / f"{index:03}.png").write_bytes(encoded(image))
    kept = images.reshape(len(names), train + test, size, size, 3)[:, :train]
    return kept.reshape(-1, size, size, 3).transpose(0, 3, 1, 2)


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


def write_mfeat(root: Path, train: int = 40, test: int = 20, views: dict[str, int] | None = None) -> None:
    """Write the layout of Multiple Features: a column for each view, and ten classes in turn."""
    sizes = {"pix": 240, "fou": 76, "fac": 216, "kar": 64, "zer": 47, "mor": 6} | (views or {})
    (root / "mfeat").mkdir(parents=True)
    for split, count in (("train", train), ("test", test)):
        draws = np.random.default_rng(count)
        table = {"label": np.arange(count) % 10}
        table |= {name: [*draws.normal(3, 2, (count, size)).astype(np.float32)] for name, size in sizes.items()}
        pq.write_table(pa.table(table), root / "mfeat" / f"{split}-00000.parquet")
