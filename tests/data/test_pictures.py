"""Data sets of encoded images: true layouts written small, read in order, refused in one line."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from layouts import (
    FOOD,
    encoded,
    load,
    noise,
    picture,
    refused,
    write_classes,
    write_food,
    write_tiny,
)
from PIL import Image, ImageOps


@pytest.fixture(autouse=True)
def _no_root_of_the_user(monkeypatch, tmp_path):
    monkeypatch.delenv("MOSAIC_DATA", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def drawn(path, mode: str = "RGB") -> np.ndarray:
    """uint8 [C, H, W], by Pillow alone."""
    array = np.asarray(Image.open(path).convert(mode))
    return array[None] if mode == "L" else array.transpose(2, 0, 1)


def cut(path, size: int) -> np.ndarray:
    """The middle of the whole image, resized: uint8 [3, size, size]."""
    image = ImageOps.fit(Image.open(path).convert("RGB"), (size, size), Image.Resampling.BILINEAR)
    return np.asarray(image).transpose(2, 0, 1)


# ---------------------------------------------------------------- Tiny-ImageNet


@pytest.mark.parametrize("channels, mode", [(0, "RGB"), (3, "RGB"), (1, "L")])
def test_tiny_imagenet_is_read_as_pillow_reads_it_in_the_order_of_wnids(tmp_path, channels, mode):
    wnids = sorted(write_tiny(tmp_path))
    base = tmp_path / "tiny-imagenet-200"
    data = load(tmp_path, "tiny_imagenet", channels=channels)
    paths = [base / "train" / wnid / "images" / f"{wnid}_{index}.JPEG" for wnid in wnids for index in range(4)]
    assert np.array_equal(data.train.images, np.stack([drawn(path, mode) for path in paths]))
    assert data.train.labels.tolist() == [label for label in range(3) for _ in range(4)]
    tests = [drawn(base / "val" / "images" / f"val_{index}.JPEG", mode) for index in range(6)]
    assert np.array_equal(data.test.images, np.stack(tests))
    assert data.test.labels.tolist() == [2, 1, 0, 2, 1, 0], "wnids.txt is in the opposite order"
    assert data.class_names == ("word 0", "word 1", "word 2")


def test_tiny_imagenet_does_without_words(tmp_path):
    wnids = write_tiny(tmp_path)
    (tmp_path / "tiny-imagenet-200" / "words.txt").unlink()
    assert load(tmp_path, "tiny_imagenet").class_names == tuple(sorted(wnids))


def test_damaged_tiny_imagenet_is_named(tmp_path):
    wnid = write_tiny(tmp_path)[0]
    base = tmp_path / "tiny-imagenet-200"
    annotations = base / "val" / "val_annotations.txt"
    lines = annotations.read_text()
    for wrong, word in (("val_0.JPEG\n", "no class"), ("val_0.JPEG\tn77777777\t0\n", "n77777777")):
        annotations.write_text(wrong)
        message = refused(tmp_path, "tiny_imagenet")
        assert str(annotations) in message and word in message
    annotations.write_text(lines)
    (base / "val" / "images" / "val_3.JPEG").unlink()
    assert "val_3.JPEG does not decode (FileNotFoundError" in refused(tmp_path, "tiny_imagenet")
    shutil.rmtree(base / "train" / wnid)
    assert str(base / "train" / wnid / "images") in refused(tmp_path, "tiny_imagenet")


# ---------------------------------------------------------------- Food-101


@pytest.mark.parametrize("kind", ["json", "txt"])
@pytest.mark.parametrize("asked, size", [(0, 64), (64, 64), (32, 32), (28, 28)])
def test_food101_takes_the_middle_of_each_photograph(tmp_path, kind, asked, size):
    write_food(tmp_path, kind)
    images = tmp_path / "food-101" / "images"
    data = load(tmp_path, "food101", image_size=asked)
    wanted = np.stack([cut(images / name / f"{1000 - index}.jpg", size) for name in FOOD for index in range(4)])
    order = np.argsort(data.train.labels, kind="stable")
    assert data.train.images.shape == wanted.shape
    off = np.abs(data.train.images[order].astype(int) - wanted)
    assert off.mean() < 0.5 and off.max() <= 10, "a JPEG's own coarser scales are nearly the whole image"
    assert np.bincount(data.train.labels).tolist() == [4, 4]
    assert np.bincount(data.test.labels).tolist() == [2, 2]
    assert data.class_names == FOOD


def test_damaged_food101_is_named(tmp_path):
    write_food(tmp_path)
    meta = tmp_path / "food-101" / "meta"
    test = (meta / "test.json").read_text()
    for content in ("[1]", "{", '{"waffles": [3]}', '{"waffles": ["12"]}'):
        (meta / "test.json").write_text(content)
        assert str(meta / "test.json") in refused(tmp_path, "food101")
    (meta / "test.json").write_text('{"soup": ["soup/12"]}')
    assert '"soup"' in refused(tmp_path, "food101")
    (meta / "test.json").write_text(test)
    (meta / "train.json").unlink()
    assert str(meta) in refused(tmp_path, "food101")


# ---------------------------------------------------------------- folders of one's own


def test_a_folder_is_read_by_class_and_name(tmp_path):
    images = write_classes(tmp_path / "insects", ("bee", "ant", "fly"))
    for stray in ("train/.cache", "train/bee/notes.txt", "train/ant/.hidden.png"):
        path = tmp_path / "insects" / stray
        path.mkdir() if stray.endswith("cache") else path.write_text("no image")
    shutil.rmtree(tmp_path / "insects" / "test" / "ant")
    data = load(tmp_path, "folder:insects")
    order = [*range(6, 12), *range(6), *range(12, 18)]
    assert np.array_equal(data.train.images, images[order])
    assert data.train.labels.tolist() == [label for label in range(3) for _ in range(6)]
    assert data.test.labels.tolist() == [1, 1, 2, 2], "numbered as in train"
    assert data.class_names == ("ant", "bee", "fly")
    assert data.facts.mean == pytest.approx(images.mean(axis=(0, 2, 3)) / 255, abs=5.1e-5)
    assert data.facts.std == pytest.approx(images.std(axis=(0, 2, 3)) / 255, abs=5.1e-5)
    assert load(tmp_path / "elsewhere", f"folder:{tmp_path}/insects").identity == data.identity


def test_images_of_several_sizes_are_brought_to_the_one_that_is_asked_for(tmp_path):
    write_classes(tmp_path / "f")
    for index, (height, width) in enumerate(((30, 20), (16, 40), (16, 16))):
        path = tmp_path / "f" / "train" / "ant" / f"{index:03}.png"
        path.write_bytes(encoded(picture(height, width, seed=index)))
    message = refused(tmp_path, "folder:f")
    assert "30x20" in message and "data.image_size" in message
    data = load(tmp_path, "folder:f", image_size=16)
    paths = [tmp_path / "f" / "train" / name / f"{index:03}.png" for name in ("ant", "bee") for index in range(6)]
    assert np.array_equal(data.train.images, np.stack([cut(path, 16) for path in paths]))
    paths[0].write_bytes(encoded(picture(16, 16)))
    message = refused(tmp_path, "folder:f")
    assert "16x16" in message and "001.png is 16x40" in message


def test_grey_folders_stay_grey_until_a_colour_comes(tmp_path):
    write_classes(tmp_path / "f")
    paths = sorted((tmp_path / "f").rglob("*.png"))
    for path in paths:
        path.write_bytes(encoded(noise(8, 8, seed=len(path.name))))
    data = load(tmp_path, "folder:f")
    assert (data.facts.channels, data.facts.augmentations) == (1, ())
    assert np.array_equal(data.train.images[0], drawn(paths[0], "L"))
    wide = load(tmp_path, "folder:f", channels=3)
    assert np.array_equal(wide.train.images, np.repeat(data.train.images, 3, axis=1))
    assert wide.facts.augmentations == ()
    paths[-1].write_bytes(encoded(noise(8, 8, 3)))
    data = load(tmp_path, "folder:f")
    assert (data.facts.channels, data.facts.augmentations) == (3, ("crop", "flip"))
    assert np.array_equal(data.test.images[0], drawn(tmp_path / "f" / "test" / "ant" / "000.png"))


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda f: shutil.rmtree(f), ["no folder"]),
        (lambda f: shutil.rmtree(f / "test"), ["f/test", "<class>"]),
        (lambda f: [shutil.rmtree(f / "train" / c) for c in ("ant", "bee")], ["no images in", "f/train", "<class>"]),
        (lambda f: shutil.rmtree(f / "train" / "ant"), ["one class, bee"]),
        (lambda f: [p.unlink() for p in (f / "train" / "ant").iterdir()], ["train/ant holds no images", ".png"]),
        (lambda f: (f / "test" / "ant").rename(f / "test" / "wasp"), ["train has not: wasp"]),
        (lambda f: [p.write_bytes(b"") for p in f.rglob("*.png")], ["none of its images decodes"]),
    ],
)
def test_folders_that_cannot_be_learnt_from_are_refused(tmp_path, spoil, words):
    write_classes(tmp_path / "f")
    spoil(tmp_path / "f")
    message = refused(tmp_path, "folder:f")
    assert all(word in message for word in words), message


def test_images_that_do_not_decode_are_named_and_the_others_counted(tmp_path):
    write_classes(tmp_path / "f")
    bad = tmp_path / "f" / "train" / "ant" / "003.png"
    bad.write_bytes(bad.read_bytes()[:60])
    message = refused(tmp_path, "folder:f")
    assert f"{bad} does not decode" in message and "--skip-bad" in message and "others" not in message
    (tmp_path / "f" / "test" / "bee" / "001.png").write_text("no image")
    assert f"{bad} does not decode" in refused(tmp_path, "folder:f")
    assert "and 1 other" in refused(tmp_path, "folder:f")
