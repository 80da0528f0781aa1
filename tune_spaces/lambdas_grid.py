"""The 27 weights of the generator's losses at one omega: one warm-up, one set of prototypes, one teacher for all.

Values: the grid of ``lambdas_omega``. Compare mean and standard deviation over three seeds or more
(``--seeds 0,1,2``): the seed alone changes the final accuracy by points (README, Results).
"""

from mosaic_ray.spaces import Choice, SweepPlan


def plan() -> SweepPlan:
    """Return a plan of 3 x 3 x 3 points at the base's omega."""
    return SweepPlan(
        summary="weights of entropy, diversity and inversion loss at one omega: 27 points",
        knobs={
            "generator.lambda_e": Choice((0.5, 1.0, 2.0)),
            "generator.lambda_d": Choice((2.0, 5.0, 10.0)),
            "generator.lambda_i": Choice((5.0, 10.0, 15.0)),
        },
        base={"algorithm": "distilled"},
    )
