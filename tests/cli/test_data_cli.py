"""`mosaic data list` and `import`, and --skip-bad, through the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from cli_runner import ask, refusal
from layouts import encoded, load, noise, refused, write_classes, write_folder, write_mnist, write_svhn, write_tiny

from mosaic_ray.cli import request as words
from mosaic_ray.config.registry import DATASETS


@pytest.fixture(autouse=True)
def root(monkeypatch, tmp_path) -> Path:
    monkeypatch.setenv("MOSAIC_DATA", str(tmp_path / "root"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "root"


def listed(*options: str) -> dict[str, str]:
    """Return the list's text by data set."""
    result = ask("data", "list", *options)
    assert result.exit_code == 0, result.stderr
    rows: dict[str, str] = {}
    for line in result.stdout.splitlines()[1:-2]:
        name, _, what = line.strip().partition("  ")
        if line.startswith("    "):
            rows[next(reversed(rows))] += f" {line.strip()}"
        else:
            rows[name] = what.strip()
    return rows


def test_the_list_says_what_is_there_how_large_and_whether_it_is_decoded(root):
    assert set(listed()) == set(DATASETS)
    assert "at hand" in listed()["digits"]
    assert {name for name, what in listed().items() if "not there" in what} == set(DATASETS) - {"digits"}
    write_mnist(root, num_train=1000)
    write_svhn(root)
    write_tiny(root)
    (root / "MNIST" / "raw" / "t10k-labels-idx1-ubyte").unlink()
    write_classes(root.parent / "insects")
    load(root, "tiny_imagenet")
    load(root, "folder:insects", channels=1)
    rows = listed()
    assert "0.8 MB in" in rows["mnist"] and "incomplete" in rows["mnist"]
    assert rows["svhn"].endswith("; 0.2 MB")
    assert "decoded: 12 + 6 images of 64x64, colour, 3 classes" in rows["tiny_imagenet"]
    [mine] = [what for name, what in rows.items() if name.startswith("folder:")]
    assert "12 + 4 images of 8x8, grey, 2 classes" in mine
    assert "not there" in listed("--set", f"data.root={root}/elsewhere")["svhn"]


@pytest.mark.parametrize("kind", ["folder", "parquet"])
def test_imported_data_are_found_by_name_without_their_source(tmp_path, root, kind):
    if kind == "folder":
        images = write_classes(tmp_path / "pictures")
    else:
        images = write_folder(tmp_path / "pictures")
    identity = load(tmp_path, f"{kind}:pictures").identity
    result = ask("data", "import", "--from", "pictures", "mine")
    assert result.exit_code == 0, result.stderr
    assert "8x8" in result.stdout and "--dataset mine" in result.stdout
    shutil.rmtree(tmp_path / "pictures")
    data = load(root, "imported:mine")
    assert np.array_equal(data.train.images, images)
    assert data.identity == identity
    assert "8x8" in listed()["mine"]
    for name in ("mine", "imported:mine"):
        result = ask("partition", "--dataset", name, "--clients", "2", "--set", "partition.min_size=1", "--json")
        assert sum(json.loads(result.stdout)["client_sizes"]) == len(images)
    assert load(root, "imported:mine", image_size=16, channels=1).train.images.shape == (len(images), 1, 16, 16)


def test_the_name_is_looked_for_below_the_root_that_is_asked_for(tmp_path, root):
    write_classes(tmp_path / "f")
    other = f"data.root={tmp_path}/other"
    assert ask("data", "import", "--from", "f", "mine", "--set", other).exit_code == 0
    assert words.parse_config(dataset="mine", sets=[other]).data.name == "imported:mine"
    (tmp_path / "x.toml").write_text(f'[data]\nroot = "{tmp_path}/other"\nname = "mine"\n')
    assert words.parse_config(config="x.toml").data.name == "imported:mine"
    assert "--dataset mine" in refusal(ask("run", "--dataset", "mine"))
    assert "did you mean" in refused(tmp_path / "other", "imported:mien")
    assert "nothing was" in refused(tmp_path / "none", "imported:mine")


def test_images_of_several_sizes_are_imported_at_the_requested_size(tmp_path, root):
    write_classes(tmp_path / "f")
    (tmp_path / "f" / "train" / "ant" / "000.png").write_bytes(encoded(noise(20, 30, 3)))
    assert "data.image_size" in refusal(ask("data", "import", "--from", "f", "mine"))
    assert ask("data", "import", "--from", "f", "mine", "--set", "data.image_size=16").exit_code == 0
    assert load(root, "imported:mine").facts.image_size == 16


def test_data_that_cannot_be_imported_are_refused_in_a_line(tmp_path, root):
    write_classes(tmp_path / "f")
    for name in (*DATASETS, "a/b", "..", "", "parquet:x", "-x"):
        assert refusal(ask("data", "import", "--from", "f", "--", name))
    for source in ("nowhere", "."):
        assert f"--from {source}" in refusal(ask("data", "import", "--from", source, "mine"))
    assert "--from" in refusal(ask("data", "import", "mine"))
    shutil.rmtree(tmp_path / "f" / "train" / "ant")
    assert "one class" in refusal(ask("data", "import", "--from", "f", "mine"))
    assert not (root / "imported" / "mine").exists()
    write_classes(tmp_path / "g")
    assert ask("data", "import", "--from", "g", "mine").exit_code == 0
    assert "imported already" in refusal(ask("data", "import", "--from", "g", "mine"))
    array = root / "imported" / "mine" / "train_images.npy"
    array.write_bytes(array.read_bytes()[:-1])
    assert "import it again" in refused(root, "imported:mine")
    assert 'did you mean "list"' in refusal(ask("data", "lst"))
    assert "Commands:" in ask("data").stdout


def test_skip_bad_is_an_option_wherever_images_are_read(tmp_path, root, monkeypatch):
    write_classes(tmp_path / "f")
    bad = tmp_path / "f" / "train" / "ant" / "003.png"
    bad.write_text("")
    request = ["partition", "--dataset", "folder:f", "--clients", "2", "--set", "partition.min_size=1", "--json"]
    line = refusal(ask(*request))
    assert str(bad) in line and "--skip-bad" in line
    result = ask(*request, "--skip-bad")
    assert sum(json.loads(result.stdout)["client_sizes"]) == 11
    assert result.stderr.count("\n") == 1 and "1 of 16 images" in result.stderr and str(bad) in result.stderr
    assert str(bad) in refusal(ask("data", "import", "--from", "f", "mine"))
    result = ask("data", "import", "--from", "f", "mine", "--skip-bad")
    assert "11 + 4 images" in result.stdout
    for command in ("run", "sweep"):
        line = refusal(ask(command, "--skip-bad", "--set", "data.skip_bad=false"))
        assert line.startswith("mosaic: error: --skip-bad: --set data.skip_bad=false says otherwise")
    assert words.parse_config(skip_bad="true").data.skip_bad
    assert not words.parse_config().data.skip_bad
