"""Data sets whose samples have several modalities, read from the columns of parquet files into records.

A column of encoded images (a struct with ``bytes``) is an image, a column of lists of numbers a vector, a column of
strings a text. A text becomes tokens without a vocabulary file: token b + 1 for each byte b of its UTF-8, cut or filled
with 0 to ``data.text_length``; there are 257 tokens. A sample whose image or vector is null lacks that modality.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..config.presets import Shape
from ..config.schema import DataConfig
from ..core.errors import RequestError, neighbours
from ..core.types import DataFacts, Dataset, ImageSet, Modality
from ..core.untrusted import open_regular
from .download import needed
from .formats import brief, columns, is_image, label_column
from .image_decode import WrongSize, draw, form, not_parquet
from .image_ops import chunks, mean_std, tally
from .image_sources import (
    check_classes,
    classes_named,
    given_folder,
    joined_labels,
    parquet_splits,
    whole_labels,
)
from .image_sources import parquet_files as image_files
from .progress import warn
from .records import pack
from .specs import DatasetSpec, ImageFiles, Resource, Samples

#: The tokens of a text: its bytes, and 0, which fills.
VOCABULARY = 257

#: Rows of a parquet file that are read at a time.
_BATCH = 1 << 12

#: A column's values: an image, a vector and a text of each row, None where a row has none.
_Values = list[Any]


def parquet(config: DataConfig) -> ImageFiles | Samples:
    """List ``parquet:PATH``: ``train*.parquet`` and ``test*.parquet`` as Hugging Face lays them out."""
    return parquet_files(config, given_folder(config))


def parquet_files(config: DataConfig, base: Path) -> ImageFiles | Samples:
    """List ``train*.parquet`` and ``test*.parquet`` in ``base``: the images, or the columns ``data.modalities``."""
    return samples_of(config, base, config.modalities) if config.modalities else image_files(config, base)


def mfeat(config: DataConfig) -> Samples:
    """List ``mfeat/train*.parquet`` and ``mfeat/test*.parquet``: a column ``label``, and one for each view."""
    [base] = needed(config)
    views = chosen(config, VIEWS)
    found = samples_of(replace(config, label_column="label"), base, [view.name for view in views])

    def read() -> Dataset:
        data = found.read()
        if data.facts.modalities != views or len(data.class_names) != 10:
            there = ", ".join(f"{part.name} of {part.size}" for part in data.facts.modalities)
            meant = ", ".join(f"{view.name} of {view.size}" for view in views)
            raise RequestError(
                f"data.name = {config.name}: {base} holds {len(data.class_names)} classes and {there} numbers; 10 and "
                f"{meant} are meant"
            )
        return data

    return Samples(read, found.shape)


def chosen(config: DataConfig, modalities: Sequence[Modality]) -> tuple[Modality, ...]:
    """Return those of ``modalities`` that ``data.modalities`` names, in its order; all where it names none."""
    known = {modality.name: modality for modality in modalities}
    for name in config.modalities:
        if name not in known:
            raise RequestError(f'data.modalities: {config.name} has no "{name}"; {neighbours(name, known)}')
    return tuple(known[name] for name in config.modalities) or tuple(modalities)


def tokens(text: str, length: int) -> np.ndarray:
    """Return ``text`` as tokens int32 [length]: each byte of its UTF-8 plus 1, cut at ``length`` or filled with 0."""
    found = np.zeros(length, np.int32)
    raw = np.frombuffer(text.encode("utf-8", "replace")[:length], np.uint8)
    found[: len(raw)] = raw.astype(np.int32) + 1
    return found


def samples_of(config: DataConfig, base: Path, names: Sequence[str]) -> Samples:
    """Return the data set whose samples are the columns ``names`` of the parquet files in ``base``."""
    files = parquet_splits(config, base)
    return Samples(lambda: _read(config, files, names), lambda: _shape(config, files, names))


def _read(config: DataConfig, files: Mapping[str, Sequence[Path]], names: Sequence[str]) -> Dataset:
    kinds = _kinds(config, files, names)
    values: dict[str, dict[str, _Values]] = {}
    labels: dict[str, np.ndarray] = {}
    class_names: tuple[str, ...] = ()
    for split, paths in files.items():
        values[split], labels[split], found = _columns(config, paths, kinds)
        class_names = found if split == "train" else class_names
    class_names = classes_named(config.name, labels["train"], class_names)
    kept = {split: np.ones(len(found), bool) for split, found in labels.items()}
    constants: dict[str, Any] = {"channels": 1, "image_size": 8, "mean": (0.0,), "std": (1.0,)}
    modalities, arrays = [], {}
    for name, kind in kinds.items():
        columns_of = {split: found[name] for split, found in values.items()}
        _check_there(config, name, columns_of)
        if kind == "image":
            arrays[name], constants = _images(config, name, columns_of, kept)
        elif kind == "vector":
            arrays[name] = _vectors(config, name, columns_of)
        else:
            arrays[name] = {split: np.stack(found) for split, found in columns_of.items()}
        shape = arrays[name]["train"].shape[1:]
        modalities.append(Modality(name, kind, shape, VOCABULARY if kind == "text" else 0))
    parts = {}
    for split in files:
        present = np.array([[value is not None for value in values[split][name]] for name in kinds]).T
        if len(lacking := np.flatnonzero(~present.any(1) & kept[split])):
            raise RequestError(f"{files[split][0]}: row {lacking[0]} of {split} has none of {', '.join(kinds)}")
        records = pack(modalities, {name: array[split] for name, array in arrays.items()}, present)
        parts[split] = ImageSet(records, labels[split])
        parts[split] = parts[split] if kept[split].all() else parts[split].take(kept[split])
    check_classes(config.name, parts["train"].labels, parts["test"].labels, class_names)
    facts = DataFacts(config.name, len(class_names), **constants, modalities=tuple(modalities))
    tables = tuple(str(path) for path in files["train"])
    return Dataset(facts, parts["train"], parts["test"], class_names, "", tables=tables, kept=kept["train"])


def _shape(config: DataConfig, files: Mapping[str, Sequence[Path]], names: Sequence[str]) -> Shape:
    """Return the shape for a schedule, from the labels and the first image's header."""
    kinds = _kinds(config, files, names)
    image = [name for name, kind in kinds.items() if kind == "image"]
    _, labels, found = _columns(config, files["train"], {})
    classes = len(classes_named(config.name, labels, found))
    if not image:
        return Shape(classes, 1, 8, len(labels))
    height, width, coloured = _first_form(config, image[0], _encoded(files["train"], image[0]))
    return Shape(classes, 3 if coloured else 1, height if height == width else 0, len(labels))


