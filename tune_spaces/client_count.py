"""The same data among more and more clients.

Values: the README commands of the authors' code have 10 clients, and the paper scales to 100. At omega 0.01 the
authors' rejection sampler found no partition among 50 clients in 13,000 tries; ``partition.policy=repair``, the
default, repairs a draw instead.
"""

from mosaic_ray.spaces import Choice, SweepPlan


def plan() -> SweepPlan:
    """Return a plan of 4 counts."""
    return SweepPlan(
        summary="10, 20, 50 and 100 clients",
        knobs={"partition.num_clients": Choice((10, 20, 50, 100))},
    )
