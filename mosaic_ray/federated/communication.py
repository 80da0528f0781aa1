"""Count the bytes that clients and server send each other, and predict them (docs/algorithm.md 4.6).

A message is a set of named arrays. Its size is the size of a safetensors file: the arrays' bytes, which count under the
message's kind, and a frame that names them, which counts under ``frames``. The frame grows with the number of arrays,
not with their size: 0.03 % of a ResNet-18, a few per cent of a network of a test.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from ..config.schema import PrototypesConfig

#: The arrays of a message by name as (shape, dtype), without values.
Entries = Mapping[str, tuple[Sequence[int], Any]]

#: The kind under which the frames of all messages count.
FRAMES = "frames"

#: safetensors' names of the types that travel.
_TYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "int64": "I64", "int32": "I32", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip


@dataclass(frozen=True)
class Size:
    """Bytes of messages: their arrays, and the frames around them."""

    payload: int = 0
    frame: int = 0


def entries_of(arrays: Mapping[str, Any]) -> Entries:
    """Return names, shapes and types of arrays or tensors."""
    return {name: (tuple(array.shape), str(array.dtype).removeprefix("torch.")) for name, array in arrays.items()}


def size_of_entries(entries: Entries) -> Size:
    """Return the bytes of one message that holds ``entries``; payload and frame are exactly a safetensors file."""
    return _size(tuple((name, tuple(shape), kind) for name, (shape, kind) in entries.items()))


@lru_cache(maxsize=4096)  # the messages of a round are alike, and there are several for every client
def _size(entries: tuple[tuple[str, tuple[int, ...], Any], ...]) -> Size:
    header, end = {}, 0
    sized = [(name, list(shape), _dtype(kind)) for name, shape, kind in entries]
    for name, shape, kind in sorted(sized, key=lambda e: (-e[2].itemsize, e[2].kind == "f", e[0])):
        begin, end = end, end + int(np.prod(shape, dtype=np.int64)) * kind.itemsize
        header[name] = {"dtype": _TYPES[kind.name], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return Size(end, 8 + -(-len(text) // 8) * 8)  # the header's length, and the header, which fills words of 8 bytes


def size_of(arrays: Mapping[str, Any]) -> Size:
    """Return the bytes of one message that holds ``arrays`` or tensors."""
    return _size(tuple((name, tuple(array.shape), array.dtype) for name, array in arrays.items()))


def _dtype(kind: Any) -> np.dtype:
    """Return numpy's type of ``kind``, its name, or torch's."""
    return np.dtype(kind if isinstance(kind, np.dtype | type | str) else str(kind).removeprefix("torch."))


class Tally:
    """Bytes by direction and kind, for every round and client: int64 [rounds, clients] each."""

    def __init__(self, num_rounds: int, num_clients: int, bytes_: Mapping[str, np.ndarray] | None = None) -> None:
        """``bytes_``: the return value of ``arrays``, to continue from."""
        self._shape = max(1, num_rounds), num_clients
        self._bytes = {name: np.array(array) for name, array in (bytes_ or {}).items()}
        if any(array.ndim != 2 or array.shape[1] != num_clients for array in self._bytes.values()):
            raise ValueError(f"bytes of other than {num_clients} clients")

    def add(
        self, direction: str, kind: str, client_id: int, message: Size, *, round_num: int = 0, times: int = 1
    ) -> None:
        """Add ``message``, sent between the server and a client ``times`` times."""
        for name, count in ((kind, message.payload), (FRAMES, message.frame)):
            if count and times:
                place = self._bytes.setdefault(f"{direction}/{name}", np.zeros(self._shape, np.int64))
                place[round_num, client_id] += times * count

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the counts by ``direction/kind``, to be stored."""
        return dict(self._bytes)

    def totals(self) -> dict[str, dict[str, int]]:
        """Return direction -> kind -> bytes of all rounds and clients."""
        found: dict[str, dict[str, int]] = {"uplink": {}, "downlink": {}}
        for name, count in sorted(self._bytes.items(), key=lambda item: f"/{FRAMES}" in item[0]):
            direction, kind = name.split("/")
            found[direction][kind] = int(count.sum())
        return found

    def by_client(self, direction: str) -> np.ndarray:
        """Return each client's bytes over all rounds and kinds, int64 [clients]."""
        counts = [array.sum(0) for name, array in self._bytes.items() if name.startswith(f"{direction}/")]
        return sum(counts, np.zeros(self._shape[1], np.int64))

    @property
    def total(self) -> int:
        """Bytes of both directions."""
        return int(sum(array.sum() for array in self._bytes.values()))

    @staticmethod
    def of(tallies: Iterable[Tally], num_clients: int) -> Tally:
        """Add up ``tallies`` over their rounds."""
        found: dict[str, np.ndarray] = {}
        for tally in tallies:
            for name, array in tally._bytes.items():
                found[name] = found.get(name, 0) + array.sum(0, keepdims=True)
        return Tally(1, num_clients, found)


def num_judging(held: np.ndarray | int, share: float) -> np.ndarray:
    """Return how many of the ``held`` images of a class a client keeps for choices: never all, none of one image."""
    return np.floor(share * np.asarray(held)).astype(np.int64)


def num_prototypes(held: np.ndarray | int, section: PrototypesConfig) -> np.ndarray:
    """Return the number of prototypes for a class with ``held`` images: k if held >= k, else 1 (0 without images).

    At most ``cap``, where that is not 0. Images that are kept for choices have prototypes of their own, by the same
    rule. Where ``samples`` are drawn this is an upper bound.
    """
    kept = num_judging(held, section.judging)
    found = [
        np.where((part >= section.k) | (section.samples > 0), section.k, 1) * (part > 0) for part in (held - kept, kept)
    ]
    return np.asarray(sum(np.minimum(part, section.cap) if section.cap else part for part in found))


def prototype_entries(count: int, feature_dim: int, judges: bool = False) -> Entries:
    """Return the entries of a message of ``count`` prototypes: vectors, labels, cluster sizes, clients and judges."""
    entries = {
        "vectors": ((count, feature_dim), np.float32), "labels": ((count,), np.int64),
        "sizes": ((count,), np.float32), "clients": ((count,), np.int64),
    }  # fmt: skip
    return entries | ({"judges": ((count,), np.bool_)} if judges else {})


def statistics_entries(entries: Entries, layers: Iterable[str]) -> Entries:
    """Return the entries of a static batch norm message (3.6): three moments of each layer of a network."""
    found: dict[str, tuple[Sequence[int], Any]] = {}
    for layer in layers:
        shape, _ = entries[f"{layer}.running_mean"]
        found |= {f"{layer}/count": ((), np.int64), f"{layer}/total": (shape, np.float64)}
        found[f"{layer}/squares"] = (shape, np.float64)
    return found


def is_parameter(name: str) -> bool:
    """Return whether an entry of a state dict is trained: neither batch norm's statistics nor a counter."""
    return name.rpartition(".")[2] not in ("running_mean", "running_var", "num_batches_tracked", "label_cdf")


def num_parameters(entries: Entries) -> int:
    """Return the number of trained values: all entries but batch norm's statistics and counters."""
    return int(sum(np.prod(shape, dtype=np.int64) for name, (shape, _) in entries.items() if is_parameter(name)))
