"""Which schedule a request gets: by its data set, by the device that it declares or finds, or by --preset."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tomli_w
from cli_runner import REPO, ask, refusal
from layouts import write_classes

from mosaic_ray.cli.request import gpus_at, parse_config, sweep_request
from mosaic_ray.config.registry import DATASETS
from mosaic_ray.config.resolve import override, resolve, to_toml
from mosaic_ray.deploy.cluster_spec import gpus_declared
from mosaic_ray.execution import ray_session
from mosaic_ray.execution.resource_plan import Node
from mosaic_ray.report.html.render import write_report
from mosaic_ray.sweeps.runner import prepare
from mosaic_ray.sweeps.state import plan_name

PLUGIN = """
import numpy as np
from mosaic_ray.core.types import DataFacts, Dataset, ImageSet
from mosaic_ray.data.specs import DatasetSpec

FACTS = DataFacts("mine", 12, 3, 32, (), ())


def load(data):
    labels = np.arange(120) % 12
    images = ImageSet(np.zeros((120, 3, 32, 32), np.uint8), labels)
    return Dataset(FACTS, images, images, tuple("abcdefghijkl"), identity="")


KNOWN = DatasetSpec(load, FACTS, num_train=120)
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MOSAIC_DATA", str(tmp_path / "root"))
    return tmp_path


def never(*_: object) -> bool:
    pytest.fail("nobody needs to know about GPUs")


@pytest.mark.parametrize("name", DATASETS)
@pytest.mark.parametrize("gpus", [False, True])
def test_a_data_set_has_its_own_schedule(name, gpus):
    scale, other = (name, f"{name}_small") if gpus else (f"{name}_small", name)
    config = parse_config(dataset=name, has_gpus=lambda _: gpus)
    assert (config, config.preset) == (resolve(scale), scale)
    assert config.reason.startswith(f"schedule {scale} ({'a' if gpus else 'no'} GPU in reach); --preset {other} for ")
    assert parse_config(sets=[f"data.name={name}"], has_gpus=lambda _: gpus) == config
    Path("d.toml").write_text(f"data.name = '{name}'\nseed = 3\n")
    assert parse_config(config="d.toml", seed="0", has_gpus=lambda _: gpus) == config


@pytest.mark.parametrize(
    "sets, scale",
    [
        (["runtime.device=cpu"], "cifar100_small"),
        (["runtime.device=cuda"], "cifar100"),
        (["runtime.gpus_per_client=0"], "cifar100_small"),
        (["runtime.gpus_per_client=0.5"], "cifar100"),
    ],
)
def test_a_device_that_is_given_decides(sets, scale):
    config = parse_config(dataset="cifar100", sets=sets, has_gpus=never)
    assert config.preset == scale and f"({sets[0].replace('=', ' = ')})" in config.reason


def test_without_a_data_set_a_run_is_the_demo():
    config = parse_config(has_gpus=never)
    assert (config, config.preset, config.reason) == (resolve("demo"), "demo", "")
    assert parse_config(preset="reference", has_gpus=never) == resolve("demo+reference")


@pytest.mark.parametrize("words", [{"preset": "demo"}, {"config": "demo.toml"}, {"config": "whole.toml"}])
def test_a_schedule_that_is_named_stays(words):
    """By --preset, by a file's preset, or by a file that has all of its knobs, as runs write them."""
    Path("demo.toml").write_text("preset = 'demo'\n")
    whole = to_toml(resolve("demo")).replace('preset = "demo"\n', "")
    Path("whole.toml").write_text(whole)
    config = parse_config(dataset="cifar10", has_gpus=never, **words)
    assert (config, config.reason) == (resolve("demo", sets={"data.name": "cifar10"}), "")


def test_an_algorithm_leaves_the_schedule_to_the_data_set():
    words = {"dataset": "cifar10", "has_gpus": lambda _: True}
    assert parse_config(preset="reference", **words) == resolve("cifar10+reference")
    assert parse_config(algorithm="paper", **words) == resolve("cifar10+paper")


