"""`mosaic compare`: methods side by side on one partition a seed."""

from __future__ import annotations

import re

import pytest
from door import ask, refusal

from mosaic_ray.cli.request import compare_plan, sweep_request
from mosaic_ray.core.errors import RequestError
from mosaic_ray.sweeps.runner import prepare

NARROW = "federation.widths=[1.0,0.5]"


@pytest.mark.parametrize(
    "methods, points",
    [
        ("fedavg,mosaic", [{"method": "fedavg"}, {"method": "mosaic"}]),
        ("fedrolex", [{"method": "fedavg", "federation.optimiser": "fedrolex"}]),
        (" mosaic , mosaic+heterofl", [{"method": "mosaic"}, {"method": "mosaic", "federation.optimiser": "heterofl"}]),
    ],
)
def test_compare_takes_methods_optimisers_and_both(methods, points):
    assert list(compare_plan(methods).points) == points


def test_widths_are_allowed_where_every_point_names_its_optimiser():
    assert compare_plan("fedrolex,mosaic+fedrolex").base == {"federation.optimiser": "fedrolex"}
    assert compare_plan("fedrolex,mosaic").base == {}, "mosaic means the optimiser that is configured"


@pytest.mark.parametrize(
    "words, says",
    [
        (["--methods", "mosiac"], 'did you mean "mosaic"?'),
        (["--methods", "fedavg+mosaic"], "unknown method"),
        (["--methods", ""], "unknown method"),
        (["--methods", "fedavg,fedavg"], "is there twice"),
        (["--seeds", "0,x"], "--seeds 0,x"),
        (["--methods", "fedavg,mosaic", "--set", NARROW], "fedavg trains whole models"),
        (["--set", "method=mosaic"], "method"),
    ],
)
@pytest.mark.usefixtures("two_cpus")
def test_a_wrong_option_is_refused_in_one_line(words, says):
    assert says in refusal(ask("compare", *words))


@pytest.mark.usefixtures("two_cpus")
def test_seeds_share_one_partition_and_warm_up_between_methods():
    result = ask("compare", "--dry-run")
    assert result.exit_code == 0, result.stderr
    assert "9 trials (3 points x 3 seeds)" in result.stdout
    counted = dict(re.findall(r"^(\w+) +\d+ +(\d+)", result.stdout, re.MULTILINE))
    assert (counted["partition"], counted["warmup"], counted["generators"]) == ("3", "3", "15")


def test_methods_over_narrow_clients_share_their_rounds():
    words = {"seed": None, "sets": (NARROW,)}
    plan = compare_plan("fedrolex,mosaic+fedrolex")
    sweep = prepare(sweep_request("compare", words, plan=plan, seeds="0,1"))
    assert {trial.config.federation.optimiser for trial in sweep.trials} == {"fedrolex"}
    assert [trial.config.method for trial in sweep.trials] == ["fedavg", "fedavg", "mosaic", "mosaic"]
    with pytest.raises(RequestError, match="fedavg trains whole models"):
        prepare(sweep_request("compare", words, plan=compare_plan("fedavg,fedrolex"), seeds="0"))
