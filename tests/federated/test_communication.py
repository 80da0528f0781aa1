"""The communication ledger: measured bytes, predicted bytes, and their equality in a run."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import safetensors.numpy
from helpers import FACTS, TINY, interrupted, small_ray, stripes_dataset
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from mosaic_ray.config.resolve import override, resolve
from mosaic_ray.config.schema import PrototypesConfig
from mosaic_ray.config.validate import check
from mosaic_ray.core.types import DataFacts
from mosaic_ray.distillation.prototypes import centroids, judging_images
from mosaic_ray.federated.client_models import Federation
from mosaic_ray.federated.communication import (
    Size,
    Tally,
    num_parameters,
    num_prototypes,
    prototype_entries,
    size_of,
    size_of_entries,
)
from mosaic_ray.runs import runner
from mosaic_ray.runs.communication import baselines, predicted

CIFAR10 = DataFacts("cifar10", 10, 3, 32, (0.5,) * 3, (0.2,) * 3)
MIB = 2**20

ARRAYS = st.dictionaries(
    st.text("abz.019_", min_size=1, max_size=30),
    npst.arrays(
        st.sampled_from([np.float32, np.float64, np.int64, np.uint8]), npst.array_shapes(min_dims=0, min_side=0)
    ),
    max_size=6,
)


# --- the measure -----------------------------------------------------------------------------------------------------


@given(ARRAYS)
def test_a_message_is_as_long_as_its_safetensors_file(arrays):
    size = size_of(arrays)
    assert size.payload == sum(array.nbytes for array in arrays.values())
    assert size.payload + size.frame == len(safetensors.numpy.save(arrays))


def test_a_tally_adds_up_by_client_round_and_kind():
    tally = Tally(2, 3)
    tally.add("uplink", "weights", 0, Size(10, 1))
    tally.add("uplink", "weights", 2, Size(10, 1), round_num=1, times=2)
    tally.add("downlink", "weights", 2, Size(5, 0), round_num=1)
    assert tally.totals() == {"uplink": {"weights": 30, "frames": 3}, "downlink": {"weights": 5}}
    assert tally.by_client("uplink").tolist() == [11, 0, 22] and tally.by_client("downlink").tolist() == [0, 0, 5]
    assert tally.arrays()["uplink/weights"].tolist() == [[10, 0, 0], [0, 0, 20]]
    again = Tally(2, 3, tally.arrays())
    again.add("uplink", "weights", 0, Size(10, 1))
    assert (tally.total, again.total, Tally.of([tally, again], 3).total) == (38, 49, 87)


def test_an_empty_tally_is_nothing():
    assert Tally(0, 2).totals() == {"uplink": {}, "downlink": {}} and Tally(0, 2).by_client("uplink").tolist() == [0, 0]


@pytest.mark.parametrize("held, k, cap", [(0, 2, 0), (1, 2, 0), (2, 2, 0), (3, 2, 0), (3, 2, 1), (5, 1, 2), (4, 3, 2)])
@pytest.mark.parametrize("share", [0.0, 0.25, 0.5])
def test_as_many_prototypes_are_foreseen_as_k_means_makes(held, k, cap, share):
    section = PrototypesConfig(k, cap=cap, held_out=share)
    labels = np.zeros(held, np.int64)
    judging = judging_images(labels, share, 0, 0)
    made = 0
    for part in (int((~judging).sum()), int(judging.sum())):
        sent = len(centroids(np.random.default_rng(0).normal(size=(part, 2)), k)[0]) if part else 0
        made += min(sent, cap) if cap else sent
    assert num_prototypes(held, section) == made
    assert num_prototypes(held, dataclasses.replace(section, samples=64)) >= made


# --- the paper's arithmetic (docs/algorithm.md 4.6) ------------------------------------------------------------------


def paper(**knobs):
    values = {"prototypes__k": 10, "warmup__num_rounds": 300, "finetune__num_rounds": 0} | knobs
    return override(resolve("cifar10+paper"), {name.replace("__", "."): value for name, value in values.items()})


def test_the_papers_models_generators_and_prototypes_have_the_sizes_of_the_specification():
    federation = Federation(paper(), CIFAR10)
    assert size_of_entries(federation.entries("resnet18")).payload / MIB == pytest.approx(42.66, abs=0.005)
    sent = predicted(paper(), CIFAR10).totals()
    assert sent["uplink"]["generators"] / 10 / MIB == pytest.approx(13.64, abs=0.005)
    vectors, whole = (
        size_of_entries(e).payload for e in ({"v": ((100, 512), np.float32)}, prototype_entries(100, 512))
    )
    assert vectors / MIB == pytest.approx(0.195, abs=0.0005)
    assert sent["uplink"]["prototypes"] == 10 * whole < 1.01 * 10 * vectors
    assert sent["uplink"]["counts"] == 10 * 10 * 8


def test_o26_narrow_networks_have_the_parameters_of_the_specification():
    federation = Federation(paper(), CIFAR10)
    found = [num_parameters(federation.entries("resnet18", width)) for width in (1.0, 0.5, 0.25, 0.125, 0.0625)]
    assert found == [11_173_962, 2_797_610, 701_466, 176_402, 44_622]


def test_300_rounds_of_fedavg_move_250_gib_and_mosaics_extras_are_a_two_thousandth_of_it():
    fedavg = predicted(paper(method="fedavg"), CIFAR10).totals()
    rounds = fedavg["uplink"]["weights"] + fedavg["downlink"]["weights"]
    assert rounds / 2**30 == pytest.approx(250, abs=0.1)
    mosaic = predicted(paper(), CIFAR10).totals()
    extras = mosaic["uplink"]["generators"] + mosaic["uplink"]["prototypes"]
    assert extras / MIB == pytest.approx(138, abs=1)
    assert extras / rounds == pytest.approx(0.0005, abs=0.0001)
    assert mosaic["downlink"] == fedavg["downlink"], "the paper's prototypes are made with the clients' own models"


def test_cifar100_at_1000_rounds_moves_837_gib():
    facts = DataFacts("cifar100", 100, 3, 32, (0.5,) * 3, (0.2,) * 3)
    sent = predicted(paper(method="fedavg", warmup__num_rounds=1000), facts).totals()
    assert (sent["uplink"]["weights"] + sent["downlink"]["weights"]) / 2**30 == pytest.approx(837, abs=1)


# --- measured bytes of a run equal predicted ones -------------------------------------------------------------------

QUICK = {"generator.steps": 2, "meta.updates": 3, "distill.steps": 2, "runtime.eval_rounds": 0}
RUNS = {
    "plain": {},
    "narrow": {"federation.optimiser": "fedrolex", "federation.widths": (1.0, 0.5, 0.25)},
    "mixed": {"model.classifiers": ("cnn", "mobilenet", "cnn")},
    "partial": {"federation.cohort_size": 2, "federation.drop_rate": 0.3},
    "every round": {"prototypes.rounds": "all", "prototypes.cap": 2},
    "judged by clients": {"distill.backbone_lr": 1e-4, "partition.validation_fraction": 0.2, "distill.check_steps": 1},
    "centroids held out": {"prototypes.split": "cells"},
    "conditional": {"generator.conditional": True, "prototypes.model": "client"},
    "prototype_head": {"method": "prototype_head", "federation.optimiser": "heterofl", "federation.widths": (0.5, 1.0)},
    "fedavg without a warm-up": {"method": "fedavg", "warmup.num_rounds": 0},
}


@pytest.fixture(autouse=True)
def stripes_as_data(monkeypatch):
    """Every run of this module trains on the tiny data set."""
    monkeypatch.setattr("mosaic_ray.data.load.load_dataset", lambda config: stripes_dataset())


def go(tmp_path, knobs, **options):
    return runner.run(check(override(TINY, QUICK | knobs)), storage=str(tmp_path), progress=False, **options)


@pytest.mark.parametrize("knobs", RUNS.values(), ids=list(RUNS))
def test_a_run_sends_what_arithmetic_says_of_every_kind_and_client(tmp_path, knobs):
    summary = go(tmp_path, knobs)
    found, sent = summary["communication"], summary["communication_bytes"]
    assert found["predicted"] == sent  # to the byte, which is well within a hundredth
    assert found["measured_over_predicted"] == 1.0
    assert found["total"] == sum(sum(kinds.values()) for kinds in sent.values())
    for way, kinds in sent.items():
        assert sum(kinds.values()) == sum(row[way] for row in found["clients"])
        assert [row[way] for row in found["clients"]] == [row[f"predicted_{way}"] for row in found["clients"]]
    config = check(override(TINY, QUICK | knobs))
    bound = predicted(config, FACTS)
    assert bound.total >= found["total"], "without label counts prototypes have an upper bound"
    assert json.loads(json.dumps(found)) == found


def test_wider_clients_send_more_and_widths_are_counted_separately(tmp_path):
    found = go(tmp_path, RUNS["narrow"])["communication"]
    whole, half, quarter = found["widths"]
    assert [row["width"] for row in found["widths"]] == [1.0, 0.5, 0.25]
    assert whole["model_bytes"] > 3 * half["model_bytes"] > 9 * quarter["model_bytes"]
    assert whole["uplink"] > half["uplink"] > quarter["uplink"]


def test_fedavg_and_fedrolex_stand_beside_it_at_equal_rounds(tmp_path):
    mine = go(tmp_path, {})["communication"]["baselines"]
    fedavg = go(tmp_path, {"method": "fedavg"})["communication_bytes"]
    widths = (1.0, 0.5, 0.25, 0.125, 0.0625)
    rolling = go(
        tmp_path,
        {"method": "fedavg", "federation.optimiser": "fedrolex", "federation.widths": widths, "model.width": 16},
    )
    assert mine["fedavg"] == fedavg
    assert rolling["communication"]["baselines"]["fedrolex"] == rolling["communication_bytes"]
    assert mine["fedrolex"]["uplink"]["weights"] < mine["fedavg"]["uplink"]["weights"]


def test_a_network_that_cannot_be_cut_has_no_fedrolex_beside_it(tmp_path, monkeypatch):
    folder = tmp_path / "lab"
    folder.mkdir()
    (folder / "uncuttable_nets.py").write_text(
        "import torch\nfrom torch import nn\n\n\nclass Net(nn.Module):\n"
        "    def __init__(self, channels, num_classes, size):\n        super().__init__()\n"
        "        self.bn = nn.BatchNorm2d(channels)\n"
        "        self.head = nn.Linear(channels * size * size, num_classes)\n\n"
        "    def forward(self, x):\n        y = self.bn(x)\n"
        "        if y.sum() > 0:\n            y = y * 1.0\n        return self.head(y.flatten(1))\n\n\n"
        "def build(num_classes, channels, image_size, width):\n    return Net(channels, num_classes, image_size)\n"
    )
    monkeypatch.syspath_prepend(str(folder))
    config = override(TINY, {"model.classifier": "uncuttable_nets:build"})
    assert set(baselines(config, FACTS)) == {"fedavg"}


def test_a_killed_and_resumed_run_has_sent_what_an_undisturbed_one_has(tmp_path):
    knobs = {"method": "fedavg", "warmup.checkpoint_rounds": 1, "federation.drop_rate": 0.3}
    whole = go(tmp_path / "a", knobs)
    with interrupted(in_round=2):
        go(tmp_path / "b", knobs)
    assert go(tmp_path / "b", knobs)["communication"] == whole["communication"]


@pytest.mark.slow
def test_ray_sends_what_the_serial_host_sends(tmp_path):
    with small_ray(2):
        there = go(tmp_path / "ray", RUNS["narrow"] | {"runtime.host": "ray"}, address="auto")
    assert there["communication"] == go(tmp_path / "serial", RUNS["narrow"])["communication"]
