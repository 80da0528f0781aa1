"""The meta model: a small transformer that combines the experts' logits (docs/algorithm.md stage M)."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from ..config.schema import MetaConfig
from ..core.seeding import seeded, stream
from ..core.types import DataFacts, Prototypes
from ..federated.local_training import no_progress
from ..models.optimizers import Adam
from .linear_head import sample_losses, scores, surely_lower
from .prototypes import prototype_weights

#: Largest number of elements in one tensor of the meta model, 16 MiB of float32; there are tens of such tensors. It
#: allows 200 rows with 10 classes; with 100 and the authors' heads, attention takes a million elements per row.
MAX_NUMBERS = 2**22

#: Number of last updates over which the training loss is the median.
RECENT = 25


def token_size(token_dim: int, num_classes: int) -> tuple[int, int]:
    """Return (size of a token, number of attention heads) for ``meta.token_dim``: -1 the authors', 0 ours."""
    if token_dim < 0:
        return 10 * num_classes, num_classes
    dim, most = token_dim or 10 * min(num_classes, 20), min(num_classes, 10)
    return dim, max(heads for heads in range(1, most + 1) if dim % heads == 0)


class MetaModel(nn.Module):
    """Maps logits [B, E, C] of E experts to logits [B, C].

    Each expert's logits become a token (shared linear map C -> d). Tokens pass an encoder-decoder transformer with
    source = target and are pooled over experts; a linear map gives logits. The authors use d = 10 C and C heads
    (948,206 parameters at C = 10; attention takes 4 MB per row at C = 100): token_dim = -1. Ours is equal up to ten
    classes and has at most ten heads and d = 200. Without ``expert_embedding`` the output does not depend on the order
    of the experts (M3).

    With ``modalities`` M > 0 a token is what one expert says of one modality: logits [B, M E, C], modality by modality,
    and ``absent`` bool [B, M E] leaves out those that a sample lacks. An embedding of the modality is added.
    """

    def __init__(self, num_experts: int, num_classes: int, config: MetaConfig, modalities: int = 0) -> None:
        super().__init__()
        self.modalities, self.num_experts = modalities, num_experts
        dim, heads = token_size(config.token_dim, num_classes)
        self.expand = nn.Linear(num_classes, dim)
        layer = nn.TransformerEncoderLayer(dim, heads, config.feedforward, config.dropout, batch_first=True)
        # As nn.Transformer builds it, but without nested tensors, because nothing is padded.
        encoder = nn.TransformerEncoder(layer, 1, nn.LayerNorm(dim), enable_nested_tensor=False)
        self.transformer = nn.Transformer(
            dim, heads, 1, 1, config.feedforward, config.dropout, batch_first=True, custom_encoder=encoder
        )
        self.out = nn.Linear(dim, num_classes)
        self.identity = nn.Parameter(0.02 * torch.randn(num_experts, dim)) if config.expert_embedding else None
        self.kind = nn.Parameter(0.02 * torch.randn(modalities, dim)) if modalities else None
        self.pool, count = config.pool, num_experts * max(1, modalities)
        self.max_rows = max(1, MAX_NUMBERS // (count * max(dim, config.feedforward, heads * count)))

    def forward(self, expert_logits: Tensor, absent: Tensor | None = None) -> Tensor:
        tokens = self.expand(expert_logits)
        if self.identity is not None:
            tokens = tokens + self.identity.repeat(max(1, self.modalities), 1)
        if self.kind is not None:
            tokens = tokens + self.kind.repeat_interleave(self.num_experts, 0)
        if absent is None:
            tokens = self.transformer(tokens, tokens)
            logits: Tensor = self.out(tokens.mean(1) if self.pool == "mean" else tokens.sum(1))
            return logits
        masks = dict.fromkeys(("src_key_padding_mask", "tgt_key_padding_mask", "memory_key_padding_mask"), absent)
        tokens = self.transformer(tokens, tokens, **masks).masked_fill(absent[:, :, None], 0.0)
        pooled = tokens.sum(1)
        if self.pool == "mean":
            pooled = pooled / (~absent).sum(1, keepdim=True).clamp(min=1)
        found: Tensor = self.out(pooled)
        return found


class Teacher(nn.Module):
    """The meta model, for ``meta.init = prototype_head`` as a correction of a linear head: H phi + h + g meta(experts).

    ``skip`` (H, h) starts at the refitted head and the gain g at 0, so training starts from that head's logits.
    ``modalities``: see ``modality_tokens``.
    """

    def __init__(
        self, num_experts: int, num_classes: int, config: MetaConfig, feature_dim: int, modalities: int = 0
    ) -> None:
        super().__init__()
        self.meta = MetaModel(num_experts, num_classes, config, modalities)
        warm = config.init == "prototype_head"
        self.skip = nn.Linear(feature_dim, num_classes) if warm else None
        self.gain = nn.Parameter(torch.zeros(())) if warm else None

    def forward(self, expert_logits: Tensor, features: Tensor | None = None) -> Tensor:
        absent = None
        if self.meta.modalities and features is not None:
            absent = by_modality(features, self.meta.modalities)[1].logical_not()
            absent = absent.repeat_interleave(self.meta.num_experts, 1)
        logits: Tensor = self.meta(expert_logits, absent)
        if self.skip is not None and self.gain is not None:
            logits = self.skip(features) + self.gain * logits
        return logits


def modality_tokens(config: MetaConfig, facts: DataFacts) -> int:
    """Return the number of modalities where each of them has tokens of its own (``meta.tokens``), else 0."""
    return len(facts.modalities) if config.tokens == "modality" else 0


def by_modality(features: Tensor, modalities: int) -> tuple[Tensor, Tensor]:
    """Return each modality's block of late-fused features [B, M (d + 1)] at share 1, and which are there, bool [B, M].

    The blocks [B, M, d + 1] are features and a one (``models.multimodal.Fusion``), zeros where absent.
    """
    blocks = features.unflatten(1, (modalities, -1))
    shares = blocks[:, :, -1]
    return blocks / torch.where(shares > 0, shares, 1)[:, :, None], shares > 0


@torch.no_grad()
def teacher_logits(teacher: Teacher, expert_logits: Callable[[Tensor], Tensor], features: Tensor) -> Tensor:
    """Compute logits [B, C] for features [B, d], in batches that fit ``MAX_NUMBERS``."""
    return torch.cat([teacher(expert_logits(part), part) for part in features.split(teacher.meta.max_rows)])


def gates(teacher: Teacher, expert_logits: Callable[[Tensor], Tensor], features: Tensor, labels: Tensor) -> np.ndarray:
    """Return float32 [E, C]: the influence of expert e on the teacher's logit of class c, in units of logits.

    It is the mean over the prototypes of class c (``features`` [P, d], ``labels`` [P]) of |sum_j (x_ej - mean_j x_ej)
    dt_c / dx_ej|, with x_e the expert's logits and t_c the teacher's logit of c: to first order, the change of t_c if
    expert e's logits were constant. 0 for a class without prototypes, and if the gain g is 0.
    """
    parts, counts = [], torch.bincount(labels, minlength=teacher.meta.out.out_features)
    for rows in torch.arange(len(labels)).split(teacher.meta.max_rows):
        given = expert_logits(features[rows]).detach().requires_grad_()
        asked = teacher(given, features[rows]).gather(1, labels[rows, None]).sum()
        (slopes,) = torch.autograd.grad(asked, given)
        opinion = given.detach() - given.detach().mean(2, keepdim=True)
        effect = (opinion * slopes).sum(2)
        effect = effect.unflatten(1, (-1, teacher.meta.num_experts)).sum(1).abs()  # [B, E], over all modalities
        parts.append(effect.new_zeros(effect.shape[1], len(counts)).index_add_(1, labels[rows], effect.T))
    return np.asarray((torch.stack(parts).sum(0) / counts.clamp(min=1)).cpu())


def ema_update(average: dict[str, Tensor], model: nn.Module, decay: float) -> None:
    """Update in place: average <- decay * average + (1 - decay) * parameters."""
    for name, parameter in model.named_parameters():
        average[name].mul_(decay).add_(parameter.detach(), alpha=1 - decay)


def ema_weights(
    average: dict[str, Tensor], start: dict[str, Tensor], decay: float, updates: int, correct: bool
) -> dict[str, Tensor]:
    """Return the averaged parameters; with ``correct`` (A_n - decay^n theta_0) / (1 - decay^n) (M2).

    The correction removes the weight decay^n of ``start``, 22 % at n = 150 and decay .99.
    """
    if not correct or updates == 0:
        return average
    share = decay**updates
    return {name: (value - share * start[name]) / (1 - share) for name, value in average.items()}


def train_meta(
    teacher: Teacher,
    expert_logits: Callable[[Tensor], Tensor],
    kept: Prototypes,
    held_out: Prototypes,
    config: MetaConfig,
    weighting: str,
    seed: int,
    progress: Callable[[int, dict[str, float]], None],
    step: Callable[[int, int], None] = no_progress,
) -> tuple[Teacher, dict[str, float]]:
    """Train on ``kept`` prototypes; returns the EMA copy and figures.

    With ``select`` it is the copy of lowest loss on ``held_out``; the first one unless another is ``surely_lower``.

    ``expert_logits`` maps features [B, d] to the experts' logits [B, E, C]. ``progress(update, metrics)`` is called
    every 25 updates, ``step(update, of how many)`` after each. Figures are the accuracy and loss of the returned
    teacher on ``held_out`` (on ``kept`` if that is empty), and of the end of training ``train_loss`` (median of the
    last ``RECENT`` updates) and ``raw_held_out_accuracy`` (without averaging). Build ``teacher`` inside ``seeded``;
    batches and dropout draw from their own addresses.
    """
    evaluated, device = held_out if len(held_out) else kept, teacher.meta.out.weight.device
    arrays = kept.vectors, kept.labels, prototype_weights(kept, weighting), evaluated.vectors
    vectors, labels, weights, eval_features = (torch.tensor(array, device=device) for array in arrays)
    averaged = copy.deepcopy(teacher).eval()
    start = {name: p.detach().clone() for name, p in teacher.named_parameters()}
    average = {name: value.clone() for name, value in start.items()}
    optimiser = Adam(teacher.parameters(), lr=config.lr)
    order = stream(seed, "meta", "batches")
    best, begun = math.inf, torch.empty(0)
    best_state, best_update = copy.deepcopy(averaged.state_dict()), 0

    def evaluate(update: int, loss: dict[str, float]) -> None:
        nonlocal best, best_state, best_update, begun
        decay, correct = config.ema, config.ema_bias_correction
        averaged.load_state_dict(ema_weights(average, start, decay, update, correct), strict=True)
        answers = teacher_logits(averaged, expert_logits, eval_features)
        accuracy, eval_loss = scores(answers, evaluated)
        losses = sample_losses(answers, evaluated.labels)
        if not update:
            begun = losses
        better = eval_loss < best and surely_lower(losses, begun, evaluated.sizes)
        progress(update, {"held_out_accuracy": accuracy, "held_out_loss": eval_loss} | loss)
        if not config.select or not update or better:
            best = eval_loss
            best_state, best_update = copy.deepcopy(averaged.state_dict()), update

    evaluate(0, {})
    recent: list[float] = []
    teacher.train()
    batch = min(config.batch_size, len(kept))
    with seeded(seed, "meta", "dropout"):
        for update in range(1, config.updates + 1):
            rows = torch.randperm(len(kept), generator=order)[:batch]
            optimiser.zero_grad(set_to_none=True)
            loss = 0.0
            for part in rows.split(teacher.meta.max_rows):
                logits = teacher(expert_logits(vectors[part]), vectors[part])
                errors = weights[part] * nn.functional.cross_entropy(logits, labels[part], reduction="none")
                share = errors.mean() * (len(part) / len(rows))
                share.backward()
                loss += float(share.detach())
            optimiser.step()
            recent = [*recent[1 - RECENT :], loss]
            ema_update(average, teacher, config.ema)
            step(update, config.updates)
            if update % 25 == 0 or update == config.updates:
                evaluate(update, {"loss": loss})
                if config.select and config.patience and update - best_update >= config.patience:
                    break
    averaged.load_state_dict(best_state)
    accuracy, eval_loss = scores(teacher_logits(averaged, expert_logits, eval_features), evaluated)
    figures = {"update": best_update, "held_out_accuracy": accuracy, "held_out_loss": eval_loss}
    if recent:
        figures["train_loss"] = float(np.median(recent))
        raw = teacher_logits(teacher.eval(), expert_logits, eval_features)
        figures["raw_held_out_accuracy"] = scores(raw, evaluated)[0]
    return averaged, figures
