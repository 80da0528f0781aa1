"""`mosaic experiment`: the arithmetic of the studies, whole studies on a tiny experiment, and refusals."""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_runner import ask, refusal
from helpers import FACTS, TASKS, TINY, shard_of, stripes, stripes_dataset
from hypothesis import given
from hypothesis import strategies as st

import mosaic_ray.data.load as datasets
from mosaic_ray.config.presets import FIXED
from mosaic_ray.config.resolve import override
from mosaic_ray.config.schema import ExperimentConfig
from mosaic_ray.core.types import Dataset
from mosaic_ray.distillation.client_tasks import GeneratorInput
from mosaic_ray.distillation.experts import expert_weights
from mosaic_ray.runs.plan import stage_keys
from mosaic_ray.studies import generator_quality, generator_worth, meta_training, moe_weights
from mosaic_ray.studies.harness import Study, as_csv, in_words, over_seeds, run_study
from mosaic_ray.studies.moe_weights import compared, estimate, rank_correlations, total_variation

OPTIONS = {"images": None, "inception": False}
FILES = {"config.toml", "results.csv", "figure.png", "results.json"}


def tiny(base: dict[str, Any], **knobs: Any) -> ExperimentConfig:
    return override(TINY, base | {"warmup.num_rounds": 2, "warmup.local_steps": 3} | knobs)


def run(study: Study, config: ExperimentConfig, storage: Path, seeds: tuple[int, ...] = (0,)) -> dict[str, Any]:
    return run_study(study, config, seeds, OPTIONS, storage=str(storage), progress=False)


@pytest.fixture
def data(monkeypatch: pytest.MonkeyPatch) -> Dataset:
    found = stripes_dataset()
    monkeypatch.setattr(datasets, "load_dataset", lambda config: found)
    return found


def forbid(monkeypatch: pytest.MonkeyPatch, *work: str) -> None:
    """Client work that must not be done again."""
    for name in work:
        monkeypatch.setattr(TASKS[name], "run", lambda *_: pytest.fail("it was computed again"))


# --- arithmetic ------------------------------------------------------------------------------------------------------


counts_of = st.lists(st.lists(st.integers(0, 50), min_size=4, max_size=4), min_size=2, max_size=6).map(np.array)


@given(counts_of.filter(lambda counts: counts.sum(0).all() and counts.sum(1).all()))
def test_perfect_generators_give_the_true_weights(counts):
    true, sizes = expert_weights(counts), counts.sum(1)
    guess = estimate(counts / sizes[:, None], sizes)
    np.testing.assert_allclose(guess, true, atol=1e-12)
    np.testing.assert_allclose(total_variation(true, guess), 0, atol=1e-12)


@given(counts_of.filter(lambda counts: counts.sum(1).all()), st.integers(0, 9))
def test_estimates_are_weights_and_distances_are_bounded(counts, seed):
    shares = np.random.default_rng(seed).dirichlet(np.ones(4) / 4, len(counts))
    guess = estimate(shares, counts.sum(1))
    np.testing.assert_allclose(guess.sum(0), 1)
    distances = total_variation(expert_weights(counts), guess)
    assert ((distances >= 0) & (distances <= 1 + 1e-12)).all()


def test_a_class_that_no_generator_shows_is_weighed_by_size():
    guess = estimate(np.array([[1.0, 0.0], [1.0, 0.0]]), np.array([30, 10]))
    assert guess.tolist() == [[0.75, 0.75], [0.25, 0.25]]


def test_metrics_of_an_estimate_by_hand():
    true, guess = np.array([[0.7, 0.0], [0.2, 0.5], [0.1, 0.5]]), np.array([[0.5, 0.6], [0.3, 0.3], [0.2, 0.1]])
    row = compared("x", true, guess)
    assert row["class_distance"] == pytest.approx([0.2, 0.6])
    assert (row["total_variation"], row["worst"], row["owner"]) == pytest.approx((0.4, 0.6, 0.5))
    assert rank_correlations(true, guess) == pytest.approx([1, -np.sqrt(3) / 2])
    alike = compared("uniform", true, np.full((3, 2), 1 / 3))
    assert (alike["rank_correlation"], alike["owner"]) == (None, None)


