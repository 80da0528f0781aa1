"""Train a network that no client holds, on the clients' synthetic images alone (docs/algorithm.md 1.13).

It has no features in common with any client's network, so no average of models and no head on prototypes can make it.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from ..core.seeding import numpy_stream, seeded, stream
from ..core.types import Weights
from ..data.transforms import augment, to_input
from ..federated.client import ClientContext
from ..models.optimizers import SGD
from ..models.state_dict import to_weights, use_precision
from .rehearsal import SharedGenerators, allocate_draws, draw_images

#: Images are drawn for so many steps at a time.
STEPS_DRAWN = 20

MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4


def first_weights(context: ClientContext) -> Weights:
    """Return the weights with which ``model.student`` begins, as they are drawn."""
    with seeded(context.config.seed, "student/init"):
        return to_weights(context.classifier(name=context.config.model.student))


def train_server_student(context: ClientContext, teacher_weights: Weights, shared: SharedGenerators) -> Weights:
    """Return ``model.student`` after ``student.steps`` steps on images drawn anew from the generators ``shared``.

    Labels spread evenly over the classes that some generator can draw. With y the label asked for, p the prediction of
    the teacher (the run's final model) and l = ``student.label_weight`` the loss of an image x is

        l CE(f(x), y) + (1 - l) KL(p(x) || f(x))

    SGD with momentum; the learning rate falls from ``student.lr`` to 0 along half a cosine.
    """
    config, facts, section = context.config, context.facts, context.config.student
    precision = config.runtime.precision
    model = context.classifier(first_weights(context), config.model.student)
    teacher = context.classifier(teacher_weights).eval()
    optimizer = SGD(
        model.parameters(), lr=section.lr, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, nesterov=True
    )
    model.train()
    for step in range(section.steps):
        number, place = divmod(step, STEPS_DRAWN)
        if place == 0:
            count = section.batch_size * min(STEPS_DRAWN, section.steps - step)
            draws = numpy_stream(config.seed, "student/labels", number)
            everyone = range(facts.num_classes)
            drawn = draw_images(
                config, facts, shared, *allocate_draws(shared, -1, everyone, count, draws),
                stream(config.seed, "student/z", number), context.device,
            )  # fmt: skip
        rows = slice(place * section.batch_size, (place + 1) * section.batch_size)
        changed = augment(drawn.images[rows], facts.augmentations, stream(config.seed, "student/augment", step))
        inputs, labels = to_input(changed, facts), drawn.labels[rows]
        optimizer.param_groups[0]["lr"] = section.lr * (1 + math.cos(math.pi * step / section.steps)) / 2
        with use_precision(precision, context.device):
            with torch.no_grad():
                target = teacher(inputs).float().log_softmax(1)
            logits = model(inputs).float()
        loss = student_loss(logits, target, labels, section.label_weight)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        context.progress(step + 1, section.steps)
    return to_weights(model)


def student_loss(
    logits: torch.Tensor, target: torch.Tensor, labels: torch.Tensor, label_weight: float
) -> torch.Tensor:
    """Return the mean loss; ``logits`` and ``target`` (log-probabilities) float32 [B, C], ``labels`` int64 [B]."""
    divergence = nn.functional.kl_div(logits.log_softmax(1), target, log_target=True, reduction="batchmean")
    return label_weight * nn.functional.cross_entropy(logits, labels) + (1 - label_weight) * divergence

