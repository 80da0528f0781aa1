"""The paired t-test: tails against published quantiles and an integral, and the number of seeds."""

from __future__ import annotations

import math
from statistics import fmean, stdev

import numpy as np
import pytest

from mosaic_ray.report.paired import paired_p, seeds_needed, two_sided_p


@pytest.mark.parametrize(
    "df, p, t",
    [
        (1, 0.05, 12.7062), (2, 0.05, 4.30265), (3, 0.05, 3.18245), (4, 0.05, 2.77645), (9, 0.05, 2.26216),
        (30, 0.05, 2.04227), (1, 0.5, 1.0), (2, 0.01, 9.92484), (5, 0.001, 6.86883), (120, 0.01, 2.61742),
    ],
)  # fmt: skip
def test_tails_are_those_of_the_tables(df, p, t):
    assert two_sided_p(t, df) == two_sided_p(-t, df) == pytest.approx(p, rel=1e-4)


@pytest.mark.parametrize("df", [1, 2, 3, 4, 7, 10, 25])
def test_a_tail_is_the_integral_of_the_density(df):
    constant = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(df * math.pi)
    for t in (0.0, 0.3, 1.7, 5.0):
        x = np.linspace(-t, t, 20_001)
        y = constant * (1 + x**2 / df) ** (-(df + 1) / 2)
        inside = float(((y[1:] + y[:-1]) / 2 * np.diff(x)).sum())
        assert two_sided_p(t, df) == pytest.approx(1 - inside, abs=1e-6)


def test_a_test_of_differences_by_hand():
    """Differences 1, 2, 3: mean 2, sd 1, t = 2 sqrt(3) with 2 degrees of freedom, p = 1 - t / sqrt(2 + t^2)."""
    assert paired_p([1.0, 2.0, 3.0]) == pytest.approx(1 - math.sqrt(12 / 14))
    assert paired_p([-1.0, -2.0, -3.0]) == paired_p([1.0, 2.0, 3.0])
    assert paired_p([0.5]) is None and paired_p([]) is None
    assert paired_p([0.5, 0.5]) == 0.0 and paired_p([0.0, 0.0]) == 1.0


def test_seeds_needed_by_simulation():
    """With so many seeds a z-test finds the effect in four of five draws."""
    differences = [0.4, 1.3, -0.8, 2.0, 0.1, 0.9]
    found, mean, sd = seeds_needed(differences), fmean(differences), stdev(differences)
    assert found == math.ceil(((1.959964 + 0.841621) * sd / mean) ** 2)
    draws = np.random.default_rng(0).normal(mean, sd, (20_000, found)).mean(1)
    power = (np.abs(draws) > 1.959964 * sd / math.sqrt(found)).mean()
    assert 0.79 < power < 0.86
    assert seeds_needed([0.5]) is None and seeds_needed([-1.0, 1.0]) is None and seeds_needed([2.0, 2.0]) == 2