def _kinds(
    config: DataConfig, files: Mapping[str, Sequence[Path]], names: Sequence[str]
) -> dict[str, Literal["image", "vector", "text"]]:
    """Return the kind of each column in ``names``, the same in all files; ``RequestError`` where there is none."""
    import pyarrow as pa
    from pyarrow.parquet import read_schema

    found: dict[str, Literal["image", "vector", "text"]] = {}
    for path in (path for paths in files.values() for path in paths):
        try:
            open_regular(path, follow=True).close()
            schema = read_schema(path)
        except (pa.ArrowException, OSError) as error:
            raise not_parquet(path, error) from error
        label, _ = label_column(schema, path, config.label_column)
        for name in names:
            if schema.get_field_index(name) < 0:
                raise RequestError(f'data.modalities: {path} has no column "{name}"; it has {columns(schema)}')
            kind = None if name == label else _kind(schema.field(name).type)
            if kind is None:
                why = "holds the classes" if name == label else f"has the type {schema.field(name).type}"
                raise RequestError(
                    f'data.modalities: column "{name}" of {path} {why}; it takes encoded images (a struct with bytes), '
                    "lists of numbers, or text"
                )
            if found.setdefault(name, kind) != kind:
                raise RequestError(f'data.modalities: column "{name}" is {found[name]} in one file, {kind} in {path}')
    if sum(kind == "image" for kind in found.values()) > 1:
        both = ", ".join(name for name, kind in found.items() if kind == "image")
        raise RequestError(f"data.modalities: {both} are images; a sample may have one image")
    return found


