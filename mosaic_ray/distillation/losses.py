"""Losses of generators, discriminators and students.

Logits are [B, C] and unnormalised unless stated. Softmaxes stay in log space, so that logits of +-1e4 give finite
values and gradients. Half-precision logits are converted to float32 first. y is softmax(logits), ybar its batch mean.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config.schema import DistillConfig
from ..core.types import Weights
from ..models.state_dict import bn_statistics


def _full(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _log_softmax(logits: Tensor) -> Tensor:
    return F.log_softmax(_full(logits), dim=1)


def entropy_loss(logits: Tensor) -> Tensor:
    """L_ent = E[-sum_c y_c log(y_c + 1e-5)]: scalar in [-1e-5, log C]; small when each sample is confident (DeGAN)."""
    y = _full(logits).softmax(1)
    return -(y * (y + 1e-5).log()).sum(1).mean()


def diversity_loss(logits: Tensor, support: Tensor | None = None, shares: Tensor | None = None) -> Tensor:
    """L_div: scalar, small when the batch as a whole spreads over the classes.

    Without ``support``, DeGAN's sum_c ybar_c log ybar_c, the negative entropy of ybar, in [-log C, 0].
    With ``support`` (bool [C], True for the classes that the client owns, at least one; G8 ``owned``), ours: with m the
    mass of ybar on the owned classes and r_c = ybar_c / m there, sum_owned r_c log r_c - log m, in [-log |owned|, inf).
    Its one minimum on the simplex is the uniform distribution over the owned classes with no mass outside; with every
    class owned, m = 1 and it is DeGAN's.
    With ``shares`` (float [C], sum 1, above 0 on the support) as well, KL(r || shares) - log m: its minimum is 0, at
    ybar = shares. For equal shares it is the loss without them plus log |owned|.
    """
    log_mean = _log_softmax(logits).logsumexp(0) - math.log(len(logits))  # [C]
    owned = log_mean if support is None else log_mean.masked_fill(~support, -math.inf)
    log_mass = owned.logsumexp(0)
    # Outside the support softmax is 0 and the other factor finite: no 0 * inf, in value or gradient (G7).
    target = 0.0 if shares is None else torch.where(shares > 0, shares, 1.0).log()
    return (owned.softmax(0) * (log_mean - log_mass - target)).sum() - log_mass


@contextlib.contextmanager
def inversion_probe(model: nn.Module, targets: Weights | None = None) -> Iterator[Callable[[], Tensor]]:
    """Compute L_inv during a forward pass inside the block (DeepInversion, Yin et al. 2020; summed as in Mosaic).

    L_inv = sum over batch norms of ||mean - running mean||_2 + ||variance - running variance||_2, population
    statistics over (N, H, W) of each batch norm's *input*: a scalar in [0, inf). Gradients flow to the images. Inside
    the block the model is in eval mode, so running statistics stay as they are; modes and hooks are put back after it.
    ``targets``: state dict of another model, such as the global one; its running statistics are the targets:

        with inversion_probe(model) as inversion:
            logits = model(images)
        loss = inversion()  # here or inside the block
    """
    statistics, terms = bn_statistics(model, targets), list[Tensor]()

    def read(mean: Tensor, var: Tensor, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = _full(inputs[0])
        batch_var, batch_mean = torch.var_mean(x, [d for d in range(x.dim()) if d != 1], correction=0)
        terms.append(torch.linalg.vector_norm(batch_mean - mean) + torch.linalg.vector_norm(batch_var - var))

    def loss() -> Tensor:
        if not terms or len(terms) != len(statistics):
            readings = f"{len(terms)} readings of {len(statistics)} batch norms"
            raise ValueError(f"the inversion loss wants one forward pass: {readings}")
        return torch.stack(terms).sum()

    modes = [(module, module.training) for module in model.modules()]
    hooks = [model.get_submodule(n).register_forward_pre_hook(partial(read, *s)) for n, s in statistics.items()]
    model.eval()
    try:
        yield loss
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes:
            module.training = training


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """L_D = mean BCE(real, 1) + mean BCE(fake, 0) of discriminator logits [B]: a scalar in [0, inf)."""
    return -F.logsigmoid(_full(real_logits)).mean() - F.logsigmoid(-_full(fake_logits)).mean()


def adversarial_loss(fake_logits: Tensor) -> Tensor:
    """L_adv = mean BCE(fake, 1), non-saturating, of discriminator logits [B]: a scalar in [0, inf)."""
    return -F.logsigmoid(_full(fake_logits)).mean()


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(1)


def kl(teacher_logits: Tensor, student_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 KL(softmax(teacher/T) || softmax(student/T)) of each sample, [B] in [0, inf) (Hinton et al. 2015)."""
    log_p = _log_softmax(_full(teacher_logits) / temperature)
    log_q = _log_softmax(_full(student_logits) / temperature)
    return temperature**2 * _kl(log_p, log_q)


