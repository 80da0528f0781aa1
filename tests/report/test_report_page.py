"""A run's page: one file that loads nothing, with readable colours and correct sentences."""

from __future__ import annotations

import re
from itertools import combinations, pairwise

import numpy as np
import pytest
from cli_runner import ask, refusal
from reports import ACCURACY, FINDING, Reader, make_run, write_run

from mosaic_ray.core.errors import RequestError
from mosaic_ray.report.api import load_run
from mosaic_ray.report.figures import run as figures
from mosaic_ray.report.figures.heatmap import heat_map
from mosaic_ray.report.figures.style import PALETTE, STEPS, axes
from mosaic_ray.report.html import run as run_page
from mosaic_ray.report.html.blocks import FILE
from mosaic_ray.report.html.render import render, write_report
from mosaic_ray.report.html.svg import inline_svg

LARGEST = 3 << 20  # bytes of a page
NAMES = [figure.name for section in figures.FIGURES.values() for figure in section]


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> str:
    """The page of a run that has everything."""
    return render(make_run(tmp_path_factory.mktemp("st")))


@pytest.fixture(scope="module")
def read(page) -> Reader:
    return Reader(page)


# --- the file --------------------------------------------------------------------------------------------------------


def test_it_holds_every_figure_and_says_so_of_none(read, page):
    assert [f"{name}-words" for name in NAMES] == [a["aria-labelledby"] for a in read.all("figure") if "role" in a]
    assert "Not shown" not in page


def test_it_loads_nothing_and_runs_nothing(read, page):
    assert not {"script", "link", "iframe", "object", "base"} & {tag for tag, _ in read.tags}
    for tag, attributes in read.tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "xlink:href", "action"):
                assert value.startswith(("#", "data:image/png;base64,")), (tag, value)
    assert not re.search(r"https?:|@import|@font-face|url\((?!#)", page)


def test_it_is_small_and_the_same_each_time(page, tmp_path):
    assert len(page.encode()) < LARGEST
    assert render(make_run(tmp_path)) == page


def test_every_figure_says_what_it_shows_in_words_and_has_its_numbers(read):
    drawn = [attributes for attributes in read.all("figure") if attributes.get("role") == "img"]
    words = [read.labels[attributes["aria-labelledby"]].strip() for attributes in drawn]
    assert all(word.endswith(".") and len(word) > 20 for word in words) and len(set(words)) == len(words)
    assert len(read.all("table")) >= len(drawn) and len(read.all("details")) == len(drawn) + 1  # and config.toml
    assert len({attributes["alt"] for attributes in read.all("img")}) == len(read.all("img")) == 6


def test_ids_are_unique_and_every_reference_finds_one(read, page):
    ids = [attributes["id"] for _, attributes in read.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    wanted = {attributes[name] for _, attributes in read.tags for name in ("aria-labelledby",) if name in attributes}
    wanted |= {a["href"].removeprefix("#") for _, a in read.tags if a.get("href", "").startswith("#")}
    wanted |= set(re.findall(r"url\(#([^)]+)\)", page))
    assert wanted <= set(ids)


def test_headings_are_in_order(read):
    levels = [int(tag[1]) for tag, _ in read.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))


def test_colours_are_the_themes(page):
    head, _, body = page.partition("</style>")
    assert not re.search(r"#[0-9a-fA-F]{6}\b|\brgba?\(", re.sub("data:[^\"']*", "", body))
    used = set(re.findall(r"var\(--([a-z0-9]+)\)", page))
    assert used <= set(PALETTE)
    light, dark = head.split("prefers-color-scheme: dark")
    for role in PALETTE:
        assert f"--{role}: {PALETTE[role][0]};" in light and f"--{role}: {PALETTE[role][1]};" in dark
    assert "@media print" in head


def linear(colour: str) -> np.ndarray:
    """Return the linear RGB channels in [0, 1] of a colour (WCAG 2.2)."""
    channels = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)


def contrast(one: str, other: str) -> float:
    """Return the contrast ratio in [1, 21] (WCAG 2.2)."""
    dark, light = sorted(float(linear(colour) @ [0.2126, 0.7152, 0.0722]) for colour in (one, other))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_contrast_meets_aa(theme):
    colour = {role: values[theme] for role, values in PALETTE.items()}
    for role in ("ink", "muted", *(f"s{n}" for n in range(1, 9))):  # labels have the colours of series too
        assert contrast(colour[role], colour["paper"]) >= 4.5, role
    for role in ("ink", "muted"):
        assert contrast(colour[role], colour["raised"]) >= 4.5, role
    for step in range(STEPS):
        assert contrast(colour[f"t{step}"], colour[f"h{step}"]) >= 4.5, step