def test_summary_over_seeds():
    study = dataclasses.replace(moe_weights.STUDY, by="what", columns={"a": ("A", ".2f"), "b": ("B", "+.1%")})
    rows = [{"seed": 0, "what": "x", "a": 1.0, "b": 0.5}, {"seed": 1, "what": "x", "a": 2.0, "b": None}]
    (line,) = over_seeds(rows, study)
    assert line["a"] == {"mean": 1.5, "sd": pytest.approx(np.sqrt(0.5)), "seeds": 2}
    assert line["b"] == {"mean": 0.5, "sd": None, "seeds": 1}
    assert [in_words(line[c], form) for c, (_, form) in study.columns.items()] == ["1.50 ± 0.71", "+50.0%"]
    assert in_words({"mean": None}, ".1f") == "–"


def test_csv_gives_lists_a_column_each():
    assert as_csv([{"seed": 0, "s": [0.5, None]}, {"seed": 1, "t": "x"}]) == "seed,s_0,s_1,t\n0,0.5,,\n1,,,x\n"
    assert as_csv([{"arm": "=1", "gain": -0.5}]) == "arm,gain\n'=1,-0.5\n"


# --- whole studies ---------------------------------------------------------------------------------------------------


def test_generator_quality_writes_its_files_and_is_cached(data, tmp_path, monkeypatch):
    config = tiny(generator_quality.BASE)
    found = run(generator_quality.STUDY, config, tmp_path, (0, 1))
    folder = Path(found["paths"]["results"])
    assert folder.parent == tmp_path / "experiments"
    assert {path.name for path in folder.iterdir()} == FILES
    assert json.loads((folder / "results.json").read_text()) == found
    assert (folder / "figure.png").read_bytes().startswith(b"\x89PNG")
    with open(folder / "results.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(line["seed"], line["classifier"]) for line in lines] == [
        ("0", "own"), ("0", "judge"), ("1", "own"), ("1", "judge"),
    ]  # fmt: skip
    for row in found["rows"]:
        assert row["num_images"] == 24
        assert row["fid"] >= 0 < row["floor"]
        assert row["ratio"] == pytest.approx(row["fid"] / row["floor"])
        assert 1 <= row["inception_score"] <= 3
        assert sum(row["class_share"]) == pytest.approx(1)
    own, judge = found["rows"][:2]
    assert own["fid"] != judge["fid"], "both classifiers are the same"
    assert set(found["keys"]) == {path.name for path in (tmp_path / "objects").iterdir()}
    forbid(monkeypatch, "train", "generate")
    assert run(generator_quality.STUDY, config, tmp_path, (0, 1)) == found


def test_no_figure_of_quality_looks_at_test_images(data, tmp_path, monkeypatch):
    config = tiny(generator_quality.BASE)
    first = run(generator_quality.STUDY, config, tmp_path / "a")["rows"]
    other = dataclasses.replace(data, test=stripes(60, 7))
    monkeypatch.setattr(datasets, "load_dataset", lambda config: other)
    second = run(generator_quality.STUDY, config, tmp_path / "b")["rows"]
    for a, b in zip(first, second, strict=True):
        assert a | {"test_accuracy": 0} == b | {"test_accuracy": 0}


def test_moe_weights_uses_the_stages_of_an_ordinary_run(data, tmp_path, monkeypatch):
    from mosaic_ray.runs import runner

    config = tiny(moe_weights.BASE)
    runner.run(config, storage=str(tmp_path), progress=False)
    forbid(monkeypatch, "train", "generate")
    rows = run(moe_weights.STUDY, config, tmp_path)["rows"]
    assert [row["weights"] for row in rows] == ["synthetic", "noise", "sizes", "uniform"]
    for row in rows:
        assert 0 <= row["total_variation"] <= row["worst"] <= 1
        assert len(row["class_distance"]) == 3


def test_meta_training_compares_its_arms(data, tmp_path, monkeypatch):
    config = tiny(meta_training.BASE)
    found = run(meta_training.STUDY, config, tmp_path)
    lines = {line["learns_from"]: line for line in found["summary"]}
    assert list(lines) == [*meta_training.ARMS, "real images"]
    for arm in meta_training.ARMS:
        assert lines[arm]["accuracy"]["seeds"] == 1
        differences = lines[arm]["accuracy_difference"]
        if arm == "prototypes":
            assert differences["mean"] is None
        else:
            assert differences["mean"] == pytest.approx(
                lines[arm]["accuracy"]["mean"] - lines["prototypes"]["accuracy"]["mean"]
            )
            assert 0 <= lines[arm]["label_distance"]["mean"] <= 1
            assert 0 <= lines[arm]["auc"]["mean"] <= 1
    own = [row for row in found["rows"] if row["learns_from"] in ("synthetic", "synthetic_vote")]
    assert own[0]["auc"] == own[1]["auc"], "both see the same images"
    forbid(monkeypatch, "train", "generate", "prototypes")
    assert run(meta_training.STUDY, config, tmp_path) == found


