"""The price of a run or a sweep on a cluster: list prices of common machines, and the sum over those that are used."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.errors import RequestError
from ..execution.ray_session import BOOTSTRAP
from ..execution.resource_plan import Node
from ..runs.estimate import Hours
from .cluster_spec import Cluster, NodeType, load, understand

#: Where and when the prices were read; docs/howto/how-long.md has the same table.
AS_OF = "on-demand list prices of Linux in us-east-1 and us-central1, January 2025"

#: Dollars an hour, by provider and machine type.
PRICES: Mapping[str, Mapping[str, float]] = {
    "aws": {
        "m5.large": 0.096, "m5.xlarge": 0.192, "m5.2xlarge": 0.384, "m5.4xlarge": 0.768, "m6i.large": 0.096,
        "m6i.xlarge": 0.192, "m6i.2xlarge": 0.384, "m6i.4xlarge": 0.768, "m6i.8xlarge": 1.536, "c6i.xlarge": 0.17,
        "c6i.2xlarge": 0.34, "c6i.4xlarge": 0.68, "c6i.8xlarge": 1.36, "g4dn.xlarge": 0.526, "g4dn.2xlarge": 0.752,
        "g4dn.12xlarge": 3.912, "g5.xlarge": 1.006, "g5.2xlarge": 1.212, "g5.4xlarge": 1.624, "g5.12xlarge": 5.672,
        "g5.48xlarge": 16.288, "g6.xlarge": 0.8048, "g6.2xlarge": 0.9776, "p4d.24xlarge": 32.7726,
        "p5.48xlarge": 98.32,
    },
    "gcp": {
        "e2-standard-4": 0.134, "e2-standard-8": 0.268, "n2-standard-4": 0.1942, "n2-standard-8": 0.3885,
        "n2-standard-16": 0.7769, "g2-standard-4": 0.7068, "g2-standard-8": 0.8536, "a2-highgpu-1g": 3.6738,
    },
}  # fmt: skip


def price_of(provider: str, kind: NodeType) -> float | None:
    """Return a machine's dollars an hour; None if it is not in the table, or has accelerators attached to it."""
    if kind.content.get("guestAccelerators"):
        return None
    return PRICES.get(provider, {}).get(machine_type(kind.content))


def machine_type(content: Mapping[str, Any]) -> str:
    """Return the provider's name of a machine; empty where its configuration has none."""
    return str(content.get("InstanceType") or content.get("machineType") or "").rpartition("/")[2]


@dataclass(frozen=True)
class Cost:
    """Estimated dollars, None where a price is not known, and the line about them."""

    dollars: float | None
    line: str


def cost_of(cluster: Cluster, used: Mapping[str, int], hours: Hours) -> Cost:
    """Return the cost of ``hours`` on the head and on the workers ``used``, counted by type."""
    counts = [(cluster.head, 1), *((kind, used[kind.name]) for kind in cluster.workers if used.get(kind.name))]
    prices = [(count, kind, price_of(cluster.document.kind, kind)) for kind, count in counts]
    unknown = [machine_type(kind.content) or kind.name for _, kind, price in prices if price is None]
    if unknown:
        return Cost(None, f"not known, for there is no price of {', '.join(dict.fromkeys(unknown))}")
    total = hours.hours * sum(count * (price or 0.0) for count, _, price in prices)
    each = " + ".join(f"{count} {machine_type(kind.content)} at {price:g}" for count, kind, price in prices)
    spot = "; spot machines cost less" if any(kind.spot for _, kind, _ in prices) else ""
    return Cost(total, f"about {total:,.2f} ({each} an hour; {AS_OF}{spot})")


def cost_on_head(used_of: Callable[[Sequence[Node]], Mapping[str, int]], hours: Hours) -> Cost | None:
    """Return the cost on the cluster whose file `ray up` left on this machine; None without one.

    ``used_of`` counts the workers that the request uses by type, of the cluster's nodes, the head first.
    """
    if not hours.source or not Path(BOOTSTRAP).expanduser().exists():
        return None
    try:
        cluster = understand(load(BOOTSTRAP))
        if isinstance(cluster, Cluster):
            return cost_of(cluster, used_of(cluster.nodes(gpus=hours.gpu_hours > 0)), hours)
    except RequestError:
        pass
    return Cost(None, f"not known, for {BOOTSTRAP} does not describe the machines")
