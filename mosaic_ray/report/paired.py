"""Test differences that are paired by seed: the t-test, and the number of seeds that a difference would take."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist, fmean, stdev

#: A difference whose p is below it is marked.
LEVEL = 0.05

#: The probability with which ``seeds_needed`` seeds show a difference at ``LEVEL``.
POWER = 0.8


def two_sided_p(t: float, df: int) -> float:
    """Return P(|T| >= |t|) for Student's t with ``df`` >= 1 degrees of freedom.

    Abramowitz and Stegun, Handbook of Mathematical Functions (1964), 26.7.3 and 26.7.4: finite sums of powers of
    cos(atan(t / sqrt(df))). The absolute error is about 1e-15.
    """
    angle = math.atan(abs(t) / math.sqrt(df))
    sine, cosine, odd = math.sin(angle), math.cos(angle), df % 2
    term = total = 0.0 if df == 1 else cosine if odd else 1.0
    for place in range(2 + odd, df - 1, 2):
        term *= (place - 1) / place * cosine**2
        total += term
    inside = 2 / math.pi * (angle + sine * total) if odd else sine * total
    return min(max(1 - inside, 0.0), 1.0)


def paired_p(differences: Sequence[float]) -> float | None:
    """Return p of the two-sided paired t-test, whose null hypothesis is a mean of 0; None for fewer than 2 pairs."""
    if len(differences) < 2:
        return None
    mean, sd = fmean(differences), stdev(differences)
    if not sd:
        return 0.0 if mean else 1.0
    return two_sided_p(mean / (sd / math.sqrt(len(differences))), len(differences) - 1)


def seeds_needed(differences: Sequence[float]) -> int | None:
    """Return how many seeds a paired test at ``LEVEL`` takes to show the observed mean with probability ``POWER``.

    The normal approximation n = ((z_0.975 + z_0.8) sd / mean)^2, rounded up, at least 2. None for fewer than 2 pairs or
    a mean of 0.
    """
    if len(differences) < 2 or not fmean(differences):
        return None
    normal = NormalDist()
    z = normal.inv_cdf(1 - LEVEL / 2) + normal.inv_cdf(POWER)
    return max(2, math.ceil((z * stdev(differences) / fmean(differences)) ** 2))
