"""The descent of a head on prototypes, which is written out, against autograd and torch's Adam."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
import torch

from mosaic_ray.core.types import Prototypes
from mosaic_ray.distillation.linear_head import FIT_LR, descent
from mosaic_ray.distillation.prototypes import prototype_weights


@pytest.mark.parametrize("weighting", ["size", "uniform"])
@pytest.mark.parametrize("num, dim, classes", [(30, 16, 3), (57, 33, 7), (300, 64, 10), (12, 256, 10), (200, 128, 100)])
def test_each_step_has_the_bits_of_autograd_and_adam(num, dim, classes, weighting):
    draws = np.random.default_rng(num)
    vectors, labels = draws.normal(size=(num, dim)).astype(np.float32), draws.integers(0, classes, num)
    prototypes = Prototypes(vectors, labels, draws.integers(1, 90, num).astype(np.float32), np.zeros(num, np.int64))
    start = draws.normal(size=(classes, dim)).astype(np.float32), draws.normal(size=classes).astype(np.float32)
    head = [torch.tensor(part, requires_grad=True) for part in start]
    optimiser = torch.optim.Adam(head, lr=FIT_LR)
    weights = torch.tensor(prototype_weights(prototypes, weighting))
    for step, found in enumerate(islice(descent(prototypes, start, weighting), 40)):
        assert all(torch.equal(a, b) for a, b in zip(found, head, strict=True)), step
        optimiser.zero_grad()
        logits = torch.tensor(vectors) @ head[0].T + head[1]
        losses = torch.nn.functional.cross_entropy(logits, torch.tensor(labels), reduction="none")
        (weights * losses).mean().backward()
        optimiser.step()
