"""Train the meta model on clients' prototypes, or on the generators' images with two kinds of label.

Descriptions of the paper report that training on synthetic data "degraded performance due to bias". Here each arm has
the same meta model, the same random start and the same number of updates, and returns its last state: a re-fitted
head (``meta.init``) and a selected state (``meta.select``) both use held-out prototypes, which the synthetic arms must
not see. ``synthetic`` takes the labels of the classifier of the client that made the image, ``synthetic_vote`` the
experts' vote. Compare the teacher's accuracy over the seeds; the distillation after it is the base's own: its student
starts at, and is anchored on, prototypes.
"""

from mosaic_ray.spaces import Choice, SweepPlan


def plan() -> SweepPlan:
    """Return a plan of 3 sources x 3 seeds."""
    return SweepPlan(
        summary="meta model trained on prototypes, or on synthetic images with two kinds of label",
        knobs={"meta.data": Choice(("prototypes", "synthetic", "synthetic_vote"))},
        base={"algorithm": "distilled", "meta.init": "random", "meta.select": False},
        seeds=(0, 1, 2),
    )