def test_what_is_given_wins_over_the_schedule():
    sets = ["warmup.local_steps=9", "federation.cohort_size=40"]
    config = parse_config(dataset="cifar100", clients="50", sets=sets, has_gpus=lambda _: False)
    assert (config.warmup.local_steps, config.finetune.local_steps, config.generator.steps) == (9, 5, 200)
    assert config.distill.samples_per_generator == 6


def test_show_prints_the_schedule_of_so_many_clients():
    shown = ask("show", "cifar100_small", "--clients", "100").stdout
    assert "num_clients = 100 " in shown and "\nlocal_steps = 5 " in shown and "\nlocal_steps = 20 " not in shown
    assert shown.startswith('preset = "cifar100_small"\n')


def test_other_data_sets_have_the_schedule_of_their_shape():
    write_classes(Path("shades"))
    small = parse_config(dataset="folder:shades", has_gpus=lambda _: False)
    assert "schedule small (no GPU in reach); --preset large " in small.reason
    assert (small.preset, small.generator.steps, small.warmup.local_steps) == ("small", 200, 5)
    large = parse_config(dataset="folder:shades", has_gpus=lambda _: True)
    assert (large.preset, large.data.image_size, large.warmup.num_rounds) == ("large", 32, 341)
    assert parse_config(dataset="folder:shades", preset="large", has_gpus=never) == large
    assert ask("data", "import", "--from", "shades", "kept").exit_code == 0
    kept = parse_config(dataset="kept", has_gpus=lambda _: False)
    assert (kept.data.name, kept.generator, kept.warmup) == ("imported:kept", small.generator, small.warmup)


def test_a_plug_in_that_declares_its_facts_has_a_schedule():
    Path("mine.py").write_text(PLUGIN)
    config = parse_config(dataset="mine.py:KNOWN", has_gpus=lambda _: False)
    assert (config.preset, config.warmup.num_rounds, config.warmup.batch_size) == ("small", 10, 12)


@pytest.mark.parametrize("command", ["run", "sweep", "compare", "experiment moe-weights"])
@pytest.mark.parametrize("preset", [[], ["--preset", "large"], ["--preset", "paper"]])
def test_a_data_set_without_a_schedule_is_refused(command, preset):
    Path("mine.py").write_text(PLUGIN)
    line = refusal(ask(*command.split(), "--dataset", "mine.py:load", *preset))
    assert line.startswith("mosaic: error: data.name = mine.py:load: its images are not known ")
    assert "--preset demo" in line


def test_a_data_set_without_a_schedule_can_be_dealt_and_takes_a_named_one():
    Path("mine.py").write_text(PLUGIN)
    dealt = ask("partition", "--dataset", "mine.py:load", "--json", "--set", "partition.min_size=1")
    assert len(json.loads(dealt.stdout)["client_sizes"]) == 10 and dealt.stderr == ""
    assert parse_config(dataset="mine.py:load", preset="svhn_small", has_gpus=never).warmup.num_rounds == 60


def test_a_missing_folder_is_refused_in_its_own_words():
    assert "data.name = folder:gone: no folder gone" in refusal(ask("run", "--dataset", "folder:gone"))


# --- where there are GPUs --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gpus", [0, 2])
def test_this_machine_or_the_cluster_is_asked(gpus, monkeypatch):
    monkeypatch.setattr(ray_session, "local_resources", lambda: ray_session.Resources(2, gpus, 2**33))
    monkeypatch.setattr(ray_session, "connect", never)
    demo, to_come = resolve("demo"), [Node("worker 1, to come", 4, gpus, 2**33, to_come=True)]
    assert gpus_at("local")(demo) == bool(gpus)
    assert gpus_at("h:1")(override(demo, {"runtime.host": "serial"})) == bool(gpus), "its clients are here"
    monkeypatch.setattr(ray_session, "local_resources", never)
    monkeypatch.setattr(ray_session, "connect", lambda address: ray_session.Resources(4, 0, 2**33))
    monkeypatch.setattr(ray_session, "machines_to_come", lambda: to_come)
    assert gpus_at("h:1")(demo) == bool(gpus)


