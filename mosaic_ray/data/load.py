"""Load data sets by name: uint8 NCHW images, int64 labels, and the constants that clients need."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace

import numpy as np

from ..config.presets import Shape
from ..config.schema import DataConfig
from ..config.user_code import digest_of, users_code
from ..core.errors import RequestError, neighbours
from ..core.types import DataFacts, Dataset, ImageSet
from .image_cache_build import decoded, first_form
from .image_ops import chunks, in_channels, mean_std, resized, tally
from .image_sources import check_classes
from .modality_sources import chosen
from .specs import ImageFiles, Samples, is_plugin, spec_of


def load_dataset(config: DataConfig) -> Dataset:
    """Load the data set that ``config`` names, in the size and channels that it requests.

    Raises ``RequestError`` where files are missing or damaged, or a plug-in fails.
    """
    raw = _run_plugin(config) if is_plugin(config.name) else spec_of(config.name).load(config)
    if isinstance(raw, ImageFiles):
        raw = decoded(config, raw)
    elif isinstance(raw, Samples):
        raw = raw.read()
    if raw.facts.modalities:
        facts = replace(raw.facts, name=config.name, num_classes=len(raw.class_names))
        return _identified(config, raw, facts, raw.train, raw.test)
    _, native, height, _ = raw.train.images.shape
    facts = replace(raw.facts, num_classes=len(raw.class_names), channels=native, image_size=height)
    facts = _requested(config, facts)
    size, channels = facts.image_size, facts.channels
    train, test = (in_channels(images, min(channels, native)) for images in (raw.train.images, raw.test.images))
    if channels < native or not facts.mean:  # the deviation of luma does not follow from the channels'
        mean, std = mean_std(tally(chunk) for chunk in chunks(train))
        times = channels // train.shape[1]
        facts = replace(facts, mean=mean * times, std=std * times)
    train, test = (in_channels(resized(images, size), channels) for images in (train, test))
    return _identified(config, raw, facts, ImageSet(train, raw.train.labels), ImageSet(test, raw.test.labels))


def _identified(config: DataConfig, raw: Dataset, facts: DataFacts, train: ImageSet, test: ImageSet) -> Dataset:
    """Return the data set of ``train`` and ``test`` with its identity, a digest of ``facts`` and of what was read."""
    digest = hashlib.sha256(json.dumps([*replace(facts, name="").to_json().values()]).encode())
    if is_plugin(config.name):
        digest.update(digest_of(config.name).encode())
    if raw.identity:
        digest.update(raw.identity.encode())
    else:
        for array in (train.images, train.labels, test.images, test.labels):
            digest.update(str(array.shape).encode())
            digest.update(array.data)
    identity = digest.hexdigest()[:16]
    return Dataset(facts, train, test, raw.class_names, identity, raw.copy, raw.tables, raw.kept)


def shape_of(config: DataConfig) -> Shape | None:
    """Return a data set's shape without decoding an image; None for a plug-in that declares no facts.

    Files are listed and the first image's header is read; ``RequestError`` where there are none.
    """
    spec = spec_of(config.name)
    if spec.facts is not None:
        return Shape(spec.facts.num_classes, spec.facts.channels, spec.facts.image_size, spec.num_train)
    if is_plugin(config.name):
        return None
    raw = spec.load(config)
    if isinstance(raw, Samples):
        return raw.shape()
    if isinstance(raw, Dataset):
        count, channels, side, _ = raw.train.images.shape
        return Shape(len(raw.class_names), channels, side, count)
    listing = raw.listing()
    height, width, coloured = first_form(config.name, listing)
    count = len(listing.train.labels)
    return Shape(len(listing.class_names), 3 if coloured else 1, height if height == width else 0, count)


def known_facts(config: DataConfig) -> DataFacts | None:
    """Return the facts of a data set without reading its files; None if they must be measured or counted."""
    known = None if is_plugin(config.name) else spec_of(config.name).facts
    if known is not None and known.modalities:
        return replace(known, name=config.name, modalities=chosen(config, known.modalities))
    if known is None or 0 < config.channels < known.channels:
        return None
    return _requested(config, known)


def _run_plugin(config: DataConfig) -> Dataset:
    """Return the checked ``Dataset`` of the user's own function or record; its identity is computed here."""
    what = f"data.name = {config.name}"
    load = spec_of(config.name).load
    with users_code(what):
        try:
            found = load(config)
        except RequestError as error:  # of a function of this package, such as ``needed``
            raise RequestError(str(error)) from None
        if not isinstance(found, Dataset):
            raise RequestError(f"{what}: it returned {type(found).__name__}, not a Dataset")
        _check(what, config.name, found)
    train, test = (ImageSet(part.images, np.ascontiguousarray(part.labels)) for part in (found.train, found.test))
    return Dataset(found.facts, train, test, tuple(found.class_names), "")


def _check(what: str, name: str, data: Dataset) -> None:
    """Raise ``RequestError`` where the parts of a plug-in's ``data`` contradict each other."""
    from .transforms import AUGMENTATIONS

    facts, train, test = data.facts, data.train, data.test
    shapes = list(train.images.shape), list(test.images.shape)
    channels, height, width = shapes[0][1:]
    if facts.modalities:
        _, _, size = facts.stored_shape
        if shapes[0][1:] != [1, 1, size] or shapes[1][1:] != [1, 1, size]:
            raise RequestError(f"{what}: records {shapes[0]} and {shapes[1]}; both must be [N, 1, 1, {size}]")
        if len({modality.name for modality in facts.modalities}) < len(facts.modalities):
            raise RequestError(f"{what}: two of its modalities share a name")
    elif shapes[1][1:] != [channels, height, width] or channels not in (1, 3) or height != width:
        raise RequestError(f"{what}: images {shapes[0]} and {shapes[1]}; both must be [N, 1 or 3, side, side]")
    labels, classes = np.concatenate([train.labels, test.labels, [0]]), len(data.class_names)
    if not 0 <= labels.min() <= labels.max() < classes:
        raise RequestError(f"{what}: labels run from {labels.min()} to {labels.max()}; there are {classes} classes")
    check_classes(name, train.labels, test.labels, data.class_names)
    given = (facts.channels,) if facts.modalities else (0, channels)
    if not len(facts.mean) == len(facts.std) in given:
        raise RequestError(f"{what}: {len(facts.mean)} means and {len(facts.std)} deviations for {given[-1]} channels")
    if strange := set(facts.augmentations) - set(AUGMENTATIONS):
        raise RequestError(f"{what}: augmentation {min(strange)}: unknown; {neighbours(min(strange), AUGMENTATIONS)}")


def _requested(config: DataConfig, native: DataFacts) -> DataFacts:
    """Return ``native`` in the size and channels of ``config``; added channels repeat the constants of the first."""
    channels, size = config.channels or native.channels, config.image_size or native.image_size
    times = channels if channels > native.channels else 1
    return replace(
        native, name=config.name, channels=channels, image_size=size, mean=native.mean * times, std=native.std * times
    )