def test_numbers_in_cells_are_drawn_in_the_pages_colours():
    """Every one: matplotlib does not write pure black down, which would stay black on a dark page."""
    figure, over = axes()
    shares = ((np.arange(STEPS) + 0.5)[None] / STEPS) ** 2
    heat_map(over, shares, np.full(shares.shape, "8"), "row")
    drawing = inline_svg(figure, "x")
    assert all(f"var(--t{step})" in drawing and f"var(--h{step})" in drawing for step in range(STEPS))


#: Machado, Oliveira and Fernandes 2009, severity 1, on linear RGB.
BLINDNESS = {
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}  # fmt: skip


def _lab(colour: str, matrix: list[list[float]]) -> np.ndarray:
    """Return CIELAB of a colour under the colour blindness ``matrix``."""
    seen = np.clip(np.array(matrix) @ linear(colour), 0, 1)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    x, y, z = np.cbrt(np.maximum(to_xyz @ seen / [0.9505, 1.0, 1.089], 1e-6))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
@pytest.mark.parametrize("matrix", BLINDNESS.values(), ids=BLINDNESS)
def test_the_four_first_series_differ_to_colour_blind_readers(theme, matrix):
    seen = {role: _lab(PALETTE[role][theme], matrix) for role in ("s1", "s2", "s3", "s4")}
    for one, other in combinations(seen, 2):
        assert np.linalg.norm(seen[one] - seen[other]) > 12, (one, other)


# --- the content -----------------------------------------------------------------------------------------------------


def test_it_leads_with_the_result(read):
    assert "right on 81.2 % of the test images, 25.0 points more than the control" in read.text("header")
    cards = dict(zip(read.words["dt"], read.words["dd"][::2], strict=False))
    assert cards["gain over control"] == "+25.0" and "5.0 MiB" in read.words["dd"] and "1 warning" in read.words["dd"]
    assert "20.0 s" in read.words["dd"] and "1 of 10 stages cached" in read.words["dd"]


def test_findings_come_with_threshold_and_advice(read):
    text = read.text("ul")
    for words in (FINDING["code"], "generators, client 1", "It shows 1 of its 2 classes", "Try: raise generator.steps"):
        assert words in text
    assert "value 0.25, threshold 0.5" in text


def test_it_says_how_to_do_it_again(read):
    text = read.text("pre")
    assert "mosaic run --storage here" in text and "num_rounds = 3" in text and "mosaic-ray 0.1.0" in text


def test_sentences_are_true(tmp_path):
    run = load_run(make_run(tmp_path))
    text = {figure.name: figure(run).words for section in figures.FIGURES.values() for figure in section}
    assert (
        "class 0 from 50.0 % to 75.0 %" in text["per_class"] and "1 class loses more than 5 points" in text["per_class"]
    )
    assert "of 2 classes: 1 class gains" in text["per_class"], "a class without test images is not counted"
    assert text["confusion_final"].startswith("The final model is right on 24 of 30 test images")
    assert "takes class 2 for 0 (3 of 10)" in text["confusion_final"]
    assert "3 clients hold 35 to 43 training images of 2 to 2 of 3 classes" in text["partition"]
    assert "show 25.0 % to 75.0 %" in text["coverage"] and "client 1" in text["coverage"]
    assert "of 100 synthetic images the teacher names class 0 most (60.0 %)" in text["synthetic_classes"]
    assert "every class" in text["synthetic_classes"]
    assert "none comes from one client alone" in text["expert_weights"] and "88.9 %" in text["expert_weights"]
    assert "for 100.0 % of the classes their own expert" in text["meta_gates"]
    assert "warm-up ends at 37.5 %" in text["rounds"] and "the control from 50.0 % to 56.2 %" in text["rounds"]
    assert all(part in text["time"] for part in ("18.0 s computing", "1 of 10 stages (outlined)", "8.0 s"))
    assert (
        text["baselines"]
        == "In as many rounds the run sends 1.25 times what FedAvg sends. Arithmetic predicts it to the byte."
    )
    assert (
        "send 3.0 MiB and receive 2.0 MiB" in text["communication"]
        and "100.0 % of both is weights" in text["communication"]
    )


