"""From clients that hold one class or two to clients that are nearly alike.

Values: the paper's omegas 0.01, 0.1 and 1.0, and a step between each two. Three seeds, because each draws another
partition, which alone changes the accuracy at omega 0.01 by several points.
"""

from mosaic_ray.spaces import Choice, SweepPlan


def plan() -> SweepPlan:
    """Return a plan of 5 omegas x 3 seeds."""
    return SweepPlan(
        summary="omega from 0.01 to 1: how the gain over the control grows with the skew",
        knobs={"partition.omega": Choice((0.01, 0.03, 0.1, 0.3, 1.0))},
        seeds=(0, 1, 2),
    )
