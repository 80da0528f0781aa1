"""Mosaic (arXiv 2505.19699): class experts, a meta model trained on prototypes, distillation on generators' images."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

from ..config.schema import ExperimentConfig
from ..core.errors import RunError
from ..core.health import SINGLE_OWNER_BELOW
from ..core.seeding import seeded, stream
from ..core.types import DataFacts, Prototypes, Weights
from ..federated.client import ClientContext
from ..federated.evaluation import domain_auc
from ..models.state_dict import freeze, head_of, load_weights, to_weights, use_precision
from ..models.submodel import ChannelIndices, ChannelLayout
from .experts import effective_owners, expert_weights, form_experts, redundancy
from .generator_training import classifier_view, draw, load_generator
from .linear_head import fit_head, scores
from .meta_model import Teacher, gates, teacher_logits, train_meta
from .prototypes import split_held_out
from .teacher import TeacherState, head_logits, heads_only

#: (client, its model, its generator), in client order, one client in memory at a time.
Sources = Iterable[tuple[int, Weights, Weights]]

#: Prototypes, at most, that the meta model's gates are read off.
MAX_READ = 1024


def expert_mean_logits(
    context: ClientContext, experts: tuple[Weights, ...], index: np.ndarray
) -> Callable[[Tensor, Tensor], Tensor]:
    """(images, features) -> the mean of the class experts' logits [B, C]: the "model group" without a meta model.

    Experts speak as ``meta.input`` has it: heads on features, or whole models on images.
    """
    if context.config.meta.input == "head":
        logits = head_logits(experts, index)
        return lambda images, features: logits(features).mean(1)
    networks = [context.classifier(weights).eval() for weights in experts]
    return lambda images, features: torch.stack([network(images) for network in networks], 1)[:, index].mean(1)


@torch.no_grad()
def synthetic_prototypes(
    context: ClientContext,
    global_weights: Weights,
    sources: Sources,
    ensemble: Callable[[Tensor, Tensor], Tensor],
    kept: Prototypes,
    chunk: int = 500,
) -> Prototypes:
    """Features of synthetic images in the place of ``kept`` prototypes (ALGORITHM 4.2, seed experiment 3).

    Each generator draws as many images as its client has prototypes, and each image stands for their mean size: the
    sets are alike in number and in each client's weight, and differ in vectors and labels alone. Features are of the
    model that made the prototypes; labels are the argmax of the client's model, or of ``ensemble``.
    """
    config, parts = context.config, []
    counts = np.bincount(kept.clients, minlength=config.partition.num_clients)
    totals = np.bincount(kept.clients, kept.sizes, minlength=config.partition.num_clients)
    backbone = context.classifier(global_weights).eval()
    by_client = config.prototypes.model == "client" and config.prototypes.rounds == "last"
    for client_id, own_weights, generator_weights in sources:
        count = int(counts[client_id])
        if not count:
            continue
        own = context.classifier(own_weights).eval()
        generator = load_generator(config.generator, context.facts, generator_weights).to(context.device)
        vectors, labels = [], []
        drawn = draw(generator, count, stream(config.seed, "meta/synthetic", client_id), context.device)
        for part in zip(*(tensor.split(chunk) for tensor in drawn), strict=True):
            with use_precision(config.runtime.precision, context.device):
                images = classifier_view(generator(*part).float(), config.generator.gan_range, context.facts)
                features = (own if by_client else backbone).features(images).float()
                logits = ensemble(images, features) if config.meta.data == "synthetic_vote" else own(images)
            vectors.append(features.cpu().numpy())
            labels.append(logits.argmax(1).cpu().numpy())
        size = np.full(count, totals[client_id] / count, np.float32)
        parts.append(Prototypes(np.concatenate(vectors), np.concatenate(labels), size, np.full(count, client_id)))
        if not np.isfinite(parts[-1].vectors).all():
            raise RunError("the features of its generator's images are not finite", client=client_id)
    return Prototypes.concatenate(parts)


def make_teacher(
    config: ExperimentConfig,
    facts: DataFacts,
    global_weights: Weights,
    client_weights: Iterable[tuple[int, Weights] | tuple[int, Weights, ChannelIndices | None]],
    counts: np.ndarray,
    prototypes: Prototypes,
    progress: Callable[[int, dict[str, float]], None],
    sources: Sources = (),
    device: torch.device | str = "cpu",
    channels: ChannelLayout | None = None,
) -> tuple[TeacherState, dict[str, float]]:
    """Experts from the clients' models, and the meta model trained on three quarters of the prototypes.

    With ``meta.data`` = synthetic or synthetic_vote it is trained on images from ``sources`` instead, made on
    ``device``; the last quarter of the prototypes judges and selects all the same.

    ``counts`` int64 [K, C]. With ``meta.input = head`` only heads are averaged: the experts read the global model's
    features, the very space the prototypes live in; with ``full`` whole models are (M6 has what that costs). Narrow
    clients' weights come with the channels that they hold, and ``channels`` are the network's.
    """
    whole = global_weights
    if config.meta.input == "head":
        client_weights = ((k, heads_only(w), *sets) for k, w, *sets in client_weights)
        whole = heads_only(global_weights)
    fallback = whole if config.meta.expert_fallback == "global" else None
    experts, index = form_experts(client_weights, counts, fallback, whole=whole, channels=channels)
    kept, held_out = split_held_out(prototypes, config.prototypes.held_out, config.seed)
    figures: dict[str, float] = {}
    if config.meta.data != "prototypes":
        context, real = ClientContext(config, facts, torch.device(device)), kept
        ensemble = expert_mean_logits(context, tuple(experts), index)
        kept = synthetic_prototypes(context, global_weights, sources, ensemble, real)
        figures["domain_auc"] = domain_auc(real.vectors, kept.vectors, config.seed)
    head = head_of(global_weights)
    with seeded(config.seed, "init", "meta"):
        teacher = Teacher(facts.num_classes, facts.num_classes, config.meta, head[0].shape[1])
    evaluated = held_out if len(held_out) else kept
    student = torch.tensor(evaluated.vectors) @ torch.tensor(head[0]).T + torch.tensor(head[1])
    figures["student_held_out_accuracy"] = scores(student, evaluated)[0]
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


def inspect_teacher(
    config: ExperimentConfig, facts: DataFacts, state: TeacherState, counts: np.ndarray, prototypes: Prototypes
) -> tuple[dict[str, float], Weights]:
    """(figures, arrays) of a teacher that ``make_teacher`` made of the same ``counts`` and ``prototypes`` (4.2).

    Arrays: ``expert_weights`` float32 [K, C], client k's share in class c's expert; ``expert_of_class`` int64 [C],
    which of the distinct experts is its own; ``meta_gates`` float32 [C, C] as ``gates`` has them, of class experts, on
    the prototypes held out (on all, where none is).
    """
    kept, held_out = split_held_out(prototypes, config.prototypes.held_out, config.seed)
    evaluated = held_out if len(held_out) else kept
    teacher = Teacher(facts.num_classes, facts.num_classes, config.meta, head_of(state.backbone)[0].shape[1])
    freeze(load_weights(teacher, state.meta))
    expert_logits = head_logits(state.experts, state.index)
    features, labels = torch.tensor(evaluated.vectors), torch.tensor(evaluated.labels)
    named = teacher_logits(teacher, expert_logits, features).argmax(1)
    votes = torch.cat([expert_logits(part).mean(1) for part in features.split(teacher.meta.max_rows)])
    read = torch.linspace(0, len(evaluated) - 1, min(len(evaluated), MAX_READ)).long()
    owners = effective_owners(counts)
    owners = owners[owners > 0]
    figures = {
        "meta_classes_named": float(len(named.unique())),
        "classes_judged": float(len(labels.unique())),
        "experts_held_out_accuracy": scores(votes, evaluated)[0],
        "expert_redundancy": redundancy(state.experts, state.index, counts),
        "single_owner_classes": float((owners < SINGLE_OWNER_BELOW).sum()),
        "effective_owners": float(owners.mean()),
    }
    arrays = {
        "expert_weights": expert_weights(counts).astype(np.float32),
        "expert_of_class": state.index,
        "meta_gates": gates(teacher, expert_logits, features[read], labels[read]),
    }
    return figures, arrays
