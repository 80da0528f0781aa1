"""DENSE: the loss of its images, against loops and the authors' numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ensembles import LABELS, LOGITS, STUDENT, B, divergence, softmax

from mosaic_ray.distillation.losses import kl
from mosaic_ray.methods.dense import image_loss

ENSEMBLE = LOGITS.mean(0)


@pytest.mark.parametrize("weight", [0.0, 1.0, 2.5])
def test_the_loss_written_out(weight):
    named, apart = 0.0, 0.0
    for i in range(B):
        t, s = softmax(ENSEMBLE[i]), softmax(STUDENT[i])
        named -= np.log(t[int(LABELS[i])]) / B
        apart += divergence(t, s) / B if np.argmax(t) != np.argmax(s) else 0
    assert apart > 0
    assert float(image_loss(STUDENT, ENSEMBLE, LABELS, weight)) == pytest.approx(named - weight * apart)


def test_the_authors_numbers():
    """Of ``synthesize`` and ``KLDiv`` in helpers/ of zj-jayzhang/DENSE, run on these inputs."""
    labels = torch.tensor([0, 1, 1, 2])
    alone = float(image_loss(STUDENT, ENSEMBLE, labels, 0.0))
    assert alone == pytest.approx(1.4196458694131593)
    assert float(image_loss(STUDENT, ENSEMBLE, labels, 1.0)) - alone == pytest.approx(-1.1444891337776413)
    assert float(kl(ENSEMBLE, STUDENT, 20.0).mean()) == pytest.approx(1.2806098263209886)


def test_where_the_student_agrees_everywhere_nothing_is_not_a_number():
    student = (2 * ENSEMBLE).requires_grad_()
    ensemble = ENSEMBLE.clone().requires_grad_()
    loss = image_loss(student, ensemble, LABELS, 1.0)
    loss.backward()
    assert loss.item() == pytest.approx(float(image_loss(STUDENT, ENSEMBLE, LABELS, 0.0)))
    assert (student.grad == 0).all() and ensemble.grad.isfinite().all()
