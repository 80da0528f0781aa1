"""Train Mosaic's teacher (arXiv 2505.19699): class experts, and a meta model on prototypes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ..config.schema import ExperimentConfig, MetaConfig
from ..core.errors import RunError
from ..core.health import SINGLE_OWNER_BELOW
from ..core.seeding import seeded, stream
from ..core.types import Prototypes, Weights
from ..federated.client import ClientContext
from ..models.state_dict import freeze, head_of, load_weights, to_weights, use_precision
from ..models.submodel import ChannelLayout
from .experts import ClientWeights, Holdings, effective_owners, expert_weights, form_experts, redundancy
from .generator_training import classifier_view, draw, load_generator
from .image_quality import domain_auc
from .linear_head import fit_heads, scores
from .meta_model import Teacher, gates, modality_tokens, teacher_logits, train_meta
from .prototypes import split_held_out
from .teacher import TeacherState, head_logits, heads_only

#: Yields (client, its model, its generator) in client order, so that one client is in memory at a time.
Sources = Iterable[tuple[int, Weights, Weights]]

#: Largest number of prototypes from which the meta model's gates are computed.
MAX_READ = 1024


def expert_mean_logits(
    context: ClientContext, experts: tuple[Weights, ...], index: np.ndarray
) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a function: (images, features) -> mean of the class experts' logits [B, C], without a meta model.

    ``meta.input`` selects the experts: heads applied to features, or full models applied to images.
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
    """Compute features of synthetic images that replace the ``kept`` prototypes (docs/algorithm.md 4.2).

    Each generator draws as many images as its client has prototypes, each with their mean size, so the two sets have
    equal counts and client weights. Features are of the model that computed the prototypes; labels are the predictions
    of the client's model, or of ``ensemble``. Raises ``RunError`` if a feature is not finite.
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


def class_experts(
    config: ExperimentConfig,
    global_weights: Weights,
    client_weights: Iterable[ClientWeights],
    counts: np.ndarray,
    channels: ChannelLayout | None = None,
    holdings: Holdings | None = None,
) -> tuple[tuple[Weights, ...], np.ndarray]:
    """Average the clients' models to distinct class experts; return them and the index of each class's, int64 [C].

    ``counts`` int64 [K, C]: images per client and class. With ``meta.input = head`` only heads are averaged, which read
    the global model's features like the prototypes; with ``full`` full models are (see M6). Weights of partial-width
    clients come with their channels, and ``channels`` is the network's layout. ``holdings``: the clients' modalities,
    where samples have several.
    """
    whole = global_weights
    if config.meta.input == "head":
        client_weights = ((k, heads_only(w), sets[0] if sets else None) for k, w, *sets in client_weights)
        whole = heads_only(global_weights)
    fallback = whole if config.meta.expert_fallback == "global" else None
    experts, index = form_experts(client_weights, counts, fallback, whole=whole, channels=channels, holdings=holdings)
    return tuple(experts), index


