"""Check the content of stored results, which anybody may have written, against what stages write."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np

from ..core.serialization import from_json
from ..core.types import Dataset, Finding, Prototypes, Weights
from ..data.partition import label_counts
from ..distillation.rehearsal import generator_entries
from ..federated.client_models import Federation
from ..federated.communication import Entries

Amount = Annotated[float, (0.0, 1e18)]


@dataclass(frozen=True, kw_only=True)
class _Facts:
    """Facts that results of all stages have, where they have them."""

    curve: list[list[Any]]
    seconds: Amount | None = None
    client_seconds: Amount | None = None
    communication: dict[str, dict[str, Amount]] | None = None
    findings: list[Finding] | None = None


def check_facts(facts: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` where the facts of a stage or a checkpoint do not have the form that all of them have."""
    found: _Facts = from_json(_Facts, dict(facts))
    _require(all(facts.get(name, 0) is not None for name in vars(found)), "one of its facts")
    for tag, step, value in found.curve:
        _require(isinstance(tag, str) and type(step) is int and abs(step) < 2**63, "its curve")
        _require(value is None or (isinstance(value, int | float) and abs(value) <= 1e300), "its curve")
    _require({*(found.communication or {})} <= {"uplink", "downlink"}, "its communication")


def check_figures(figures: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` unless ``figures`` are finite numbers by name."""
    _require(all(isinstance(x, int | float) and abs(x) <= 1e300 for x in figures.values()), "a figure")


def check_part(federation: Federation, dataset: Dataset, part: str, arrays: Weights, finite: bool) -> None:
    """Raise ``ValueError`` where ``arrays`` differ from what is stored as ``part``; parts of other names pass.

    ``finite``: weights have to be so.
    """
    stem, clients, facts = part.partition("_")[0], federation.config.partition.num_clients, dataset.facts
    if part == "shards":
        _check_shards(dataset, clients, arrays)
    elif part == "standardisation":
        _check_sums(dataset, arrays)
    elif part in ("communication", "losses"):
        kind = np.dtype(np.int64 if part == "communication" else np.float32)
        _require(all(a.dtype == kind and a.ndim == 2 and a.shape[1] == clients for a in arrays.values()), "a shape")
        _require(arrays.keys() == {part} or all(name.count("/") == 1 for name in arrays), "a name")
    elif stem in ("global", "prototypes"):
        names = {stored: name for name, stored in federation.parts(stem).items()}
        _require(part in names, "its number")
        entries = federation.entries(names[part])
        if stem == "global":
            check_entries(arrays, entries, finite)
        else:
            _check_prototypes(arrays, entries["head.weight"][0][1], facts.num_classes, clients, finite)
    elif stem == "client":
        client_id = int(part.partition("_")[2])
        _require(0 <= client_id < clients, "its number")
        whole = federation.widths[client_id] == 1
        check_entries(arrays, federation.entries(federation.classifiers[client_id]), finite, shapes=whole)
    elif part == "generator":
        check_entries(arrays, generator_entries(federation.config, facts), finite)
    elif stem in ("expert", "group", "meta", "head", "trial") and not part.endswith("diagnostics"):
        _require(not finite or _finite(arrays.values()), "a value")


def check_entries(arrays: Weights, entries: Entries, finite: bool = True, shapes: bool = True) -> None:
    """Raise ``ValueError`` unless ``arrays`` have the names, shapes and types of ``entries``, and are ``finite``."""
    _require(arrays.keys() == entries.keys(), "the names of its arrays")
    for name, (shape, kind) in entries.items():
        array = arrays[name]
        _require(array.dtype == np.dtype(kind), f"the type of {name}")
        _require(array.shape == tuple(shape) if shapes else array.ndim == len(shape), f"the shape of {name}")
        _require(not finite or _finite([array]), f"a value of {name}")


def _finite(arrays: Iterable[np.ndarray]) -> bool:
    return all(bool(np.isfinite(array).all()) for array in arrays if array.dtype.kind == "f")


def _check_shards(dataset: Dataset, clients: int, arrays: Weights) -> None:
    labels = dataset.train.labels
    _require(arrays.keys() == {"counts", "train", "train_sizes", "validation", "validation_sizes"}, "a name")
    for name in ("train", "validation"):
        rows, sizes = arrays[name], arrays[f"{name}_sizes"]
        _require(rows.dtype == sizes.dtype == np.int64 and rows.ndim == 1 and sizes.shape == (clients,), name)
        _require(bool((sizes >= 0).all()) and sum(sizes.tolist()) == len(rows), f"{name}_sizes")
        _require(not len(rows) or bool(rows.min() >= 0 and rows.max() < len(labels)), f"an index in {name}")
    lists = np.split(arrays["train"], np.cumsum(arrays["train_sizes"])[:-1])
    counts = label_counts(labels, lists, dataset.facts.num_classes)
    _require(arrays["counts"].dtype == np.int64 and np.array_equal(arrays["counts"], counts), "counts")


def _check_sums(dataset: Dataset, arrays: Weights) -> None:
    vectors = {part.name: ((3, part.size), np.float64) for part in dataset.facts.modalities if part.kind == "vector"}
    check_entries(arrays, vectors)
    for name, (count, _, squares) in arrays.items():
        whole = 0 <= count[0] <= len(dataset.train.labels) and count[0] == np.floor(count[0])
        _require(bool(whole and (count == count[0]).all() and (squares >= 0).all()), name)


def _check_prototypes(arrays: Weights, dim: int, classes: int, clients: int, finite: bool) -> None:
    found = Prototypes(**arrays)
    size, one = len(found), all(a.ndim == 1 for name, a in arrays.items() if name != "vectors")
    _require(one and all(len(a) == size for a in arrays.values()) and found.vectors.shape == (size, dim), "a shape")
    _require(not finite or _finite(arrays.values()), "a value")
    kinds = {"vectors": "f4", "labels": "i8", "sizes": "f4", "clients": "i8", "judges": "?"}
    _require(all(array.dtype == np.dtype(kinds[name]) for name, array in arrays.items()), "a type")
    for name, values, top in (("labels", found.labels, classes), ("clients", found.clients, clients)):
        _require(not size or bool(values.min() >= 0 and values.max() < top), f"one of its {name}")


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(f"unlike what the stage writes: {what}")

