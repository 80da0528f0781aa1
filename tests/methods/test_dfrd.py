"""DFRD: the loss of the generator's images, against loops and the numbers of the same group's later code."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ensembles import COUNTS, LOGITS, STUDENT, B, divergence, softmax

from mosaic_ray.distillation.ensemble import class_weights, mixed
from mosaic_ray.distillation.losses import kl
from mosaic_ray.methods.dfrd import image_loss

ASKED = torch.tensor([2, 1, 2, 0])
WEIGHTS = torch.tensor(class_weights(COUNTS), dtype=torch.float64)[:, ASKED]
ENSEMBLE = mixed(LOGITS, WEIGHTS)


@pytest.mark.parametrize("weight", [0.0, 1.0, 3.0])
def test_the_loss_written_out(weight):
    named, chosen = 0.0, []
    for i in range(B):
        t, s, y = softmax(ENSEMBLE[i]), softmax(STUDENT[i]), int(ASKED[i])
        named -= np.log(t[y]) / B
        if np.argmax(t) == y != np.argmax(s):
            chosen.append(divergence(softmax(STUDENT[i], 10), softmax(ENSEMBLE[i], 10)))
    assert 0 < len(chosen) < B
    wanted = named - weight * np.mean(chosen)
    assert float(image_loss(STUDENT, ENSEMBLE, ASKED, 10.0, weight)) == pytest.approx(wanted)


def test_the_authors_numbers():
    """Of ``Update_generator`` and ``cal_L_kl`` in DFAD/manager.py of lkyddd/DFDG (tran_strategy 1), on these inputs."""
    named = float(image_loss(STUDENT, ENSEMBLE, ASKED, 10.0, 0.0))
    assert named == pytest.approx(1.6067754015546953, rel=1e-6)
    both = float(image_loss(STUDENT, ENSEMBLE, ASKED, 10.0, 1.0))
    assert both - named == pytest.approx(-0.015494726881642995, rel=1e-5)
    assert float(kl(ENSEMBLE, STUDENT, 10.0).mean()) / 100 == pytest.approx(0.013088886849080883, rel=1e-5)


def test_without_a_sample_that_only_the_ensemble_has_right_the_term_is_zero():
    ensemble = ENSEMBLE.clone().requires_grad_()
    loss = image_loss(ENSEMBLE, ensemble, ASKED, 10.0, 1.0)
    loss.backward()
    assert loss.item() == float(image_loss(STUDENT, ENSEMBLE, ASKED, 10.0, 0.0))
    assert ensemble.grad.isfinite().all()
