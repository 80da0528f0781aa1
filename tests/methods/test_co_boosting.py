"""Co-Boosting: hard images, perturbed images and learnt weights, against loops and the authors' numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ensembles import LABELS, LOGITS, STUDENT, B, divergence, softmax

from mosaic_ray.core.seeding import stream
from mosaic_ray.distillation.losses import kl
from mosaic_ray.methods.co_boosting import image_loss, perturb, reweigh

ENSEMBLE = LOGITS.mean(0)
HALVES = torch.tensor([0.5, 0.5], dtype=torch.float64)


@pytest.mark.parametrize("hardness", [0.0, 1.0, 2.0])
def test_the_loss_written_out(hardness):
    hard, apart = 0.0, 0.0
    for i in range(B):
        p = softmax(ENSEMBLE[i])[int(LABELS[i])]
        hard -= (1 - p) ** hardness * np.log(p) / B
        apart += 9 * divergence(softmax(ENSEMBLE[i], 3), softmax(STUDENT[i], 3)) / B
    assert float(image_loss(STUDENT, ENSEMBLE, LABELS, 0.7, hardness)) == pytest.approx(hard - 0.7 * apart)


def test_how_hard_an_image_is_has_no_gradient():
    ensemble = ENSEMBLE.clone().requires_grad_()
    image_loss(STUDENT, ensemble, LABELS, 0.0, 1.0).backward()
    p = ENSEMBLE.softmax(1)
    hard = 1 - p[torch.arange(B), LABELS]
    wanted = hard[:, None] * (p - torch.nn.functional.one_hot(LABELS, 3)) / B
    assert torch.allclose(ensemble.grad, wanted)


def test_the_authors_numbers():
    """Of ``synthesize`` in datafree/synthesis/coboost.py and of ``KLDiv``, rong-dai/Co-Boosting, on these inputs."""
    hard = float(image_loss(STUDENT, ENSEMBLE, LABELS, 0.0, 1.0))
    assert hard == pytest.approx(1.524, abs=6e-4)
    assert float(image_loss(STUDENT, ENSEMBLE, LABELS, 1.0, 1.0)) - hard == pytest.approx(-1.270, abs=1.1e-3)
    assert float(kl(ENSEMBLE, STUDENT, 4.0).mean()) == pytest.approx(1.2761941385251054)
    moved = reweigh(LOGITS, LABELS, HALVES, 3, 0.01, 0.99)
    assert moved.tolist() == pytest.approx([0.5097029805183411, 0.49029701948165894])


def test_weights_go_down_the_loss_and_stay_in_their_range():
    def loss(weights):
        mixture = (LOGITS * (weights / weights.sum())[:, None, None]).sum(0)
        return float(torch.nn.functional.cross_entropy(mixture, LABELS))

    weights, before = HALVES, loss(HALVES)
    for epoch in range(1, 300):
        weights = reweigh(LOGITS, LABELS, weights, epoch, 0.02, 1.0)
        assert ((weights >= 0) & (weights <= 1)).all() and weights.sum() > 0
        assert float((weights / weights.sum()).sum()) == pytest.approx(1)
    assert loss(weights) < before - 1e-3
    both = torch.zeros(2, dtype=torch.float64) + 1e-3  # a step may not take all weights away
    alike = torch.stack([LOGITS[0], LOGITS[0]])
    assert reweigh(alike, LABELS, both, 1, 0.5, 1.0).sum() > 0


def test_images_move_by_one_signed_step_up_the_random_direction():
    matrix = torch.tensor(np.sin(np.arange(12.0)).reshape(4, 3))

    def ensemble(images):
        return images.flatten(1) @ matrix

    x = torch.tensor(np.cos(np.arange(8.0)).reshape(2, 1, 2, 2))
    moved = perturb(ensemble, x, stream(0, "test"), 0.01)
    direction = 2 * torch.rand((2, 3), generator=stream(0, "test"), dtype=torch.float32) - 1

    def value(images):
        return (direction * (ensemble(images) / 4).softmax(1)).sum(1)

    assert torch.allclose((moved - x).abs(), torch.tensor(0.01, dtype=torch.float64))
    assert (value(moved) > value(x)).all() and not moved.requires_grad
