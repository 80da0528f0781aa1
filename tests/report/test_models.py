"""Models of a run as modules: they answer as the run measured, and refuse in one line what the run lacks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_runner import refused_by
from helpers import TINY, stripes_dataset

from mosaic_ray import load_run
from mosaic_ray.config.resolve import override
from mosaic_ray.core.seeding import stream
from mosaic_ray.core.types import DataFacts
from mosaic_ray.distillation.generator_training import NUM_EVALUATED, draw
from mosaic_ray.federated.evaluation import accuracy, confusion, own_accuracy, per_class_accuracy
from mosaic_ray.report import models
from mosaic_ray.report.api import Run
from mosaic_ray.report.models import chosen
from mosaic_ray.runs import runner

TEST = stripes_dataset().test
IMAGES = torch.tensor(TEST.images)

#: TINY without a method.
PLAIN = {"method": "fedavg", "warmup.num_rounds": 2, "finetune.num_rounds": 1}


@pytest.fixture
def tiny(undisturbed_tiny) -> Run:
    return load_run(undisturbed_tiny["paths"]["run"])


@pytest.fixture
def run_of(tmp_path, monkeypatch):
    """A function: knobs -> a finished run of TINY on stripes."""
    monkeypatch.setattr("mosaic_ray.data.load.load_dataset", lambda config: stripes_dataset())

    def made(**knobs):
        config = override(TINY, {name.replace("__", "."): value for name, value in knobs.items()})
        return load_run(runner.run(config, storage=str(tmp_path), progress=False)["paths"]["run"])

    return made


def table(module) -> np.ndarray:
    with torch.no_grad():
        return confusion(module(IMAGES).numpy(), TEST.labels)


def test_every_role_answers_as_the_run_measured(tiny):
    reached = {role: value for role, value in tiny.summary.accuracy.items() if value is not None}
    assert set(reached) == {"initial", "teacher", "distilled", "final", "control"}
    for role, value in reached.items():
        module = tiny.model(role)
        assert not module.training and module.config["role"] == role
        assert accuracy(table(module)) == value
        assert np.array_equal(table(module), tiny.confusion(role))
    assert module.config["class_names"] == ["top", "middle", "bottom"]
    assert torch.equal(tiny.model()(IMAGES), tiny.model("final")(IMAGES))
    assert not torch.equal(tiny.model()(IMAGES), tiny.model("initial")(IMAGES))


def test_floats_in_the_unit_range_are_the_same_images(tiny):
    module = tiny.model()
    assert torch.equal(module(IMAGES.float() / 255), module(IMAGES))


def test_building_a_model_leaves_torchs_generator_alone(tiny):
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    tiny.model()
    assert torch.equal(torch.rand(4), expected)


def test_clients_models_are_those_that_were_scored(tiny):
    own = tiny.summary.client_accuracy.clients["own"]
    for k, held in enumerate(tiny.label_counts):
        assert own_accuracy(per_class_accuracy(table(tiny.model(client=k))), held) == own[k]
    assert torch.equal(tiny.model("client:1")(IMAGES), tiny.model(client=1)(IMAGES))
    assert not torch.equal(tiny.model(client=0)(IMAGES), tiny.model(client=1)(IMAGES))


def test_narrow_clients_are_used_as_they_were_trained(run_of):
    run = run_of(**PLAIN, federation__strategy="heterofl", federation__widths=[1.0, 0.5])
    own = run.summary.client_accuracy.clients["own"]
    for k, held in enumerate(run.label_counts):
        assert own_accuracy(per_class_accuracy(table(run.model(client=k))), held) == own[k]
    assert run.model(client=1).scale == 0.5
    assert len(run.model(client=1).network.head.weight[0]) < len(run.model(client=0).network.head.weight[0])


def test_clients_have_their_own_models_where_the_strategy_keeps_some(run_of):
    run = run_of(**PLAIN, federation__strategy="fedbn")
    for k, held in enumerate(run.label_counts):
        reached = own_accuracy(per_class_accuracy(table(run.model(client=k))), held)
        assert reached == run.summary.personal_accuracy.clients[k]


def test_generators_draw_what_their_clients_drew(tiny):
    for k, kept in tiny.samples().items():
        module = tiny.model(generator=k)
        [z] = draw(module.network, NUM_EVALUATED, stream(tiny.summary.seed, "generator/judge", k), torch.device("cpu"))
        assert np.array_equal(module(z)[: len(kept)].detach().numpy(), kept)
    assert module(5).shape == (5, 1, 8, 8) and module(5).dtype == torch.uint8
    with pytest.raises(ValueError, match="z alone"):
        module(z, torch.zeros(len(z), dtype=torch.int64))


@pytest.mark.parametrize("knobs", [{"family": "cvae"}, {"family": "condensed", "least_images": 1}])
def test_conditional_generators_take_labels(run_of, knobs):
    run = run_of(**{f"generator__{name}": value for name, value in knobs.items()})
    module, labels = run.model(generator=1), torch.arange(3).repeat(4)
    z = torch.randn(12, module.network.latent_dim)
    images = module(z, labels)
    assert images.shape == (12, 1, 8, 8) and not torch.equal(images, module(z, labels.flip(0)))
    assert module(7).shape == module(7, torch.zeros(7, dtype=torch.int64)).shape == (7, 1, 8, 8)
    with pytest.raises(ValueError, match="z and labels"):
        module(z)


def test_teachers_of_several_networks_and_gates_are_built(run_of):
    gate = run_of(method="fens", fens__rounds=2)
    assert np.array_equal(table(gate.model("teacher")), gate.confusion("teacher"))
    mixed = run_of(model__classifiers=["cnn", "mobilenet"])
    assert np.array_equal(table(mixed.model("teacher")), mixed.confusion("teacher"))
    assert mixed.model(client=1).config["network"] == "mobilenet"
    assert np.array_equal(table(mixed.model("final")), mixed.confusion("final"))


def test_other_roles_of_a_run(run_of):
    knobs = {"runtime__ceiling": True, "generator__family": "cvae", "model__student": "mobilenet", "student__steps": 2}
    run = run_of(**knobs, rehearsal__weight=1.0, finetune__head="lda_head")
    for role in ("ceiling", "server_student", "final"):
        assert np.array_equal(table(run.model(role)), run.confusion(role))
    taught = run_of(method="dense", dense__epochs=2, model__student="mobilenet")
    assert np.array_equal(table(taught.model("server_student")), taught.confusion("server_student"))


def test_a_network_of_ones_own_is_built_by_its_name(run_of, tmp_path, monkeypatch):
    source = (
        "import torch.nn as nn\n"
        "def build(num_classes, channels, image_size, width):\n"
        "    return nn.Sequential(nn.Conv2d(channels, width, 3), nn.BatchNorm2d(width), nn.ReLU(),\n"
        "                         nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, num_classes))\n"
    )
    (tmp_path / "my_nets_of_models.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    run = run_of(**PLAIN, model__classifier="my_nets_of_models:build")
    assert np.array_equal(table(run.model()), run.confusion("final"))


# --- what a run lacks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ask, says",
    [
        ({"role": "ceiling"}, "has initial, teacher, distilled, final, control, client:0 to 2, generator:0 to 2"),
        ({"role": "best"}, "role best: this run has initial"),
        ({"client": 3}, "role client:3: this run has"),
        ({"generator": 9}, "role generator:9: this run has"),
        ({"client": 0, "generator": 0}, "client:0 and generator:0; name one"),
        ({"role": "initial", "client": 0}, "role initial: it names a model beside client:0"),
        ({"role": "client:x"}, "client:NUMBER"),
        ({"role": "final:1"}, "client:NUMBER"),
        ({"role": "client"}, "role client: this run has"),
    ],
)
def test_a_model_that_the_run_lacks_is_refused_in_one_line(ask, says, tiny):
    assert says in refused_by(lambda: tiny.model(**ask))


def test_numbers_are_read():
    assert chosen("final") == ("final", -1) and chosen("client:12") == ("client", 12)
    assert chosen("final", generator=0) == ("generator", 0)


def test_a_run_without_its_store_has_its_final_model(tiny, tmp_path):
    shutil.copytree(tiny.folder, tmp_path / "alone")
    alone = load_run(tmp_path / "alone")
    assert torch.equal(alone.model()(IMAGES), tiny.model()(IMAGES))
    assert "no store beside this folder" in refused_by(alone.model, "initial")


def test_an_unfinished_run_says_so(tiny, tmp_path):
    shutil.copytree(tiny.folder, tmp_path / "begun")
    (tmp_path / "begun" / "summary.json").unlink()
    assert "no finished model" in refused_by(load_run(tmp_path / "begun").model)


def test_constants_of_the_images_are_kept_with_the_run(tiny, tmp_path, monkeypatch):
    assert tiny.facts == stripes_dataset().facts
    shutil.copytree(tiny.folder, tmp_path / "earlier")
    kept = tmp_path / "earlier" / "label_counts.json"
    content = json.loads(kept.read_text())
    kept.write_text(json.dumps({name: value for name, value in content.items() if name != "data"}))
    monkeypatch.setattr(models, "known_facts", lambda config: None)
    monkeypatch.setattr(models, "load_dataset", lambda config: stripes_dataset())
    assert torch.equal(load_run(tmp_path / "earlier").model()(IMAGES), tiny.model()(IMAGES))
    for wrong in ({"channels": 2}, {"std": [0.0]}, {"mean": [0.1, 0.2]}, {"num_classes": "x"}):
        kept.write_text(json.dumps(content | {"data": content["data"] | wrong}))
        assert f"data.{next(iter(wrong))}" in refused_by(load_run, tmp_path / "earlier")


def test_damaged_weights_are_no_model(tiny, tmp_path):
    shutil.copytree(tiny.folder, tmp_path / "alone")
    file = Path(tmp_path / "alone" / "student.safetensors")
    file.write_bytes(file.read_bytes()[:100])
    assert "cannot be read" in refused_by(load_run(tmp_path / "alone").model)


def test_facts_read_back():
    facts = DataFacts("x", 3, 1, 8, (0.5,), (0.25,), ("crop",))
    assert DataFacts.from_json(json.loads(json.dumps(vars(facts)))) == facts
    with pytest.raises(ValueError, match="channels"):
        DataFacts.from_json({"name": "x", "num_classes": 2, "channels": 5})
