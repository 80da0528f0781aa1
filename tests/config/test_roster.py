"""The clients' widths, architectures (O27) and modalities."""

from __future__ import annotations

import pytest

from mosaic_ray.config.client_layout import (
    any_partial_width,
    client_classifiers,
    client_modalities,
    client_widths,
    groups,
)
from mosaic_ray.config.resolve import override
from mosaic_ray.config.schema import ExperimentConfig
from mosaic_ray.core.errors import RequestError
from mosaic_ray.core.seeding import numpy_stream


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


VIEWS = ("image", "sound", "text", "depth")


def held(num_clients: int, modalities, names=VIEWS, seed: int = 0) -> tuple[tuple[str, ...], ...]:
    return client_modalities(asked(num_clients, partition__modalities=modalities, data__name="a:b", seed=seed), names)


def test_without_a_value_clients_hold_all_modalities():
    assert held(3, ()) == (VIEWS,) * 3
    assert held(2, (), ()) == ((), ())
    assert held(2, (), ("image",)) == (("image",), ("image",))


def test_modalities_are_dealt_in_turn_in_the_order_of_the_data_set():
    given = ("depth+image", " text + sound ", "sound")
    assert held(5, given) == (
        ("image", "depth"), ("sound", "text"), ("sound",), ("image", "depth"), ("sound", "text"),
    )  # fmt: skip


def test_each_draws_so_many_without_replacement_by_address():
    found = held(40, "each:2")
    assert all(len(set(own)) == 2 and own == tuple(sorted(own, key=VIEWS.index)) for own in found)
    assert found[:30] == held(30, "each:2"), "a client's draw does not depend on the others"
    assert found != held(40, "each:2", seed=1)
    for client, own in enumerate(found):
        order = numpy_stream(0, "modalities", client).permutation(4)
        assert set(own) == {VIEWS[i] for i in order[:2]}
    assert held(3, "each:4") == (VIEWS,) * 3


def test_p_draws_each_modality_with_that_probability_and_at_least_one():
    found = held(4_000, "p:0.5")
    assert all(found) and found[:100] == held(100, "p:0.5")
    for name in VIEWS:  # P = 1/2 + (1/2)^4 / 4 = 0.516; five standard deviations are 0.04
        assert sum(name in own for own in found) / 4_000 == pytest.approx(0.516, abs=0.04)
    sizes = [sum(len(own) == size for own in found) / 4_000 for size in range(1, 5)]
    assert sizes == pytest.approx([5 / 16, 6 / 16, 4 / 16, 1 / 16], abs=0.04)
    assert held(50, "p:1") == (VIEWS,) * 50
    assert {len(own) for own in held(200, "p:0.000001")} == {1}


@pytest.mark.parametrize(
    "modalities, words",
    [
        (("image", "sond"), 'the data set has no modality "sond"; did you mean "sound"'),
        (("image+",), 'no modality ""'),
        (("image+image", "sound+text+depth"), "image\\+image names a modality twice"),
        (("image+sound", "text"), "no client holds depth"),
        ("each:5", "the data set has 4 modalities: image, sound, text, depth"),
    ],
)
def test_refused_modalities(modalities, words):
    with pytest.raises(RequestError, match=rf"^partition\.modalities = [^\n]*{words}"):
        held(4, modalities)


@pytest.mark.parametrize("rule", ["p:", "p:0", "p:1.1", "p:x", "each:0", "each:1.5", "every:2", "p:0.5:2"])
def test_rules_of_another_form_are_refused(rule):
    with pytest.raises(RequestError, match=r"^partition\.modalities = [^\n]*each:N with N of 1 or more"):
        held(4, rule)


def test_a_modality_that_nobody_drew_is_refused():
    with pytest.raises(RequestError, match=r"no client holds .*take another seed or rule"):
        held(1, "each:1")


def test_modalities_of_data_with_one_are_refused():
    with pytest.raises(RequestError, match=r"partition\.modalities = each:1: samples of a:b have one modality"):
        held(3, "each:1", ("image",))


@pytest.mark.parametrize(
    "text, value",
    [
        ("p:0.5", "p:0.5"), ("each:2", "each:2"), ("[image+text, image]", ("image+text", "image")),
        ("image+text", ("image+text",)), ('["image", "text"]', ("image", "text")), ("[]", ()),
    ],
)  # fmt: skip
def test_modalities_are_typed_as_lists_or_rules(text, value):
    found = override(ExperimentConfig(), {"partition.modalities": text, "data.name": "a:b"}, text=True)
    assert found.partition.modalities == value
    again = override(ExperimentConfig(), {"partition.modalities": value, "data.name": "a:b"})
    assert again.partition.modalities == value
