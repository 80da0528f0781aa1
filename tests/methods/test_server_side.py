"""Methods with work on the server: whole runs on tiny images, killed ones, dry runs, refusals, other federations."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_runner import ask, refusal
from ensembles import QUICK, go, tiny
from helpers import FACTS, TINY, assert_same, interrupted, small_ray, stripes_dataset
from safetensors.numpy import load_file

from mosaic_ray.config.resolve import to_toml
from mosaic_ray.distillation.ensemble import GateTask
from mosaic_ray.methods import fedcvae
from mosaic_ray.pipeline.context import RunContext
from mosaic_ray.runs.plan import stage_keys
from mosaic_ray.storage.store import Store

#: The stages between the warm-up and the closing rounds.
OWN = {
    "dense": ["distill"], "co_boosting": ["distill"], "fedftg": ["control_warmup"], "dfrd": ["control_warmup"],
    "fedcvae": ["generators", "distill"], "fens": ["gate"], "centralised": ["distill"],
}  # fmt: skip
AFTER_WARMUP = sorted(set(OWN) - {"fedftg", "dfrd"})


@pytest.fixture(autouse=True)
def stripes_as_data(monkeypatch):
    monkeypatch.setattr("mosaic_ray.data.load.load_dataset", lambda config: stripes_dataset())


def student(summary: dict) -> dict[str, np.ndarray]:
    return load_file(Path(summary["paths"]["run"]) / "student.safetensors")


@pytest.mark.parametrize("method", sorted(OWN))
def test_a_run_has_its_stages_and_its_dry_run_counts_the_same(tmp_path, monkeypatch, method):
    monkeypatch.chdir(tmp_path)
    config = tiny(method)
    summary = go(tmp_path / "store", method)
    stages = ["partition", "warmup", *OWN[method], "finetune", "control", "own_models", "evaluate"]
    assert list(summary["stages"]) == stages == list(stage_keys(config, "stripes", FACTS))
    assert summary["communication"]["measured_over_predicted"] == 1
    reached = summary["accuracy"]
    assert (reached["distilled"] is None) == (method in ("fedftg", "dfrd", "fens"))
    assert (reached["teacher"] is None) == (method != "fens")
    Path("tiny.toml").write_text(to_toml(config))
    dry = ask("run", "--config", "tiny.toml", "--dry-run", "--storage", "elsewhere")
    assert dry.exit_code == 0, dry.stderr
    assert all(stage in dry.stdout for stage in stages)
    codes = {finding["code"] for finding in summary["health"]}
    assert ("method.not_federated" in codes) == (method == "centralised")
    assert ("method.not_data_free" in codes) == (method == "fens")
    again = go(tmp_path / "store", method)
    assert all(stage["cached"] for stage in again["stages"].values()) and again["accuracy"] == reached


@pytest.mark.parametrize("method", AFTER_WARMUP)
def test_a_killed_stage_goes_on_at_its_checkpoint_and_ends_the_same(tmp_path, monkeypatch, method):
    whole = go(tmp_path / "whole", method)
    begun: list[int] = []
    on_server, run = RunContext.on_server, GateTask.run

    def broken(ctx, function, *arguments, **more):
        if len(arguments) > 1 and isinstance(arguments[1], int):
            begun.append(arguments[1])
            if stop and arguments[1] > 0:
                raise KeyboardInterrupt
        return on_server(ctx, function, *arguments, **more)

    def broken_gate(task, *arguments):
        begun.append(task.round_num)
        if stop and task.round_num == 25:
            raise KeyboardInterrupt
        return run(task, *arguments)

    monkeypatch.setattr(RunContext, "on_server", broken)
    monkeypatch.setattr(GateTask, "run", broken_gate)
    stop = True
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "killed", method)
    assert begun[0] == 0
    begun.clear()
    stop = False
    resumed = go(tmp_path / "killed", method)
    first = {"dense": 5, "co_boosting": 5, "fedcvae": 1, "centralised": 1, "fens": 20}[method]
    assert begun[0] == first
    assert resumed["accuracy"] == whole["accuracy"]
    assert_same(student(resumed), student(whole))
    name = OWN[method][-1]
    key = whole["stages"][name]["key"]
    assert resumed["stages"][name]["key"] == key
    results = [Store(str(tmp_path / folder)).get(key) for folder in ("killed", "whole")]
    assert results[0].parts == results[1].parts
    for part in results[0].parts:
        assert_same(*(result.load(part) for result in results))
    curves = [result.facts["curve"] for result in results]
    assert curves[0] == curves[1] and curves[0]


@pytest.mark.parametrize("method", ["fedftg", "dfrd"])
def test_a_generator_survives_a_kill_between_rounds(tmp_path, method):
    whole = go(tmp_path / "whole", method, warmup__num_rounds=4)
    with interrupted(in_round=3, phase="local"):
        go(tmp_path / "killed", method, warmup__num_rounds=4)
    resumed = go(tmp_path / "killed", method, warmup__num_rounds=4)
    assert_same(student(resumed), student(whole))
    store = Store(str(tmp_path / "whole"))
    tuned = store.get(whole["stages"]["warmup"]["key"])
    plain = store.get(whole["stages"]["control_warmup"]["key"])
    assert "method" in tuned.parts
    assert not np.array_equal(tuned.load("global")["head.weight"], plain.load("global")["head.weight"])


@pytest.mark.ray
def test_on_ray_with_the_same_bits(tmp_path, monkeypatch):
    root = Path(__file__).resolve().parents[2]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")]))
    quick = {"fens.rounds": 3, "warmup.num_rounds": 2, "finetune.num_rounds": 0}
    parts = {"dfrd": ("warmup", "method"), "fens": ("gate", "gate"), "dense": ("distill", "global")}
    serial = {method: go(tmp_path / "serial", method, **quick) for method in parts}
    with small_ray(num_cpus=2):
        for method, (stage, part) in parts.items():
            summary = go(tmp_path / "ray", method, runtime__host="ray", runtime__max_hosts=2, **quick)
            key = summary["stages"][stage]["key"]
            assert key == serial[method]["stages"][stage]["key"] and not summary["stages"][stage]["cached"]
            assert_same(*(Store(str(tmp_path / host)).get(key).load(part) for host in ("serial", "ray")))
            assert summary["accuracy"] == serial[method]["accuracy"]


@pytest.mark.parametrize("method", ["dense", "dfrd", "fens"])
@pytest.mark.parametrize(
    "layout",
    [
        {"model.classifiers": ("cnn", "mobilenet"), "partition.num_clients": 4},
        {"federation.strategy": "heterofl", "federation.widths": (1.0, 0.5, 0.25)},
        {"federation.cohort_size": 2},
    ],
    ids=["networks", "widths", "cohort"],
)
def test_federations_of_many_kinds(tmp_path, method, layout):
    summary = go(tmp_path, method, **layout)
    assert summary["communication"]["measured_over_predicted"] == 1
    assert 0 <= summary["accuracy"]["final"] <= 1


@pytest.mark.parametrize("method", ["dense", "co_boosting", "fedcvae"])
def test_a_student_may_start_as_drawn(tmp_path, method):
    keys = [go(tmp_path, method)["stages"], go(tmp_path, method, **{f"{method}.start": "random"})["stages"]]
    first, second = (Store(str(tmp_path)).get(stages["distill"]["key"]).load("global") for stages in keys)
    assert not np.array_equal(first["head.weight"], second["head.weight"])
    moved = [not np.allclose(weights["trunk.1.running_var"], 1.0) for weights in (first, second)]
    assert moved == [True, True]  # at the warm-up's model they came with it
    assert keys[0]["warmup"]["key"] == keys[1]["warmup"]["key"]


def test_own_knobs_change_the_keys_of_what_follows_alone():
    for method, knobs in QUICK.items():
        name = next(iter(knobs), None)
        if name is None:
            continue
        before = stage_keys(tiny(method), "x", FACTS)
        after = stage_keys(tiny(method, **{f"{method}.{name}": knobs[name] + 1}), "x", FACTS)
        changed = {stage for stage in before if before[stage] != after[stage]}
        stages = {"warmup"} if method in ("fedftg", "dfrd") else {OWN[method][-1]}
        follow = {"finetune", "evaluate"} - ({"finetune"} if method == "fens" else set())
        own = {"own_models"} if stages == {"warmup"} else set()
        assert changed == stages | follow | own, method


def test_what_cannot_work_is_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("tiny.toml").write_text(to_toml(TINY))
    for words, line in (
        (("dense", "warmup.num_rounds=0"), "method dense: clients' models teach, so they have to train; "),
        (("fens", "warmup.num_rounds=0"), "method fens: clients' models teach"),
        (("fedcvae", "generator.family=dcgan"), "generator.family = dcgan; set generator.family=cvae"),
        (("dfrd", "dfrd.ema=1"), "dfrd.ema = 1: it takes a number at least 0 and at most 0.9999"),
    ):
        result = ask("run", "--config", "tiny.toml", "--method", words[0], "--set", words[1], "--storage", "st")
        assert line in refusal(result)
    assert not Path("st").exists()


def test_centralised_training_is_the_warm_up_of_one_client_with_all_images(tmp_path):
    """One client: the same images, steps and rates; only the random order of the images is another."""
    one = {"partition.num_clients": 1, "warmup.batch_size": 240, "warmup.shuffle": False}
    summary = go(tmp_path, "centralised", **one)
    store = Store(str(tmp_path))
    pooled, federated = (store.get(summary["stages"][s]["key"]).load("global") for s in ("distill", "warmup"))
    for name in federated:
        assert np.allclose(pooled[name], federated[name], atol=1e-4), name


def test_decoders_draw_by_their_clients_shares_and_inside_the_limit(monkeypatch):
    from ensembles import context

    from mosaic_ray.models.generator import build_generator
    from mosaic_ray.models.state_dict import to_weights

    made = context(tiny("fedcvae"))
    decoder = build_generator(made.config.generator, 1, 8, 3)
    decoder.label_cdf.copy_(torch.tensor([0.25, 0.25, 1.0], dtype=torch.float64))
    seen: list[torch.Tensor] = []
    forward = type(decoder).forward
    monkeypatch.setattr(type(decoder), "forward", lambda self, z, y: (seen.append(z), forward(self, z, y))[1])
    found = fedcvae.draw_images(made, [(0, to_weights(decoder), 40), (2, to_weights(decoder), 0)], 1.0)
    assert np.bincount(found["labels"], minlength=3).tolist() == [10, 0, 30]
    assert found["images"].shape == (40, 1, 8, 8) and found["images"].dtype == np.uint8
    z = torch.cat(seen)
    assert z.abs().max() <= 1 and abs(z.std().item() - 0.54) < 0.05
    fedcvae.draw_images(made, [(0, to_weights(decoder), 40)], 0.0)
    assert seen[-1].abs().max() > 1.5
