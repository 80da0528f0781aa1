"""Find the groups that images are dealt by: the clients in a CSV file, or the values of a column of the data set.

The further columns of parquet files (writer, user ...) are kept in the decoded copy, for the images that decoded.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..config.registry import sampler_kind
from ..config.schema import PartitionConfig
from ..core.errors import RequestError, neighbours
from ..core.types import Dataset, Groups
from ..core.untrusted import open_regular
from .formats import brief
from .image_cache import flush, read_facts
from .image_decode import not_parquet
from .partition import chosen_groups
from .progress import warn

COLUMNS = "columns.parquet"
#: Bytes of the largest CSV file: some 20 million images.
MOST_CSV = 256 << 20
#: Most values of a column: as many as there may be clients.
MOST_VALUES = 1_000_000
#: Rows that are read at a time.
_BATCH = 1 << 16


def with_groups(data: Dataset, sections: Iterable[PartitionConfig]) -> Dataset:
    """Return ``data`` with the groups that samplers in ``sections`` deal by.

    Warns of images that go to no client. ``RequestError`` where a section cannot be dealt.
    """
    found: dict[str, Groups] = {}
    for section in dict.fromkeys(sections):
        sampler = section.sampler
        if sampler_kind(sampler) not in ("file", "natural"):
            continue
        groups = found[sampler] = found.get(sampler) or _groups_of(data, sampler)
        chosen, sizes = chosen_groups(groups, section)
        left, nowhere = len(data.train) - int(sizes[chosen].sum()), len(data.train) - len(groups.rows)
        if left:
            why = [f"{nowhere:,} have no {'row' if sampler_kind(sampler) == 'file' else 'value'}"] if nowhere else []
            why += [f"{len(sizes) - len(chosen):,} values are left out"] if len(sizes) > len(chosen) else []
            warn(
                f"partition.sampler = {sampler}: {left:,} of {len(data.train):,} training images go to no client "
                f"({', '.join(why)})"
            )
    return replace(data, groups=found)


def _groups_of(data: Dataset, sampler: str) -> Groups:
    """Return the groups of ``file:PATH`` or ``natural:COLUMN``; ``RequestError`` unless they fit the images."""
    what = f"partition.sampler = {sampler}"
    if sampler_kind(sampler) == "natural":
        return _values(data, sampler.partition(":")[2], what)
    groups = read_rows(sampler)
    if groups.rows[-1] >= len(data.train):
        raise RequestError(f"{what}: row {groups.rows[-1]}, and rows run from 0 to {len(data.train) - 1}")
    return groups


def read_rows(sampler: str) -> Groups:
    """Read ``file:PATH``, a CSV file of ``client,row``; the order of its lines and further columns change nothing.

    ``RequestError`` in one line for any other content, a row that occurs twice and a number that no client has.
    """
    what, path = f"partition.sampler = {sampler}", Path(sampler.partition(":")[2]).expanduser()
    try:
        stat = path.stat()
        return _read_rows(what, path, (stat.st_mtime_ns, stat.st_size, stat.st_ino))
    except OSError as error:
        raise RequestError(f"{what}: {path}: {error.strerror or error}") from None


@functools.lru_cache(maxsize=4)  # keys of all stages of all trials ask for it
def _read_rows(what: str, path: Path, version: tuple[Any, ...]) -> Groups:
    import pyarrow as pa
    from pyarrow import csv

    def refused(reason: str) -> RequestError:
        return RequestError(f"{what}: {reason}; it takes a CSV file with the columns client and row")

    names = ("client", "row")
    try:
        with open_regular(path, MOST_CSV, follow=True) as file:
            options = csv.ConvertOptions(column_types=dict.fromkeys(names, pa.int64()), include_columns=list(names))
            table = csv.read_csv(pa.PythonFile(file, "r"), convert_options=options)
    except KeyError:
        with open_regular(path, MOST_CSV, follow=True) as file:
            head = file.readline(1000).decode(errors="replace").strip()
        raise refused(f'its header is "{head}"') from None
    except pa.ArrowException as error:
        raise refused(brief(error)) from None
    if any(table[name].null_count for name in names):
        raise refused("a line lacks a number")
    clients, rows = (table[name].to_numpy() for name in names)
    if not len(rows):
        raise refused("it has no lines")
    if min(clients.min(), rows.min()) < 0:
        raise refused("a number is below 0")
    order = np.argsort(rows, kind="stable")
    rows, clients = rows[order], clients[order]
    twice = np.flatnonzero(np.diff(rows) == 0)
    if len(twice):
        raise refused(f"row {rows[twice[0]]} is there twice")
    there = np.unique(clients)
    if there[-1] >= len(there):
        missing = np.flatnonzero(there != np.arange(len(there)))[0]
        raise refused(f"clients go up to {there[-1]}, and {missing} has no row")
    return Groups(rows, clients)


def _values(data: Dataset, column: str, what: str) -> Groups:
    """Return the training images by their value in ``column``, values in order; images without one in no group.

    Reads this column alone, some rows at a time.
    """
    numbers: dict[Any, int] = {}
    codes = [np.zeros(0, np.int64)]
    for part in _in_tables(data, column, what) if data.tables else _in_copy(data, column, what):
        found = part.dictionary_encode()
        values = found.dictionary.to_pylist()
        own = [-1 if value is None else numbers.setdefault(value, len(numbers)) for value in values]
        codes.append(np.array([*own, -1])[found.indices.fill_null(-1).to_numpy(zero_copy_only=False)])
        if len(numbers) > MOST_VALUES:
            raise RequestError(f"{what}: the column has more than {MOST_VALUES:,} values")
    if not numbers:
        raise RequestError(f"{what}: the column has no values")
    ranks = np.empty(len(numbers), np.int64)
    ranks[[numbers[value] for value in sorted(numbers)]] = np.arange(len(numbers))
    code = np.concatenate(codes)
    rows = np.flatnonzero(code >= 0)
    return Groups(rows, ranks[code[rows]])


def _in_copy(data: Dataset, column: str, what: str) -> Iterator[Any]:
    """Yield the values in ``column`` of the decoded copy, as arrays of pyarrow."""
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile

    path = Path(data.copy, COLUMNS)
    checksum = (read_facts(Path(data.copy)) or {}).get("columns") if data.copy else None
    if checksum is None:
        raise RequestError(
            f"{what}: {data.facts.name} has no columns; it takes parquet:PATH, hf:OWNER/NAME or a data set imported "
            "from parquet files, and a data root that can be written"
        )
    try:
        if _checksum(path) != checksum:
            raise OSError("its checksum differs")
        with open_regular(path) as opened, ParquetFile(opened) as file:
            _check_there(data, column, file.schema_arrow.names, what)
            for batch in file.iter_batches(_BATCH, columns=[column]):
                yield batch.column(0)
    except (OSError, pa.ArrowException) as error:
        raise RequestError(f"{what}: {path} cannot be read ({brief(error)}); remove its folder") from error


def _in_tables(data: Dataset, column: str, what: str) -> Iterator[Any]:
    """Yield the values in ``column`` of the files of samples of several modalities, as arrays of pyarrow."""
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile, read_schema

    path, start = Path(data.tables[0]), 0
    try:
        names = [field.name for field in _plain_fields([read_schema(path) for path in data.tables])]
        _check_there(data, column, names, what)
        for path in map(Path, data.tables):
            with open_regular(path, follow=True) as opened, ParquetFile(opened) as file:
                for batch in file.iter_batches(_BATCH, columns=[column]):
                    kept = None if data.kept is None else data.kept[start : start + batch.num_rows]
                    start += batch.num_rows
                    yield batch.column(0) if kept is None else batch.column(0).filter(pa.array(kept))
    except (OSError, pa.ArrowException) as error:
        raise RequestError(f"{what}: {path} cannot be read ({brief(error)})") from error


def _check_there(data: Dataset, column: str, names: Sequence[str], what: str) -> None:
    if column not in names:
        there = neighbours(column, names) if names else "there is none of text or whole numbers"
        raise RequestError(f"{what}: {data.facts.name} has no such column; {there}")


def _plain_fields(schemas: Sequence[Any]) -> list[Any]:
    """Return pyarrow's fields of text and whole numbers that all ``schemas`` have."""
    import pyarrow as pa

    def plain(kind: pa.DataType) -> bool:
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        return pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)

    fields = [f for f in schemas[0] if plain(f.type) and all(f.name in s.names for s in schemas)]
    return [f for f in fields if all(s.field(f.name).type == f.type for s in schemas)]


def write_columns(folder: Path, tables: tuple[Path, ...], kept: np.ndarray) -> int:
    """Write the columns of text and whole numbers of ``tables`` to ``folder``, for the rows in ``kept``, bool [N].

    Returns the file's CRC-32.
    """
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile, ParquetWriter, read_schema

    try:
        fields = _plain_fields([read_schema(path) for path in tables])
        names, start = [field.name for field in fields], 0
        with ParquetWriter(folder / COLUMNS, pa.schema([(field.name, field.type) for field in fields])) as writer:
            for path in tables:
                with open_regular(path, follow=True) as opened, ParquetFile(opened) as file:
                    for batch in file.iter_batches(_BATCH, columns=names):
                        end = start + batch.num_rows
                        writer.write_batch(batch.filter(pa.array(kept[start:end])))
                        start = end
    except pa.ArrowException as error:
        raise not_parquet(tables[0], error) from error
    flush(folder / COLUMNS)
    return _checksum(folder / COLUMNS)


def _checksum(path: Path) -> int:
    value = 0
    with open_regular(path) as file:
        while piece := file.read(1 << 20):
            value = zlib.crc32(piece, value)
    return value