def jensen_shannon(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """KL(P || M) / 2 + KL(Q || M) / 2 with M = (P + Q) / 2, of each sample: [B] in [0, log 2], symmetric."""
    log_p, log_q = _log_softmax(p_logits), _log_softmax(q_logits)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    return (_kl(log_p, log_m) + _kl(log_q, log_m)) / 2


def bhattacharyya(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """-log sum_c sqrt(P_c Q_c) of each sample: [B] in [0, inf), symmetric.

    The authors' code computes this under the name of Jensen-Shannon, because it averages logits and reverses both KLs
    (K1). Both divergences are about KL / 4 for similar distributions; for distant ones this one is unbounded.
    """
    return -((_log_softmax(p_logits) + _log_softmax(q_logits)) / 2).logsumexp(1)


def with_asked_labels(teacher_logits: Tensor, labels: Tensor, weight: float) -> Tensor:
    """Return logits [B, C] of (1 - weight) softmax(teacher) + weight onehot(labels); ``weight`` in (0, 1)."""
    log_p = _log_softmax(_full(teacher_logits)) + math.log1p(-weight)
    asked = F.one_hot(labels, log_p.shape[1]).bool()
    return torch.where(asked, torch.logaddexp(log_p, log_p.new_tensor(math.log(weight))), log_p)


def distillation_loss(
    teacher_logits: Tensor,
    student_logits: Tensor,
    config: DistillConfig,
    weights: Tensor | None = None,
    normaliser: Tensor | float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """L_KD: weighted mean of alpha T^2 KL(t || s) + (1 - alpha) CE(s, argmax t) + beta JS(s/T, t/T), and its parts.

    ``weights`` [B] >= 0 count samples; all zero gives loss 0. ``normaliser`` replaces their sum (or B) as the divisor:
    given the sum over all workers' batches, the workers' losses add up to the loss of the joined batch.
    Parts ``soft`` (KL with its T^2), ``hard`` and ``js`` are detached scalars before alpha and beta.
    """
    student, teacher, t = _full(student_logits), _full(teacher_logits), config.temperature
    samples = {
        "soft": kl(teacher, student, t),
        "hard": F.cross_entropy(student, teacher.argmax(1), reduction="none"),
        "js": DIVERGENCES[config.jsd](student / t, teacher / t),
    }
    counts = torch.ones_like(samples["hard"]) if weights is None else weights.to(samples["hard"].dtype)
    divisor = counts.sum() if normaliser is None else torch.as_tensor(normaliser).to(counts)
    shares = counts / divisor.clamp_min(torch.finfo(counts.dtype).tiny)
    means = {name: (shares * sample).sum() for name, sample in samples.items()}
    loss = (
        config.soft_weight * means["soft"] + (1 - config.soft_weight) * means["hard"] + config.js_weight * means["js"]
    )
    return loss, {name: mean.detach() for name, mean in means.items()}


#: distill.jsd -> divergence of logits, per sample
DIVERGENCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"true": jensen_shannon, "bhattacharyya": bhattacharyya}
