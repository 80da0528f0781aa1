"""Distillation: train the student on the teacher's outputs for synthetic images (docs/algorithm.md stage KD)."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from ..config.schema import ExperimentConfig
from ..core.health import PLATEAU_MIN_WINDOW, PLATEAU_WINDOW
from ..core.seeding import stream
from ..core.types import DataFacts, ImageSet, Prototypes, Weights
from ..data.transforms import drop_from_rows
from ..federated.client import ClientContext
from ..federated.evaluation import logits_on
from ..federated.local_training import no_progress
from ..models.optimizers import Adam
from ..models.state_dict import to_weights, use_precision
from .generator_training import allocate, classifier_view, draw, load_generator, sampling_shares
from .linear_head import fit_heads, sample_losses, scores, surely_lower
from .losses import distillation_loss, with_asked_labels
from .prototypes import prototype_weights, split_held_out
from .teacher import MixedTeacher, TeacherState, build_teacher, shift

#: A class that the teacher names a few times in a batch is often an error of it. With ten classes in 320 images a class
#: with 8 images or more counts as much as any other, and a single image has 1.25 % of the loss instead of 10 %.
MOST_BALANCE = 4.0


@dataclass(frozen=True)
class DistillTask:
    """All inputs of distillation, as arrays, so that they can be sent to Ray Train workers.

    ``student`` starts and ``teacher`` teaches without knowledge of the ``held_out`` prototypes, which choose the number
    of steps. ``whole``: a student and a teacher for as many steps on all prototypes; None where none are held out.
    ``validation``: clients' images that choose in their place where the student's features move.
    """

    config: ExperimentConfig
    facts: DataFacts
    student: Weights
    teacher: TeacherState | MixedTeacher
    generators: tuple[Weights, ...]
    counts: np.ndarray  # int64 [K], images per generator and step
    kept: Prototypes
    held_out: Prototypes
    whole: tuple[Weights, TeacherState | MixedTeacher] | None = None
    validation: ImageSet | None = None


@dataclass(frozen=True)
class DistContext:
    """Rank of this worker, number of workers, and an in-place sum of a tensor over all workers.

    ``progress(done, total)`` is called after each step.
    """

    rank: int = 0
    size: int = 1
    sum_: Callable[[Tensor], object] = lambda tensor: None
    progress: Callable[[int, int], None] = no_progress


class Batcher:
    """Generates synthetic batches of ``counts[k]`` images of each generator k, from one stream per step and generator.

    With n workers, worker r uses the generators k with k mod n = r, so the union is the batch of a single process.
    """

    def __init__(self, task: DistillTask, dist: DistContext, device: torch.device) -> None:
        self.task, self.device = task, device
        mine = [k for k in range(len(task.generators)) if k % dist.size == dist.rank and task.counts[k] > 0]
        self.generators = {
            k: load_generator(task.config.generator, task.facts, task.generators[k]).to(device) for k in mine
        }

    @torch.no_grad()
    def __call__(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return classifier inputs float32 [B, channels, H, W] of ``step``, in client order, without gradients (K3).

        With them what the student sees of them, and the labels int64 [B] that conditional generators were asked for;
        empty where generators take none.
        """
        task, config = self.task, self.task.config
        images, rate = [torch.empty(0, *task.facts.input_shape, device=self.device)], config.distill.modality_dropout
        seen, labels = images.copy(), [torch.empty(0, dtype=torch.int64, device=self.device)]
        for k, generator in self.generators.items():
            draws = stream(config.seed, "distill/z", step, k)
            with use_precision(config.runtime.precision, self.device):
                inputs = draw(generator, int(task.counts[k]), draws, self.device)
                fake = generator(*inputs).float()
            images.append(classifier_view(fake, config.generator.gan_range, task.facts))
            labels += inputs[1:]
            if rate:
                left_out = stream(config.seed, "distill/modalities", step, k)
                seen.append(drop_from_rows(images[-1], task.facts.modalities, rate, left_out))
        whole = torch.cat(images)
        return whole, torch.cat(seen) if rate else whole, torch.cat(labels)


