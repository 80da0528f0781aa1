"""The JSON Schema of the configuration accepts what the command accepts, and refuses wrong names, types and ranges."""

from __future__ import annotations

import json
import tomllib
from typing import Any

import pytest
from cli_runner import ask, refusal

from mosaic_ray.config.json_schema import json_schema
from mosaic_ray.config.plugins import entries, load
from mosaic_ray.config.presets import ALGORITHMS, SCALES
from mosaic_ray.config.resolve import KNOBS, dotted, override, resolve, to_toml
from mosaic_ray.config.schema import ExperimentConfig
from mosaic_ray.core.errors import RequestError

SCHEMA = json_schema()


def property_of(name: str) -> dict[str, Any]:
    section, _, leaf = name.rpartition(".")
    return (SCHEMA["properties"][section] if section else SCHEMA)["properties"][leaf]


@pytest.fixture(scope="module")
def validator():
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    return jsonschema.Draft202012Validator(SCHEMA)


def test_every_knob_is_there_with_meaning_and_default():
    own = [load(kind, name) for kind in ("methods", "strategies") for name in entries(kind)]
    assert {found.name for found in own if found.knobs} <= SCHEMA["properties"].keys()
    for name, knob in KNOBS.items():
        found = property_of(name)
        assert found["description"] == knob.metadata["help"]
        assert found["default"] == json.loads(json.dumps(knob.default))
    assert property_of("federation.optimiser")["deprecated"]
    assert property_of("fedprox.mu")["type"] == "number"


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_presets_are_valid(validator, scale, algorithm):
    values = tomllib.loads(to_toml(resolve(f"{scale}+{algorithm}"), comments=True))
    assert values["preset"] == scale and list(validator.iter_errors(values)) == []


def test_defaults_are_valid(validator):
    for name, knob in KNOBS.items():
        own = validator.evolve(schema=property_of(name))
        assert own.is_valid(json.loads(json.dumps(knob.default))), name


GOOD = [
    "",
    'preset = "demo+paper"',
    'data.name = "folder:/images"',
    'data.name = "mine"  # imported',
    "seed = 3.0",
    "warmup.lr = 1",
    "federation.widths = [1, 0.5]",
    'federation.widths = "rho:3"',
    "federation.widths = 0.5",
    'federation.strategy = "fedrolex+fedprox"',
    'federation.optimiser = "fedrolex"',
    "fedprox.mu = 0.5",
    'model.classifiers = ["cnn", "nets:build"]',
    'model.classifiers = "cnn"',
    "model.classifiers = []",
    'partition.sampler = "my.module:deal"',
    'distill.workers = "auto"',
    "distill.workers = 2",
    "runtime.gpus_per_client = 0.5",
    "runtime.client_timeout = -1",
    "rehearsal.candidates = [0.3, 1.0]",
]
PLUGIN = ['method = "mine.py:METHOD"\n[mine]\nweight = 2', '[federation]\nstrategy = "a.b:C"\n[c]\nmu = "x"']


@pytest.mark.parametrize("text", GOOD)
def test_what_the_command_takes_is_valid(validator, text):
    values = tomllib.loads(text)
    assert list(validator.iter_errors(values)) == []
    override(ExperimentConfig(), values)


@pytest.mark.parametrize("text", PLUGIN)
def test_a_plug_in_may_have_a_section_of_its_own(validator, text):
    assert list(validator.iter_errors(tomllib.loads(text))) == []


BAD = [
    "[warmpu]\nlr = 1",
    "warmup.lrr = 1",
    "warmup = 3",
    "lr = 1",
    'warmup.lr = "fast"',
    "warmup.lr = 0",
    "warmup.lr = inf",
    "warmup.lr = 1e30",
    "warmup.momentum = 1.0",
    "warmup.num_rounds = 2.5",
    "warmup.num_rounds = true",
    "warmup.shuffle = 1",
    'warmup.loss = "mse"',
    "seed = -1",
    'distill.workers = "many"',
    "distill.workers = 65",
    "federation.widths = []",
    "federation.widths = [1.0, 1.5]",
    "federation.widths = [0.0]",
    "model.classifiers = [1]",
    'partition.sampler = "even"',
    "rehearsal.candidates = [0]",
    "data.name = 3",
    'mine.weight = 2\nmethod = "fedavg"',
]
#: Names that only ``check`` refuses, after the preset is known.
BAD_NAMES = ['method = "mosiac"', 'federation.strategy = "fedprxo"', 'model.classifier = "vgg"']


@pytest.mark.parametrize("text", BAD)
def test_what_the_command_refuses_is_invalid(validator, text):
    values = tomllib.loads(text)
    assert not validator.is_valid(values)
    with pytest.raises(RequestError):
        override(ExperimentConfig(), values)


@pytest.mark.parametrize("text", BAD_NAMES)
def test_unknown_names_are_invalid(validator, text):
    values = tomllib.loads(text)
    assert not validator.is_valid(values)
    with pytest.raises(RequestError):
        resolve(file=dotted(values))


def test_show_prints_it():
    assert json.loads(ask("show", "--schema").stdout) == SCHEMA
    for words in (["demo"], ["--dataset", "mnist"]):
        assert f"--schema: it holds for every preset, so it goes without {words[-1]}" in refusal(
            ask("show", *words, "--schema")
        )
    assert "Missing argument 'PRESET'." in refusal(ask("show"))