# --- generator-worth -------------------------------------------------------------------------------------------------

WORTH = FIXED | generator_worth.BASE | {
    "generator.tau": 300, "finetune.num_rounds": 1, "prototypes.k": 2, "generator.steps": 3,
}  # fmt: skip


def worth(storage: Path, seeds: tuple[int, ...] = (0,), equal_compute: bool = False, **knobs: Any) -> dict[str, Any]:
    config = tiny(generator_worth.BASE, **(WORTH | {name.replace("__", "."): v for name, v in knobs.items()}))
    options = {"equal_compute": equal_compute}
    return run_study(generator_worth.STUDY, config, seeds, options, storage=str(storage), progress=False)


@pytest.mark.parametrize("family", ["dcgan", "cgan", "cvae"])
def test_a_generator_without_a_step_is_the_network_that_was_drawn(family):
    """Apart from the shares of its labels, which a client knows before it trains."""
    from mosaic_ray.core.seeding import seeded
    from mosaic_ray.federated.client import ClientContext, initial_weights
    from mosaic_ray.models.generator import build_generator
    from mosaic_ray.models.state_dict import to_weights

    found = {}
    for steps in (0, 1):
        config = override(TINY, {"generator.family": family, "generator.steps": steps})
        context = ClientContext(config, FACTS, torch.device("cpu"))
        start, shard = initial_weights(context), shard_of(stripes(40))
        found[steps] = TASKS["generate"]().run(context, shard, 2, {"cnn": start}, GeneratorInput(start))
    with seeded(config.seed, "generator/init", 2):
        drawn = to_weights(build_generator(config.generator, FACTS.channels, FACTS.image_size, FACTS.num_classes))
    same = [name for name in drawn if np.array_equal(drawn[name], found[0].weights[name])]
    assert set(drawn) - set(same) <= {"label_cdf"} and len(same) > 3
    assert not all(np.array_equal(drawn[name], found[1].weights[name]) for name in same)
    assert found[0].curve == [] and found[0].progress["steps"].tolist() == [0]


def test_generator_worth_compares_its_arms_in_pairs(data, tmp_path, monkeypatch):
    from mosaic_ray.runs import runner
    from mosaic_ray.runs.equal_compute import extra_rounds, label

    found = worth(tmp_path, (0, 1), equal_compute=True)
    more = extra_rounds(tiny(generator_worth.BASE, **WORTH), FACTS)
    arms = [*generator_worth.ARMS, "floor", label(more)]
    assert [row["arm"] for row in found["rows"]] == 2 * arms and more > 0
    rows = {(row["seed"], row["arm"]): row for row in found["rows"]}
    for seed in (0, 1):
        for arm in arms:
            for other, column in (("real only", "over_real"), ("placebo", "over_placebo")):
                difference = rows[seed, arm]["accuracy"] - rows[seed, other]["accuracy"]
                assert rows[seed, arm][column] == (None if arm == other else difference)
    lines = {line["arm"]: line for line in found["summary"]}
    differences = [rows[seed, "trained"]["over_placebo"] for seed in (0, 1)]
    assert lines["trained"]["over_placebo"]["mean"] == pytest.approx(np.mean(differences))
    assert lines["trained"]["over_placebo"]["sd"] == pytest.approx(np.std(differences, ddof=1))
    assert lines["trained"]["over_placebo"]["seeds"] == 2

    # each arm is an ordinary run, and shares its stages
    forbid(monkeypatch, "train", "generate", "prototypes")
    for arm, knobs in generator_worth.ARMS.items():
        config = tiny(generator_worth.BASE, **(WORTH | knobs))
        summary = runner.run(config, storage=str(tmp_path), progress=False)
        assert summary["accuracy"]["final"] == rows[0, arm]["accuracy"]
    floor = override(config, generator_worth.FLOOR | {"runtime.ceiling": True})
    summary = runner.run(floor, storage=str(tmp_path), progress=False)
    assert summary["accuracy"]["distilled"] == rows[0, "floor"]["accuracy"]
    assert summary["accuracy"]["ceiling"] == rows[0, "floor"]["ceiling"]
    again = worth(tmp_path, (0, 1), equal_compute=True)
    assert again | {"keys": []} == found | {"keys": []} and set(again["keys"]) <= set(found["keys"])
    folder = Path(found["paths"]["results"])
    assert {path.name for path in folder.iterdir()} == FILES
    assert set(found["keys"]) <= {path.name for path in (tmp_path / "objects").iterdir()}


