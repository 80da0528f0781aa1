"""Data sets by name, whole: uint8 NCHW images, int64 labels, and the facts that clients need."""

from __future__ import annotations

import hashlib
import json
from dataclasses import astuple, replace

from ..config.schema import DataConfig
from ..core.types import DataFacts, Dataset, ImageSet
from .image_cache_build import decoded
from .image_ops import chunks, in_channels, moments, resized, tally
from .paths import data_root as data_root
from .specs import ImageFiles, spec_of


def load_dataset(config: DataConfig) -> Dataset:
    """The data set that ``config`` names, in the size and channels that it asks for."""
    raw = spec_of(config.name).load(config)
    if isinstance(raw, ImageFiles):
        raw = decoded(config, raw)
    _, native, height, _ = raw.train.images.shape
    facts = replace(raw.facts, num_classes=len(raw.class_names), channels=native, image_size=height)
    facts = _asked(config, facts)
    size, channels = facts.image_size, facts.channels
    train, test = (in_channels(images, min(channels, native)) for images in (raw.train.images, raw.test.images))
    if channels < native:  # luma mixes channels that vary together: its spread does not follow from theirs
        mean, std = moments(tally(chunk) for chunk in chunks(train))
        facts = replace(facts, mean=mean, std=std)
    train, test = (in_channels(resized(images, size), channels) for images in (train, test))
    train_set, test_set = ImageSet(train, raw.train.labels), ImageSet(test, raw.test.labels)
    digest = hashlib.sha256(json.dumps(astuple(replace(facts, name=""))).encode())
    if raw.identity:
        digest.update(raw.identity.encode())
    else:
        for array in (train_set.images, train_set.labels, test_set.images, test_set.labels):
            digest.update(str(array.shape).encode())
            digest.update(array.data)
    return Dataset(facts, train_set, test_set, raw.class_names, digest.hexdigest()[:16])


def known_facts(config: DataConfig) -> DataFacts | None:
    """The facts of a data set whose files need not be there; None where they must be measured or counted."""
    known = spec_of(config.name).facts
    if known is None or 0 < config.channels < known.channels:
        return None
    return _asked(config, known)


def _asked(config: DataConfig, native: DataFacts) -> DataFacts:
    """``native`` in the size and channels that ``config`` asks for; where they are more, they repeat the one."""
    channels, size = config.channels or native.channels, config.image_size or native.image_size
    times = channels if channels > native.channels else 1
    return replace(
        native, name=config.name, channels=channels, image_size=size, mean=native.mean * times, std=native.std * times
    )