#: The name under which steps of the second training are reported.
AGAIN = "again"


def sample_weights(teacher_logits: Tensor, confidence: float, class_balance: bool, dist: DistContext) -> Tensor:
    """Return weights [B] >= 0: 0 below the teacher ``confidence``; with ``class_balance`` equal totals per class.

    Classes are the teacher's predictions, counted over all workers. An image counts at most ``MOST_BALANCE`` times as
    much as it would without the balance, so a class with fewer images than that part of an equal share counts less.
    """
    probabilities = teacher_logits.softmax(1)
    top, labels = probabilities.max(1)
    weights = (top >= confidence).float()
    if class_balance:
        totals = torch.zeros(teacher_logits.shape[1], device=weights.device).index_add_(0, labels, weights)
        dist.sum_(totals)
        equal = totals.sum() / (totals > 0).sum().clamp(min=1)  # images of a class, if all that are named had as many
        weights = weights / totals.clamp(min=1).maximum(equal / MOST_BALANCE)[labels]
    return weights


def distil(
    task: DistillTask, device: torch.device, dist: DistContext, report: Callable[[int, dict[str, float]], None]
) -> tuple[Weights, dict[str, float]]:
    """Train the student; returns its weights and figures, equal on all workers.

    Held-out prototypes choose the number of steps (``guard``) and give the figures; the student that is returned takes
    as many from its start on all prototypes. These steps are counted on from the first ones, and ``report`` gets how
    many they are (``AGAIN``) beside their metrics.
    """
    first = task.config.distill.steps
    weights, figures = train_student(task, device, dist, report, first)
    if task.whole is not None:
        student, teacher = task.whole
        kept, none = Prototypes.concatenate([task.kept, task.held_out]), task.held_out.take(np.arange(0))
        whole = replace(task, student=student, teacher=teacher, kept=kept, held_out=none, whole=None)
        steps = int(figures["step"])

        def second(step: int, metrics: dict[str, float]) -> None:
            report(first + step, metrics | {AGAIN: float(steps)})

        weights, _ = train_student(whole, device, dist, second, steps, guard=False)
    return weights, figures


