"""Whole runs on samples of several modalities: image and text of which neither alone tells the class."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers import TINY, assert_same, interrupted, stripes_dataset
from safetensors.numpy import load_file
from signs import FACTS, REHEARSAL, SOME, signs_dataset

from mosaic_ray.config.resolve import override
from mosaic_ray.core.errors import RequestError
from mosaic_ray.runs import runner

DISTILLED = {
    "algorithm": "distilled", "generator.family": "cvae", "method": "mosaic", "partition.modalities": SOME,
    "prototypes.subsets": "all", "meta.tokens": "modality", "distill.modality_dropout": 0.5,
}  # fmt: skip



@pytest.fixture(autouse=True)
def signs_as_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mosaic_ray.data.load.load_dataset", lambda config: signs_dataset())
    monkeypatch.setattr("mosaic_ray.data.load.known_facts", lambda config: FACTS)


def go(tmp_path: Path, knobs: dict | None = None, **options) -> dict:
    return runner.run(override(TINY, knobs or {}), storage=str(tmp_path), progress=False, **options)


def student(summary: dict) -> dict[str, np.ndarray]:
    return load_file(Path(summary["paths"]["run"]) / "student.safetensors")


def test_the_fused_network_beats_each_modality_by_ten_points(tmp_path: Path) -> None:
    knobs = {
        "method": "fedavg", "model.fusion": "mean", "partition.omega": 100.0, "warmup.num_rounds": 12,
        "warmup.local_steps": 8, "warmup.lr": 0.1, "warmup.momentum": 0.9,
    }  # fmt: skip
    found = go(tmp_path, knobs)["subset_accuracy"]["final"]
    single = max(found["image"], found["text"], found["v"])
    assert found["image+text"] >= single + 0.1 and found["image+text+v"] >= single + 0.1
    assert max(found["image"], found["text"]) < 0.7  # each tells one of two bits


def test_the_accuracy_of_a_run_is_the_mean_over_the_sets(tmp_path: Path) -> None:
    summary = go(tmp_path, {"method": "fedavg"})
    for role, sets in summary["subset_accuracy"].items():
        assert len(sets) == 7
        assert summary["accuracy"][role] == pytest.approx(np.mean(list(sets.values())))


@pytest.mark.parametrize("fusion", ["gated", "late", "zero_fill"])
def test_rehearsal_runs_with_every_fusion_and_sends_what_is_predicted(tmp_path: Path, fusion: str) -> None:
    summary = go(tmp_path, REHEARSAL | {"model.fusion": fusion})
    assert summary["communication"]["measured_over_predicted"] == 1
    assert summary["accuracy"]["final"] > 0
    again = go(tmp_path, REHEARSAL | {"model.fusion": fusion})
    assert all(stage["cached"] for stage in again["stages"].values())


@pytest.mark.parametrize("knobs", [REHEARSAL, {"method": "fedavg", "partition.modalities": SOME}], ids=["m", "f"])
def test_the_weights_of_all_modalities_are_all_weights_of_the_rounds(tmp_path: Path, knobs: dict) -> None:
    knobs = knobs | {"finetune.head": "keep", "prototypes.rounds": "all"}
    summary = go(tmp_path, knobs)
    rows = summary["communication"]["modalities"]
    assert [(row["modality"], row["clients"]) for row in rows] == [("image", 2), ("text", 2), ("v", 2), ("", 3)]
    for way in ("uplink", "downlink"):
        assert sum(row[way] for row in rows) == summary["communication_bytes"][way]["weights"]
    sizes = {row["modality"]: row["uplink"] for row in rows}
    assert sizes["image"] > sizes["v"] > 0


def test_clients_that_lack_a_modality_send_less(tmp_path: Path) -> None:
    whole, some = (go(tmp_path, {"method": "fedavg", "partition.modalities": held}) for held in ((), SOME))
    assert some["communication_bytes"]["uplink"]["weights"] < 0.8 * whole["communication_bytes"]["uplink"]["weights"]
    assert some["communication"]["measured_over_predicted"] == 1


@pytest.mark.parametrize(
    "knobs",
    [
        {"method": "lda_head"},
        {"method": "prototype_head"},
        {
            "federation.widths": (1.0, 0.5),
            "federation.strategy": "fedrolex",
            "method": "lda_head",
            "model.fusion": "mean",
        },
        {"federation.strategy": "fedprox", "warmup.modality_dropout": 0.5},
        {"federation.strategy": "pmcmfl", "model.fusion": "prototypes", "method": "lda_head"},
        {"algorithm": "distilled", "generator.family": "cvae", "method": "mosaic"},
        {"algorithm": "distilled", "generator.family": "cgan", "method": "mosaic"},
        REHEARSAL | {"generator.family": "cgan"},
        {"model.fusion": "zero_fill", "method": "lda_head", "prototypes.subsets": "all"},
        {"finetune.head": "prototype_head", "prototypes.subsets": "all"},
        DISTILLED | {"meta.input": "full", "model.fusion": "gated", "meta.tokens": "expert", "meta.init": "random"},
        DISTILLED
        | {"federation.widths": (1.0, 0.5), "federation.strategy": "fedrolex"}
        | {"model.fusion": "mean", "meta.tokens": "expert"},
        REHEARSAL | {"rehearsal.modalities": "single", "rehearsal.weight": 0.0, "rehearsal.candidates": (1.0,)},
        REHEARSAL | {"rehearsal.begins": "warmup", "generator.stage": "before"},
        REHEARSAL | {"federation.widths": (1.0, 0.5), "federation.strategy": "heterofl", "model.fusion": "gated"},
    ],
    ids=lambda knobs: "-".join(map(str, [*knobs.values()][:2])),
)
def test_methods_and_strategies_run(tmp_path: Path, knobs: dict) -> None:
    summary = go(tmp_path, {"partition.modalities": SOME, "method": "fedavg"} | knobs)
    assert 0 < summary["accuracy"]["final"] <= 1
    assert summary["communication"]["measured_over_predicted"] in (1, None) or knobs.get("rehearsal.candidates")


def test_an_interrupted_run_ends_with_the_same_numbers(tmp_path: Path) -> None:
    whole = go(tmp_path / "whole", REHEARSAL)
    with interrupted(2, "local"):
        go(tmp_path / "cut", REHEARSAL | {"warmup.checkpoint_rounds": 1})
    resumed = go(tmp_path / "cut", REHEARSAL | {"warmup.checkpoint_rounds": 1})
    assert resumed["accuracy"] == whole["accuracy"]
    assert_same(student(resumed), student(whole))


PMCMFL = {
    "method": "fedavg", "federation.strategy": "pmcmfl", "model.fusion": "prototypes", "partition.modalities": SOME,
    "pmcmfl.mu": 0.1,
}  # fmt: skip


def test_pmcmfl_makes_prototypes_goes_on_with_them_and_sends_what_is_predicted(tmp_path: Path) -> None:
    whole = go(tmp_path / "whole", PMCMFL)
    assert whole["communication"]["measured_over_predicted"] == 1
    prototypes = student(whole)["trunk.prototypes"]
    assert prototypes.shape == (3, 4, 16) and (np.abs(prototypes).sum(2) > 0).all()
    with interrupted(2, "local"):
        go(tmp_path / "cut", PMCMFL | {"warmup.checkpoint_rounds": 1})
    resumed = go(tmp_path / "cut", PMCMFL | {"warmup.checkpoint_rounds": 1})
    assert_same(student(resumed), student(whole))


def test_pmcmfl_is_about_several_modalities(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mosaic_ray.data.load.load_dataset", lambda config: stripes_dataset())
    monkeypatch.setattr("mosaic_ray.data.load.known_facts", lambda config: stripes_dataset().facts)
    with pytest.raises(RequestError, match="samples of several modalities"):
        go(tmp_path, PMCMFL | {"partition.modalities": ()})


@pytest.mark.ray
@pytest.mark.parametrize(
    "knobs",
    [REHEARSAL, PMCMFL, REHEARSAL | {"generator.family": "cgan"}, DISTILLED],
    ids=["rehearsal", "pmcmfl", "cgan", "distilled"],
)
def test_both_hosts_give_the_same_bits(tmp_path: Path, ray_up, knobs: dict) -> None:
    serial = go(tmp_path / "serial", knobs)
    ray = go(tmp_path / "ray", knobs | {"runtime.host": "ray"}, address="auto")
    assert serial["accuracy"] == ray["accuracy"]
    assert_same(student(serial), student(ray))


@pytest.mark.parametrize(
    "knobs, says",
    [
        ({"method": "dense"}, "several modalities"),
        ({"method": "fedcvae"}, "several modalities"),
        ({"federation.strategy": "scaffold", "partition.modalities": SOME}, "scaffold"),
        ({"method": "mosaic"}, "generator.family=cvae or cgan"),
        ({"method": "mosaic", "generator.family": "cvae", "generator.feature_weight": 1.0}, "feature_weight=0"),
        ({"method": "mosaic", "generator.family": "cgan", "generator.diff_augment": True}, "diff_augment=false"),
        ({"method": "mosaic", "generator.family": "cgan", "generator.discriminator": "shared_trunk"}, "dcgan"),
        ({"method": "mosaic", "generator.family": "cgan", "generator.gan_range": "model_norm"}, "pm1_then_renorm"),
        ({"partition.modalities": ("image+sound",)}, "sound"),
        ({"partition.modalities": ("image", "text")}, "no client holds v"),
        ({"federation.widths": (0.5,), "model.fusion": "late", "federation.strategy": "fedrolex"}, "cannot be cut"),
        ({"model.fusion": "prototypes"}, "take pmcmfl"),
        (DISTILLED | {"model.fusion": "mean"}, "meta.tokens = modality"),
        (DISTILLED | {"meta.input": "full"}, "meta.tokens = modality"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_starts(tmp_path: Path, knobs: dict, says: str) -> None:
    with pytest.raises(RequestError, match=says):
        go(tmp_path, {"method": "fedavg"} | knobs)
    assert not list(tmp_path.rglob("objects/*"))


def test_a_teacher_with_tokens_by_modality_sends_what_is_predicted_and_is_found_again(tmp_path: Path) -> None:
    summary = go(tmp_path, DISTILLED)
    assert summary["communication"]["measured_over_predicted"] == 1
    again = go(tmp_path, DISTILLED)
    assert all(stage["cached"] for stage in again["stages"].values())
    assert again["accuracy"] == summary["accuracy"]
    plain = go(tmp_path, DISTILLED | {"prototypes.subsets": "held"})
    sent = [run["communication_bytes"]["uplink"]["prototypes"] for run in (plain, summary)]
    assert sent[1] > 2.5 * sent[0]  # a client with two modalities sends prototypes of three sets


@pytest.mark.parametrize(
    "knobs",
    [
        {"prototypes.subsets": "all"},
        {"meta.tokens": "modality"},
        {"warmup.modality_dropout": 0.5},
        {"distill.modality_dropout": 0.5},
    ],
)
def test_switches_about_several_modalities_are_refused_for_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, knobs: dict
) -> None:
    monkeypatch.setattr("mosaic_ray.data.load.load_dataset", lambda config: stripes_dataset())
    monkeypatch.setattr("mosaic_ray.data.load.known_facts", lambda config: stripes_dataset().facts)
    with pytest.raises(RequestError, match=f"{next(iter(knobs))}: samples of .* have one modality"):
        go(tmp_path, knobs)
