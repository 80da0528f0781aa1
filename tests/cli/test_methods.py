"""`mosaic methods`: what methods and strategies declare about themselves is what they do."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from cli_runner import ask, refusal
from helpers import stripes_dataset
from strategy_runs import go, warmed_up

from mosaic_ray.config.plugins import load
from mosaic_ray.config.registry import METHODS, STRATEGIES
from mosaic_ray.core.about import About, Paper

EVERY = [("methods", name) for name in METHODS] + [("strategies", name) for name in STRATEGIES]
PAGE = (Path(__file__).parents[2] / "docs" / "algorithm.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("kind, name", EVERY)
def test_papers_are_those_of_the_page(kind, name):
    about = load(kind, name).about
    for paper in about.papers if about else ():
        [line] = [line for line in PAGE.splitlines() if line.startswith("- ") and paper.title in line]
        assert line.startswith(f"- {paper.authors}. {paper.title}")
        assert str(paper.year) in line and paper.venue in line
        places = (paper.arxiv, paper.doi, paper.url)
        assert any(places) and all(place in line for place in places)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_declares_what_its_stages_send(name):
    method = load("methods", name)
    stages = {stage.name for stage in method.stages}
    if method.about is None:
        return
    assert method.about.generators == ("generators" in stages)
    assert bool(method.about.statistics) == bool(stages & {"prototypes", "class_statistics", "gate"})
    assert (method.about.rounds == "every round") == (method.after_round is not None)


@pytest.mark.parametrize("name", [name for name in STRATEGIES if not load("strategies", name).several_modalities])
def test_a_strategy_declares_the_state_that_clients_keep(tmp_path, monkeypatch, name):
    monkeypatch.setattr("mosaic_ray.data.load.load_dataset", lambda config: stripes_dataset())
    found = go(tmp_path, name, {"warmup.num_rounds": 1, "finetune.num_rounds": 0})
    kept = any(part.startswith("state_") for part in warmed_up(found).parts)
    about = load("strategies", name).about
    assert about is not None and bool(about.state) == kept
    assert bool(about.statistics) == ("statistics" in found["communication_bytes"]["uplink"])


def test_one_is_described_with_knobs_and_papers():
    shown = ask("methods", "ditto").stdout
    for words in ("Strategy ditto:", "state +a personal model", "narrow clients +no", r"ditto\.lam", "ICML 2021"):
        assert re.search(words, shown), words
    both = ask("methods", "fedavg").stdout
    assert "Method fedavg:" in both and "Strategy fedavg:" in both
    assert "Method mosaic:" in (shown := ask("methods", "mosaic+fedrs").stdout) and "Strategy fedrs:" in shown


def test_the_list_says_what_each_needs():
    listed = " ".join(ask("methods").stdout.split())
    assert "Clients send generators and class statistics or prototypes, label counts on the server; once" in listed
    assert "Clients send nothing more, keep a personal model; every round." in listed


def test_bibtex():
    found = ask("methods", "fedbn", "--bibtex").stdout
    assert found.startswith("@inproceedings{li2021fedbn,\n") and found.endswith("}\n")
    assert "author = {Xiaoxiao Li and Meirui Jiang and Xiaofei Zhang and Michael Kamp and Qi Dou}" in found
    every = re.findall(r"^@\w+\{(\w+),$", ask("methods", "--bibtex").stdout, re.MULTILINE)
    assert len(every) == len(set(every)) > 12
    assert Paper("k", "T", "", 2020, "A B, C D").bibtex() == (
        "@misc{k,\n  title = {{T}},\n  author = {A B and C D},\n  year = {2020}\n}"
    )


@pytest.mark.parametrize(
    "words, says",
    [
        (["dito"], 'methods dito: unknown method or strategy; did you mean "ditto"?'),
        (["fedrs+mon"], 'methods fedrs+mon: unknown method or strategy; did you mean "moon"'),
        (["prototype_head", "--bibtex"], "methods prototype_head --bibtex: it declares no paper"),
        (["nowhere.py:X"], "methods nowhere.py:X: nowhere.py: No such file"),
    ],
)
def test_bad_requests_are_one_line(words, says):
    assert says in refusal(ask("methods", *words))


def test_a_plug_in_is_described(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    head = "from mosaic_ray.core.about import About\nfrom mosaic_ray.federated.strategies.base import Strategy\n"
    (tmp_path / "mine.py").write_text(
        head + 'class Mine(Strategy):\n    name = "mine"\n    about = About(state="a diary")\nMINE = Mine()\n'
        'class Bare(Strategy):\n    name = "bare"\n    about = "words of its own"\nBARE = Bare()\n'
    )
    assert re.search("state +a diary", ask("methods", "mine.py:MINE").stdout)
    assert re.search("needs +not declared", ask("methods", "mine.py:BARE").stdout)
    assert About(data_free=False).summary() == "Clients send real images; every round."