def train_student(
    task: DistillTask,
    device: torch.device,
    dist: DistContext,
    report: Callable[[int, dict[str, float]], None],
    steps: int,
    guard: bool = True,
) -> tuple[Weights, dict[str, float]]:
    """Train the student for ``steps`` steps, without a guard if the configuration or ``guard`` say so.

    The loss of a step is sum_i w_i (alpha T^2 KL + (1 - alpha) CE + beta JS)_i / sum_i w_i over the synthetic batch,
    plus ``anchor_weight`` times the head's cross-entropy on prototypes. With a guard the state of lowest cross-entropy
    on held-out prototypes is returned; the initial one unless another is surely lower (``surely_lower``).
    ``report(step, metrics)`` is called every ``check_steps``.

    Prototypes are features of the initial backbone. Where the features move they cannot choose, since the head may fit
    features that no longer exist: then clients' validation images do, and without any the last state is returned. That
    is no error of the configuration, so that ``backbone_lr`` alone can be changed in a sweep; the figure ``unguarded``
    makes it a health finding. Other figures on held-out prototypes measure the head alone.

    Figures: ``improvement``, 1 minus the ratio of the mean losses (without anchor) of the last window of steps and the
    window before it; ``late_agreement``, share of the last window's images on which student and teacher agree.
    """
    config, distill = task.config, task.config.distill
    wanted = guard and distill.guard
    guard = wanted and not (distill.moves_features and task.validation is None)
    student = ClientContext(config, task.facts, device).classifier(task.student)
    student.train(distill.student_bn == "train")
    teacher = build_teacher(config, task.facts, task.teacher).to(device)
    batch_of = Batcher(task, dist, device)
    head = list(student.head.parameters())
    backbone = [p for name, p in student.named_parameters() if not name.startswith("head.")]
    moving = distill.backbone_lr > 0
    for parameter in backbone:
        parameter.requires_grad_(moving)
    # A frozen backbone that student and teacher share is evaluated once for both.
    shared = not moving and distill.student_bn == "frozen" and teacher.reads_student_features(task.student)
    groups = [{"params": head, "lr": distill.lr}]
    if moving:
        groups.append({"params": backbone, "lr": distill.backbone_lr})
    optimiser = Adam(groups)
    anchors, labels = torch.tensor(task.kept.vectors, device=device), torch.tensor(task.kept.labels, device=device)
    weights_of_anchors = torch.tensor(prototype_weights(task.kept, config.prototypes.weighting), device=device)
    evaluated = task.held_out if len(task.held_out) else task.kept
    eval_vectors = torch.tensor(evaluated.vectors, device=device)

    judges = task.validation if distill.moves_features else None
    sizes = evaluated.sizes if judges is None else np.ones(len(judges))

    def score_head() -> tuple[float, float]:
        with torch.no_grad():
            return scores(student.head(eval_vectors), evaluated)

    @torch.no_grad()
    def losses() -> Tensor:
        """Return the losses that choose, one for each validation image or held-out prototype."""
        if judges is None:
            return sample_losses(student.head(eval_vectors), evaluated.labels)
        mode = student.training
        logits = logits_on(student.eval(), judges, task.facts, device, config.runtime.precision)
        student.train(mode)
        return sample_losses(torch.tensor(logits), judges.labels)

    entered, best_step, begun = score_head(), 0, losses()
    best, best_state = np.average(begun, weights=sizes), copy.deepcopy(student.state_dict())
    seen = torch.zeros(task.facts.num_classes, device=device)
    window, late = min(PLATEAU_WINDOW, steps // 2), torch.zeros(4, device=device)
    for step in range(1, steps + 1):
        images, seen_by_student, asked = batch_of(step)
        with torch.no_grad(), use_precision(config.runtime.precision, device):
            features = student.features(images).float() if shared else None
            target = teacher(images, features, asked if len(asked) else None).float()
            if distill.label_weight:
                target = with_asked_labels(target, asked, distill.label_weight)
        weights = sample_weights(target, distill.confidence, distill.class_balance, dist)
        normaliser = weights.sum()
        dist.sum_(normaliser)
        with use_precision(config.runtime.precision, device):
            known = shared and seen_by_student is images
            logits = (student.head(features) if known else student(seen_by_student)).float()
        loss, parts = distillation_loss(target, logits, distill, weights, normaliser=normaliser)
        if step > steps - 2 * window:
            last = int(step > steps - window)
            late[last] += loss.detach()
            if last:
                late[2] += (logits.argmax(1) == target.argmax(1)).sum()
                late[3] += len(logits)
        if distill.anchor_weight and len(anchors):
            anchor = nn.functional.cross_entropy(student.head(anchors), labels, reduction="none")
            anchor = (weights_of_anchors * anchor).mean()
            loss = loss + distill.anchor_weight * anchor / dist.size
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        if dist.size > 1:
            for parameter in head + (backbone if moving else []):
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                dist.sum_(parameter.grad)
        optimiser.step()
        dist.progress(step, steps)
        seen += torch.bincount(target.argmax(1), minlength=len(seen))
        if step % distill.check_steps == 0 or step == steps:
            held, now = score_head(), losses()
            mean = np.average(now, weights=sizes)
            if guard and mean < best and surely_lower(now, begun, sizes):
                best, best_step, best_state = mean, step, copy.deepcopy(student.state_dict())
            agreement = (logits.argmax(1) == target.argmax(1)).float().mean() if len(logits) else torch.ones(())
            report(
                step,
                {"loss": float(loss.detach()), "agreement": float(agreement), "held_out_accuracy": held[0]}
                | {name: float(part) for name, part in parts.items()},
            )
    dist.sum_(seen)
    dist.sum_(late)
    if guard:
        student.load_state_dict(best_state)
    ended = score_head()
    figures = {
        "held_out_before": entered[0],
        "held_out_after": ended[0],
        "held_out_loss_before": entered[1],
        "held_out_loss_after": ended[1],
        "step": float(best_step if guard else steps),
        "unguarded": float(wanted and not guard),
        "class_coverage": float((seen / seen.sum().clamp(min=1) >= 0.1 / len(seen)).float().mean()),
    }
    if window >= PLATEAU_MIN_WINDOW:
        before, after, agreed, count = late.tolist()
        figures["improvement"] = 1 - after / before if before > 0 else 0.0
        figures["late_agreement"] = agreed / max(count, 1.0)
    return to_weights(student.eval()), figures


@torch.no_grad()
def inspect_student(task: DistillTask, student: Weights, device: torch.device) -> tuple[dict[str, float], np.ndarray]:
    """Measure teacher and student on one synthetic batch that is not trained on (docs/algorithm.md 4.3).

    Returns figures and int64 [C], how often the teacher predicts each class. ``teacher_entropy``: mean entropy of the
    teacher's probabilities over log C; ``teacher_confidence``: mean largest probability; ``class_entropy``: entropy of
    its predicted classes over log C; ``agreement``: share of equal predictions of the student; ``shift``: see
    ``teacher.shift``.
    """
    config, num_classes = task.config, task.facts.num_classes
    images, _, _ = Batcher(task, DistContext(), device)(0)  # training uses steps from 1
    teacher = build_teacher(config, task.facts, task.teacher).to(device)
    network = ClientContext(config, task.facts, device).classifier(student).eval()
    with use_precision(config.runtime.precision, device):
        target, logits = teacher(images).float(), network(images).float()
        moved = shift(teacher, images)
    named, answers = target.argmax(1), target.softmax(1)
    counts, scale = torch.bincount(named, minlength=num_classes), math.log(max(2, num_classes))
    shares = counts / counts.sum()
    figures = {
        "num_classes": float(num_classes),
        "teacher_entropy": float(-torch.xlogy(answers, answers).sum(1).mean()) / scale,
        "teacher_confidence": float(answers.max(1).values.mean()),
        "class_entropy": float(-torch.xlogy(shares, shares).sum()) / scale,
        "agreement": float((logits.argmax(1) == named).float().mean()),
        "shift": moved,
    }
    return figures, counts.cpu().numpy()


def make_task(
    config: ExperimentConfig,
    facts: DataFacts,
    global_weights: Weights,
    teacher: TeacherState | MixedTeacher,
    generators: tuple[Weights, ...],
    generator_figures: list[dict[str, float]],
    client_sizes: np.ndarray,
    prototypes: Prototypes,
    validation: ImageSet | None = None,
) -> DistillTask:
    """Assemble the inputs of distillation.

    The student starts as the global model, with ``distill.start`` = refit with the head at which the teacher of its
    architecture starts, fitted here where that starts at random.
    """
    shares = sampling_shares(config.distill.gen_sampling, client_sizes, generator_figures)
    counts = allocate(shares, config.distill.samples_per_generator * len(generators))
    kept, held_out = split_held_out(prototypes, config.prototypes.held_out, config.seed)
    student = whole = global_weights
    if config.distill.start == "refit":
        own = teacher.groups[teacher.student] if isinstance(teacher, MixedTeacher) else teacher
        trial_head, head = own.trial.head, own.head
        if not head:
            trial_head, head, _ = fit_heads(kept, held_out, global_weights, config.prototypes.weighting)
        student, whole = global_weights | trial_head, global_weights | head
    again = (whole, teacher) if len(held_out) else None
    return DistillTask(config, facts, student, teacher.trial, generators, counts, kept, held_out, again, validation)
