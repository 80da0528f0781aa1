"""The heat map of a partition: cells in their places, and no change of global settings."""

from __future__ import annotations

import io
import subprocess
import sys

import numpy as np
import pytest
from matplotlib import rc_context, rcParams
from PIL import Image

from mosaic_ray.config.resolve import resolve
from mosaic_ray.core.errors import RequestError
from mosaic_ray.report.figures.heatmap import MOST_ROWS, default_name, heading, partition_heatmap, save_png

#: The colours of a client's only class, and of a class that it lacks.
WHOLE, NONE = (11, 44, 102), (254, 254, 254)
#: The first colour, where cells are too many to be drawn one by one.
WHOLE_OF_MANY = (64, 128, 208)


def pixels(counts: np.ndarray, title: str = "a title", class_names: tuple[str, ...] = ()) -> np.ndarray:
    """The picture, [height, width, 3], less the sizes and the colour bar on its right."""
    png = partition_heatmap(counts, title, class_names)
    assert png.startswith(b"\x89PNG\r\n")
    picture = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
    return picture[:, : int(0.6 * picture.shape[1])]


def area(picture: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    """Rows and columns of the pixels of ``colour``, to a shade or two: [n, 2]."""
    return np.argwhere((np.abs(picture.astype(int) - colour) <= 2).all(axis=2))


def place(client: int, c: int, shape: tuple[int, int] = (4, 3)) -> np.ndarray:
    """Where the one cell stands that is not empty: its middle's row and column."""
    counts = np.zeros(shape, np.int64)
    counts[client, c] = 7
    found = area(pixels(counts), WHOLE if shape[0] <= MOST_ROWS else WHOLE_OF_MANY)
    assert len(found), "the cell is there to be seen"
    return found.mean(axis=0)


def test_clients_stand_down_and_classes_across():
    top, bottom, left, right = place(0, 1), place(3, 1), place(1, 0), place(1, 2)
    assert top[0] < left[0] < bottom[0]
    assert left[1] < top[1] < right[1]
    assert [top[1], left[0]] == pytest.approx([bottom[1], right[0]], abs=1)


def test_every_one_of_1000_clients_is_seen():
    rows = [place(client, 4, (1000, 10))[0] for client in (0, 617, 999)]
    assert rows == sorted(set(rows))
    assert (rows[1] - rows[0]) / (rows[2] - rows[0]) == pytest.approx(617 / 999, abs=0.005)


def test_colour_is_the_share_of_the_client_and_the_scale_is_always_the_same():
    for whole in (1, 3000):
        few = area(pixels(np.array([[whole, 0]])), WHOLE)
        many = area(pixels(np.array([[whole, 0], [1, 1]])), WHOLE)
        assert len(few) > 1.5 * len(many) > 0
    assert len(area(pixels(np.array([[1, 1], [1, 1]])), WHOLE)) == 0


def test_one_sample_among_thousands_differs_from_none():
    none, one = (len(area(pixels(np.array([[9999, n, 5000]])), NONE)) for n in (0, 1))
    assert none > 1.1 * one


@pytest.mark.parametrize("shape", [(1, 1), (1, 200), (40, 20), (41, 21), (3000, 2)])
def test_all_shapes_are_drawn_and_fit_a_screen(shape):
    png = partition_heatmap(np.ones(shape, np.int64), "t")
    width, height = Image.open(io.BytesIO(png)).size
    assert 600 < width < 2400
    assert 500 < height < 1900


def test_names_are_taken_as_they_are():
    """Dollar signs are no mathematics, other scripts no warning, and long names and paths no obstacle."""
    names = (r"$\frac$", "猫", "a very long name " * 9)
    plain = pixels(np.eye(3, dtype=int), "folder:/" + r"$\data$/" * 40, names)
    assert len(area(plain, WHOLE)) > 1000


def marks(**held: list[bool]) -> np.ndarray:
    """Where modalities of three clients are marked, beside their classes: [n, 2]. No class is drawn in their colour."""
    png = partition_heatmap(np.full((3, 4), 5), "a title", (), held)
    return area(np.asarray(Image.open(io.BytesIO(png)).convert("RGB")), WHOLE)


def test_modalities_are_marked_beside_the_classes():
    yes, no = True, False
    all_six = marks(a=[yes, yes, yes], b=[yes, yes, yes])
    rows, columns = marks(a=[yes, no, yes], b=[no, yes, yes]).T
    assert len(rows) == pytest.approx(len(all_six) * 4 / 6, rel=0.03)
    assert not len(marks(a=[no, no, no])) and not len(marks())
    middle = columns.min() + np.ptp(columns) / 2
    first, second = rows[columns < middle], rows[columns > middle]
    assert first.min() < second.min() and first.max() == second.max(), "the first client holds a alone"
    third = rows.min() + np.ptp(rows) / 3
    assert not ((first > third + 9) & (first < third + np.ptp(rows) / 3 - 9)).any(), "the second does not hold it"


def test_the_picture_depends_on_its_arguments_alone_and_leaves_nothing_behind():
    counts = np.arange(12).reshape(3, 4)
    before = dict(rcParams)
    png = partition_heatmap(counts, "t")
    assert dict(rcParams) == before
    with rc_context({"figure.facecolor": "red", "font.size": 30, "savefig.dpi": 20}):
        assert partition_heatmap(counts, "t") == png
    assert partition_heatmap(counts, "u") != png


def test_no_pyplot_is_loaded():
    code = (
        "import sys, numpy; from mosaic_ray.report.figures.heatmap import partition_heatmap as p; p(numpy.eye(2), 't');"
        "assert not {'matplotlib.pyplot', 'ray', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "sets, name, title",
    [
        ({}, "digits-reference-omega0.1-5clients-s0.png", "digits, 5 clients; sampler reference, omega 0.1, seed 0"),
        (
            {"data.name": "folder:/my photos/x.y/", "partition.sampler": "iid", "seed": "3"},
            "x_y-iid-omega0.1-5clients-s3.png",
            "folder:/my photos/x.y/, 5 clients; sampler iid, seed 3",
        ),
        (
            {"partition.sampler": "pathological", "partition.omega": "1e-5", "data.name": "cifar10"},
            "cifar10-pathological-omega1e-05-5clients-s0.png",
            "cifar10, 5 clients; sampler pathological, 2 classes each, seed 0",
        ),
    ],
)
def test_names_and_headings(sets, name, title):
    config = resolve(sets=sets)
    assert default_name(config) == name
    assert heading(config) == title


def test_a_place_that_cannot_be_written_is_refused(tmp_path):
    save_png(str(tmp_path / "new" / "x.png"), b"picture")
    assert (tmp_path / "new" / "x.png").read_bytes() == b"picture"
    for place_, why in ((tmp_path / "new" / "x.png" / "y.png", "is a file"), (tmp_path / "new", "directory")):
        with pytest.raises(RequestError, match=rf"--png {place_}: .*{why}.*name a file"):
            save_png(str(place_), b"other")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["x.png"], "nothing is left lying about"
