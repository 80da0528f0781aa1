"""Coordinate-wise median in place of the average (Yin et al., "Byzantine-Robust Distributed Learning", ICML 2018)."""

from dataclasses import dataclass

import numpy as np

from mosaic_ray.config.fields import knob
from mosaic_ray.config.plugins import section_of
from mosaic_ray.federated.client_models import RoundAggregator
from mosaic_ray.federated.strategies.base import Strategy


@dataclass(frozen=True)
class MedianKnobs:
    step: float = knob(1.0, "how far the model moves to the median", above=0.0, high=1.0)


class MedianAggregator(RoundAggregator):
    """Keep all updates of a round; the new model is the median of each coordinate."""

    def __init__(self, start, step):
        super().__init__(start)
        self.step, self.updates = step, {}

    def add(self, update):
        name = self.start.federation.classifiers[update.client_id]
        self.updates.setdefault(name, []).append(update.weights)

    def result(self):
        return self.start.models | {
            name: {entry: self.moved(value, [w[entry] for w in weights]) for entry, value in before.items()}
            for name, weights in self.updates.items()
            for before in [self.start.models[name]]
        }

    def moved(self, before, values):
        return np.asarray(before + self.step * (np.median(values, axis=0) - before), before.dtype)


class Median(Strategy):
    name = "median"
    knobs = MedianKnobs

    def aggregator(self, start):
        config = start.federation.config
        return MedianAggregator(start, section_of(config, self.name, MedianKnobs).step)


MEDIAN = Median()
