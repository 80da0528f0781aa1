"""The default space: the three weights of the generator's losses, and how skewed the clients are.

Ranges: the authors' code sets lambda_e 0, lambda_d 5, lambda_i 10 (``degan.py``); published descriptions of the paper
suggest 0.5 to 2, 2 to 10 and 5 to 15, which bracket the last two and turn the entropy loss on, as in the paper's
text. Omegas: the paper's three. The grid is the one of ``lambdas_grid`` at each omega, 81 points.

The weights belong to the paper's path (GAN, teacher, distillation), so the base is the algorithm preset ``distilled``.
``rehearsal_omega`` sweeps what ``fixed`` has instead.
"""

from mosaic_ray.spaces import Choice, Range, SweepPlan


def plan() -> SweepPlan:
    """Return a plan of 16 random points; ``--search grid`` gives all 81."""
    return SweepPlan(
        summary="weights of entropy, diversity and inversion loss x omega (the default space)",
        knobs={
            "generator.lambda_e": Range(0.5, 2.0, grid=(0.5, 1.0, 2.0)),
            "generator.lambda_d": Range(2.0, 10.0, grid=(2.0, 5.0, 10.0)),
            "generator.lambda_i": Range(5.0, 15.0, grid=(5.0, 10.0, 15.0)),
            "partition.omega": Choice((0.01, 0.1, 1.0)),
        },
        base={"algorithm": "distilled"},
        search="random",
        samples=16,
    )
