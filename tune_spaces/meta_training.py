"""What the meta model learns from: clients' prototypes, or the generators' images, with two ways to label them.

Descriptions of the paper report that training on synthetic data "degraded performance due to bias". Here each arm has
the same meta model, the same random start and the same number of updates, and hands back its last state: a re-fitted
head (``meta.init``) and a selected state (``meta.select``) would both be stopped by held-out prototypes, which the
synthetic arms are to do without. Labels of ``synthetic``: the classifier of the client whose generator made the
image; of ``synthetic_vote``: the experts' vote. The teacher's accuracy over the seeds is to be compared; distillation
after it is the base's own, its anchor on prototypes included.
"""

from __future__ import annotations

from mosaic_ray.spaces import Choice, SweepPlan


def plan() -> SweepPlan:
    """3 sources x 3 seeds."""
    return SweepPlan(
        summary="meta model trained on prototypes, or on synthetic images with two kinds of label",
        knobs={"meta.data": Choice(("prototypes", "synthetic", "synthetic_vote"))},
        base={"meta.init": "random", "meta.select": False},
        seeds=(0, 1, 2),
    )
