"""Every switch in which ``distilled`` (knobs at their defaults) and ``reference`` (the authors' code) differ, flipped.

A point flips one switch; point 0 is the base. The points are read from ``presets.REFERENCE``, so a switch that is added
there is flipped here.

The knobs in ``BUDGETS`` are no switches and stay: numbers of updates and tries, and step sizes. lambda_e = 0 is a
switch, since it turns the entropy loss off. ``COMPANY`` names knobs that change together with a switch. Either the
configuration requires it (experts with their full forward allow no re-fitted head), or each knob alone is the same
switch (lambda_i = 0 and tau = 0 both turn the inversion loss off), or the switch needs it to succeed (a partition that
is drawn again until it fits needs its tries).

A switch has no effect where the base does not reach it: ``prototypes.cap`` 10 with ``prototypes.k`` 10, or
``partition.policy`` where one of the first draws fits.
"""

from mosaic_ray.config.presets import REFERENCE
from mosaic_ray.config.resolve import KNOBS
from mosaic_ray.spaces import SweepPlan

BUDGETS = ("meta.updates", "meta.patience", "distill.lr", "generator.tau", "partition.max_tries")
COMPANY = {
    "meta.input": ("meta.init",),
    "generator.lambda_i": ("generator.tau",),
    "partition.policy": ("partition.max_tries",),
}


def plan() -> SweepPlan:
    """Return the base and one point for each switch."""
    flipped = [name for name, value in REFERENCE.items() if value != KNOBS[name].default and name not in BUDGETS]
    points = [{knob: REFERENCE[knob] for knob in (name, *COMPANY.get(name, ()))} for name in flipped]
    return SweepPlan(
        summary=f"the base, then {len(points)} choices of the authors' code, one at a time",
        points=({}, *points),
        base={"algorithm": "distilled"},
    )
