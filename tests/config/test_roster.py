"""The clients' widths and architectures (O27)."""

from __future__ import annotations

import pytest

from mosaic_ray.config.client_layout import any_partial_width, client_classifiers, client_widths, groups
from mosaic_ray.config.resolve import override
from mosaic_ray.config.schema import ExperimentConfig
from mosaic_ray.core.errors import RequestError


def asked(num_clients: int = 10, **knobs) -> ExperimentConfig:
    named = {name.replace("__", "."): value for name, value in knobs.items()}
    return override(ExperimentConfig(), {"partition.num_clients": num_clients} | named)


@pytest.mark.parametrize(
    "rule, expected",
    [
        ("rho:2", [1.0] * 4 + [0.5] * 5 + [0.25]),
        ("rho:3", [1.0] * 3 + [0.5] * 3 + [0.25] * 4),
        ("rho:4", [1.0] * 2 + [0.5] * 2 + [0.25] * 6),
        ("rho:4:2", [1.0] * 2 + [0.5] * 2 + [0.25] * 6),
        ("rho:5:4", [1.0] + [0.5] * 2 + [0.25] * 2 + [0.125] * 2 + [0.0625] * 3),
        ("rho:0", [1.0] * 10),
        ("rho:9:0", [1.0] * 10),
    ],
)
def test_o27_widths_by_rule(rule, expected):
    assert list(client_widths(asked(federation__widths=rule))) == expected


def test_widths_are_dealt_in_turn():
    assert client_widths(asked(5, federation__widths=(1.0, 0.5))) == (1.0, 0.5, 1.0, 0.5, 1.0)
    assert client_widths(asked(2, federation__widths=(1.0, 0.5, 0.25))) == (1.0, 0.5)


def test_one_narrow_client_is_enough():
    assert not any_partial_width(asked())
    assert not any_partial_width(asked(1, federation__widths=(1.0, 0.5)))
    assert any_partial_width(asked(2, federation__widths=(1.0, 0.5)))
    assert any_partial_width(asked(federation__widths="rho:2"))


@pytest.mark.parametrize("rule", ["rho", "rho:", "rho:x", "rho:-1", "rho:2:", "rho:2:3:4", "rho:1.5", "half", " rho:2"])
def test_a_rule_that_there_is_not_is_refused_in_one_line(rule):
    with pytest.raises(RequestError, match=r"^federation\.widths = [^\n]*rho:5:4$"):
        client_widths(asked(federation__widths=rule))


def test_architectures_are_dealt_in_turn_and_grouped():
    mixed = asked(5, model__classifiers=("resnet18", "cnn"), model__classifier="cnn")
    assert client_classifiers(mixed) == ("resnet18", "cnn", "resnet18", "cnn", "resnet18")
    assert list(groups(mixed).items()) == [("resnet18", (0, 2, 4)), ("cnn", (1, 3))]
    assert groups(asked(3)) == {"cnn": (0, 1, 2)}
