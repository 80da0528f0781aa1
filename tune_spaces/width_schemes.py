"""How narrow clients' channels are chosen, and what can be added: HeteroFL, FedRolex and Federated Dropout, each alone,
under the two floors that need no synthetic image, and under Mosaic.

Widths 1, 1/2, 1/4, 1/8 in turn are the first four of the five classes of FedRolex' and HeteroFL's public codes (1/16
would leave one channel of a small network's first layer). The order to expect is HeteroFL < FedRolex < Federated
Dropout, as in FedEcover's tables on CIFAR-10. ``accuracy_control`` of every point is the strategy alone, with its own
head, under the same closing rounds. What ``mosaic`` adds to a floor of the same strategy is what its images add.
"""

from mosaic_ray.spaces import SweepPlan


def plan() -> SweepPlan:
    """3 strategies x 4 methods."""
    return SweepPlan(
        summary="widths 1, 1/2, 1/4, 1/8: three ways to choose channels, alone, with floors, with Mosaic",
        points=tuple(
            {"federation.strategy": strategy, "method": method}
            for strategy in ("fedrolex", "heterofl", "feddropout")
            for method in ("fedavg", "prototype_head", "lda_head", "mosaic")
        ),
        base={"federation.strategy": "fedrolex", "federation.widths": (1.0, 0.5, 0.25, 0.125)},
    )
