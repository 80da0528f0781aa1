"""Mosaic (arXiv 2505.19699): class experts, a meta model trained on prototypes, distillation on generators' images."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch

from ...algorithm.distillation import DistillTask
from ...algorithm.experts import form_experts
from ...algorithm.generation import allocate, sampling_shares
from ...algorithm.heads import fit_head, scores
from ...algorithm.meta_training import Teacher, train_meta
from ...algorithm.prototypes import split_held_out
from ...algorithm.teacher import TeacherState, head_logits, heads_only
from ...config import ExperimentConfig
from ...models.tensors import head_of, to_weights
from ...records import DataFacts, Prototypes, Weights
from ...seeding import seeded


def make_teacher(
    config: ExperimentConfig,
    facts: DataFacts,
    global_weights: Weights,
    client_weights: Iterable[tuple[int, Weights]],
    counts: np.ndarray,
    prototypes: Prototypes,
    progress: Callable[[int, dict[str, float]], None],
) -> tuple[TeacherState, dict[str, float]]:
    """Experts from the clients' models, and the meta model trained on three quarters of the prototypes.

    ``counts`` int64 [K, C]. With ``meta.input = head`` only heads are averaged: the experts read the global model's
    features, the very space the prototypes live in; with ``full`` whole models are (M6 has what that costs).
    """
    fallback = global_weights if config.meta.expert_fallback == "global" else None
    if config.meta.input == "head":
        client_weights = ((k, heads_only(w)) for k, w in client_weights)
        fallback = None if fallback is None else heads_only(fallback)
    experts, index = form_experts(client_weights, counts, fallback)
    kept, held_out = split_held_out(prototypes, config.prototypes.held_out, config.seed)
    head = head_of(global_weights)
    with seeded(config.seed, "init", "meta"):
        teacher = Teacher(facts.num_classes, facts.num_classes, config.meta, head[0].shape[1])
    figures: dict[str, float] = {}
    judged = held_out if len(held_out) else kept
    student = torch.tensor(judged.vectors) @ torch.tensor(head[0]).T + torch.tensor(head[1])
    figures["student_held_out_accuracy"] = scores(student, judged)[0]
    if teacher.skip is not None:
        matrix, bias, fitted = fit_head(kept, held_out, head, config.prototypes.weighting)
        with torch.no_grad():
            teacher.skip.weight.copy_(torch.tensor(matrix))
            teacher.skip.bias.copy_(torch.tensor(bias))
        figures |= {f"head_{name}": value for name, value in fitted.items()}
    teacher, trained = train_meta(
        teacher, head_logits(tuple(experts), index), kept, held_out, config.meta, config.prototypes.weighting,
        config.seed, progress,
    )  # fmt: skip
    figures |= {f"meta_{name}": value for name, value in trained.items()}
    figures |= {
        "num_experts": float(len(experts)),
        "num_prototypes": float(len(kept)),
        "num_held_out": float(len(held_out)),
    }
    state = TeacherState(global_weights, tuple(experts), index, to_weights(teacher))
    return state, figures


def make_task(
    config: ExperimentConfig,
    facts: DataFacts,
    global_weights: Weights,
    teacher: TeacherState,
    generators: tuple[Weights, ...],
    generator_figures: list[dict[str, float]],
    client_sizes: np.ndarray,
    prototypes: Prototypes,
) -> DistillTask:
    """What distillation reads: the student that goes in is the global model (stage KD)."""
    shares = sampling_shares(config.distill.gen_sampling, client_sizes, generator_figures)
    counts = allocate(shares, config.distill.samples_per_generator * len(generators))
    kept, held_out = split_held_out(prototypes, config.prototypes.held_out, config.seed)
    return DistillTask(config, facts, global_weights, teacher, generators, counts, kept, held_out)
