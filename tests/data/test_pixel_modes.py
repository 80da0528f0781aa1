"""Pictures are read as they are meant: depths, palettes, transparency, inks and orientation; and labels with gaps."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from cli_runner import ask, refusal
from layouts import encoded, write_parquet
from PIL import Image

from mosaic_ray.config.schema import DataConfig
from mosaic_ray.core.errors import RequestError
from mosaic_ray.data.image_decode import draw, form, plain
from mosaic_ray.data.load import load_dataset


def saved(image: Image.Image, kind: str = "PNG", **words) -> io.BytesIO:
    buffer = io.BytesIO()
    image.save(buffer, kind, **words)
    buffer.seek(0)
    return buffer


def pixels(source: io.BytesIO, channels: int, side: int = 8) -> tuple[np.ndarray, bool, list[str]]:
    content, coloured, changes = draw(source, (channels, side, side), False)
    return np.frombuffer(content, np.uint8).reshape(side, side, channels).squeeze(), coloured, changes


def test_16_bit_grey_is_scaled_and_is_no_colour():
    values = np.linspace(0, 65_535, 64).astype(np.uint16).reshape(8, 8)
    found, coloured, changes = pixels(saved(Image.fromarray(values)), 1)
    assert np.array_equal(found, np.rint(values / 257).astype(np.uint8))
    assert (found[0, 0], found[-1, -1], coloured, changes) == (0, 255, False, ["deep"])
    assert form(saved(Image.fromarray(values))) == (8, 8, False)
    assert np.array_equal(pixels(saved(Image.fromarray(values)), 3)[0], np.repeat(found[..., None], 3, 2))


def test_8_bits_stay_as_they_are():
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    assert np.array_equal(pixels(saved(Image.fromarray(grey)), 1)[0], grey)
    colour = np.arange(192, dtype=np.uint8).reshape(8, 8, 3)
    found, coloured, changes = pixels(saved(Image.fromarray(colour)), 3)
    assert np.array_equal(found, colour) and coloured and changes == []


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pixels_show_white(mode):
    image = Image.new("RGBA", (8, 8), (10, 10, 10, 255))
    image.paste((200, 0, 0, 0), (0, 0, 4, 8))
    image.paste((0, 0, 0, 128), (4, 0, 5, 8))  # half transparent black
    if mode == "LA":
        image = image.convert("LA")
    elif mode == "P":
        image = image.quantize(8, Image.Quantize.FASTOCTREE)
    found, coloured, changes = pixels(saved(image), 3)
    assert (found[:, :4] == 255).all() and np.abs(found[:, 5:].astype(int) - 10).max() <= 1
    assert np.abs(found[:, 4].astype(int) - 127).max() <= 1
    assert coloured == (mode != "LA") and changes == ["transparent"]


def test_an_opaque_alpha_changes_nothing():
    image = Image.new("RGBA", (8, 8), (10, 20, 30, 255))
    found, _, changes = pixels(saved(image), 3)
    assert (found == (10, 20, 30)).all() and changes == []


def test_a_turned_photograph_is_set_upright():
    upright = Image.new("RGB", (8, 6), "white")
    upright.paste("black", (0, 0, 8, 3))  # black above
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a turn to the right
    stored = upright.transpose(Image.Transpose.ROTATE_90)
    assert form(saved(stored, "PNG", exif=exif)) == (6, 8, True)
    content, _, changes = draw(saved(stored, "PNG", exif=exif), (3, 6, 8), False)
    found = np.frombuffer(content, np.uint8).reshape(6, 8, 3)
    assert (found[:3] == 0).all() and (found[3:] == 255).all() and changes == ["turned"]


def test_inks_become_colours():
    found, coloured, _ = pixels(saved(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"), 3)
    assert coloured and found[..., 0].min() > 200 and found[..., 1:].max() < 60


def test_grey_without_a_known_range_is_refused():
    with pytest.raises(ValueError, match="no known range"):
        plain(Image.fromarray(np.full((8, 8), 70_000, np.int32)))
    with pytest.raises(ValueError, match="no known range"):
        plain(Image.fromarray(np.full((8, 8), 0.5, np.float32)))


def folder_of(root: Path, side: int, image=None) -> None:
    """Two classes of grey pictures, as ``folder:pictures``."""
    for split in ("train", "test"):
        for name in ("a", "b"):
            (place := root / "pictures" / split / name).mkdir(parents=True)
            for number in range(6):
                made = np.full((side, side), 40 * number, np.uint8) if image is None else image(number)
                (place / f"{number}.png").write_bytes(encoded(made))


def test_changes_are_counted_and_said(tmp_path, capsys):
    folder_of(tmp_path, 8, lambda number: np.full((8, 8), 10_000 * number, np.uint16))
    data = load_dataset(DataConfig("folder:pictures", str(tmp_path)))
    assert data.facts.channels == 1 and np.unique(data.train.images).tolist() == [0, 39, 78, 117, 156, 195]
    assert "24 16-bit grey images are scaled to 8 bits" in capsys.readouterr().err


def test_a_size_that_no_generator_draws_is_refused_before_anything_starts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder_of(tmp_path, 12)
    words = ("run", "--preset", "demo", "--clients", "2", "--dataset", "folder:pictures", "--set", "data.root=.")
    line = refusal(ask(*words, "--storage", "s", "--host", "serial"))
    assert "data.image_size = 12: generators draw 8, 16, 28, 32, 64" in line and "set data.image_size=8" in line
    assert list((tmp_path / "s" / "objects").iterdir()) == []


@pytest.mark.parametrize("label, says", [(2_000_000_000, "2000000000"), (5_000, "only 3 of these numbers occur")])
def test_labels_with_gaps_are_a_question(tmp_path, label, says):
    images = [encoded(np.full((8, 8), number, np.uint8)) for number in range(6)]
    for split in ("train", "test"):
        write_parquet(tmp_path / "gaps" / f"{split}-0.parquet", images, [0, 1, label, 0, 1, label])
    with pytest.raises(RequestError, match=says):
        load_dataset(DataConfig("parquet:gaps", str(tmp_path)))
