"""Small records that every package uses. They need numpy alone: nothing here may import torch or ray."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Annotated, Any, Literal

import numpy as np

from .serialization import from_json

#: A network's state dict as numpy arrays: parameters and buffers under torch's own names.
Weights = dict[str, np.ndarray]

#: The stages that results have columns for, in the order in which they run. A method may add its own.
STAGES = (
    "partition", "warmup", "generators", "prototypes", "teacher", "distill", "finetune", "control", "own_models",
    "evaluate",
)  # fmt: skip

Severity = Literal["info", "warning", "error"]

#: The models that a run scores. "ceiling" reads all clients' images, "server_student" is a network no client holds.
ROLES = ("initial", "teacher", "distilled", "final", "control", "ceiling", "server_student")


@dataclass(frozen=True)
class ImageSet:
    """Images uint8 [N, C, H, W] and labels int64 [N]."""

    images: np.ndarray
    labels: np.ndarray

    def __post_init__(self) -> None:
        assert self.images.dtype == np.uint8 and self.images.ndim == 4, (self.images.dtype, self.images.shape)
        assert self.labels.dtype == np.int64 and self.labels.shape == self.images.shape[:1]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: np.ndarray) -> ImageSet:
        """Return a copy of the rows at ``indices``."""
        return ImageSet(self.images[indices], self.labels[indices])


@dataclass(frozen=True)
class Modality:
    """One part of every sample: an image uint8 [C, H, W], a vector float32 [d], or a text int32 [L] of tokens.

    ``vocabulary``: the number of tokens of a text, 0 for others; token 0 fills short texts.
    """

    name: str
    kind: Literal["image", "vector", "text"]
    shape: tuple[int, ...]
    vocabulary: int = 0

    @property
    def size(self) -> int:
        """Return the number of values of one sample."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def num_bytes(self) -> int:
        """Return the bytes of one sample in a record (``data.records``)."""
        return self.size * (1 if self.kind == "image" else 4)

    @staticmethod
    def from_json(value: Any) -> Modality:
        """Check and return a modality that was read from JSON; ``ValueError`` where it does not fit."""
        given = from_json(dict[str, Any], value)
        found: dict[str, Any] = {name: from_json(kind, given.get(name), name) for name, kind in _MODALITY.items()}
        return Modality(**found | {"shape": tuple(found["shape"])})


_MODALITY: dict[str, Any] = {
    "name": str, "kind": Literal["image", "vector", "text"], "shape": list[Annotated[int, (1, 10**7)]],
    "vocabulary": Annotated[int, (0, 10**7)],
}  # fmt: skip


@dataclass(frozen=True)
class DataFacts:
    """Facts of a data set that clients need beside its images; plain and picklable.

    ``mean`` and ``std`` are per channel in units of [0, 1] intensity; ``augmentations`` names entries of
    ``data.transforms.AUGMENTATIONS`` for classifier training. ``modalities``: the parts of a sample, where there are
    several; then ``ImageSet.images`` holds records (``data.records``), and ``channels``, ``image_size``, ``mean`` and
    ``std`` are those of the image among the parts (1, 8, 0 and 1 without one).
    """

    name: str
    num_classes: int
    channels: int
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augmentations: tuple[str, ...] = ()
    modalities: tuple[Modality, ...] = ()

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Return the shape of one sample as networks take it: [channels, side, side], or all values and the mask."""
        if self.modalities:
            return (sum(modality.size for modality in self.modalities) + len(self.modalities),)
        return self.channels, self.image_size, self.image_size

    @property
    def stored_shape(self) -> tuple[int, int, int]:
        """Return the shape of one sample in ``ImageSet.images``: an image's, or [1, 1, bytes] of a record."""
        if self.modalities:
            return 1, 1, sum(modality.num_bytes for modality in self.modalities) + len(self.modalities)
        return self.channels, self.image_size, self.image_size

    def to_json(self) -> dict[str, Any]:
        """Return the facts as plain values; without ``modalities`` where samples are images alone."""
        found = asdict(self)
        return found if self.modalities else {name: value for name, value in found.items() if name != "modalities"}

    @staticmethod
    def from_json(value: Any) -> DataFacts:
        """Check and return facts that were read from JSON; ``ValueError`` names the field that does not fit."""
        given = from_json(dict[str, Any], value)
        found: dict[str, Any] = {name: from_json(kind, given.get(name), name) for name, kind in _FACTS.items()}
        parts = from_json(list[Any], given.get("modalities", []), "modalities")
        found["modalities"] = [Modality.from_json(part) for part in parts]
        if not len(found["mean"]) == len(found["std"]) == found["channels"]:
            raise ValueError("mean")
        found |= {name: tuple(values) for name, values in found.items() if isinstance(values, list)}
        return DataFacts(**found)