def _kind(kind: Any) -> Literal["image", "vector", "text"] | None:
    from pyarrow import types

    if is_image(kind):
        return "image"
    if types.is_string(kind) or types.is_large_string(kind):
        return "text"
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        inner = kind.value_type
        return "vector" if types.is_floating(inner) or types.is_integer(inner) else None
    return None


def _columns(
    config: DataConfig, paths: Sequence[Path], kinds: Mapping[str, str]
) -> tuple[dict[str, _Values], np.ndarray, tuple[str, ...]]:
    """Return the columns' values by row, the labels int64 [N], and the class names that the files give.

    Images are encoded bytes, vectors float32 [d], texts tokens int32 [data.text_length].
    """
    from pyarrow.compute import struct_field

    found: dict[str, _Values] = {name: [] for name in kinds}
    labels: list[np.ndarray] = [np.zeros(0, np.int64)]
    class_names: tuple[str, ...] = ()
    for path, file in _opened(paths):
        label, class_names = label_column(file.schema_arrow, path, config.label_column)
        row = 0
        for batch in file.iter_batches(_BATCH, columns=[label, *kinds]):
            labels.append(whole_labels(path, label, batch.column(label)))
            for name, kind in kinds.items():
                column = batch.column(name)
                if kind == "image":
                    found[name] += struct_field(column, "bytes").to_pylist()
                elif kind == "vector":
                    found[name] += _lists(column, name, path, row)
                else:
                    texts = column.to_pylist()
                    if not all(texts):
                        at = row + next(i for i, text in enumerate(texts) if not text)
                        raise RequestError(f'{path}: column "{name}", row {at}: an empty text')
                    found[name] += [tokens(text, config.text_length) for text in texts]
            row += batch.num_rows
    return found, joined_labels(paths[0], labels), class_names


def _opened(paths: Sequence[Path]) -> Iterator[tuple[Path, Any]]:
    """Yield each file with its path; ``RequestError`` where pyarrow cannot read it."""
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile

    for path in paths:
        try:
            with open_regular(path, follow=True) as opened, ParquetFile(opened) as file:
                yield path, file
        except (pa.ArrowException, OSError) as error:
            raise not_parquet(path, error) from error


def _lists(column: Any, name: str, path: Path, start: int) -> _Values:
    """Return the lists of a pyarrow ``column`` as float32 arrays, None for nulls; ``RequestError`` for odd numbers."""
    from pyarrow.compute import list_value_length

    there = column.is_valid().to_numpy(zero_copy_only=False)
    full = column.drop_null()
    with np.errstate(over="ignore"):
        flat = full.flatten().to_numpy(zero_copy_only=False).astype(np.float32)  # nulls inside a list become NaN
    ends = np.cumsum(list_value_length(full).to_numpy(zero_copy_only=False))
    parts = np.split(flat, ends[:-1]) if len(full) else []
    rows = start + np.flatnonzero(there)
    for at, part in zip(rows, parts, strict=True):
        if not len(part) or not np.isfinite(part).all():
            why = "a value is not a finite number" if len(part) else "an empty list"
            raise RequestError(f'{path}: column "{name}", row {at}: {why}')
    left = iter(parts)
    return [next(left) if is_there else None for is_there in there]


def _check_there(config: DataConfig, name: str, values: Mapping[str, _Values]) -> None:
    without = [split for split, found in values.items() if all(value is None for value in found)]
    if without:
        other = "; test has it" if without == ["train"] else "; train has it" if without == ["test"] else ""
        raise RequestError(f"data.name = {config.name}: no sample of {without[0]} has the modality {name}{other}")


def _vectors(config: DataConfig, name: str, values: Mapping[str, _Values]) -> dict[str, np.ndarray]:
    """Return vectors float32 [N, d] by split, zeros where there is none; ``RequestError`` where lengths differ."""
    length = len(next(value for value in values["train"] if value is not None))
    for split, found in values.items():
        for row, value in enumerate(found):
            if value is not None and len(value) != length:
                raise RequestError(
                    f'data.name = {config.name}: column "{name}", row {row} of {split}: {len(value)} numbers, and the '
                    f"first has {length}; all rows take the same"
                )
    empty = np.zeros(length, np.float32)
    return {split: np.stack([empty if v is None else v for v in found]) for split, found in values.items()}


