"""Data sets by name, whole: uint8 NCHW images, int64 labels, and the facts that clients need."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import astuple, replace

from ..config.schema import DataConfig
from ..core.errors import RequestError, neighbours
from ..core.types import DataFacts, Dataset, ImageSet
from .array_sources import CLOTHES, DIGIT_NAMES, Cifar, digits, mnist_like, svhn
from .image_cache_build import decoded, imported
from .image_ops import chunks, in_channels, moments, resized, tally
from .image_sources import PICTURES
from .paths import data_root as data_root
from .specs import KNOWN, Raw


def load_dataset(config: DataConfig) -> Dataset:
    """The data set that ``config`` names, in the size and channels that it asks for."""
    kind, colon, _ = config.name.partition(":")
    loader = PREFIXES.get(kind) if colon else LOADERS.get(config.name)
    if loader is None:
        known = neighbours(config.name, [*LOADERS, *(f"{prefix}:PATH" for prefix in PREFIXES)])
        raise RequestError(f"data.name = {config.name}: unknown data set; {known}")
    raw = loader(config)
    _, native, height, _ = raw.train.images.shape
    facts = DataFacts(config.name, len(raw.class_names), native, height, raw.mean, raw.std, raw.augmentations)
    facts = _asked(config, facts)
    size, channels = facts.image_size, facts.channels
    train, test = (in_channels(images, min(channels, native)) for images in (raw.train.images, raw.test.images))
    if channels < native:  # luma mixes channels that vary together: its spread does not follow from theirs
        mean, std = moments(tally(chunk) for chunk in chunks(train))
        facts = replace(facts, mean=mean, std=std)
    train, test = (in_channels(resized(images, size), channels) for images in (train, test))
    train_set, test_set = ImageSet(train, raw.train.labels), ImageSet(test, raw.test.labels)
    digest = hashlib.sha256(json.dumps(astuple(replace(facts, name=""))).encode())
    if raw.content:
        digest.update(raw.content.encode())
    else:
        for array in (train_set.images, train_set.labels, test_set.images, test_set.labels):
            digest.update(str(array.shape).encode())
            digest.update(array.data)
    return Dataset(facts, train_set, test_set, raw.class_names, digest.hexdigest()[:16])


def known_facts(config: DataConfig) -> DataFacts | None:
    """The facts of a data set whose files need not be there; None where they must be measured or counted."""
    known = KNOWN.get(config.name)
    if known is None or 0 < config.channels < known.channels:
        return None
    return _asked(config, known)


def _asked(config: DataConfig, native: DataFacts) -> DataFacts:
    """``native`` in the size and channels that ``config`` asks for; where they are more, they repeat the one."""
    channels, size = config.channels or native.channels, config.image_size or native.image_size
    times = channels if channels > native.channels else 1
    return replace(native, channels=channels, image_size=size, mean=native.mean * times, std=native.std * times)


def _pictures(kind: str) -> Callable[[DataConfig], Raw]:
    return lambda config: decoded(config, PICTURES[kind](config))


PREFIXES: dict[str, Callable[[DataConfig], Raw]] = {
    "folder": _pictures("folder"),
    "imported": imported,
    "parquet": _pictures("parquet"),
}

LOADERS: dict[str, Callable[[DataConfig], Raw]] = {
    "digits": digits,
    "mnist": mnist_like(DIGIT_NAMES),
    "fmnist": mnist_like(CLOTHES),
    "svhn": svhn,
    "cifar10": Cifar(meta="batches.meta", label_key="labels", names_key="label_names"),
    "cifar100": Cifar(meta="meta", label_key="fine_labels", names_key="fine_label_names"),
    "tiny_imagenet": _pictures("tiny_imagenet"),
    "food101": _pictures("food101"),
}
