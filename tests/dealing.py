"""Labels to split among clients, and each client's label counts."""

from __future__ import annotations

import numpy as np

from mosaic_ray.config.schema import PartitionConfig
from mosaic_ray.data.partition import label_counts, partition


def labels_of(class_sizes: list[int], order_seed: int | None = None) -> np.ndarray:
    """Return labels class by class, or in a random order of ``order_seed``."""
    labels = np.repeat(np.arange(len(class_sizes)), class_sizes)
    return labels if order_seed is None else np.random.default_rng(order_seed).permutation(labels)


def counts_of(class_sizes: list[int], seed: int = 0, order_seed: int | None = None, **knobs) -> np.ndarray:
    """Return the label counts [K, C] of a partition with ``knobs`` of the section ``partition``."""
    labels = labels_of(class_sizes, order_seed)
    shards = partition(labels, PartitionConfig(**knobs), seed, len(class_sizes))
    return label_counts(labels, shards, len(class_sizes))
