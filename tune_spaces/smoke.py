"""Six short trials on handwritten digits, to check that a sweep works here and shares its common stages.

Two omegas, and at each the three weights of the diversity loss that bracket the authors' 5 (``degan.py``), as in
``lambdas_grid``. A trial differs from its neighbours at the same omega in its generators alone, so six trials make
two partitions, two warm-ups, two sets of prototypes and two teachers. The base shortens the stages that run
six times (generators and distillation) and the meta model's training; the warm-up is the demo's own.
"""

from mosaic_ray.spaces import Choice, SweepPlan


def plan() -> SweepPlan:
    """Return a plan of 2 omegas x 3 points; minutes on two cores."""
    return SweepPlan(
        summary="digits, 2 omegas x 3 weights of the diversity loss: 6 short trials, minutes on two cores",
        knobs={"partition.omega": Choice((0.1, 1.0)), "generator.lambda_d": Choice((2.0, 5.0, 10.0))},
        preset="demo+distilled",
        base={"generator.steps": 200, "meta.updates": 200, "distill.steps": 150},
    )
