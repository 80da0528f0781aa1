"""Data sets of the user's own code, ``--dataset module:name`` and ``FILE.py:name``."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cli_runner import ask, refusal
from layouts import load, refused, write_idx, write_mnist

from mosaic_ray.config.schema import DataConfig
from mosaic_ray.data.load import known_facts

SHADES = """
import numpy as np
from mosaic_ray.core.types import DataFacts, Dataset, ImageSet


def load(data):
    def part(count, seed):
        labels = np.arange(count) % 2
        noise = np.random.default_rng(seed).integers(0, 128, (count, 3, 8, 8))
        return ImageSet((noise + 127 * labels[:, None, None, None]).astype(np.uint8), labels)
    facts = DataFacts("shades", 2, 3, 8, mean=(), std=(), augmentations=("flip",))
    return Dataset(facts, part(60, 0), part(20, 1), ("dark", "bright"), identity="mine")
"""

RECORD = """
import numpy as np
from mosaic_ray.core.types import DataFacts
from mosaic_ray.data.array_sources import DIGIT_NAMES, mnist_like
from mosaic_ray.data.specs import DatasetSpec, idx_files

FACTS = DataFacts("letters", 10, 1, 28, (0.2,), (0.3,))
FILES = idx_files("MNIST/raw", ("http://127.0.0.1:9/",), *"abcd")
LETTERS = DatasetSpec(mnist_like(DIGIT_NAMES), FACTS, FILES)
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """A working directory that Python does not import from."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MOSAIC_DATA", str(tmp_path / "root"))
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(tmp_path))])
    return tmp_path


def write(source: str, name: str = "shades.py") -> str:
    Path(name).write_text(source)
    return f"{name}:load"


def test_a_function_is_a_data_set_in_any_size_and_channels(capsys):
    name = write(SHADES.replace("    facts =", "    print('loading')\n    facts ="))
    data = load(Path("root"), name)
    assert data.facts.name == name and data.class_names == ("dark", "bright")
    assert (data.facts.channels, data.facts.image_size, data.facts.augmentations) == (3, 8, ("flip",))
    assert data.train.images.shape == (60, 3, 8, 8) and data.test.images.shape == (20, 3, 8, 8)
    means = data.train.images.mean((0, 2, 3)) / 255
    assert data.facts.mean == pytest.approx(means, abs=5.1e-5)
    assert data.facts.std == pytest.approx(data.train.images.std((0, 2, 3)) / 255, abs=5.1e-5)
    grey = load(Path("root"), name, channels=1, image_size=16)
    assert grey.train.images.shape == (60, 1, 16, 16) and len(grey.facts.mean) == 1
    assert capsys.readouterr().out == "", "standard output is kept for results"


def test_grey_images_become_colour_with_repeated_moments():
    name = write(SHADES.replace("(count, 3, 8, 8)", "(count, 1, 8, 8)").replace("2, 3, 8", "2, 1, 8"))
    colour = load(Path("root"), name, channels=3)
    assert colour.train.images.shape == (60, 3, 8, 8) and len(colour.facts.mean) == len(colour.facts.std) == 3
    assert colour.facts.mean == load(Path("root"), name).facts.mean * 3


def test_the_identity_follows_the_source_and_the_images():
    identity = load(Path("root"), write(SHADES)).identity
    assert len(identity) == 16 and identity == load(Path("root"), write(SHADES, "elsewhere.py")).identity
    assert identity != load(Path("root"), write(SHADES + "# other\n")).identity
    Path("pixels.npy").write_bytes(b"\x01")
    name = write(SHADES.replace("seed).int", "seed + int(np.fromfile('pixels.npy', np.uint8)[0])).int"))
    before = load(Path("root"), name).identity
    Path("pixels.npy").write_bytes(b"\x02")
    assert load(Path("root"), name).identity != before


def test_labels_need_not_be_contiguous():
    name = write(SHADES.replace("labels = np.arange(count) % 2", "labels = np.repeat(np.arange(count) % 2, 2)[::2]"))
    assert load(Path("root"), name).train.labels.flags.c_contiguous


def test_nothing_is_known_before_it_is_loaded():
    assert known_facts(DataConfig(name=write(SHADES))) is None
    assert known_facts(DataConfig(name="no_such_module:load")) is None


def test_a_module_is_found_in_the_working_directory():
    write(SHADES, "my_shades_module.py")
    name = "my_shades_module:load"
    result = ask("partition", "--dataset", name, "--clients", "2", "--set", "partition.min_size=1", "--json")
    assert result.exit_code == 0, result.stderr
    assert sum(json.loads(result.stdout)["client_sizes"]) == 60


def test_a_record_is_a_data_set_and_names_what_is_missing(tmp_path):
    Path("letters.py").write_text(RECORD)
    name = "letters.py:LETTERS"
    message = refused(tmp_path / "root", name)
    assert message.startswith(f"data.name = {name}: no {tmp_path}/root/MNIST/raw/train-images")
    assert f"mosaic data fetch {name}" in message
    assert "127.0.0.1:9" in refusal(ask("data", "fetch", name, "--set", f"data.root={tmp_path}/new"))
    written = write_mnist(tmp_path / "root")
    data = load(tmp_path / "root", name)
    assert np.array_equal(data.train.images[:, 0], written["train"][0]) and data.facts.mean == (0.2,)
    assert replace(data.facts, name="") == replace(
        load(tmp_path / "root", "mnist").facts, name="", mean=(0.2,), std=(0.3,)
    )
    write_idx(tmp_path / "root" / "MNIST" / "raw" / "t10k-labels-idx1-ubyte", np.full(12, 10, np.uint8))
    assert "labels run from" in refused(tmp_path / "root", name)


@pytest.mark.parametrize(
    "source, message",
    [
        (SHADES.replace("def load", "def laod"), 'no "load" there; did you mean "laod"?'),
        ("load = 3\n", "it has the type int, neither a function nor a DatasetSpec"),
        ("import no_such_thing\n", "shades.py, line 1: ModuleNotFoundError: No module named 'no_such_thing'"),
        ("def load(:\n", "shades.py, line 1: SyntaxError: invalid syntax"),
        ("def load(data):\n    return data.nmae\n", "shades.py, line 2: AttributeError: 'DataConfig' object has no"),
        ("def load(data):\n    raise SystemExit(0)\n", "shades.py, line 2: SystemExit: 0"),
        ("def load():\n    pass\n", "TypeError: load() takes 0 positional arguments but 1 was given"),
        ("def load(data):\n    return 3\n", "it returned int, not a Dataset"),
        (SHADES.replace("(np.uint8)", "(float)"), "shades.py, line 10: AssertionError"),
        (SHADES.replace("3, 8, 8", "2, 8, 8"), "images [60, 2, 8, 8] and [20, 2, 8, 8]; both must be [N, 1 or 3, "),
        (SHADES.replace("3, 8, 8)", "3, 8, 9)"), "images [60, 3, 8, 9] and [20, 3, 8, 9]; both must be"),
        (SHADES.replace("part(20", "part(0"), "test holds no images"),
        (SHADES.replace("% 2", "% 1"), "train holds one class, dark; it takes two or more"),
        (SHADES.replace("% 2", "% 3"), "labels run from 0 to 2; there are 2 classes"),
        (SHADES.replace("mean=()", "mean=(0.5,)"), "1 means and 0 deviations for 3 channels"),
        (SHADES.replace('"flip"', '"flop"'), 'augmentation flop: unknown; did you mean "flip"'),
        (SHADES.replace("Dataset(facts", "Dataset(None"), "AttributeError: "),
    ],
)  # fmt: skip
def test_a_broken_plug_in_is_one_line_before_anything_starts(source, message):
    name = write(source)
    line = refusal(ask("run", "--preset", "demo", "--dataset", name, "--storage", "s", "--host", "serial"))
    assert line.startswith(f"mosaic: error: data.name = {name}: {message}")
    assert not list(Path("s").glob("runs/*"))


@pytest.mark.parametrize(
    "name, message",
    [
        ("no_such.py:load", "no_such.py: No such file or directory"),
        ("no_such_lab.x:load", 'no module "no_such_lab" on Python\'s path or in the working directory'),
        ("shades:", "unknown data set; "),
        ("folder:", "unknown data set; "),
        ("a/b:load", "unknown data set; "),
    ],
)
def test_a_wrong_word_is_refused(name, message):
    assert message in refusal(ask("run", "--preset", "demo", "--dataset", name, "--storage", "s", "--host", "serial"))


def test_a_whole_run_on_a_plug_in():
    knobs = {
        "method": "fedavg", "warmup.num_rounds": 1, "warmup.local_steps": 1, "finetune.num_rounds": 1,
        "partition.num_clients": 2, "partition.min_size": 1,
    }  # fmt: skip
    sets = [word for knob, value in knobs.items() for word in ("--set", f"{knob}={value}")]
    result = ask("run", "--preset", "demo", "--dataset", write(SHADES), *sets, "--storage", "s", "--host", "serial")
    assert result.exit_code == 0, result.stderr
    [summary] = Path("s").glob("runs/*/summary.json")
    assert json.loads(summary.read_text())["config"]["data"]["name"] == "shades.py:load"