def test_the_doctor_asks_the_clusters_file():
    path = str(REPO / "cluster.yaml")
    assert gpus_declared(path)
    result = ask("doctor", "--cluster", path, "--dataset", "cifar100")
    assert "schedule: cifar100 (a GPU in reach)" in result.stdout
    text = Path(path).read_text()
    Path("cpus.yaml").write_text(text.replace('"GPU": 1, ', ""))
    assert '"GPU": 1, ' in text and not gpus_declared("cpus.yaml")


def test_the_doctor_of_a_machine_chooses_no_schedule():
    assert "schedule" not in ask("doctor", "--dataset", "folder:gone").output


# --- where it is written ---------------------------------------------------------------------------------------------

QUICK = (
    "--method", "fedavg", "--host", "serial", "--set", "warmup.num_rounds=1", "--set", "finetune.num_rounds=1",
    "--set", "warmup.local_steps=1", "--set", "finetune.local_steps=1", "--set", "model.width=4",
    "--set", "runtime.precision=fp32",
)  # fmt: skip


def test_a_run_records_its_schedule(monkeypatch):
    monkeypatch.setattr(ray_session, "local_resources", lambda: ray_session.Resources(2, 0, 2**33))
    result = ask("run", "--dataset", "digits", *QUICK, "--name", "r", "--json")
    assert result.exit_code == 0, result.stderr
    assert "schedule digits_small (no GPU in reach); --preset digits for the full scale\n" in result.stderr
    folder = Path("mosaic_runs/runs/r")
    assert json.loads((folder / "summary.json").read_text())["preset"] == "digits_small"
    assert (folder / "config.toml").read_text().startswith('preset = "digits_small"\n')
    assert "schedule digits_small" in Path(write_report(str(folder), None)).read_text()
    again = ask("run", "--config", str(folder / "config.toml"), "--name", "r", "--json")
    assert again.exit_code == 0 and "schedule" not in again.stderr
    assert not Path("mosaic_runs/runs/r.1").exists(), "it is the same run"


def test_a_sweep_records_its_schedule_but_is_not_named_after_it():
    found = prepare(sweep_request("omega_ladder", {"dataset": "cifar100"}, lambda _: False)).plan_json
    assert found["preset"] == "cifar100_small"
    assert found["base"]["warmup"]["num_rounds"] == 30
    assert plan_name(found) == plan_name(found | {"preset": None})


def test_a_space_with_a_preset_keeps_it_unless_a_data_set_is_named():
    space = ("from mosaic_ray.spaces import Choice, SweepPlan\n\n\ndef plan():\n"
             "    return SweepPlan('s', knobs={'warmup.lr': Choice((0.1, 0.2))}, preset='demo', base={'seed': 3})\n")
    Path("mine.py").write_text(space)

    def base(**options: str) -> str:
        config = sweep_request("mine.py", options, lambda _: False).config
        assert (config.seed, config.partition.validation_fraction) == (3, 0.1)
        return config.preset

    assert base() == "demo"
    assert base(dataset="svhn") == "svhn_small"
    assert base(preset="cifar10_small") == "cifar10_small"
    assert base(preset="demo", dataset="svhn") == "demo"
    Path("d.toml").write_text(tomli_w.dumps({"data": {"name": "fmnist"}}))
    assert base(config="d.toml") == "fmnist_small"
    space = space.replace("preset='demo', ", "")
    Path("mine.py").write_text(space.replace("'seed': 3", "'seed': 3, 'data.name': 'svhn'"))
    assert base() == "svhn_small"
