"""How much clients rehearse, and how skewed they are: what the algorithm preset ``fixed`` has in place of the lambdas.

Weights: the two that ``fixed`` lets the clients' held-back images choose from, and a smaller one; each trial has one of
them. Weight 0 is the method ``fedavg``. Three seeds, because each draws another partition.
"""

from mosaic_ray.spaces import Choice, SweepPlan


def plan() -> SweepPlan:
    """Return a plan of 3 weights x 3 omegas x 3 seeds."""
    return SweepPlan(
        summary="weight of rehearsal x omega",
        knobs={
            "rehearsal.weight": Choice((0.1, 0.3, 1.0)),
            "partition.omega": Choice((0.01, 0.1, 1.0)),
        },
        base={"rehearsal.candidates": (), "rehearsal.weight": 1.0},
        seeds=(0, 1, 2),
    )