def fit_teacher(
    context: ClientContext,
    global_weights: Weights,
    experts: tuple[Weights, ...],
    index: np.ndarray,
    prototypes: Prototypes,
    progress: Callable[[int, dict[str, float]], None],
    sources: Sources = (),
) -> tuple[TeacherState, dict[str, float]]:
    """Train the meta model of ``class_experts`` on the prototypes that are not held out; return it and figures.

    Held-out prototypes choose the number of updates and give the figures. It is then trained on all prototypes for as
    many. With ``meta.data`` = synthetic or synthetic_vote it is trained on images of ``sources`` alone.
    """
    config, facts = context.config, context.facts
    kept, held_out = split_held_out(prototypes, config.prototypes.held_out, config.seed)
    figures: dict[str, float] = {}
    if config.meta.data != "prototypes":
        real, ensemble = kept, expert_mean_logits(context, experts, index)
        kept = synthetic_prototypes(context, global_weights, sources, ensemble, real)
        figures["domain_auc"] = domain_auc(real.vectors, kept.vectors, config.seed)
    modalities = modality_tokens(config.meta, facts)
    own, weighting = head_of(global_weights), config.prototypes.weighting
    evaluated = held_out if len(held_out) else kept
    student = torch.tensor(evaluated.vectors) @ torch.tensor(own[0]).T + torch.tensor(own[1])
    figures["student_held_out_accuracy"] = scores(student, evaluated)[0]

    def trained(
        head: Weights, meta: MetaConfig, kept: Prototypes, held_out: Prototypes, report: Callable[..., None]
    ) -> tuple[Weights, dict[str, float]]:
        with seeded(config.seed, "init", "meta"):
            teacher = Teacher(facts.num_classes, facts.num_classes, meta, own[0].shape[1], modalities)
        if teacher.skip is not None:
            start = {name.removeprefix("head."): torch.tensor(value) for name, value in head.items()}
            teacher.skip.load_state_dict(start)
        logits = head_logits(experts, index, modalities)
        made, found = train_meta(
            teacher.to(context.device), logits, kept, held_out, meta, weighting, config.seed, report, context.progress
        )
        return to_weights(made), found

    trial_head: Weights = {}
    head: Weights = {}
    if config.meta.init == "prototype_head":
        trial_head, head, fitted = fit_heads(kept, held_out, global_weights, weighting)
        figures |= {f"head_{name}": value for name, value in fitted.items()}
    meta, found = trained(trial_head, config.meta, kept, held_out, progress)
    figures |= {f"meta_{name}": value for name, value in found.items()}
    figures |= {"num_experts": float(len(experts)), "num_prototypes": float(len(kept))}
    figures["num_held_out"] = float(len(held_out))
    state = TeacherState(global_weights, experts, index, meta, head=trial_head)
    if len(held_out) and config.meta.data == "prototypes":
        everything, none = Prototypes.concatenate([kept, held_out]), held_out.take(np.arange(0))
        as_many = replace(config.meta, updates=int(found["update"]), select=False)
        meta, _ = trained(head, as_many, everything, none, lambda update, metrics: None)
        state = replace(state, meta=meta, head=head, trial_meta=state.meta, trial_head=trial_head)
    return state, figures


def teach(
    context: ClientContext,
    global_weights: Weights,
    experts: tuple[Weights, ...],
    index: np.ndarray,
    counts: np.ndarray,
    prototypes: Prototypes,
    sources: Sources,
    *,
    report: Callable[[int, dict[str, float]], None],
) -> tuple[TeacherState, dict[str, float], Weights]:
    """Train a teacher and inspect it; return it (without its backbone and experts), figures and arrays."""
    state, figures = fit_teacher(context, global_weights, experts, index, prototypes, report, sources)
    looked, arrays = inspect_teacher(context, state.trial, counts, prototypes)
    return replace(state, backbone={}, experts=()), figures | looked, arrays


def inspect_teacher(
    context: ClientContext, state: TeacherState, counts: np.ndarray, prototypes: Prototypes
) -> tuple[dict[str, float], Weights]:
    """Return figures and arrays of a teacher made from the same ``counts`` and ``prototypes`` (docs/algorithm.md 4.2).

    Arrays: ``expert_weights`` float32 [K, C], client k's weight in class c's expert; ``expert_of_class`` int64 [C],
    index of its distinct expert; ``meta_gates`` float32 [C, C], see ``gates``, on held-out prototypes (on all if none
    is held out).
    """
    config, num_classes, device = context.config, context.facts.num_classes, context.device
    kept, held_out = split_held_out(prototypes, config.prototypes.held_out, config.seed)
    evaluated = held_out if len(held_out) else kept
    modalities = modality_tokens(config.meta, context.facts)
    teacher = Teacher(num_classes, num_classes, config.meta, head_of(state.backbone)[0].shape[1], modalities)
    freeze(load_weights(teacher, state.meta)).to(device)
    expert_logits = head_logits(state.experts, state.index, modalities)
    features, labels = (torch.tensor(part, device=device) for part in (evaluated.vectors, evaluated.labels))
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