_FACTS: dict[str, Any] = {
    "name": str, "num_classes": Annotated[int, (1, 10**6)], "channels": Literal[1, 3],
    "image_size": Annotated[int, (1, 10**4)], "mean": list[Annotated[float, (-1e3, 1e3)]],
    "std": list[Annotated[float, (1e-6, 1e3)]], "augmentations": list[str],
}  # fmt: skip


@dataclass(frozen=True)
class Groups:
    """Training images in groups, such as one for each writer: rows int64 [M], rising, and their groups int64 [M]."""

    rows: np.ndarray
    groups: np.ndarray

    @cached_property
    def digest(self) -> str:
        """Return 20 hexadecimal digits that change with the groups, for keys."""
        content = (np.ascontiguousarray(array, "<i8").tobytes() for array in (self.rows, self.groups))
        return hashlib.sha256(b"".join(content)).hexdigest()[:20]


@dataclass(frozen=True)
class Dataset:
    """A whole data set in memory. ``identity`` goes into cache keys: it changes when the images do.

    ``copy``: the folder of its decoded copy, with further columns of the training images; "" without one.
    ``tables``: else the parquet files of the training samples, with further columns; ``kept``: which of their rows are
    training samples, bool [rows]. ``groups``: the groups that samplers deal by, by ``partition.sampler``.
    """

    facts: DataFacts
    train: ImageSet
    test: ImageSet
    class_names: tuple[str, ...]
    identity: str
    copy: str = ""
    tables: tuple[str, ...] = ()
    kept: np.ndarray | None = None
    groups: Mapping[str, Groups] = field(default_factory=dict)


@dataclass(frozen=True)
class Update:
    """A client's result of local training.

    ``message``: arrays that its strategy sends beside the weights; ``state``: the client's own, for its next round.
    ``samples``: by modality, how many of its samples have it, where clients train what belongs to a modality on these.
    """

    client_id: int
    weights: Weights
    num_samples: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    message: Weights = field(default_factory=dict)
    state: Weights = field(default_factory=dict)
    samples: Mapping[str, float] | None = None


@dataclass(frozen=True)
class Prototypes:
    """Centroids in feature space.

    vectors float32 [P, d]; labels int64 [P]; sizes float32 [P], the samples behind each centroid; clients int64 [P].
    judges bool [P]: whether the samples are those that a client keeps for choices; None where no client keeps any.
    """

    vectors: np.ndarray
    labels: np.ndarray
    sizes: np.ndarray
    clients: np.ndarray
    judges: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: np.ndarray) -> Prototypes:
        """Return the prototypes at ``rows``."""
        return Prototypes(**{name: array[rows] for name, array in self.arrays().items()})

    def arrays(self) -> Weights:
        """Return the fields as arrays by name."""
        return {name: array for name, array in vars(self).items() if array is not None}

    @staticmethod
    def concatenate(parts: list[Prototypes]) -> Prototypes:
        """Join ``parts`` in order."""
        return Prototypes(**{n: np.concatenate([getattr(p, n) for p in parts]) for n in parts[0].arrays()})


@dataclass(frozen=True)
class Finding:
    """A health finding: ``severity`` is info, warning or error; ``client`` is -1 without a client.

    ``threshold``: what ``value`` was held against; ``advice``: what to try (``core.health`` has the rules).
    """

    code: str
    severity: Severity
    stage: str
    message: str
    client: int = -1
    value: float | None = None
    threshold: float | None = None
    advice: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return the finding as summary.json holds it."""
        names = ("code", "severity", "stage", "client", "value", "threshold", "message", "advice")
        return {name: getattr(self, name) for name in names} | {"client": None if self.client < 0 else self.client}

    @staticmethod
    def from_json(value: Any) -> Finding:
        """Check and return a finding that was read from JSON; ``ValueError`` names the field that does not fit."""
        found: Finding = from_json(Finding, value)
        return found
