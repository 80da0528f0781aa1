"""The ceiling: a linear probe of the warmed-up model, trained on all clients' real images, for reporting alone.

No server of a federation could compute it, so no choice depends on it and nothing is sent for it. It says how far any
head on these features can get, however it is made (Alain and Bengio, "Understanding intermediate layers using linear
classifier probes", 2016; docs/algorithm.md 1.11).
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import nn

from ..core.seeding import numpy_stream
from ..core.types import ImageSet, Weights
from ..distillation.prototypes import extract_features
from ..federated.client import ClientContext
from ..models.optimizers import LBFGS
from ..storage.store import StageWriter
from ..tracking.progress import StageProgress
from .context import Facts, RunContext
from .graph import Stage
from .stages import MOST_PROBED

#: The most steps of L-BFGS. Of a small Fashion-MNIST network the probe then reaches 82.9 %, LDA 79.2 %.
MOST_STEPS = 100


def probe(ctx: RunContext, stage: Stage, weights: Weights) -> Weights:
    """Return the classifier ``weights`` with the head of a linear probe on all clients' training images.

    Of more than ``MOST_PROBED`` images a sample is drawn, the same for every model of a seed.
    """

    def compute(writer: StageWriter, progress: StageProgress) -> Facts:
        rows = np.sort(np.concatenate(ctx.shards.train)).astype(np.int64)
        if len(rows) > MOST_PROBED:
            rows = np.sort(numpy_stream(ctx.config.seed, "ceiling").permutation(rows)[:MOST_PROBED])
        inside = ctx.tracker.inside("batch")
        images = ctx.dataset.train.take(rows)
        matrix, bias = ctx.on_server(_probed, weights, images, progress=partial(inside, 0))
        inside.close()
        writer.add("global", weights | {"head.weight": matrix, "head.bias": bias})
        progress.advance()
        return {"images": len(rows)}

    return ctx.find_or_compute(stage, compute).load("global")


def _probed(context: ClientContext, weights: Weights, images: ImageSet) -> tuple[np.ndarray, np.ndarray]:
    shard = context.shard(images.images, images.labels)
    precision = context.config.runtime.precision
    model = context.classifier(weights)
    features = extract_features(model, shard, context.facts, precision, progress=context.progress)
    return linear_probe(features, images.labels, context.facts.num_classes)


def linear_probe(features: np.ndarray, labels: np.ndarray, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Fit a logistic regression to features float32 [n, d] and labels int64 [n]; returns V [C, d] and b [C], float32.

    It minimises the mean cross-entropy plus 1 / 2n times the squared norm of the matrix, on standardised features, by
    L-BFGS from zero; the standardisation is then part of V and b. A class without images gets the
    smallest logit of all training images, so that it is predicted for none of them.
    """
    x, y = torch.from_numpy(features).double(), torch.from_numpy(labels)
    mean, deviation = x.mean(0), x.std(0, correction=0)
    x = (x - mean) / torch.where(deviation > 0, deviation, 1)
    matrix = torch.zeros(num_classes, x.shape[1], dtype=x.dtype, requires_grad=True)
    bias = torch.zeros(num_classes, dtype=x.dtype, requires_grad=True)
    absent = torch.bincount(y, minlength=num_classes) == 0
    optimizer = LBFGS(
        [matrix, bias], max_iter=MOST_STEPS, line_search_fn="strong_wolfe", tolerance_grad=1e-6
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        logits = (x @ matrix.T + bias).masked_fill(absent, -torch.inf)
        loss = nn.functional.cross_entropy(logits, y) + matrix.square().sum() / (2 * len(y))
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        bias[absent] = (x @ matrix.T + bias)[:, ~absent].min()
        scaled = matrix / torch.where(deviation > 0, deviation, 1)
        return scaled.float().numpy(), (bias - scaled @ mean).float().numpy()