def _encoded(paths: Sequence[Path], name: str) -> Iterator[bytes]:
    """Yield the encoded images of the column ``name``, those that are there."""
    from pyarrow.compute import struct_field

    for _, file in _opened(paths):
        for batch in file.iter_batches(64, columns=[name]):
            yield from filter(None, struct_field(batch.column(0), "bytes").to_pylist())


def _first_form(config: DataConfig, name: str, images: Iterator[bytes]) -> tuple[int, int, bool]:
    """Return height, width and whether it has colours, of the first image that opens."""
    for content in images:
        with contextlib.suppress(Exception):  # Pillow raises nearly anything; try the next image
            return form(io.BytesIO(content))
    raise RequestError(f'data.name = {config.name}: none of the images in column "{name}" decodes')


def _images(
    config: DataConfig, name: str, values: Mapping[str, _Values], kept: Mapping[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return images uint8 [N, C, side, side] by split, zeros where there is none, and their constants.

    ``kept`` becomes False for rows whose image does not decode, where ``data.skip_bad`` leaves them out.
    """
    encoded = (value for found in values.values() for value in found if value is not None)
    height, width, coloured = _first_form(config, name, encoded)
    side = config.image_size or height
    if not config.image_size and height != width:
        raise RequestError(f"data.name = {config.name}: images are {height}x{width}; set data.image_size to a side")
    channels = config.channels or (3 if coloured else 1)
    drawn, any_colour = _drawn(config, name, values, kept, (channels, side, side))
    if any_colour and channels == 1 and not config.channels:  # only the first ones are grey
        channels = 3
        drawn, _ = _drawn(config, name, values, kept, (channels, side, side))
    there = np.array([value is not None for value in values["train"]]) & kept["train"]
    mean, std = mean_std(tally(chunk) for chunk in chunks(drawn["train"][there]))
    return drawn, {"channels": channels, "image_size": side, "mean": mean, "std": std}


def _drawn(
    config: DataConfig, name: str, values: Mapping[str, _Values], kept: Mapping[str, np.ndarray], shape: tuple[int, ...]
) -> tuple[dict[str, np.ndarray], bool]:
    arrays, coloured, bad = {}, False, 0
    for split, found in values.items():
        arrays[split] = np.zeros((len(found), *shape), np.uint8)
        for row, content in enumerate(found):
            if content is None:
                continue
            where = f'column "{name}", row {row} of {split}'
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # Pillow's, about metadata: the user cannot fix them
                    raw, colour, _ = draw(io.BytesIO(content), shape, bool(config.image_size))
            except WrongSize as error:
                raise RequestError(
                    f"data.name = {config.name}: {where} is {error.args[0]}x{error.args[1]}, the first image "
                    f"{shape[1]}x{shape[2]}; set data.image_size to the side that all are to have"
                ) from None
            except Exception as error:  # Pillow's decoders raise nearly anything on damaged input
                if not config.skip_bad:
                    raise RequestError(
                        f"data.name = {config.name}: {where} does not decode ({brief(error)}); --skip-bad "
                        "(data.skip_bad=true) leaves such samples out"
                    ) from error
                kept[split][row] = False
                bad += 1
                continue
            arrays[split][row] = np.frombuffer(raw, np.uint8).reshape(*shape[1:], shape[0]).transpose(2, 0, 1)
            coloured |= colour
    if bad:
        warn(f"{config.name}: {bad} samples have images that do not decode and are left out (data.skip_bad)")
    return arrays, coloured


#: The views of UCI's Multiple Features: pixels, Fourier, profile correlations, Karhunen-Loeve, Zernike, morphology.
VIEWS = tuple(
    Modality(name, "vector", (size,))
    for name, size in (("pix", 240), ("fou", 76), ("fac", 216), ("kar", 64), ("zer", 47), ("mor", 6))
)

MFEAT = DatasetSpec(
    mfeat, DataFacts("mfeat", 10, 1, 8, (0.0,), (1.0,), modalities=VIEWS),
    (
        Resource(
            (), "", "mfeat", ("mfeat",),
            "train*.parquet and test*.parquet of UCI's Multiple Features, with the columns label, "
            + ", ".join(view.name for view in VIEWS),
        ),
    ), 1_500,
)  # fmt: skip
