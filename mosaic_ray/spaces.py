"""The import path of users' search spaces; ``sweeps.space`` has the code."""

from .sweeps.space import Choice, Range, SweepPlan

__all__ = ["Choice", "Range", "SweepPlan"]