def test_real_only_and_placebo_do_not_follow_the_trained_generators():
    def keys(steps: int) -> dict[str, tuple[str, ...]]:
        config = tiny(generator_worth.BASE, **(WORTH | {"generator.steps": steps}))
        arms = generator_worth.arms(config, FACTS, {"equal_compute": False})
        return {name: stage_keys(arm)["finetune"] for name, arm in arms.items()}

    first, second = keys(2), keys(12)
    assert {name for name in first if first[name] != second[name]} == {"trained"}
    assert len(set(first.values())) == len(first) == 4


# --- the command -----------------------------------------------------------------------------------------------------


def test_experiments_are_listed():
    shown = ask("experiment").stdout
    assert all(name in shown for name in ("generator-quality", "moe-weights", "meta-training", "generator-worth"))


@pytest.mark.parametrize(
    "words, part",
    [
        (("generator-quality", "--images", "5"), "--images 5: it may be 20 to 143"),
        (("generator-quality", "--images", "x"), "--images x"),
        (("generator-quality", "--steps", "0"), "--steps 0"),
        (("generator-quality", "--inception"), "--inception: "),
        (("generator-quality", "--set", "partition.num_clients=2"), "one client holds everything"),
        (("generator-quality", "--set", "partition.validation_fraction=0"), "partition.validation_fraction = 0"),
        (("moe-weights", "--seeds", "1,1"), "--seeds 1,1"),
        (("moe-weights", "--name", "a/b"), "--name a/b"),
        (("meta-training", "--set", "meta.init=prototype_head"), "meta.init = prototype_head"),
        (("meta-training", "--set", "meta.select=true"), "meta.select = true"),
        (("meta-training", "--set", "model.classifiers=[cnn,mobilenet]", "--clients", "4"), "meta.data = synthetic"),
        (("generator-worth", "--set", "rehearsal.weight=0"), "set rehearsal.weight above 0"),
        (("generator-worth", "--set", "rehearsal.weight=0", "--set", "distill.steps=2"), "weight = 0: the arms"),
        (("generator-worth", "--set", "generator.steps=0"), "generator.steps = 0"),
        (("generator-worth", "--set", "generator.family=dcgan"), "generators that take labels"),
        (("generator-worth", "--equal-compute", "--set", "generator.epochs=1"), "generator.epochs = 1: equal client"),
        (("moe-weihgts",), 'unknown command "moe-weihgts"; did you mean "moe-weights"?'),
    ],
)
def test_wrong_requests_are_refused_in_one_line(words, part, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mosaic_ray.execution.placement.Placement.backend", lambda *_: pytest.fail("it started"))
    assert part in refusal(ask("experiment", *words))


def test_the_command_prints_a_table_or_json(data, tmp_path, monkeypatch):
    asked = []

    def fake(study, config, seeds, options, **places):
        asked.append((config, seeds, options))
        line = {"weights": "sizes"} | {name: {"mean": 0.5, "sd": None, "seeds": 1} for name in study.columns}
        return {"seeds": seeds, "summary": [line], "paths": {"results": "somewhere"}}

    monkeypatch.setattr("mosaic_ray.studies.harness.run_study", fake)
    shown = ask("experiment", "moe-weights", "--omega", "0.5").stdout
    assert "0.500" in shown and "files   somewhere" in shown
    assert json.loads(ask("experiment", "moe-weights", "--json", "--seeds", "3").stdout)["paths"]
    ask("experiment", "generator-quality", "--dataset", "mnist", "--steps", "7", "--images", "50")
    ask("experiment", "moe-weights", "--dataset", "mnist", "--preset", "paper")
    ask("experiment", "moe-weights", "--dataset", "mnist", "--preset", "demo")
    (first, seeds, _), (_, three, _), (quality, _, options), *named = asked
    assert (first.partition.omega, first.data.name, seeds, three) == (0.5, "digits", (0, 1, 2), (3,))
    assert (quality.data.name, quality.warmup.momentum, quality.generator.steps) == ("mnist", 0.9, 7)
    assert options == {"images": 50, "inception": False}
    # a scale that suits the data is chosen where none is named
    found = [(config.algorithm, config.warmup.momentum) for config, _, _ in named]
    assert found == [("paper", 0.9), ("distilled", 0.0)]
