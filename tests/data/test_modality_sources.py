"""Data sets of several modalities: columns of parquet files, and Multiple Features."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cli_runner import ask, refusal
from layouts import load, refused, write_mfeat
from PIL import Image

from mosaic_ray.config.presets import SHAPES, Shape
from mosaic_ray.config.resolve import resolve
from mosaic_ray.config.schema import DataConfig
from mosaic_ray.core.errors import RequestError
from mosaic_ray.core.types import DataFacts, Dataset, ImageSet, Modality
from mosaic_ray.data.catalog import fetch_dataset
from mosaic_ray.data.load import known_facts, load_dataset, shape_of
from mosaic_ray.data.modality_sources import VIEWS, tokens
from mosaic_ray.data.records import pack, present_in, unpack

NAMES = ("photo", "reading", "note")
#: Arrow's types of the columns.
TYPES = {
    "photo": pa.struct({"bytes": pa.binary(), "path": pa.string()}), "reading": pa.list_(pa.float64()),
    "note": pa.string(), "label": pa.int64(), "price": pa.float64(), "other": pa.list_(pa.int32(), 2),
}  # fmt: skip


def png(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels.squeeze()).save(out, "PNG")
    return out.getvalue()


def columns(count: int, seed: int, colours: bool = True) -> dict[str, list]:
    draws = np.random.default_rng(seed)
    images = draws.integers(0, 256, (count, 8, 8, 3) if colours else (count, 8, 8), dtype=np.uint8)
    return {
        "photo": [{"bytes": png(image), "path": None} for image in images],
        "reading": draws.normal(5, 3, (count, 4)).tolist(),
        "note": [f"number {n}, größer" for n in range(count)],
        "label": [n % 3 for n in range(count)],
        "price": draws.random(count).tolist(),
        "other": draws.integers(-9, 9, (count, 2)).tolist(),
    }


def write(root: Path, train: dict[str, list], test: dict[str, list], types: dict[str, pa.DataType] = TYPES) -> None:
    (root / "made").mkdir(parents=True, exist_ok=True)
    for split, content in (("train", train), ("test", test)):
        schema = pa.schema([(name, types[name]) for name in content])
        pq.write_table(pa.table(content, schema), root / "made" / f"{split}.parquet", row_group_size=5)


@pytest.fixture
def made(tmp_path) -> tuple[Path, dict[str, list], dict[str, list]]:
    train, test = columns(12, 0), columns(6, 1)
    return tmp_path, train, test


def read(root: Path, **knobs) -> Dataset:
    return load(root, "parquet:made", **{"modalities": NAMES, "text_length": 12} | knobs)


def pixels(row: dict[str, bytes]) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(row["bytes"])))


def test_columns_become_records(made):
    root, train, test = made
    train["photo"][3] = train["reading"][4] = train["photo"][5] = None
    train["photo"][7] = {"bytes": None, "path": None}
    write(root, train, test)
    data = read(root)
    assert data.facts.modalities == (
        Modality("photo", "image", (3, 8, 8)),
        Modality("reading", "vector", (4,)),
        Modality("note", "text", (12,), 257),
    )
    assert (data.facts.num_classes, data.facts.channels, data.facts.image_size) == (3, 3, 8)
    assert data.facts.augmentations == () and data.class_names == ("0", "1", "2")
    assert data.train.labels.tolist() == train["label"] and len(data.test) == 6
    present = np.ones((12, 3), bool)
    present[[3, 5, 7], 0] = present[4, 1] = False
    assert np.array_equal(present_in(data.facts.modalities, data.train.images), present)
    found = unpack(data.facts.modalities, data.train.images)
    images = np.zeros((12, 8, 8, 3), np.uint8)
    for row in np.flatnonzero(present[:, 0]):
        images[row] = pixels(train["photo"][row])
    assert np.array_equal(found["photo"], images.transpose(0, 3, 1, 2))
    readings = np.array([value or [0.0] * 4 for value in train["reading"]], np.float32)
    assert np.array_equal(found["reading"], readings)
    assert np.array_equal(found["note"], [tokens(text, 12) for text in train["note"]])
    inside = images[present[:, 0]] / 255
    assert data.facts.mean == pytest.approx(inside.mean((0, 1, 2)), abs=5.1e-5)
    assert data.facts.std == pytest.approx(inside.std((0, 1, 2)), abs=5.1e-5)
    assert data.identity == read(root).identity != read(root, text_length=13).identity
    assert shape_of(DataConfig(name="parquet:made", root=str(root), modalities=NAMES)) == Shape(3, 3, 8, 12)
    assert known_facts(DataConfig(name="parquet:made", root=str(root), modalities=NAMES)) is None


def test_columns_come_in_the_order_that_was_asked_for_and_others_are_left(made):
    write(*made)
    data = read(made[0], modalities=("other", "note"))
    assert [part.name for part in data.facts.modalities] == ["other", "note"]
    assert (data.facts.channels, data.facts.image_size, data.facts.mean, data.facts.std) == (1, 8, (0.0,), (1.0,))
    assert np.array_equal(unpack(data.facts.modalities, data.test.images)["other"], made[2]["other"])
    assert shape_of(DataConfig(name="parquet:made", root=str(made[0]), modalities=("note",))) == Shape(3, 1, 8, 12)


def test_without_modalities_images_are_read_as_ever(made):
    write(*made)
    data = load(made[0], "parquet:made", image_column="photo")
    assert data.facts.modalities == () and data.train.images.shape == (12, 3, 8, 8)


@pytest.mark.parametrize("size, channels", [(16, 0), (0, 1), (28, 3)])
def test_images_are_read_in_the_size_and_channels_asked_for(made, size, channels):
    write(*made)
    data = read(made[0], image_size=size, channels=channels)
    shape = (channels or 3, size or 8, size or 8)
    assert data.facts.modalities[0].shape == shape
    assert (data.facts.channels, data.facts.image_size) == shape[:2]
    assert len(data.facts.mean) == len(data.facts.std) == shape[0]


def test_one_image_in_colours_makes_all_colour(made):
    root, _, test = made
    train = columns(12, 0, colours=False)
    train["photo"][9] = test["photo"][0]
    write(root, train, test)
    assert read(root).facts.channels == 3
    assert read(root, channels=1).facts.channels == 1


def test_lists_of_other_types_are_vectors(made):
    root, train, test = made
    for kind in (pa.list_(pa.int16()), pa.large_list(pa.float32()), pa.list_(pa.float64(), 4)):
        for part in (train, test):
            part["reading"] = np.arange(4 * len(part["label"])).reshape(-1, 4).tolist()
        train["reading"][2] = None
        write(root, train, test, TYPES | {"reading": kind, "note": pa.large_string()})
        found = read(root, modalities=("reading", "note"))
        expected = np.arange(48).reshape(-1, 4)
        expected[2] = 0
        assert np.array_equal(unpack(found.facts.modalities, found.train.images)["reading"], expected), kind


def test_tokens_are_bytes_and_zeros_fill():
    assert tokens("aß", 5).tolist() == [98, 0xC3 + 1, 0x9F + 1, 0, 0]
    assert tokens("ß", 1).tolist() == [0xC3 + 1]
    assert tokens("\0\xff", 8).max() <= 256 and tokens("\0", 2).tolist() == [1, 0]


def changed(part: dict[str, list], name: str, row: int, value: object) -> None:
    part[name][row] = value


def without(part: dict[str, list], name: str) -> None:
    del part[name]


@pytest.mark.parametrize(
    "change, knobs, words",
    [
        (lambda a, b: None, {"modalities": ("photo", "nte")}, 'no column "nte"; it has photo'),
        (lambda a, b: None, {"modalities": ("photo", "price")}, 'column "price".*has the type double; it takes'),
        (lambda a, b: None, {"modalities": ("photo", "label")}, 'column "label".*holds the classes'),
        (lambda a, b: without(b, "note"), {}, 'test.parquet has no column "note"'),
        (lambda a, b: without(a, "note"), {}, 'train.parquet has no column "note"'),
        (lambda a, b: changed(a, "reading", 4, [1.0, 2.0]), {}, '"reading", row 4 of train: 2 numbers.*first has 4'),
        (lambda a, b: changed(b, "reading", 5, [1.0] * 5), {}, '"reading", row 5 of test: 5 numbers.*first has 4'),
        (lambda a, b: changed(a, "reading", 7, [1.0, np.nan, 0, 0]), {}, "train.*row 7: a value is not a finite"),
        (lambda a, b: changed(b, "reading", 1, [1.0, np.inf, 0, 0]), {}, "test.*row 1: a value is not a finite"),
        (lambda a, b: changed(a, "reading", 0, [1e300, 1, 0, 0]), {}, "row 0: a value is not a finite number"),
        (lambda a, b: changed(a, "reading", 11, [None, 1, 0, 0]), {}, "row 11: a value is not a finite number"),
        (lambda a, b: changed(a, "reading", 6, []), {}, "row 6: an empty list"),
        (lambda a, b: changed(a, "note", 8, ""), {}, '"note", row 8: an empty text'),
        (lambda a, b: changed(b, "note", 2, None), {}, '"note", row 2: an empty text'),
        (lambda a, b: b.update(photo=[None] * 6), {}, "no sample of test has the modality photo; train has it"),
        (lambda a, b: a.update(reading=[None] * 12), {}, "no sample of train has the modality reading; test has it"),
        (
            lambda a, b: (changed(a, "photo", 9, None), changed(a, "reading", 9, None)),
            {"modalities": ("photo", "reading")}, "row 9 of train has none of photo, reading",
        ),
        (lambda a, b: changed(a, "label", 3, None), {}, 'column "label" has empty places'),
        (lambda a, b: changed(a, "label", 3, -2), {}, "a label is -2"),
        (lambda a, b: changed(a, "label", 3, 900), {}, "labels go up to 900"),
        (lambda a, b: changed(b, "label", 3, 3), {}, "test holds classes that train has not"),
        (lambda a, b: changed(a, "photo", 4, {"bytes": b"no image"}), {}, '"photo", row 4 of train does not decode'),
        (
            lambda a, b: changed(b, "photo", 4, {"bytes": png(np.zeros((9, 8), np.uint8))}), {},
            '"photo", row 4 of test is 9x8.*set data.image_size',
        ),
        (
            lambda a, b: changed(a, "photo", 0, {"bytes": png(np.zeros((9, 8), np.uint8))}), {},
            "images are 9x8; set data.image_size to a side",
        ),
    ],
)  # fmt: skip
def test_refusals_in_one_line(made, change, knobs, words):
    root, train, test = made
    change(train, test)
    write(root, train, test)
    message = refused(root, "parquet:made", **{"modalities": NAMES} | knobs)
    assert re.search(words, message), message


def test_two_columns_of_images_are_refused(made):
    root, train, test = made
    for part in (train, test):
        part["second"] = part["photo"]
    write(root, train, test, TYPES | {"second": TYPES["photo"]})
    assert "photo, second are images" in refused(root, "parquet:made", modalities=("photo", "second"))


def test_a_file_that_is_no_parquet_is_refused(made):
    write(*made)
    (made[0] / "made" / "test.parquet").write_bytes(b"PAR1 nothing PAR1")
    assert "cannot be read as parquet" in refused(made[0], "parquet:made", modalities=NAMES)


def test_samples_whose_image_does_not_decode_are_left_out_where_asked(made, capsys):
    root, train, test = made
    train["photo"][4] = {"bytes": b"no image"}
    write(root, train, test)
    data = read(root, skip_bad=True)
    assert data.train.labels.tolist() == [label for row, label in enumerate(train["label"]) if row != 4]
    assert "1 samples have images that do not decode" in capsys.readouterr().err


@pytest.mark.parametrize(
    "sets, words",
    [
        ({"data.modalities": "[photo,photo]", "data.name": "parquet:x"}, '"photo" is there twice'),
        ({"data.modalities": "[a+b]", "data.name": "parquet:x"}, "which joins names"),
        ({"data.modalities": '["", "b"]', "data.name": "parquet:x"}, "is no name"),
        ({"data.modalities": "[photo]", "data.name": "digits"}, "digits has images alone"),
        ({"data.modalities": "[photo]", "data.name": "folder:x"}, "folder:x has images alone"),
        ({"data.modalities": "[a]", "data.image_column": "a", "data.name": "parquet:x"}, "data.modalities names"),
        ({"data.text_length": "0"}, "at least 1"),
        ({"data.text_length": "5000"}, "at most 4096"),
        ({"partition.modalities": "p:0.5", "data.name": "digits"}, "samples of digits have one modality"),
        ({"partition.modalities": "p:0.5", "data.name": "parquet:x"}, "have one modality; data.modalities names"),
        ({"partition.modalities": "[a]", "data.name": "parquet:x", "data.modalities": "[a]"}, "have one modality"),
        ({"partition.modalities": "p:0", "data.name": "mfeat"}, "p:P with 0 < P <= 1"),
    ],
)
def test_contradicting_knobs_are_refused_before_anything_is_read(sets, words):
    with pytest.raises(RequestError) as caught:
        resolve("demo", sets=sets)
    assert words in str(caught.value) and "\n" not in str(caught.value)


# ---------------------------------------------------------------- Multiple Features


def test_mfeat_has_six_views_as_vectors(tmp_path):
    write_mfeat(tmp_path)
    data = load(tmp_path, "mfeat")
    assert data.facts == known_facts(DataConfig(name="mfeat"))
    assert data.facts.modalities == VIEWS and data.train.images.shape == (40, 1, 1, 4 * 649 + 6)
    table = pq.read_table(tmp_path / "mfeat" / "test-00000.parquet")
    found = unpack(VIEWS, data.test.images)
    for view in VIEWS:
        assert np.array_equal(found[view.name], np.array(table[view.name].to_pylist(), np.float32))
    assert data.class_names == tuple("0123456789")


def test_views_of_mfeat_are_picked(tmp_path):
    write_mfeat(tmp_path)
    config = DataConfig(name="mfeat", root=str(tmp_path), modalities=("mor", "pix"))
    data = load_dataset(config)
    assert data.facts == known_facts(config)
    assert [part.name for part in data.facts.modalities] == ["mor", "pix"]
    assert data.identity != load(tmp_path, "mfeat").identity
    with pytest.raises(RequestError, match=r'mfeat has no "piks"; it may be .*pix'):
        known_facts(replace(config, modalities=("piks",)))
    assert 'mfeat has no "piks"' in refused(tmp_path, "mfeat", modalities=("piks",))


def test_mfeat_of_other_lengths_or_classes_is_refused(tmp_path):
    write_mfeat(tmp_path / "a", views={"fou": 75})
    assert "fou of 75" in refused(tmp_path / "a", "mfeat")
    write_mfeat(tmp_path / "b", train=8, test=8)
    assert "holds 8 classes" in refused(tmp_path / "b", "mfeat")


def test_without_its_files_mfeat_says_what_to_put_where(tmp_path):
    message = refused(tmp_path, "mfeat")
    assert str(tmp_path / "mfeat") in message and "label, pix, fou, fac, kar, zer, mor" in message
    with pytest.raises(RequestError, match="no address offers it; put train") as caught:
        fetch_dataset("mfeat", DataConfig(root=str(tmp_path)))
    assert str(tmp_path / "mfeat") in str(caught.value)


def test_a_small_schedule_suits_mfeat():
    config = resolve("mfeat_small")
    assert config.data.image_size == config.data.channels == 0
    assert (config.warmup.num_rounds, config.warmup.local_steps) == (12, 5)
    assert SHAPES["mfeat"] == Shape(10, 1, 8, 1_500)


@pytest.mark.realdata
def test_real_mfeat_is_the_one_that_is_published(data_root):
    if not (data_root / "mfeat").is_dir():
        pytest.skip(f"no mfeat under {data_root}")
    data = load(data_root, "mfeat")
    assert (len(data.train), len(data.test)) == (1_500, 500)
    assert np.bincount(data.test.labels).tolist() == [50] * 10
    assert present_in(VIEWS, data.train.images).all()
    pixels_ = unpack(VIEWS, data.train.images)["pix"]
    assert (pixels_.min(), pixels_.max()) == (0, 6)  # averages of 2 x 3 windows of a black and white picture


# ---------------------------------------------------------------- the command line, and plug-ins


def test_the_command_shows_what_clients_hold(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_mfeat(tmp_path)
    words = "partition", "--dataset", "mfeat", "--clients", "2", "--sampler", "iid", "--set", f"data.root={tmp_path}"
    shown = ask(*words, "--set", "partition.modalities=[pix+fou+fac, kar+zer+mor]")
    assert shown.exit_code == 0, shown.stderr
    assert "pix+fou+fac" in shown.stdout and "kar+zer+mor" in shown.stdout and "modalities" in shown.stdout
    assert len([*tmp_path.glob("mosaic_runs/partitions/*.png")]) == 1
    assert '"modalities": [["pix", "fou", "fac"], ["kar"' in ask(
        *words, "--json", "--set", "partition.modalities=[pix+fou+fac, kar+zer+mor]"
    ).stdout
    assert '"mor"' in refusal(ask(*words, "--set", "partition.modalities=[pix+mo]"))
    assert "no client holds kar" in refusal(ask(*words, "--set", "partition.modalities=[pix+fou, fac+mor+zer]"))


def records_of(config: DataConfig) -> Dataset:
    parts = Modality("a", "vector", (2,)), Modality("b", "vector", (1,))
    values = {"a": np.ones((4, 2), np.float32), "b": np.zeros((4, 1), np.float32)}
    found = ImageSet(pack(parts, values, np.ones((4, 2), bool)), np.arange(4) % 2)
    facts = DataFacts("mine", 2, 1, 8, (0.0,), (1.0,), modalities=parts)
    return Dataset(facts, found, found, ("x", "y"), "")


def test_a_plug_in_may_return_records():
    data = load_dataset(DataConfig(name=f"{__name__}:records_of"))
    assert data.facts.modalities == records_of(DataConfig()).facts.modalities
    assert data.train.images.shape == (4, 1, 1, 14)


def too_short(config: DataConfig) -> Dataset:
    found = records_of(config)
    return replace(found, test=ImageSet(found.test.images[..., :-1], found.test.labels))


def test_records_of_a_plug_in_have_the_size_of_its_modalities():
    with pytest.raises(RequestError, match=r"records .* both must be \[N, 1, 1, 14\]"):
        load_dataset(DataConfig(name=f"{__name__}:too_short"))
