"""The configuration: layers, types, ranges, suggestions, and the round trip through TOML."""

from __future__ import annotations

import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mosaic_ray.config.presets import ALGORITHMS, SCALES
from mosaic_ray.config.resolve import KNOBS, check_value, flatten, override, resolve, to_toml
from mosaic_ray.config.schema import ExperimentConfig
from mosaic_ray.core.errors import RequestError, RunError
from mosaic_ray.core.seeding import derive, numpy_stream, stream


@pytest.mark.parametrize("scale", sorted(SCALES))
@pytest.mark.parametrize("algorithm", sorted(ALGORITHMS))
def test_every_preset_resolves_and_survives_toml(scale, algorithm):
    config = resolve(f"{scale}+{algorithm}")
    assert config.algorithm == algorithm
    again = override(ExperimentConfig(), tomllib.loads(to_toml(config, comments=True)))
    assert again == config


def test_algorithms_and_scales_are_orthogonal():
    """An algorithm never changes the work of the warm-up; a scale never changes which defects are reproduced."""
    work = ("warmup.num_rounds", "warmup.local_steps", "model.classifier", "partition.num_clients", "generator.ngf")
    for scale in SCALES:
        configs = [flatten(resolve(f"{scale}+{a}")) for a in ALGORITHMS]
        assert all(c[name] == configs[0][name] for c in configs for name in work)


def test_layers_later_ones_win():
    config = resolve("fmnist_small+distilled", file={"generator.lambda_e": 0.7, "seed": 3}, sets={"seed": "4"})
    assert (config.data.name, config.generator.lambda_e, config.seed) == ("fmnist", 0.7, 4)


def test_a_file_may_name_its_preset_and_algorithm():
    config = resolve(file={"preset": "fmnist_small", "algorithm": "reference"})
    assert (config.data.name, config.meta.pool) == ("fmnist", "sum")


@pytest.mark.parametrize(
    "sets, says",
    [
        ({"generator.lamda_e": "1"}, 'unknown knob "generator.lamda_e".*"generator.lambda_e"'),
        ({"lambda_e": "1"}, '"generator.lambda_e"'),
        ({"partition.omega": "0"}, r"partition\.omega = 0: .*above 0"),
        ({"partition.omega": "nan"}, "takes a number"),
        ({"partition.omega": "wide"}, "takes a number"),
        ({"partition.num_clients": "2.5"}, "whole number"),
        ({"distill.guard": "1"}, "true or false"),
        ({"generator.lambda_d": "-1"}, "at least 0"),
        ({"generator.tau": "-3"}, "at least 0"),
        ({"federation.widths": "[1.0, 2.0]"}, "at most 1"),
        ({"federation.widths": "[]"}, "list of numbers"),
        ({"federation.widths": "[0.5]"}, "fedavg trains whole models"),
        ({"federation.widths": "half"}, r"a rule such as rho:2"),
        ({"federation.widths": "rho:3"}, "fedavg trains whole models.*fedrolex, heterofl, feddropout"),
        ({"federation.optimiser": "fedrolx"}, '"fedrolex"'),
        ({"model.classifier": "resnet19"}, '"resnet18"'),
        ({"model.classifiers": "[cnn, resnet19]"}, '"resnet18"'),
        ({"model.classifiers": "cnn,resnet18"}, "2 networks for 5 clients"),
        ({"model.classifiers": "resnet18"}, r"model\.classifier = cnn: .*must be"),
        ({"model.classifiers": "cnn,cnn,cnn,cnn,resnet18", "prototypes.model": "client"}, "take global"),
        ({"model.classifiers": "cnn,cnn,cnn,cnn,resnet18", "prototypes.rounds": "all"}, "take last"),
        ({"model.classifiers": "cnn,cnn,cnn,cnn,resnet18", "meta.data": "synthetic"}, "takes prototypes"),
        ({"generator.conditional": "true", "generator.drop_class0_bug": "true"}, "could not be drawn"),
        ({"data.name": "fmist"}, '"fmnist"'),
        ({"data.name": "parquet:"}, "unknown data set"),
        ({"data.image_size": "20"}, "8, 16, 28, 32 or 64"),
        ({"method": "mosaik"}, '"mosaic"'),
        ({"federation.cohort_size": "9"}, "there are 5 clients"),
        ({"meta.input": "full"}, r"meta\.init"),
        ({"generator.stage": "later"}, "before, after_warmup"),
        ({"runtime.cpus_per_client": "1.5"}, "whole number"),
        ({"algorithm": "fixd"}, "fixed, distilled, paper, reference"),
    ],
)  # fmt: skip
def test_a_wrong_knob_is_named_with_what_it_may_be(sets, says):
    with pytest.raises(RequestError, match=says) as caught:
        resolve(sets=sets)
    assert "\n" not in str(caught.value)


def test_an_unknown_preset_has_neighbours():
    with pytest.raises(RequestError, match='"fmnist_small"'):
        resolve("fmnist_smal")


@pytest.mark.parametrize("text, value", [("1e-4", 1e-4), (".5", 0.5), ("1.", 1.0), ("3", 3.0), ("1_000", 1000.0)])
def test_numbers_as_people_write_them(text, value):
    assert check_value("warmup.lr", text, text=True) == value


@given(st.floats(1e-6, 1e5))
def test_any_float_survives_the_command_line(value):
    assert check_value("partition.omega", repr(value), text=True) == value


def test_every_knob_has_a_meaning_and_a_default_within_its_range():
    for name, spec in KNOBS.items():
        assert spec.metadata["help"], name
        assert check_value(name, spec.default) == spec.default


def test_every_draw_has_its_own_address():
    addresses = [("local", 0, 1), ("local", 1, 0), ("local", "0", 1), ("closing", 0, 1), ("local", 0, 1, 0)]
    assert len({derive(0, *a) for a in addresses} | {derive(1, *addresses[0])}) == len(addresses) + 1
    assert derive(0, "local", 3, 7) == 7994692965074882444
    assert stream(0, "x").initial_seed() == derive(0, "x")
    assert numpy_stream(0, "x").random() == numpy_stream(0, "x").random()


def test_a_run_error_carries_its_address_through_a_pickle():
    import pickle

    error = pickle.loads(pickle.dumps(RunError("no", round=3, client=7).at("warmup")))
    assert str(error) == "stage warmup, round 3, client 7: no"
