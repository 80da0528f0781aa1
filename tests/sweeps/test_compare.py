"""`mosaic compare`: methods side by side on one partition a seed."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from cli_runner import ask, refusal

from mosaic_ray.cli.request import compare_plan, sweep_request
from mosaic_ray.core.errors import RequestError
from mosaic_ray.sweeps.runner import prepare

NARROW = "federation.widths=[1.0,0.5]"


@pytest.mark.parametrize(
    "methods, points",
    [
        ("fedavg,mosaic", [{"method": "fedavg"}, {"method": "mosaic"}]),
        ("fedrolex", [{"method": "fedavg", "federation.strategy": "fedrolex"}]),
        (" mosaic , mosaic+heterofl", [{"method": "mosaic"}, {"method": "mosaic", "federation.strategy": "heterofl"}]),
        ("fedavg+fedrolex+fedprox", [{"method": "fedavg", "federation.strategy": "fedrolex+fedprox"}]),
        ("fedrolex+fedprox", [{"method": "fedavg", "federation.strategy": "fedrolex+fedprox"}]),
    ],
)
def test_compare_takes_methods_strategies_and_both(methods, points):
    assert list(compare_plan(methods).points) == points


LAB = Path(__file__).parents[1] / "plugins/lab"


def test_compare_takes_plugins(tmp_path, monkeypatch):
    """The object's class decides whether it is a method or a strategy."""
    monkeypatch.chdir(tmp_path)
    for name in ("nearest_mean", "median"):
        shutil.copy(LAB / f"{name}.py", tmp_path)
    (tmp_path / "other.py").write_text("OTHER = 3\n")
    method, strategy = "nearest_mean.py:NEAREST_MEAN", "median.py:MEDIAN"
    assert list(compare_plan(f"{method},{strategy},{method}+fedrolex,mosaic+{strategy}").points) == [
        {"method": method},
        {"method": "fedavg", "federation.strategy": strategy},
        {"method": method, "federation.strategy": "fedrolex"},
        {"method": "mosaic", "federation.strategy": strategy},
    ]
    with pytest.raises(RequestError, match=r"other\.py:OTHER: it is a int, not an instance of"):
        compare_plan("other.py:OTHER")


def test_widths_are_allowed_where_every_point_names_its_strategy():
    assert compare_plan("fedrolex,mosaic+fedrolex").base == {
        "federation.strategy": "fedrolex", "runtime.ceiling": True,
    }  # fmt: skip
    found = compare_plan("fedrolex,mosaic").base
    assert found == {"runtime.ceiling": True}, "mosaic means the strategy that is configured"


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
    assert {trial.config.federation.strategy for trial in sweep.trials} == {"fedrolex"}
    assert [trial.config.method for trial in sweep.trials] == ["fedavg", "fedavg", "mosaic", "mosaic"]
    with pytest.raises(RequestError, match="fedavg trains whole models"):
        prepare(sweep_request("compare", words, plan=compare_plan("fedavg,fedrolex"), seeds="0"))
