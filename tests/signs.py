"""Made samples of several modalities, of which neither image nor text alone tells the class."""

from __future__ import annotations

import numpy as np

from mosaic_ray.core.types import DataFacts, Dataset, ImageSet, Modality
from mosaic_ray.data.records import pack

MODALITIES = (Modality("image", "image", (1, 8, 8)), Modality("text", "text", (6,), 9), Modality("v", "vector", (4,)))
FACTS = DataFacts("signs", 4, 1, 8, (0.4,), (0.3,), modalities=MODALITIES)

#: Modalities of three clients, dealt in turn.
SOME = ("image+text", "text+v", "image+v")

#: A run of Mosaic with rehearsal on such samples.
REHEARSAL = {
    "method": "mosaic", "algorithm": "fixed", "generator.family": "cvae", "distill.steps": 0, "warmup.bn": "exact",
    "finetune.bn": "exact", "finetune.head": "refit", "rehearsal.weight": 1.0, "partition.modalities": SOME,
}  # fmt: skip


def signs(count: int, seed: int) -> ImageSet:
    """Return samples whose class is 2 x (bright image) + (word of the text); the vector is noise around the class."""
    draws = np.random.default_rng(seed)
    bright, word = draws.integers(0, 2, (2, count))
    labels = 2 * bright + word
    values = {
        "image": draws.integers(0, 128, (count, 1, 8, 8)) + 127 * bright[:, None, None, None],
        "text": np.where(np.arange(6) < 4, 1 + draws.integers(0, 3, (count, 6)) + 4 * word[:, None], 0),
        "v": draws.normal(size=(count, 4)) * 3 + labels[:, None] * 0.5 + 7,
    }
    return ImageSet(pack(MODALITIES, values, np.ones((count, 3), bool)), labels.astype(np.int64))


def signs_dataset() -> Dataset:
    """Return 240 training and 80 test samples."""
    return Dataset(FACTS, signs(240, 0), signs(80, 1), ("ww", "wb", "bw", "bb"), "signs")
