"""Read CIFAR's pickles, and find the columns of Hugging Face's image parquet.

No file may run code: the unpickler accepts arrays of integers and plain values, nothing else.
"""

from __future__ import annotations

import contextlib
import json
import pickle
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..core.errors import RequestError
from ..core.untrusted import open_regular


def brief(error: BaseException) -> str:
    """Return an error as one line of text."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn any error in the block into a ``RequestError`` on ``path``: a damaged file may raise nearly anything.

    So does a pipe or a device, before the block.
    """
    try:
        open_regular(path, follow=True).close()
        yield
    except Exception as error:
        raise RequestError(f"{path} cannot be read ({brief(error)}); remove it and fetch it again") from error


def read_pickle(path: Path) -> dict[str, Any]:
    """Return the dict in a pickle of plain values and integer arrays; ``RequestError`` for any other content."""
    with reading(path), open(path, "rb") as file:
        content = _ArraysOnly(file, encoding="latin1").load()
        if not isinstance(content, dict):
            raise pickle.UnpicklingError(f"it holds a {type(content).__name__}, not a dict")
        return {key: value.array if isinstance(value, _Array) else value for key, value in content.items()}


@dataclass
class _Array:
    """Replaces numpy.ndarray while unpickling. numpy's own ``__setstate__`` trusts its input (a forged dtype makes it
    follow forged pointers), so the bytes are read here, and only as integers."""

    array: np.ndarray | None = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, data = state
        self.array = _integers(data, dtype, shape, "F" if fortran else "C")


def _integers(data: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    if not re.fullmatch(r"[<>|][iu][1248]", dtype.order + dtype.code):
        raise pickle.UnpicklingError(f"an array of {dtype.code}, not of integers")
    data = data.encode("latin1") if isinstance(data, str) else data  # how Python 2's bytes arrive
    return np.frombuffer(bytearray(data), dtype.order + dtype.code).reshape(shape, order=order)


class _Dtype:
    """Replaces numpy.dtype: a code such as ``u1`` and a byte order."""

    def __init__(self, code: str) -> None:
        self.code, self.order = code, "|"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = state[1]


#: The names that pickled integer arrays use (numpy 1 and 2, protocols 0 to 5), and their replacements.
_NAMES: dict[str, Any] = {
    "numpy.ndarray": "ndarray",  # only ever handed to _reconstruct
    "numpy.dtype": lambda code, *_: _Dtype(code),
    "numpy.core.multiarray._reconstruct": lambda *_: _Array(),
    "numpy.core.multiarray.scalar": lambda dtype, data: _integers(data, dtype, (1,), "C")[0],
    "numpy.core.numeric._frombuffer": lambda *parts: _Array(_integers(*parts)),
    "_codecs.encode": lambda text, _: text.encode("latin1"),
}


class _ArraysOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        full = f"{module.replace('numpy._core', 'numpy.core')}.{name}"
        if full not in _NAMES:
            raise pickle.UnpicklingError(f"{full} has no place in a data set")
        return _NAMES[full]


def image_columns(schema: Any, path: Path, image: str = "", label: str = "") -> tuple[str, str, tuple[str, ...]]:
    """Return the image column, the label column, and the class names in Hugging Face's metadata (or ``()``).

    ``image``, ``label``: the columns' names; where empty, a usual name, else the only column that the metadata calls
    an ``Image`` or a ``ClassLabel``. ``RequestError`` without one.
    """
    found = _column(schema, image, ("img", "image"), "Image", is_image)
    if found is None:
        usual = f'"{image}" with bytes' if image else '"img" or "image" with bytes'
        raise RequestError(f"{path} has no column {usual} (data.image_column names another); it has {columns(schema)}")
    return found, *label_column(schema, path, label)


def label_column(schema: Any, path: Path, label: str = "") -> tuple[str, tuple[str, ...]]:
    """Return the label column and the class names, as ``image_columns`` does."""
    import pyarrow as pa

    found = _column(schema, label, ("label", "labels", "fine_label"), "ClassLabel", pa.types.is_integer)
    if found is None:
        usual = f'whole numbers "{label}"' if label else 'whole numbers "label", "labels" or "fine_label"'
        raise RequestError(f"{path} has no column {usual} (data.label_column names another); it has {columns(schema)}")
    names = _features(schema).get(found, {}).get("names")
    return found, tuple(map(str, names)) if isinstance(names, list) else ()


def is_image(kind: Any) -> bool:
    """Return whether a column of pyarrow's type ``kind`` holds encoded images."""
    import pyarrow as pa

    return pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0


def columns(schema: Any) -> str:
    """Return the columns of a pyarrow schema and their types as text."""
    return ", ".join(f"{field.name} ({field.type})" for field in schema)


def _column(schema: Any, name: str, usual: tuple[str, ...], feature: str, fits: Callable[[Any], bool]) -> str | None:
    fitting, features = [field.name for field in schema if fits(field.type)], _features(schema)
    called = [column for column in fitting if features.get(column, {}).get("_type") == feature]
    names = (name,) if name else (*usual, *(called if len(called) == 1 else ()))
    return next((column for column in names if column in fitting), None)


def _features(schema: Any) -> dict[str, dict[str, Any]]:
    """Return the description of each column in Hugging Face's metadata; empty without one."""
    try:
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        return {name: feature for name, feature in features.items() if isinstance(feature, dict)}
    except (AttributeError, KeyError, TypeError, ValueError):
        return {}
