"""FedFTG: the losses of generator and student, against loops and the authors' numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ensembles import COUNTS, LABELS, LOGITS, STUDENT, B, C, K, softmax

from mosaic_ray.distillation.ensemble import class_weights
from mosaic_ray.methods.fedftg import client_loss, student_loss

WEIGHTS = torch.tensor(class_weights(COUNTS), dtype=torch.float64)[:, LABELS]


def test_the_generators_loss_written_out():
    for k in range(K):
        total = 0.0
        for i in range(B):
            apart = float((STUDENT[i] - LOGITS[k, i]).abs().sum()) / C
            named = -np.log(softmax(LOGITS[k, i])[int(LABELS[i])])
            total += float(WEIGHTS[k, i]) * (0.5 * named - apart) / B
        assert float(client_loss(STUDENT, LOGITS[k], LABELS, WEIGHTS[k], 0.5)) == pytest.approx(total)


def test_the_students_loss_written_out():
    total = 0.0
    for i in range(B):
        for c in range(C):
            target = sum(float(WEIGHTS[k, i]) * softmax(LOGITS[k, i])[c] for k in range(K))
            total -= np.log(softmax(STUDENT[i])[c]) * target / (B * C)
    assert float(student_loss(STUDENT, LOGITS, WEIGHTS)) == pytest.approx(total)


def test_the_authors_numbers():
    """Of ``compute_backward_flow_G_dis`` and the student's line, ZhangLin-PKU/FedFTG, on these inputs."""
    for k, wanted in enumerate((-1.2352087181866502, -2.610549485846823)):
        assert float(client_loss(STUDENT, LOGITS[k], LABELS, WEIGHTS[k], 0.0)) == pytest.approx(wanted, rel=1e-6)
    named = float(client_loss(LOGITS[0], LOGITS[0], LABELS, torch.ones(B, dtype=torch.float64), 1.0))
    # theirs is the product of the means of cross-entropy and weight
    assert named * float(WEIGHTS[0].mean()) == pytest.approx(0.5909673604233984, rel=1e-6)
    assert float(student_loss(STUDENT, LOGITS, WEIGHTS)) == pytest.approx(0.728724887417434, rel=1e-6)


def test_a_client_without_the_asked_label_does_not_count():
    """Client 0 has no image of class 1: its answers to samples 1 and 3 change nothing."""
    other = LOGITS.clone()
    other[0, [1, 3]] += 5.0
    for logits in (LOGITS, other):
        assert float(student_loss(STUDENT, logits, WEIGHTS)) == float(student_loss(STUDENT, LOGITS, WEIGHTS))
        wanted = client_loss(STUDENT, LOGITS[0], LABELS, WEIGHTS[0], 1.0)
        assert float(client_loss(STUDENT, logits[0], LABELS, WEIGHTS[0], 1.0)) == float(wanted)


def test_the_clients_logits_have_no_gradient_in_the_difference():
    client = LOGITS[1].clone().requires_grad_()
    client_loss(STUDENT, client, LABELS, WEIGHTS[1], 0.0).backward()
    assert (client.grad == 0).all()
