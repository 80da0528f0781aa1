"""The student's head becomes a nearest-mean classifier: logits -|f(x) - m_c|^2 / 2 up to a constant."""

from dataclasses import dataclass

import numpy as np

from mosaic_ray.config.fields import knob
from mosaic_ray.config.plugins import own_knobs, section_of
from mosaic_ray.methods.base import Distilled, Method
from mosaic_ray.methods.mosaic.graph import PROTOTYPES
from mosaic_ray.pipeline.graph import Stage


@dataclass(frozen=True)
class NearestMeanKnobs:
    shrink: float = knob(0.0, "how far class means move to their common mean", low=0.0, high=1.0)


MEANS = Stage(
    "class_means",
    version=1,
    knobs=lambda inputs: own_knobs(inputs.config, "nearest_mean"),  # the result depends on these
    compute=f"{__name__}:fit_means",
    upstream=("warmup", "prototypes"),
    role="distilled",  # its model is the student: accuracy.distilled
    unit="fit",
    work=lambda config: {"fits": 1},
)


class NearestMean(Method):
    name = "nearest_mean"
    knobs = NearestMeanKnobs
    stages = (PROTOTYPES, MEANS)  # the prototypes are Mosaic's, so both methods share them

    def run(self, ctx, warmup):
        prototypes = ctx.run(PROTOTYPES, warmup)
        return Distilled(ctx.run(MEANS, warmup, prototypes))


def fit_means(ctx, stage, warmup, prototypes):
    """Return the student: the global model with the class means as its head."""

    def compute(writer, progress):
        found, weights = prototypes[ctx.config.model.classifier], warmup.weights
        shrink = section_of(ctx.config, "nearest_mean", NearestMeanKnobs).shrink
        common = np.average(found.vectors, axis=0, weights=found.sizes)
        means = np.tile(common, (len(weights["head.bias"]), 1))
        for label in np.unique(found.labels):
            rows = found.labels == label
            mean = np.average(found.vectors[rows], axis=0, weights=found.sizes[rows])
            means[label] = shrink * common + (1 - shrink) * mean
        head = {"head.weight": means, "head.bias": -0.5 * (means**2).sum(1)}
        writer.add("global", weights | {name: value.astype(np.float32) for name, value in head.items()})
        progress.advance()
        return {}

    return ctx.find_or_compute(stage, compute).load("global")


NEAREST_MEAN = NearestMean()