def test_figures_show_their_frames(tmp_path):
    run = load_run(make_run(tmp_path))
    over = run.plot("rounds").axes[0]
    control = next(line for line in over.lines if list(line.get_xdata()) == [3, 4, 5] and line.get_ydata()[0] == 0.5)
    assert list(control.get_ydata()) == [0.5, 0.53125, 0.5625]
    widths = [bar.get_width() for bar in run.plot("time").axes[0].patches]
    assert sorted(widths) == [2.0] * 9 + [8.0], "a cached stage is as long as it took when it was computed"
    texts = {text.get_text() for text in run.plot("confusion_final").axes[0].texts}
    assert texts == {"8", "2", "9", "1", "3", "7"}
    assert [bar.get_height() for bar in run.plot("synthetic_classes").axes[0].patches] == [0.6, 0.39, 0.01]
    assert [bar.get_width() for bar in run.plot("coverage").axes[0].patches] == [0.25, 0.5, 0.75]
    table, sizes = run.plot("partition").axes
    assert [text.get_text() for text in table.texts] == ["40", "3", "20", "20", "5", "30"]
    assert [text.get_text() for text in sizes.texts] == ["43", "40", "35"]
    assert len(run.plot("samples").axes) == len(run.plot("progress").axes) == 3


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"accuracy": ACCURACY | {"final": 0.5}}, "6.2 points fewer than the control"),
        ({"accuracy": ACCURACY | {"final": 0.5625}}, "exactly as many as the control"),
        ({"accuracy": ACCURACY | {"teacher": None, "distilled": None}}, "25.0 points more than the control"),
        ({"accuracy": {"initial": 0.5, "final": 0.5, "control": 0.5}}, "exactly as many as the control"),
        ({"accuracy": ACCURACY | {"control": None}}, "no control"),
    ],
)
def test_other_results_have_their_sentence(tmp_path, changes, words):
    assert words in run_page.verdict(load_run(make_run(tmp_path, **changes)))


def test_a_sound_run_and_one_that_has_not_ended_say_so_under_health(tmp_path):
    assert run_page.health(load_run(make_run(tmp_path, health=[]))).lead == "Nothing looked unwell."
    assert "once a run is done" in run_page.health(load_run(write_run(tmp_path / "one", None))).lead


# --- runs that lack something ----------------------------------------------------------------------------------------


def test_a_failed_run_shows_its_error_and_what_there_is(tmp_path):
    failed = {"status": "failed", "error": "stage warmup: <b>no memory</b> for $x^2$", "stage": "warmup", "client": 2}
    read = Reader(render(write_run(tmp_path / "<i>one", failed)))
    assert "Failed in stage warmup, client 2" in read.text("header") and "<b>no memory</b> for $x^2$" in read.text(
        "header"
    )
    assert read.text("h1") == "<i>one" and not read.all("b") and not read.all("i")
    assert [a["aria-labelledby"] for a in read.all("figure")] == [
        "rounds-words",
        "coverage-words",
        "distillation-words",
    ]


def test_an_unfinished_run_and_an_empty_one_render(tmp_path):
    assert "The run is unfinished" in Reader(render(write_run(tmp_path / "one", None))).text("header")
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "summary.json").write_text("{}")
    assert not Reader(render(tmp_path / "two")).all("figure")


def test_a_run_without_its_store_names_missing_results_and_the_reason(tmp_path):
    folder = make_run(tmp_path / "a").rename(tmp_path / "one")
    read = Reader(render(folder))
    for title in (
        "Final model",
        "Clients in the class experts",
        "Synthetic images by client",
        "Synthetic images over time",
    ):
        assert f"{title} (there is no store beside this folder" in read.text("section")
    assert "stages-words" in read.labels and not read.all("img")


def test_many_classes_and_clients_stay_small_and_true(tmp_path):
    draws = np.random.default_rng(0)
    counts = draws.integers(0, 50, (60, 100))
    classes = {role: draws.random(100).tolist() for role in ACCURACY}
    folder = make_run(tmp_path, label_counts=counts.tolist(), per_class_accuracy=classes)
    page = render(folder)
    assert len(page.encode()) < LARGEST
    assert "60 clients hold" in Reader(page).labels["partition-words"]


# --- where it goes ---------------------------------------------------------------------------------------------------


def test_the_command_writes_the_page_and_says_where(tmp_path):
    folder = write_run(tmp_path / "runs" / "one", None)
    done = ask("report", str(folder))
    assert done.exit_code == 0 and done.stdout == f"{folder / FILE}\n" and done.stderr == ""
    out = tmp_path / "new" / "page.html"
    assert ask("report", str(tmp_path), "--out", str(out)).stdout == f"{out}\n"
    assert out.read_bytes() == (folder / FILE).read_bytes()
    assert [path.name for path in out.parent.iterdir()] == ["page.html"]


def test_wrong_requests_are_refused_in_one_line(tmp_path):
    folder = write_run(tmp_path / "one", None)
    (tmp_path / "file").write_text("")
    assert "nowhere" in refusal(ask("report", str(tmp_path / "nowhere")))
    assert "--out" in refusal(ask("report", str(folder), "--out", str(tmp_path / "file" / "page.html")))
    assert "it is a folder" in refusal(ask("report", str(folder), "--out", str(tmp_path)))
    (folder / "summary.json").write_text("{")
    assert "summary.json" in refusal(ask("report", str(folder)))
    with pytest.raises(RequestError):
        write_report(folder)
    assert not (folder / FILE).exists()
