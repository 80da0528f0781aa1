"""How narrow clients' channels are chosen, and what Mosaic adds: HeteroFL, FedRolex and Federated Dropout, and Mosaic
over FedRolex.

Widths 1, 1/2, 1/4, 1/8 in turn are the first four of the five classes of FedRolex' and HeteroFL's public codes (1/16
would leave one channel of a small network's first layer). The order to expect is HeteroFL < FedRolex < Federated
Dropout, as in FedEcover's tables on CIFAR-10. ``accuracy_control`` of the Mosaic point is FedRolex under the same
closing rounds.
"""

from mosaic_ray.spaces import SweepPlan


def plan() -> SweepPlan:
    """4 points."""
    return SweepPlan(
        summary="widths 1, 1/2, 1/4, 1/8: three ways to choose channels, and Mosaic over FedRolex",
        points=tuple(
            {"federation.strategy": strategy, "method": method}
            for strategy, method in (
                ("heterofl", "fedavg"), ("feddropout", "fedavg"), ("fedrolex", "fedavg"), ("fedrolex", "mosaic"),
            )
        ),
        base={"federation.strategy": "fedrolex", "federation.widths": (1.0, 0.5, 0.25, 0.125)},
    )  # fmt: skip
