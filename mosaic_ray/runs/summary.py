"""The content of summary.json: ``Summary``, and how a finished run builds it."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any

from .. import __version__
from ..config.client_layout import client_modalities
from ..config.resolve import as_dict
from ..config.schema import ExperimentConfig
from ..core.serialization import from_json
from ..core.types import Finding

VERSIONS_OF = ("torch", "ray", "numpy", "torchvision", "scikit-learn")

Share = Annotated[float, (0.0, 1.0)]
Amount = Annotated[float, (0.0, sys.float_info.max)]

#: Direction (uplink, downlink) -> kind of message -> bytes.
Traffic = dict[str, dict[str, Amount]]


@dataclass(frozen=True, kw_only=True)
class StageRecord:
    """A stage of a run: ``key`` names its result in the store, ``cached`` means that it was found there.

    ``seconds`` were spent in this run, ``waited_seconds`` of them waiting for another run; ``computed_seconds`` were
    spent by the run that computed the result. ``client_seconds`` is what client tasks of this run took, added up over
    the clients; it is absent where the run resumed the stage. ``cached_clients`` counts clients with a stored result.
    """

    seconds: Amount | None = None
    cached: bool
    key: str
    computed_seconds: Amount | None = None
    waited_seconds: Amount | None = None
    cached_clients: int | None = None
    client_seconds: Amount | None = None


@dataclass(frozen=True, kw_only=True)
class CommunicationRecord:
    """Bytes sent, beside what arithmetic predicts and what other methods send in as many rounds."""

    total: Amount | None = None
    predicted: Traffic | None = None
    measured_over_predicted: float | None = None
    baselines: dict[str, Traffic] | None = None
    generator_bytes: Amount | None = None
    widths: list[dict[str, Any]] | None = None
    clients: list[dict[str, Any]] | None = None
    modalities: list[dict[str, Any]] | None = None


@dataclass(frozen=True, kw_only=True)
class PersonalRecord:
    """Accuracies of clients' own models after the warm-up, means over the clients.

    ``own``: of ``clients`` [K], each on test images whose classes have the shares of the client's training images.
    ``all``: on all test images alike.
    """

    own: Share
    all: Share
    clients: list[Share]


@dataclass(frozen=True, kw_only=True)
class ClientRecord:
    """Accuracies at the clients, each on test images whose classes have the shares of the client's training images.

    By model: ``own`` (a client's after the warm-up), ``final`` (the final one of its network), ``adapted`` (that after
    local steps, where asked). ``all`` has mean, sd and worst_tenth over the clients, ``groups`` the same by network and
    width, ``clients`` each client's; None where its work failed.
    """

    all: dict[str, dict[str, Share]]
    groups: list[dict[str, Any]]
    clients: dict[str, list[Share | None]]


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The content of summary.json; None where the run did not get so far, or an earlier version wrote the file.

    ``status`` is done, failed or stopped; ``error``, ``stage``, ``round`` and ``client`` describe a failure. Accuracies
    and calibration (NLL, ECE) are by role, ``communication_bytes`` [bytes] by direction and kind, ``label_counts``
    [clients, classes] counts training images, ``preset`` is the scale that the configuration began with.
    ``modalities`` are those of each client, where samples have several.
    ``personal_accuracy`` is there where the strategy has clients' own models, ``subset_accuracy`` (role -> names of
    modalities joined by a plus -> accuracy where only these are there) where samples have several modalities.
    """

    status: str | None = None
    error: str | None = None
    stage: str | None = None
    round: int | None = None
    client: int | None = None
    method: str | None = None
    seed: int | None = None
    preset: str | None = None
    accuracy: dict[str, Share | None] | None = None
    personal_accuracy: PersonalRecord | None = None
    client_accuracy: ClientRecord | None = None
    validation_accuracy: dict[str, Share | None] | None = None
    selection: dict[str, Any] | None = None
    per_class_accuracy: dict[str, list[Share | None]] | None = None
    subset_accuracy: dict[str, dict[str, Share]] | None = None
    calibration: dict[str, dict[str, float | None]] | None = None
    stages: dict[str, StageRecord] | None = None
    communication_bytes: Traffic | None = None
    communication: CommunicationRecord | None = None
    health: list[Finding] | None = None
    config: dict[str, Any] | None = None
    versions: dict[str, str] | None = None
    label_counts: list[list[int]] | None = None
    modalities: list[list[str]] | None = None
    paths: dict[str, str] | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the content of summary.json: without fields that are None, but for those that its status has."""
        found = dict(vars(self))
        if self.stages is not None:
            records = {name: vars(record) for name, record in self.stages.items()}
            found["stages"] = {n: {k: v for k, v in row.items() if v is not None} for n, row in records.items()}
        if self.communication is not None:
            found["communication"] = dict(vars(self.communication))
        for name in ("personal_accuracy", "client_accuracy"):
            if found[name] is not None:
                found[name] = dict(vars(found[name]))
        if self.health is not None:
            found["health"] = [finding.to_json() for finding in self.health]
        null = {"done": ("validation_accuracy",), "failed": ("stage", "round", "client")}.get(self.status or "", ())
        return {name: value for name, value in found.items() if value is not None or name in null}

    @staticmethod
    def from_json(value: Any) -> Summary:
        """Check content read from JSON and return it; ``ValueError`` with the place of the first fault."""
        return from_json(Summary, value)


def build_summary(config: ExperimentConfig, run: Any, results: Mapping[str, Any]) -> Summary:
    """Build the summary of a finished run (a ``RunContext``) from the ``results`` of ``run_experiment``."""
    import numpy as np

    from .communication import COMPARISONS, communication

    names = [modality.name for modality in run.dataset.facts.modalities]
    traffic: Traffic = {"uplink": {}, "downlink": {}}
    for stage, kinds in run.traffic.items():
        if stage in COMPARISONS:
            continue
        for direction, amounts in kinds.items():
            for kind, amount in amounts.items():
                traffic[direction][kind] = traffic[direction].get(kind, 0) + amount
    # test images never enter the metric that configurations are chosen by; its value is None without prototypes too
    selection = {"metric": "held-out prototypes", "value": results["held_out_accuracy"]}
    if results["validation_accuracy"]:
        selection = {"metric": "validation accuracy", "value": results["validation_accuracy"]["final"]}
    same = (
        "accuracy", "validation_accuracy", "per_class_accuracy", "subset_accuracy", "calibration", "label_counts",
    )  # fmt: skip
    return Summary(
        **{name: results[name] for name in same},
        status="done",
        method=config.method,
        seed=config.seed,
        preset=config.preset or None,
        selection=selection,
        stages=from_json(dict[str, StageRecord], run.log),
        personal_accuracy=from_json(PersonalRecord | None, results["personal_accuracy"]),
        client_accuracy=from_json(ClientRecord, results["client_accuracy"]),
        communication_bytes=traffic,
        communication=CommunicationRecord(**communication(run, np.array(results["label_counts"]))),
        modalities=[list(own) for own in client_modalities(config, names)] if len(names) > 1 else None,
        health=run.findings,
        config=as_dict(config),
        versions=versions(),
    )


def final_table(summary: Mapping[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """Return columns and rows of the accuracies in summary.json's content: one row for each model, no empty column."""
    columns: dict[str, Mapping[str, Any]]
    columns = {"accuracy": summary["accuracy"], "validation": summary.get("validation_accuracy") or {}}
    columns |= {name: {r: row[name] for r, row in summary["calibration"].items()} for name in ("nll", "ece")}
    columns = {name: values for name, values in columns.items() if any(v is not None for v in values.values())}
    roles = [role for role, value in summary["accuracy"].items() if value is not None]
    return ["model", *columns], [[role, *(values.get(role) for values in columns.values())] for role in roles]


def versions() -> dict[str, str]:
    """Return the versions of the packages that results depend on."""
    found = {"mosaic-ray": __version__}
    for name in VERSIONS_OF:
        found[name] = "not installed"
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
